"""A classifier of points with nn.Sequential, mini batches without a loader, and accuracy."""

import tinyllm as torch
from tinyllm import nn

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def Classifier():
    return nn.Sequential(
        nn.Linear(17, 32), nn.ReLU(), nn.Dropout(0.0), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 2)
    ).to(device)


def train(model, data, steps):
    """data: (B, T + 1)."""
    X = data.float()
    X = (X - X.mean(dim=0)) / X.std(dim=0)
    y = (data[:, 0] > data[:, 1]).long()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses, history = [], []
    for _ in range(steps // 2):
        model.train()
        running = 0.0
        for i in range(0, len(X), 12):
            xb, yb = X[i : i + 12].to(device), y[i : i + 12].to(device)
            loss = loss_fn(model(xb), yb)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            running += loss.item() * xb.shape[0]
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits = model(X)
            accuracy = (logits.argmax(-1) == y).float().mean()
        history += [running / len(X), accuracy.item(), logits.cpu().numpy().max()]
    return losses + history

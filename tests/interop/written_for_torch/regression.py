"""Linear regression from scratch, its parameters updated by hand in three ways."""

import tinyllm as torch
from tinyllm.nn import functional as F


def train(model, data, steps):
    """data: (B, T + 1)."""
    X = data[:, :3].to(torch.float32) / 10
    y = X @ torch.tensor([2.0, -3.4, 1.0]) + 4.2
    w = torch.tensor([0.1, 0.2, -0.3], requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    lr, losses = 0.1, []
    for step in range(steps):
        loss = ((torch.matmul(X, w) + b - y) ** 2).mean() if step % 2 else F.mse_loss(X @ w + b, y)
        loss.backward()
        if step % 3:
            with torch.no_grad():
                w -= lr * w.grad
                b -= lr * b.grad
        else:
            for p in (w, b):
                p.data -= lr * p.grad
        w.grad = None
        b.grad = None
        losses.append(loss.item())
    assert f"{b.item():.3f}" == f"{b.detach()[0]:.3f}"
    return [*losses, *w.tolist()]

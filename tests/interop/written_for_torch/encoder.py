"""An encoder as textbooks have it: sinusoids, post-norm blocks, padding masks, a schedule, accuracy."""

import math

import tinyllm as torch
from tinyllm import nn
from tinyllm.nn import functional as F


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, max_len=100, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, x):
        return self.dropout(x + self.pe[:, : x.shape[1]])


class EncoderLayer(nn.Module):
    def __init__(self, d_model, nhead, dim_feedforward=64, dropout=0.0):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, src, src_mask=None, src_key_padding_mask=None):
        src2, _ = self.self_attn(src, src, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
        src = self.norm1(src + self.dropout(src2))
        src2 = self.linear2(self.dropout(F.relu(self.linear1(src))))
        return self.norm2(src + self.dropout(src2))


class Encoder(nn.Module):
    def __init__(self, vocab=20, d_model=32, nhead=4, num_layers=2, classes=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, d_model, padding_idx=0)
        self.pos = PositionalEncoding(d_model)
        self.layers = nn.ModuleList([EncoderLayer(d_model, nhead) for _ in range(num_layers)])
        self.fc = nn.Linear(d_model, classes)
        self.d_model = d_model
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, tokens):
        pad = tokens == 0
        x = self.pos(self.embed(tokens) * math.sqrt(self.d_model))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=pad)
        keep = (~pad).unsqueeze(-1).float()
        return self.fc((x * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1))


def train(model, data, steps):
    """data: (B, T + 1), of which the last is a length."""
    X, lengths = data[:, :-1] + 1, data[:, -1] + 1
    X = X.masked_fill(torch.arange(X.shape[1])[None, :] >= lengths[:, None], 0)
    Y = X.sum(1) % 3
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 10, 1.0))
    losses = []
    model.train()
    for step in range(steps):
        xb, yb = X[step % 2 :: 2], Y[step % 2 :: 2]
        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        logits = model(X)
        conf, predicted = torch.max(F.softmax(logits, dim=1), 1)
        correct = (predicted == Y).sum().item()
        accuracy = (logits.argmax(dim=1) == Y).type(torch.float).mean()
        assert f"{100 * accuracy:.1f}%" == f"{100 * correct / len(Y):.1f}%"
    return [*losses, accuracy.item(), conf.mean().item()]

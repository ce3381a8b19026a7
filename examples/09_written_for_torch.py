"""A small language model written for torch: with these two imports it runs here, with torch's own it runs there.

A test runs this text under both and compares the losses.
"""

import tinyllm as torch
from tinyllm import nn


class Block(nn.Module):
    """Post-norm: norm(x + attention(x)), then norm(x + feed_forward(x)). x: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, n_head, batch_first=True)
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model)
        )
        self.feed_forward_norm = nn.LayerNorm(d_model)

    def forward(self, x, mask):
        attended, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        x = self.attention_norm(x + attended)
        return self.feed_forward_norm(x + self.feed_forward(x))


class LanguageModel(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), with learned positions."""

    def __init__(self, vocab_size, d_model=32, n_head=4, n_block=2, context=16):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList([Block(d_model, n_head) for _ in range(n_block)])
        self.head = nn.Linear(d_model, vocab_size)
        later = torch.arange(context)[:, None] < torch.arange(context)
        self.register_buffer("later", later)  # True where a query may not look

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(T))
        for block in self.blocks:
            x = block(x, self.later[:T, :T])
        return self.head(x)


def train(model, tokens, steps):
    """The loss of each step on one batch. tokens: (B, T + 1)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(inputs)
        loss = criterion(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def continued(model, tokens, count):
    """`count` more tokens, each the most likely one. tokens: (1, T)."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(tokens[:, -16:])
            tokens = torch.cat([tokens, torch.tensor([[logits[0, -1].argmax().item()]])], 1)
    return tokens


if __name__ == "__main__":
    text = "to be, or not to be, that is the question: "
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    batch = torch.stack([ids[i : i + 17] for i in range(0, len(text) - 17, 2)])

    torch.manual_seed(1)
    model = LanguageModel(len(characters))
    print(model)
    losses = train(model, batch, 100)
    print(f"loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
    model.eval()
    print("".join(characters[i] for i in continued(model, ids[None, :6], 30)[0]))

    torch.save(model.state_dict(), "model.pt")
    again = LanguageModel(len(characters))
    print(again.load_state_dict(torch.load("model.pt")))
    assert losses[-1] < 0.3 < losses[0]

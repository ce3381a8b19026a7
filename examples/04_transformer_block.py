"""A transformer block: its parts, its parameters, and what flows through the residual stream."""

import numpy as np

from tinyllm import Tensor, no_grad, ops, use_formulas
from tinyllm.models import ModelConfig, TransformerLM

config = ModelConfig(
    vocab_size=50, context_length=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32
)
model = TransformerLM(config, seed=0)
block = model.blocks[0]

print("parameters of one block")
for name, parameter in block.named_parameters():
    print(f"  {name:32}{parameter.shape!s:12}{parameter.size:6,}")

tokens = np.random.default_rng(0).integers(0, 50, size=(2, 16))  # (B, T)
x = model.embedding(tokens)  # (B, T, D)

# The block, written out. Both halves add to the residual stream what they compute from its normalised form.
attended = block.attention(block.attention_norm(x))
middle = x + attended
normalised = block.feed_forward_norm(middle)
gate, up = block.feed_forward.gate(normalised), block.feed_forward.up(normalised)
out = middle + block.feed_forward.down(gate * gate.sigmoid() * up)  # SwiGLU

print("\nroot mean square of the residual stream")
for name, tensor in (("embedding", x), ("after attention", middle), ("after feed-forward", out)):
    print(f"  {name:20}{np.sqrt((tensor.data**2).mean()):.4f}")
assert np.allclose(out.data, block(x).data, atol=1e-6)

# Later tokens change nothing earlier.
changed = tokens.copy()
changed[:, 10] += 1
with no_grad():
    before, after = model(tokens).data, model(changed % 50).data
print("\nlogits before position 10 unchanged:", np.array_equal(before[:, :10], after[:, :10]))
assert np.array_equal(before[:, :10], after[:, :10])

# With use_formulas() every op runs as its formula: the mode for a debugger.
loss = ops.cross_entropy(model(tokens), np.roll(tokens, -1, axis=1))
with use_formulas():
    by_formula: Tensor = ops.cross_entropy(model(tokens), np.roll(tokens, -1, axis=1))
print(f"loss {loss.item():.6f}, by formula {by_formula.item():.6f}, log V {np.log(50):.6f}")
assert np.isclose(loss.item(), by_formula.item(), rtol=1e-5)

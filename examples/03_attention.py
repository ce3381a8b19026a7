"""Attention step by step, and the same by the fused op."""

import numpy as np

from tinyllm import Tensor, ops

rng = np.random.default_rng(0)
B, H, T, K = 1, 2, 4, 8  # batch, heads, tokens, width of a head
q, k, v = (Tensor(rng.normal(size=(B, H, T, K)), requires_grad=True) for _ in range(3))

# 1. Where each token stands is rotated into queries and keys; their dot product then depends on distance alone.
q_rotated, k_rotated = ops.rope(q), ops.rope(k)

# 2. How well each query matches each key.
scores = q_rotated @ k_rotated.swapaxes(-1, -2) / np.sqrt(K)  # (B, H, T, T)

# 3. A token must not see later ones.
seen = np.tri(T, dtype=bool)
masked = ops.where(seen, scores, -np.inf)

# 4. Scores become weights that sum to 1 for each query.
weights = ops.softmax(masked, axis=-1)

# 5. Each output is the weighted mean of the values.
output = weights @ v  # (B, H, T, K)

np.set_printoptions(precision=2, suppress=True)
print("attention weights of head 0; row: query, column: key")
print(weights.data[0, 0])

fused = ops.scaled_dot_product_attention(q_rotated, k_rotated, v, causal=True)
print("largest difference from the fused op:", np.abs(fused.data - output.data).max())
assert np.allclose(fused.data, output.data, rtol=1e-12)

# The gradients agree too. The cotangent is random: with ones, much of the softmax gradient would cancel.
cotangent = rng.normal(size=output.shape)
output.backward(cotangent)
by_steps = q.grad
q.grad = None
fused = ops.scaled_dot_product_attention(ops.rope(q), ops.rope(k), v, causal=True)
fused.backward(cotangent)
print("largest difference of the query gradients:", np.abs(by_steps - q.grad).max())
assert np.allclose(by_steps, q.grad, rtol=1e-10)

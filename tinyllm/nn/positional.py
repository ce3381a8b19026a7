"""Position encodings: how a model knows where a token stands. A new one is a subclass of PositionEncoding."""

from __future__ import annotations

from typing import Any

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.nn.module import Module
from tinyllm.ops.fast.rotary import rotate, rotation_tables


class PositionEncoding(Module):
    """How a model knows where a token stands. The methods say nothing about it here: no position encoding.

    Attention with a causal mask can still tell positions apart a little (Kazemnejad et al., 2023).
    """

    def embed(self, hidden: Tensor, offset: int) -> Tensor:
        """Position information added to embeddings. hidden: (B, T, D), the first at position `offset`."""
        return hidden

    def heads(self, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0) -> Tensor:
        """The heads of queries or keys with position information; with a weight, normalised before (RMSNorm).

        x: (B, T, H K), the first at position `offset`; weight: (K,) -> (B, H, T, K).
        """
        x = ops.split_heads(x, head_dim)
        return x if weight is None else ops.rms_norm(x, weight, eps)

    def infer(self, heads: Any, offset: int) -> Any:
        """Position information put into normalised heads, on arrays. heads: (B, T, H, K) -> the same shape."""
        return heads


class RotaryEmbedding(PositionEncoding):
    """RoPE: queries and keys rotated by their position (Su et al., 2021), in half rotation.

    Args:
        theta: base of the frequencies theta^(-2i/K).
    """

    def __init__(self, theta: float = 10000.0) -> None:
        self.theta = theta

    def heads(self, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0) -> Tensor:
        return ops.rotary_heads(x, head_dim, weight, eps, offset, self.theta)

    def infer(self, heads: Any, offset: int) -> Any:
        _, T, _, K = heads.shape
        # Tables of a power of two serve many calls; made for each position, they would cost more than the rotation.
        positions = 1 << (offset + T - 1).bit_length()
        template = current.xp.empty((positions, 1, K), dtype=heads.dtype)
        cos, sin = rotation_tables(template, 0, self.theta, axis=-3)  # (positions, 1, K)
        here = slice(offset, offset + T)
        return rotate(heads, cos[here], sin[here])

"""Position encodings: how a model knows where a token stands. A new one is a subclass of PositionEncoding."""

from __future__ import annotations

from typing import Any

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current
from tinyllm.nn.module import Module
from tinyllm.ops.fast.rotary import rotate_in_place, rotation_tables


class PositionEncoding(Module):
    """How a model knows where a token stands. The methods say nothing about it here: no position encoding.

    Attention with a causal mask can still tell positions apart a little (Kazemnejad et al., 2023). `offset` is the
    position of the first token, or the positions of all, integers (B, T).
    """

    def embed(self, hidden: Tensor, offset: int | Array) -> Tensor:
        """Position information added to embeddings. hidden: (B, T, D)."""
        return hidden

    def heads(
        self, x: Tensor, head_dim: int, offset: int | Array, weight: Any = None, eps: float = 0.0
    ) -> Tensor:
        """The heads of queries or keys with position information; with a weight, normalised before (RMSNorm).

        x: (B, T, H K), weight: (K,) -> (B, H, T, K).
        """
        x = ops.split_heads(x, head_dim)
        return x if weight is None else ops.rms_norm(x, weight, eps)

    def infer(self, heads: Array, offset: int) -> Array:
        """Normalised heads with position information, on arrays, of which `heads` may be overwritten.

        heads: (B, T, H, K), the first at position `offset` -> the same shape.
        """
        return heads


class RotaryEmbedding(PositionEncoding):
    """RoPE: queries and keys rotated by their position (Su et al., 2021), in half rotation.

    Args:
        theta: base of the frequencies theta^(-2i/K).
    """

    _kept_tables: Any = None

    def __init__(self, theta: float = 10000.0) -> None:
        self.theta = theta

    def heads(
        self, x: Tensor, head_dim: int, offset: int | Array, weight: Any = None, eps: float = 0.0
    ) -> Tensor:
        return ops.rotary_heads(x, head_dim, weight, eps, offset, self.theta)

    def infer(self, heads: Array, offset: int) -> Array:
        end = offset + heads.shape[1]
        cos, sin = self._tables(end, heads)
        return rotate_in_place(heads, cos[offset:end], sin[offset:end])[0]

    def _tables(self, positions: int, heads: Any) -> tuple[Any, Any]:
        """Rotation tables for at least so many positions, (positions, 1, K) each, in the dtype of `heads`.

        The last ones are kept, with what they depend on: to make them costs more than to rotate a single token.
        """
        # Those of a power of two serve many tokens.
        wanted = (1 << (positions - 1).bit_length(), heads.shape[-1], heads.dtype, self.theta, current.xp)
        kept = self._kept_tables
        if kept is None or kept[0] != wanted:
            template = current.xp.empty((wanted[0], 1, wanted[1]), dtype=heads.dtype)
            kept = self._kept_tables = (wanted, *rotation_tables(template, 0, self.theta, axis=-3))
        return kept[1:]

"""Position encodings. A new one is a subclass of PositionEncoding and an entry in POSITION_ENCODINGS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.nn.module import Module

if TYPE_CHECKING:
    from tinyllm.models.transformer import ModelConfig


class PositionEncoding(Module):
    """How a model knows where a token stands. Neither method says so here: no position encoding.

    Attention with a causal mask can still tell positions apart a little (Kazemnejad et al., 2023).
    """

    def __init__(self, config: ModelConfig) -> None:
        pass

    def embed(self, hidden: Tensor, offset: int) -> Tensor:
        """Position information added to embeddings. hidden: (B, T, D), the first at position `offset`."""
        return hidden

    def heads(self, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0) -> Tensor:
        """The heads of queries or keys with position information; with a weight, normalised before (RMSNorm).

        x: (B, T, H K), the first at position `offset`; weight: (K,) -> (B, H, T, K).
        """
        x = ops.split_heads(x, head_dim)
        return x if weight is None else ops.rms_norm(x, weight, eps)


class RotaryEmbedding(PositionEncoding):
    """RoPE: queries and keys rotated by their position (Su et al., 2021), in half rotation."""

    def __init__(self, config: ModelConfig) -> None:
        self.theta = config.rope_theta

    def heads(self, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0) -> Tensor:
        return ops.rotary_heads(x, head_dim, weight, eps, offset, self.theta)


POSITION_ENCODINGS: dict[str, type[PositionEncoding]] = {"rope": RotaryEmbedding, "none": PositionEncoding}
"""The encodings that `ModelConfig.position_encoding` names."""

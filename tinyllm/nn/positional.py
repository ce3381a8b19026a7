"""Position encodings. A new one is a subclass of PositionEncoding and an entry in POSITION_ENCODINGS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllm import ops
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor

if TYPE_CHECKING:
    from tinyllm.nn.transformer import ModelConfig


class PositionEncoding(Module):
    """How a model knows where a token stands. Both methods change nothing here: no position encoding.

    Attention with a causal mask can still tell positions apart a little (Kazemnejad et al., 2023).
    """

    def __init__(self, config: ModelConfig) -> None:
        pass

    def embed(self, hidden: Tensor, offset: int) -> Tensor:
        """Position information added to embeddings. hidden: (B, T, D), the first at position `offset`."""
        return hidden

    def rotate(self, x: Tensor, offset: int) -> Tensor:
        """Position information in queries and keys alike. x: (B, T, H, K), the first at position `offset`."""
        return x


class RotaryEmbedding(PositionEncoding):
    """RoPE: queries and keys rotated by their position (Su et al., 2021), in half rotation."""

    def __init__(self, config: ModelConfig) -> None:
        self.theta = config.rope_theta

    def rotate(self, x: Tensor, offset: int) -> Tensor:
        return ops.rope(x, offset, self.theta, axis=-3)


POSITION_ENCODINGS: dict[str, type[PositionEncoding]] = {"rope": RotaryEmbedding, "none": PositionEncoding}
"""The encodings that `ModelConfig.position_encoding` names."""

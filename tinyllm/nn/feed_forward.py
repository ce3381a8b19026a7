"""The feed-forward part of a transformer block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.nn.layers import Linear
from tinyllm.nn.module import Module

if TYPE_CHECKING:
    from tinyllm.models.transformer import ModelConfig


class FeedForward(Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer, 2020, equation 6). x: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, rng: np.random.Generator) -> None:
        D, D_ff = config.hidden_size, config.intermediate_size
        self.gate = Linear(D, D_ff, rng, config.init_scale)
        self.up = Linear(D, D_ff, rng, config.init_scale)
        self.down = Linear(D_ff, D, rng, config.residual_init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))

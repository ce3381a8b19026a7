"""The feed-forward part of a transformer block."""

from __future__ import annotations

import copy
from typing import Self

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.nn.layers import Linear, infer_side_by_side, packed_side_by_side
from tinyllm.nn.module import Module
from tinyllm.ops.fast.activation import FastSwiglu


class FeedForward(Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer, 2020, equation 6). x: (B, T, D) -> (B, T, D).

    Args:
        hidden_size: D. intermediate_size: width of the gate.
        rng: draws the initial weights; None: the generator of `tinyllm.manual_seed`.
        init_scale, output_init_scale: of the initial weights, and of those of the projection back to D (see `Linear`).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        rng: np.random.Generator | None = None,
        init_scale: float = 1.0,
        output_init_scale: float = 1.0,
    ) -> None:
        rng = rng or backend.default_generator()
        self.gate = Linear(hidden_size, intermediate_size, False, rng=rng, init_scale=init_scale)
        self.up = Linear(hidden_size, intermediate_size, False, rng=rng, init_scale=init_scale)
        self.down = Linear(intermediate_size, hidden_size, False, rng=rng, init_scale=output_init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))

    def infer(self, x: Array) -> Array:
        gate_and_up = infer_side_by_side(x, self.gate, self.up)
        half = gate_and_up.shape[-1] // 2
        return self.down.infer(FastSwiglu().forward(gate_and_up[..., :half], gate_and_up[..., half:]))

    def packed(self) -> Self:
        packed = copy.copy(self)
        packed.gate, packed.up = packed_side_by_side(self.gate, self.up)
        packed.down = self.down.packed()
        return packed

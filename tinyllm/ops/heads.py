"""The heads of attention: cut from a projection and joined again, normalised, rotated."""

from __future__ import annotations

from typing import Any

from tinyllm.autograd.operands import as_tensor, floating, operands
from tinyllm.autograd.registry import composite, register
from tinyllm.autograd.tensor import Case, Tensor
from tinyllm.backend import Array
from tinyllm.ops.norm import rms_norm
from tinyllm.ops.rotary import positions_of, rope
from tinyllm.ops.shape import Movement


@register
class SplitHeads(Movement):
    """The last axis cut into heads of width K. Shapes: x: (B, T, H K) -> (B, H, T, K)."""

    cases = (
        Case(((2, 3, 8),), {"head_dim": 4}),
        Case(((1, 2, 2),), {"head_dim": 2}),
        Case(((0, 2, 4),), {"head_dim": 2}),
    )

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def forward(self, x: Array) -> Array:
        B, T, width = x.shape
        return x.reshape((B, T, width // self.head_dim, self.head_dim)).transpose((0, 2, 1, 3))

    def backward(self, gradient: Array) -> Any:
        B, H, T, K = gradient.shape
        return gradient.transpose((0, 2, 1, 3)).reshape((B, T, H * K))


@register
class MergeHeads(Movement):
    """Heads joined to one axis again. Shapes: x: (B, H, T, K) -> (B, T, H K)."""

    cases = (
        Case(((2, 3, 4, 2),)),
        Case(((1, 1, 2, 3),)),
        Case(((0, 2, 3, 1),)),
    )

    def forward(self, x: Array) -> Array:
        B, H, T, K = self.input_shape = x.shape
        return x.transpose((0, 2, 1, 3)).reshape((B, T, H * K))

    def backward(self, gradient: Array) -> Any:
        B, H, T, K = self.input_shape
        return gradient.reshape((B, T, H, K)).transpose((0, 2, 1, 3))


@composite("rotary_heads")
def normalised_and_rotated(
    x: Tensor, weight: Tensor | None = None, *, head_dim: int, eps: float, offset: int | Array, theta: float
) -> Tensor:
    """RoPE(RMSNorm(x_h)) of each head h; without a weight, RoPE(x_h). x: (B, T, H K) -> (B, H, T, K)."""
    heads = split_heads(x, head_dim)
    return rope(heads if weight is None else rms_norm(heads, weight, eps), offset, theta)


def split_heads(x: Any, head_dim: int) -> Tensor:
    """The last axis cut into heads. x: (B, T, H K), K = head_dim -> (B, H, T, K)."""
    x = as_tensor(x)
    _check("split_heads", x, head_dim)
    return SplitHeads(head_dim)(x)


def merge_heads(x: Any) -> Tensor:
    """Heads joined to one axis. x: (B, H, T, K) -> (B, T, H K)."""
    x = as_tensor(x)
    if x.ndim != 4:
        raise ValueError(f"merge_heads: x has shape {x.shape}; it needs (B, H, T, K)")
    return MergeHeads()(x)


def rotary_heads(
    x: Any, head_dim: int, weight: Any = None, eps: float = 1e-6, offset: Any = 0, theta: float = 10000.0
) -> Tensor:
    """Heads with RMSNorm, if there is a weight, and rotary positions: what attention does to queries and keys.

    x: (B, T, H K), weight: (K,), K = head_dim even -> (B, H, T, K). offset: as in `rope`, which is an integer or an
    array (T,) or (B, T). Raises ValueError for other shapes.
    """
    inputs = floating(x) if weight is None else floating(*operands(x, weight))
    _check("rotary_heads", inputs[0], head_dim)
    if head_dim % 2 or any(w.shape != (head_dim,) for w in inputs[1:]):
        raise ValueError(
            f"rotary_heads: head_dim={head_dim} and a weight of shape {[w.shape for w in inputs[1:]]}; "
            "head_dim must be even, and the weight have so many elements"
        )
    offset = positions_of("rotary_heads", offset, inputs[0].shape, -2)
    return normalised_and_rotated(
        *inputs, head_dim=head_dim, eps=float(eps), offset=offset, theta=float(theta)
    )


def _check(name: str, x: Tensor, head_dim: int) -> None:
    if x.ndim != 3 or head_dim < 1 or x.shape[-1] % head_dim:
        raise ValueError(
            f"{name}: x has shape {x.shape} and head_dim={head_dim}; it needs (B, T, H K), H whole heads of width K"
        )

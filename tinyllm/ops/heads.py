"""The heads of attention: cut from a projection and joined again, normalised, rotated."""

from __future__ import annotations

from typing import Any

from tinyllm import backend
from tinyllm.autograd.tensor import Case, FusedOp, Tensor, as_tensor, operands, register
from tinyllm.backend import current
from tinyllm.ops.matrix import row_sum, rows
from tinyllm.ops.norm import inverse_root, rms_norm
from tinyllm.ops.rotary import rope, rotate, rotate_in_place, rotation_tables
from tinyllm.ops.shape import Movement, reshape, transpose


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

    def forward(self, x: Any) -> Any:
        B, T, width = x.shape
        return x.reshape((B, T, width // self.head_dim, self.head_dim)).transpose((0, 2, 1, 3))

    def backward(self, gradient: Any) -> Any:
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

    def forward(self, x: Any) -> Any:
        B, H, T, K = self.input_shape = x.shape
        return x.transpose((0, 2, 1, 3)).reshape((B, T, H * K))

    def backward(self, gradient: Any) -> Any:
        B, H, T, K = self.input_shape
        return gradient.reshape((B, T, H, K)).transpose((0, 2, 1, 3))


@register
class RotaryHeads(FusedOp):
    """RoPE(RMSNorm(x_h)) for each head h; without a weight, RoPE(x_h).

    Shapes: x: (B, T, H K), weight: (K,) -> (B, H, T, K); position t counts from `offset`. The weight of the norm is
    put into the tables of the rotation: with n = x / rms(x), y = n (w cos) + swap(n) (swap(w) sin).
    Source: QK-norm: Henry et al., "Query-key normalization for transformers", 2020, section 3, with RMSNorm; rotation:
    as in `rope`.
    """

    cases = (
        Case(((2, 3, 8), (4,)), {"head_dim": 4, "eps": 1e-6, "offset": 0, "theta": 10000.0}),
        Case(((1, 3, 6), (2,)), {"head_dim": 2, "eps": 0.1, "offset": 5, "theta": 100.0}),
        Case(((2, 3, 8),), {"head_dim": 4, "eps": 0.0, "offset": 2, "theta": 10.0}),
        Case(((0, 3, 4), (2,)), {"head_dim": 2, "eps": 1e-6, "offset": 0, "theta": 10.0}),
    )

    def __init__(self, head_dim: int, eps: float, offset: int, theta: float) -> None:
        self.head_dim, self.eps, self.offset, self.theta = head_dim, eps, offset, theta

    def forward(self, x: Any, weight: Any = None) -> Any:
        B, T, width = x.shape
        K = self.head_dim
        self.weight = weight
        self.x = x.reshape((B, T, width // K, K))
        self.cos, self.sin = rotation_tables(self.x, self.offset, self.theta, axis=-3)  # (T, H, K)
        if weight is None:
            y = rotate(self.x, self.cos, self.sin)
        else:
            y = self.x * self.x
            self.inv_rms = inverse_root(row_sum(y), K, self.eps)  # (B, T, H, 1)
            current.xp.multiply(self.x, self.inv_rms, out=y)
            rotate_in_place(y, self.cos * weight, self.sin * backend.swap_halves(weight))
        return y.transpose((0, 2, 1, 3))

    def backward(self, gradient: Any) -> Any:
        B, H, T, K = gradient.shape
        # The inverse of a rotation is the rotation back.
        gradient_x = gradient.transpose((0, 2, 1, 3)).copy()  # (B, T, H, K)
        _, scratch = rotate_in_place(gradient_x, self.cos, -self.sin)
        if self.weight is None:
            return gradient_x.reshape((B, T, H * K))
        # As in RMSNorm.
        product = current.xp.multiply(gradient_x, self.x, out=scratch)
        gradient_weight = self.inv_rms.reshape(-1) @ rows(product)
        projection = row_sum(product, self.weight) * self.inv_rms / K
        # Written out to (T, H, K), because products that broadcast along short rows are slow.
        weight = current.xp.broadcast_to(self.weight, self.cos.shape).copy()
        _rotary_backward(gradient_x, self.x, weight, self.inv_rms, projection * self.inv_rms, scratch)
        return gradient_x.reshape((B, T, H * K)), gradient_weight

    def reference(self, *inputs: Any) -> Tensor:
        x, *weight = inputs
        B, T, width = x.shape
        x = reshape(x, B, T, width // self.head_dim, self.head_dim)
        if weight:
            x = rms_norm(x, weight[0], self.eps)
        return transpose(rope(x, self.offset, self.theta, axis=-3), 0, 2, 1, 3)


@backend.elementwise
def _rotary_backward(gradient: Any, x: Any, weight: Any, inv_rms: Any, projection: Any, scratch: Any) -> None:
    gradient *= weight
    gradient -= current.xp.multiply(x, projection, out=scratch)
    gradient *= inv_rms


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
    x: Any, head_dim: int, weight: Any = None, eps: float = 1e-6, offset: int = 0, theta: float = 10000.0
) -> Tensor:
    """Heads with RMSNorm, if there is a weight, and rotary positions: what attention does to queries and keys.

    x: (B, T, H K), weight: (K,), K = head_dim even -> (B, H, T, K). Raises ValueError for other shapes.
    """
    inputs = operands(x) if weight is None else operands(x, weight)
    _check("rotary_heads", inputs[0], head_dim)
    if head_dim % 2 or any(w.shape != (head_dim,) for w in inputs[1:]):
        raise ValueError(
            f"rotary_heads: head_dim={head_dim} and a weight of shape {[w.shape for w in inputs[1:]]}; "
            "head_dim must be even, and the weight have so many elements"
        )
    return RotaryHeads(head_dim, eps, offset, float(theta))(*inputs)


def _check(name: str, x: Tensor, head_dim: int) -> None:
    if x.ndim != 3 or head_dim < 1 or x.shape[-1] % head_dim:
        raise ValueError(
            f"{name}: x has shape {x.shape} and head_dim={head_dim}; it needs (B, T, H K), H whole heads of width K"
        )

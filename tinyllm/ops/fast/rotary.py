"""Fast forms of RoPE, alone and with the cutting into heads and their norm."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.registry import FusedOp, fast_form_of
from tinyllm.autograd.tensor import Case
from tinyllm.backend import Array, current
from tinyllm.ops.fast.norm import inverse_root
from tinyllm.ops.fast.products import row_sum, rows
from tinyllm.ops.heads import normalised_and_rotated
from tinyllm.ops.rotary import Rope, kept, rotation_angles


@functools.lru_cache(maxsize=64)
def _tables(shape: tuple[int, ...], offset: int, theta: float, dtype: str, xp: Any) -> tuple[Any, Any]:
    return _written_out(rotation_angles(shape, offset, theta, -len(shape)), shape, dtype, xp)


def _written_out(angles: Any, shape: tuple[int, ...], dtype: str, xp: Any) -> tuple[Any, Any]:
    """The tables of angles (..., K/2), of the shape of x."""
    cos = np.concatenate([np.cos(angles), np.cos(angles)], axis=-1)
    sin = np.concatenate([-np.sin(angles), np.sin(angles)], axis=-1)
    # Written out to the full shape, because products of contiguous arrays are several times faster than
    # products that broadcast along short rows.
    tables = [xp.asarray(t, dtype=dtype) for t in (cos, sin)]
    return tuple(xp.broadcast_to(t, shape).copy() for t in tables)


def rotation_tables(x: Any, offset: int | Array, theta: float, axis: int) -> tuple[Any, Any]:
    """cos of position times frequency, and sin with its sign, in double precision rounded to the dtype of x.

    x: (..., T, ..., K) with positions along `axis` (negative) -> two arrays (T, ..., K), kept for the next call; where
    `offset` is an array of positions (B, T), of the shape of x. The first half of the last axis of sin is negative:
    y = x cos + swap(x) sin, where swap exchanges the halves.
    """
    if not isinstance(offset, int):
        shape = x.shape if offset.ndim == 2 else x.shape[axis:]
        return _written_out(rotation_angles(x.shape, offset, theta, axis), shape, x.dtype.name, current.xp)
    return _tables(x.shape[axis:], offset, theta, x.dtype.name, current.xp)


@fast_form_of(Rope)
class FastRope(Rope):
    """Tables that are kept, written out to whole heads, and the halves exchanged in one copy."""

    def forward(self, x: Array) -> Array:
        self.cos, self.sin = rotation_tables(x, self.offset, self.theta, self.axis)
        return rotate(x, self.cos, self.sin)

    def backward(self, gradient: Array) -> Any:
        return rotate(gradient, self.cos, -self.sin)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """x cos + swap(x) sin. x: (..., T, ..., K), cos and sin: (T, ..., K) -> the shape of x."""
    return rotate_in_place(x.copy(), cos, sin)[0]


def rotate_in_place(x: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """x, which is changed to its rotation, and an array of the same shape to write into, whose memory is in cache."""
    swapped = backend.swap_halves(x)
    _rotate(x, swapped, cos, sin)
    return x, swapped


@backend.elementwise
def _rotate(x: Any, swapped: Any, cos: Any, sin: Any) -> None:
    swapped *= sin
    x *= cos
    x += swapped


@fast_form_of(normalised_and_rotated)
class RotaryHeads(FusedOp):
    """RoPE(RMSNorm(x_h)) for each head h; without a weight, RoPE(x_h). One pass over the heads where they lie.

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
        Case(
            ((2, 3, 8), (4,)),
            {"head_dim": 4, "eps": 1e-6, "offset": np.array([[0, 1, 0], [5, 0, 1]]), "theta": 10.0},
        ),
        Case(((2, 3, 4),), {"head_dim": 2, "eps": 0.0, "offset": np.array([3, 0, 1]), "theta": 10.0}),
    )

    def __init__(self, head_dim: int, eps: float, offset: int | Array, theta: float) -> None:
        self.head_dim, self.eps, self.offset, self.theta = head_dim, eps, kept(offset), theta

    def forward(self, x: Array, weight: Array | None = None) -> Array:
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

    def backward(self, gradient: Array) -> Any:
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


@backend.elementwise
def _rotary_backward(gradient: Any, x: Any, weight: Any, inv_rms: Any, projection: Any, scratch: Any) -> None:
    gradient *= weight
    gradient -= current.xp.multiply(x, projection, out=scratch)
    gradient *= inv_rms

"""Rotary position embedding."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Case, FusedOp, Tensor, as_tensor, register
from tinyllm.backend import current
from tinyllm.ops.shape import concatenate


@functools.lru_cache(maxsize=64)
def _tables(shape: tuple[int, ...], offset: int, theta: float, dtype: str, xp: Any) -> tuple[Any, Any]:
    T, K = shape[0], shape[-1]
    frequencies = theta ** (-np.arange(0, K, 2, dtype=np.float64) / K)  # (K/2,)
    angles = np.arange(offset, offset + T)[:, None] * frequencies  # (T, K/2)
    middle = (T, *(1,) * (len(shape) - 2), K)
    cos = np.concatenate([np.cos(angles), np.cos(angles)], axis=-1).reshape(middle)
    sin = np.concatenate([-np.sin(angles), np.sin(angles)], axis=-1).reshape(middle)
    # Written out to the full shape, because products of contiguous arrays are several times faster than
    # products that broadcast along short rows.
    tables = [xp.asarray(np.ascontiguousarray(np.broadcast_to(t, shape)), dtype=dtype) for t in (cos, sin)]
    return tables[0], tables[1]


def rotation_tables(x: Any, offset: int, theta: float, axis: int) -> tuple[Any, Any]:
    """cos of position times frequency, and sin with its sign, in double precision rounded to the dtype of x.

    x: (..., T, ..., K) with positions along `axis` (negative) -> two arrays (T, ..., K). The first half of the last
    axis of sin is negative: y = x cos + swap(x) sin, where swap exchanges the halves.
    """
    real_dtype = x.real.dtype if x.dtype.kind == "c" else x.dtype
    return _tables(x.shape[axis:], offset, theta, real_dtype.name, current.xp)


@register
class Rope(FusedOp):
    """Rotates the pair (x_i, x_(i + K/2)) at position t by the angle t theta^(-2i/K).

    Shapes: x: (..., T, ..., K) -> the same, K even; position t, along `axis` (negative), counts from `offset`.
    Source: Su et al., "RoFormer", 2021, equation 34, with the pairs of the half rotation that Llama uses.
    """

    cases = (
        Case(((2, 3, 4),), {"offset": 0, "theta": 10000.0}),
        Case(((3, 6),), {"offset": 5, "theta": 100.0}),
        Case(((1, 2),), {"offset": 1, "theta": 10.0}),
        Case(((0, 3, 2),), {"offset": 1, "theta": 10.0}),
        Case(((2, 3, 2, 4),), {"offset": 2, "theta": 10.0, "axis": -3}),
    )

    def __init__(self, offset: int, theta: float, axis: int = -2) -> None:
        self.offset, self.theta, self.axis = offset, theta, axis

    def forward(self, x: Any) -> Any:
        self.cos, self.sin = rotation_tables(x, self.offset, self.theta, self.axis)
        return rotate(x, self.cos, self.sin)

    def backward(self, gradient: Any) -> Any:
        return rotate(gradient, self.cos, -self.sin)

    def reference(self, x: Tensor) -> Tensor:
        cos, sin = rotation_tables(x.data, self.offset, self.theta, self.axis)
        half = x.shape[-1] // 2
        return x * cos + concatenate([x[..., half:], x[..., :half]], axis=-1) * sin


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


def rope(x: Any, offset: int = 0, theta: float = 10000.0, axis: int = -2) -> Tensor:
    """Rotary position embedding at positions offset, offset + 1, ... along `axis`.

    x: (..., T, K), or (..., T, H, K) with axis=-3; K must be even. Raises ValueError for other shapes.
    """
    x = as_tensor(x)
    if not -x.ndim <= axis < -1 or x.shape[-1] % 2:
        raise ValueError(f"rope: x has shape {x.shape} and axis={axis}; it needs (..., T, K) with an even K")
    return Rope(offset, float(theta), axis)(x)

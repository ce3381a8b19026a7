"""Rotary position embedding."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.ops.shape import concatenate
from tinyllm.tensor import Case, FusedOp, Tensor, as_tensor, register


@functools.lru_cache(maxsize=64)
def _tables(positions: int, offset: int, width: int, theta: float, dtype: str, xp: Any) -> tuple[Any, Any]:
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)  # (K/2,)
    angles = np.arange(offset, offset + positions)[:, None] * frequencies  # (T, K/2)
    tables = [xp.asarray(table, dtype=dtype) for table in (np.cos(angles), np.sin(angles))]
    return tables[0], tables[1]


def rotation_tables(x: Any, offset: int, theta: float) -> tuple[Any, Any]:
    """cos and sin of position times frequency, in double precision rounded to the dtype of x.

    x: (..., T, K) -> two arrays (T, K/2).
    """
    real_dtype = x.real.dtype if x.dtype.kind == "c" else x.dtype
    return _tables(x.shape[-2], offset, x.shape[-1], theta, real_dtype.name, backend.xp)


@register
class Rope(FusedOp):
    """Rotates the pair (x_i, x_(i + K/2)) at position t by the angle t theta^(-2i/K).

    Shapes: x: (..., T, K) -> (..., T, K), K even; position t counts from `offset`.
    Source: Su et al., "RoFormer", 2021, equation 34, with the pairs of the half rotation that Llama uses.
    """

    cases = (
        Case(((2, 3, 4),), {"offset": 0, "theta": 10000.0}),
        Case(((3, 6),), {"offset": 5, "theta": 100.0}),
        Case(((1, 2),), {"offset": 1, "theta": 10.0}),
        Case(((0, 3, 2),), {"offset": 1, "theta": 10.0}),
    )

    def __init__(self, offset: int, theta: float) -> None:
        self.offset, self.theta = offset, theta

    def forward(self, x: Any) -> Any:
        self.cos, self.sin = rotation_tables(x, self.offset, self.theta)
        return _rotate(x, self.cos, self.sin)

    def backward(self, gradient: Any) -> Any:
        return _rotate(gradient, self.cos, -self.sin)

    def reference(self, x: Tensor) -> Tensor:
        cos, sin = rotation_tables(x.data, self.offset, self.theta)
        half = x.shape[-1] // 2
        x_1, x_2 = x[..., :half], x[..., half:]
        return concatenate([x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin], axis=-1)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    """x: (..., T, K), cos and sin: (T, K/2) -> (..., T, K)."""
    half = x.shape[-1] // 2
    x_1, x_2 = x[..., :half], x[..., half:]
    y = backend.xp.empty(x.shape, dtype=x.dtype)
    y_1, y_2 = y[..., :half], y[..., half:]
    backend.xp.multiply(x_1, cos, out=y_1)
    y_1 -= x_2 * sin
    backend.xp.multiply(x_2, cos, out=y_2)
    y_2 += x_1 * sin
    return y


def rope(x: Any, offset: int = 0, theta: float = 10000.0) -> Tensor:
    """Rotary position embedding of x: (..., T, K) at positions offset, offset + 1, ...; K must be even."""
    x = as_tensor(x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"rope: x has shape {x.shape}; it needs (..., T, K) with an even K")
    return Rope(offset, float(theta))(x)

"""Rotary position embedding."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from tinyllm.autograd.operands import floating
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.system.wording import shown


@register
class Rope(Op):
    """Rotates the pair (x_i, x_(i + K/2)) at position t by the angle t theta^(-2i/K).

    Shapes: x: (..., T, ..., K) -> the same, K even; position t, along `axis` (negative), counts from `offset`, or is
    that of `offset` where this is an array, (T,), or (B, T) for the first axis of x.
    Source: Su et al., "RoFormer", 2021, equation 34, with the pairs of the half rotation that Llama uses.
    """

    cases = (
        Case(((2, 3, 4),), {"offset": 0, "theta": 10000.0}),
        Case(((3, 6),), {"offset": 5, "theta": 100.0}),
        Case(((1, 2),), {"offset": 1, "theta": 10.0}),
        Case(((0, 3, 2),), {"offset": 1, "theta": 10.0}),
        Case(((2, 3, 2, 4),), {"offset": 2, "theta": 10.0, "axis": -3}),
        Case(((2, 3, 4),), {"offset": np.array([0, 7, 1]), "theta": 10.0}),
        Case(((2, 1, 3, 4),), {"offset": np.array([[0, 1, 0], [5, 0, 1]]), "theta": 10.0}),
    )

    def __init__(self, offset: int | Array, theta: float, axis: int = -2) -> None:
        self.offset, self.theta, self.axis = kept(offset), theta, axis

    def forward(self, x: Array) -> Array:
        angles = rotation_angles(x.shape, self.offset, self.theta, self.axis)  # (T, ..., K/2)
        self.cos, self.sin = like(np.cos(angles), x), like(np.sin(angles), x)
        return _rotated(x, self.cos, self.sin)

    def backward(self, gradient: Array) -> Any:
        """A rotation R is linear, so dL/dx = R^T g, and R^T is the rotation by the same angles back."""
        return _rotated(gradient, self.cos, -self.sin)  # back by the same angles


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    """(x_1 cos - x_2 sin, x_2 cos + x_1 sin), where x_1 and x_2 are the halves of the last axis."""
    half = x.shape[-1] // 2
    x_1, x_2 = x[..., :half], x[..., half:]
    return np.concatenate([x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin], axis=-1)


def rotation_angles(shape: tuple[int, ...], offset: int | Array, theta: float, axis: int) -> Any:
    """t theta^(-2i/K) in double precision, for x of a shape (..., T, ..., K): (T, 1, ..., K/2), or (B, ..., K/2)."""
    T, K = shape[axis], shape[-1]
    frequencies: Any = theta ** (-np.arange(0, K, 2, dtype=np.float64) / K)  # (K/2,)
    if isinstance(offset, int):
        positions: Any = np.arange(offset, offset + T)
    else:
        positions, frequencies = offset, current.xp.asarray(frequencies)
    between = (1,) * (len(shape) + axis - 1) if positions.ndim == 2 else ()
    return positions.reshape((*positions.shape[:-1], *between, T, *(1,) * (-axis - 1))) * frequencies


def kept(offset: int | Array) -> int | Array:
    """A copy of an array of positions: backward needs it as it is now."""
    return offset if isinstance(offset, int) else current.xp.array(offset)


def like(table: Any, x: Any) -> Any:
    """A table beside x, in the dtype of x."""
    return current.xp.asarray(table, dtype=x.dtype)


def rope(x: Any, offset: Any = 0, theta: float = 10000.0, axis: int = -2) -> Tensor:
    """Rotary position embedding at positions offset, offset + 1, ... along `axis`.

    x: (..., T, K), or (..., T, H, K) with axis=-3; K must be even. offset: an integer, or the positions of all tokens:
    integers (T,), or (B, T) for x of B sequences. Raises ValueError for other shapes, TypeError for other offsets.
    """
    (x,) = floating(x)
    if not -x.ndim <= axis < -1 or x.shape[-1] % 2:
        raise ValueError(f"rope: x has shape {x.shape} and axis={axis}; it needs (..., T, K) with an even K")
    return Rope(positions_of("rope", offset, x.shape, axis), float(theta), axis)(x)


def positions_of(name: str, offset: Any, shape: tuple[int, ...], axis: int) -> int | Array:
    """An offset as an integer, or as an array of positions that fits x of this shape, (T,) or (B, T).

    Raises TypeError for what is neither, and ValueError for an array of another shape; `name` is of the function.
    """
    try:
        return operator.index(offset)
    except TypeError:
        pass
    positions = current.xp.asarray(offset.data if isinstance(offset, Tensor) else offset)
    if positions.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: offset={shown(offset)}; it is one integer, the position of the first token, or an array of them"
        )
    T = shape[axis]
    if positions.shape != (T,) and (len(shape) == -axis or positions.shape != (shape[0], T)):
        raise ValueError(
            f"{name}: positions of shape {positions.shape} for x of shape {shape}; they need {(T,)} or {(shape[0], T)}"
        )
    return positions

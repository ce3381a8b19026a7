"""Primitive ops that move elements without computing: reshape, transpose, broadcast, join, pad."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.operands import as_tensor, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor, numbers
from tinyllm.backend import Array, current
from tinyllm.ops.axes import along, named_axes


class Movement(Op):
    """What the ops here share: they compute nothing."""

    moves = True

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return 0


@register
class Reshape(Movement):
    """The same elements in another shape. Shapes: x: (...) -> shape."""

    cases = (
        Case(((3, 4),), {"shape": (2, 6)}),
        Case(((3, 4),), {"shape": (-1,)}),
        Case(((),), {"shape": (1, 1)}),
        Case(((0, 3),), {"shape": (3, 0)}),
    )

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def forward(self, x: Array) -> Array:
        self.input_shape = x.shape
        return x.reshape(self.shape)

    def backward(self, gradient: Array) -> Any:
        return gradient.reshape(self.input_shape)


@register
class Transpose(Movement):
    """The axes in another order: axis i of the result is axis axes[i] of x. Shapes: x: (...) -> (...)."""

    cases = (
        Case(((3, 4),), {"axes": (1, 0)}),
        Case(((2, 3, 4),), {"axes": (2, 0, 1)}),
        Case(((),), {"axes": ()}),
        Case(((1, 0),), {"axes": (1, 0)}),
    )

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes

    def forward(self, x: Array) -> Array:
        return x.transpose(self.axes)

    def backward(self, gradient: Array) -> Any:
        ndim = len(self.axes)
        axes = [axis % ndim for axis in self.axes]
        return gradient.transpose(tuple(axes.index(axis) for axis in range(ndim)))


@register
class BroadcastTo(Movement):
    """x repeated along new axes and axes of length 1. Shapes: x: (...) -> shape."""

    cases = (
        Case(((3, 1),), {"shape": (2, 3, 4)}),
        Case(((),), {"shape": (2, 2)}),
        Case(((1,),), {"shape": (0,)}),
        Case(((2, 3),), {"shape": (4, 2, 3)}),
        Case(((1, 0),), {"shape": (2, 0)}),
    )

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def forward(self, x: Array) -> Array:
        return current.xp.broadcast_to(x, self.shape)

    def backward(self, gradient: Array) -> Any:
        return gradient  # the engine sums out broadcasting


@register
class Concatenate(Movement):
    """The inputs one after the other along an axis. Shapes: (..., n_i, ...) each -> (..., sum of n_i, ...)."""

    cases = (
        Case(((2, 3), (1, 3)), {"axis": 0}),
        Case(((2, 3), (2, 0), (2, 2)), {"axis": -1}),
        Case(((2,),), {"axis": 0}),
    )

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, *inputs: Any) -> Any:
        self.lengths = [x.shape[self.axis] for x in inputs]
        return current.xp.concatenate(inputs, axis=self.axis)

    def backward(self, gradient: Array) -> Any:
        parts = []
        start = 0
        for length in self.lengths:
            part = [slice(None)] * len(gradient.shape)
            part[self.axis] = slice(start, start + length)
            parts.append(gradient[tuple(part)])
            start += length
        return tuple(parts)


@register
class Pad(Movement):
    """x with a constant before and after each axis. Shapes: x: (n, ...) -> (before + n + after, ...)."""

    cases = (
        Case(((2, 3),), {"widths": ((1, 0), (0, 2)), "value": 0.5}),
        Case(((),), {"widths": (), "value": 0.0}),
        Case(((0,),), {"widths": ((1, 1),), "value": 0.0}),
    )

    def __init__(self, widths: tuple[tuple[int, int], ...], value: float) -> None:
        self.widths, self.value = widths, value

    def forward(self, x: Array) -> Array:
        self.inside = tuple(
            slice(before, before + n) for (before, _), n in zip(self.widths, x.shape, strict=True)
        )
        return current.xp.pad(x, self.widths, constant_values=self.value) if x.shape else x

    def backward(self, gradient: Array) -> Any:
        return gradient[self.inside]


def reshape(x: Any, *shape: Any) -> Tensor:
    """The same elements in another shape; one length may be -1: `reshape(x, 2, -1)` or `reshape(x, (2, -1))`."""
    return Reshape(lengths_of(shape))(as_tensor(x))


def transpose(x: Any, *axes: Any) -> Tensor:
    """The axes in the order given, reversed when none is given: `transpose(x, 0, 2, 1)`, as in NumPy.

    Two axes of a tensor of more are no order of all, and are exchanged, as in torch. Raises ValueError for
    `transpose(0, 1)` of a matrix, which NumPy leaves as it is and torch transposes.
    """
    x = as_tensor(x)
    if len(axes) == 2 and x.ndim > 2:
        return swapaxes(x, *axes)
    if len(axes) == 2 and x.ndim == 2 and named_axes(axes, 2) == (0, 1):
        raise ValueError(
            f"transpose{axes} of shape {x.shape} changes nothing in NumPy, and exchanges the axes in torch: say "
            f"swapaxes{axes} or .T to exchange them"
        )
    return permute(x, *axes)


def permute(x: Any, *axes: Any) -> Tensor:
    """The axes in the order given, reversed when none is given: `permute(x, 0, 2, 1)`."""
    x = as_tensor(x)
    order = lengths_of(axes) if axes and axes[0] is not None else tuple(reversed(range(x.ndim)))
    return Transpose(order)(x)


def swapaxes(x: Any, first: int, second: int) -> Tensor:
    """Two axes exchanged."""
    x = as_tensor(x)
    (first,), (second,) = named_axes(first, x.ndim), named_axes(second, x.ndim)
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return Transpose(tuple(order))(x)


def broadcast_to(x: Any, shape: Sequence[int]) -> Tensor:
    """x repeated to `shape`."""
    return BroadcastTo(lengths_of((shape,)))(as_tensor(x))


def squeeze(x: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """x without the axes of length 1, or without those named by `axis`, which must have length 1."""
    x = as_tensor(x)
    if axis is None:
        axes = tuple(position for position, n in enumerate(x.shape) if n == 1)
    else:
        axes = named_axes(axis, x.ndim)
        if any(x.shape[position] != 1 for position in axes):
            raise ValueError(f"squeeze: axis {axis} of shape {x.shape} does not have length 1")
    return Reshape(tuple(n for position, n in enumerate(x.shape) if position not in axes))(x)


def expand_dims(x: Any, axis: int | tuple[int, ...]) -> Tensor:
    """x with new axes of length 1 at the positions `axis` of the result."""
    x = as_tensor(x)
    ndim = x.ndim + np.size(axis)
    axes = named_axes(axis, ndim)
    lengths = iter(x.shape)
    return Reshape(tuple(1 if position in axes else next(lengths) for position in range(ndim)))(x)


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after the other along an existing axis."""
    if len(tensors) == 0:
        raise ValueError("concatenate needs at least one tensor")
    return Concatenate(axis)(*operands(*tensors))


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors, all of one shape, side by side along a new axis."""
    if len(tensors) == 0:
        raise ValueError("stack needs at least one tensor")
    return concatenate([expand_dims(x, axis) for x in tensors], axis)


def split(x: Any, sections: Any, axis: int = 0) -> list[Tensor]:
    """x cut along `axis` into `sections` equal parts, or at the positions that `sections` lists, as in NumPy."""
    x = as_tensor(x)
    (axis,) = named_axes(axis, x.ndim)
    n = x.shape[axis]
    if np.ndim(sections):
        bounds = [0, *sections, n]
    else:
        parts = operator.index(sections)
        if parts < 1 or n % parts:
            raise ValueError(f"split: an axis of length {n} does not divide into {parts} equal parts")
        bounds = [n // parts * i for i in range(parts + 1)]
    return [x[along(axis, slice(start, stop))] for start, stop in itertools.pairwise(bounds)]


def pad(x: Any, widths: Any, value: float = 0.0) -> Tensor:
    """x with `value` around it.

    widths: (before, after) for every axis, or one such pair or one number for all axes.
    """
    x = as_tensor(x)
    if np.ndim(widths) == 0:
        widths = ((widths, widths),) * x.ndim
    elif np.shape(widths) == (2,):
        widths = (tuple(widths),) * x.ndim
    if len(widths) != x.ndim:
        raise ValueError(f"pad: got widths for {len(widths)} axes, the tensor has shape {x.shape}")
    return Pad(
        tuple((operator.index(before), operator.index(after)) for before, after in widths),
        backend.read(numbers(value)),
    )(x)


def flip(x: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """x with the order of elements reversed along `axis`."""
    x = as_tensor(x)
    axes = named_axes(axis, x.ndim)
    return x[tuple(slice(None, None, -1) if position in axes else slice(None) for position in range(x.ndim))]


def lengths_of(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """`f(x, 2, 3)` and `f(x, (2, 3))` alike, in Python integers."""
    first = arguments[0] if len(arguments) == 1 else 0
    if isinstance(first, (tuple, list)) or (not isinstance(first, int) and np.ndim(first) == 1):
        arguments = tuple(first)
    return tuple(map(operator.index, arguments))

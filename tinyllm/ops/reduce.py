"""Primitive ops that reduce axes, and the statistics composed of them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from tinyllm import backend
from tinyllm.autograd.operators import Axis
from tinyllm.autograd.tensor import Case, Op, Tensor, as_tensor, register, summable
from tinyllm.backend import Array, current
from tinyllm.ops.elementwise import sqrt, where


def reduction_cases(empty: bool = True, kinked: bool = False, low: float = -2.0) -> tuple[Case, ...]:
    """Cases over all axes, one, several, with and without keepdims; `empty` adds a reduction of nothing."""
    calls: list[tuple[tuple[int, ...], Axis, bool]] = [
        ((3, 4), None, False),
        ((3, 4), 0, True),
        ((2, 3, 4), (0, -1), False),
        ((2, 3, 1), -1, False),
        ((), None, False),
        ((0, 3), 1, False),
    ]
    if empty:
        calls.append(((2, 0), 1, False))
    return tuple(
        Case((shape,), {"axis": axis, "keepdims": keepdims}, low=low, kinked=kinked)
        for shape, axis, keepdims in calls
    )


def own_axis(axis: Any) -> int | tuple[int, ...] | None:
    """`axis` as None, an int or a tuple of ints, from integers of any kind and sequences of them.

    A sequence of one is that one, so that a scalar, too, is reduced over (0,).
    """
    try:
        return None if axis is None else operator.index(axis)
    except TypeError:
        axes = tuple([operator.index(position) for position in axis])
        return axes[0] if len(axes) == 1 else axes


def reduced_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes that `axis` names, each in [0, ndim), once; None names all. A scalar takes 0 and -1, which name none."""
    axis = own_axis(axis)
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    n = ndim or 1
    for position in axes:
        if not -n <= position < n:
            raise IndexError(f"axis {position} is out of range for {ndim} axes")
    found = tuple([position % n for position in axes])
    if len(set(found)) < len(found):
        raise ValueError(f"axis={axis} names an axis of {ndim} twice")
    return found if ndim else ()


class Reduction(Op):
    """What the reductions share: the axes, and bringing a reduced array back against the input."""

    def __init__(self, axis: Axis = None, keepdims: bool = False) -> None:
        self.axis, self.keepdims = own_axis(axis), keepdims

    def expand(self, reduced: Any, shape: tuple[int, ...]) -> Any:
        """`reduced` with the reduced axes of `shape` as axes of length 1."""
        axes = reduced_axes(self.axis, len(shape))
        return reduced.reshape(tuple(1 if axis in axes else n for axis, n in enumerate(shape)))


@register
class Sum(Reduction):
    """The sum over axes. Shapes: x: (...) -> x without the axes."""

    cases = reduction_cases()

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.sum(axis=self.axis, keepdims=self.keepdims)

    def backward(self, gradient: Array) -> Any:
        return current.xp.broadcast_to(self.expand(gradient, self.shape), self.shape)


@register
class Max(Reduction):
    """The maximum over axes; equal maxima share the gradient equally. Shapes: x: (...) -> x without the axes."""

    cases = reduction_cases(empty=False, kinked=True)

    def forward(self, x: Array) -> Array:
        self.x = x
        self.y = x.max(axis=self.axis, keepdims=self.keepdims)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return _to_extremes(self, gradient)


@register
class Min(Reduction):
    """The minimum over axes; equal minima share the gradient equally. Shapes: x: (...) -> x without the axes."""

    cases = reduction_cases(empty=False, kinked=True)

    def forward(self, x: Array) -> Array:
        self.x = x
        self.y = x.min(axis=self.axis, keepdims=self.keepdims)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return _to_extremes(self, gradient)


def _to_extremes(op: Max | Min, gradient: Any) -> Any:
    """The gradient of an extreme, divided among the elements of x that equal it."""
    x = op.x
    extreme = (x == op.expand(op.y, x.shape)) + (x != x)  # among NaN, NaN is the extreme
    count = backend.selected(extreme, current.xp.ones_like(x)).sum(axis=op.axis, keepdims=True)
    return backend.selected(extreme, op.expand(gradient, x.shape) / count)


@register
class Prod(Reduction):
    """The product over axes. Shapes: x: (...) -> x without the axes."""

    cases = (*reduction_cases(), *reduction_cases(low=0.5))

    def forward(self, x: Array) -> Array:
        self.x = x
        return x.prod(axis=self.axis, keepdims=self.keepdims)

    def backward(self, gradient: Array) -> Any:
        """dy/dx_i is the product of the others, which y / x_i is not where y is 0, infinite, or too small."""
        gradient = self.expand(gradient, self.x.shape)
        axes = reduced_axes(self.axis, len(self.x.shape))
        kept = tuple([axis for axis in range(len(self.x.shape)) if axis not in axes])
        order = kept + axes
        rows = self.x.transpose(order)
        shape = rows.shape
        others = product_of_others(rows.reshape((*shape[: len(kept)], math.prod(shape[len(kept) :]))))
        return gradient * others.reshape(shape).transpose(
            tuple([order.index(axis) for axis in range(len(order))])
        )


def product_of_others(x: Any) -> Any:
    """For each element the product of the others along the last axis. x: (..., n) -> (..., n).

    Pairs are multiplied, and the others of an element are its partner and the others of their pair: 3 n products.
    """
    xp = current.xp
    n = x.shape[-1]
    if n < 2:
        return xp.ones_like(x)
    m = n // 2
    first, second, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    others = product_of_others(xp.concatenate([first * second, rest], axis=-1))
    of_pair = others[..., :m]
    return xp.concatenate([of_pair * second, of_pair * first, others[..., m:]], axis=-1)


@register
class Cumsum(Op):
    """The running sum along an axis. Shapes: x: (...) -> (...)."""

    cases = (
        Case(((3, 4),), {"axis": 0}),
        Case(((3, 4),), {"axis": -1}),
        Case(((1, 5),), {"axis": 1}),
        Case(((0, 2),), {"axis": 0}),
    )

    def __init__(self, axis: int) -> None:
        self.axis = operator.index(axis)

    def forward(self, x: Array) -> Array:
        return x.cumsum(axis=self.axis)

    def backward(self, gradient: Array) -> Any:
        flip = [slice(None)] * len(gradient.shape)
        flip[self.axis] = slice(None, None, -1)
        return gradient[tuple(flip)].cumsum(axis=self.axis)[tuple(flip)]


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over `axis` (one, several, or all)."""
    return Sum(axis, keepdims)(summable(x))


def count(x: Tensor, axis: Axis) -> int:
    """How many elements of `x` are reduced into one over `axis`."""
    return math.prod(x.shape[position] for position in reduced_axes(axis, x.ndim))


Statistic = TypeVar("Statistic", bound=Callable[..., Tensor])


def in_float32(statistic: Statistic) -> Statistic:
    """Decorator of a composition of ops on a Tensor: a part may be too large for float16 where the whole is not."""

    @functools.wraps(statistic)
    def widened(x: Any, *arguments: Any, **keywords: Any) -> Tensor:
        x = as_tensor(x)
        if x.dtype != np.float16:
            return statistic(x, *arguments, **keywords)
        return statistic(x.astype(np.float32), *arguments, **keywords).astype(np.float16)

    return widened  # type: ignore[return-value]


@in_float32
def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`."""
    n = count(x, axis)
    if n == 0:
        raise ValueError(f"the mean over axis {axis} of shape {x.shape} has no elements")
    return sum(x, axis, keepdims) / n


@in_float32
def var(x: Any, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Tensor:
    """The variance over `axis`, divided by n - correction (0: of the population, as in NumPy)."""
    divisor = count(x, axis) - correction
    if divisor <= 0:
        raise ValueError(
            f"the variance over axis {axis} of shape {x.shape} with correction={correction} divides by 0"
        )
    deviation = x - mean(x, axis, keepdims=True)
    return sum(deviation * deviation, axis, keepdims) / divisor


@in_float32
def std(x: Any, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Tensor:
    """The standard deviation over `axis`, with n - correction as in `var`; its gradient is 0 where all are equal."""
    variance = var(x, axis, keepdims, correction)
    equal = variance.data == 0
    return where(equal, 0, sqrt(where(equal, 1, variance)))


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The maximum over `axis`; equal maxima share the gradient equally."""
    return Max(axis, keepdims)(as_tensor(x))


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The minimum over `axis`; equal minima share the gradient equally."""
    return Min(axis, keepdims)(as_tensor(x))


def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The product over `axis`."""
    return Prod(axis, keepdims)(summable(x))


def cumsum(x: Any, axis: int | None = None) -> Tensor:
    """The running sum along `axis`, or of all elements as one row."""
    x = summable(x)
    if axis is None:
        return Cumsum(0)(x.reshape(-1))
    return Cumsum(axis)(x) if x.ndim else x.sum(axis)

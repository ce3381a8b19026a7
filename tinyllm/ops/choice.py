"""Primitive ops that choose, element by element: of two operands, of an operand and a bound, or of two signs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.forward_mode import primal
from tinyllm.autograd.operands import as_tensor, countable, floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor, numbers
from tinyllm.backend import Array, current
from tinyllm.ops.elementwise import binary_cases, unary_cases


@register
class Absolute(Op):
    """|x|, with gradient 0 at 0. Shapes: x: (...) -> (...)."""

    cases = unary_cases(kinked=True)

    def forward(self, x: Array) -> Array:
        self.x = x
        return current.xp.absolute(x)

    def backward(self, gradient: Array) -> Any:
        return gradient * current.xp.sign(self.x)


@register
class Relu(Op):
    """max(x, 0), with gradient 0 at 0. Shapes: x: (...) -> (...)."""

    cases = unary_cases(kinked=True)

    def forward(self, x: Array) -> Array:
        self.kept = current.xp.logical_not(x <= 0)  # NaN, too, is not hidden
        return backend.selected(self.kept, x)

    def backward(self, gradient: Array) -> Any:
        return backend.selected(self.kept, gradient)


@register
class Maximum(Op):
    """The larger of a and b; where they are equal, each gets half of the gradient.

    Shapes: a: (...), b: (...) -> broadcast.
    """

    cases = binary_cases(kinked=True)

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return current.xp.maximum(a, b)

    def backward(self, gradient: Array) -> Any:
        return _to_chosen(gradient, self.a == self.b, self.a < self.b, self.a > self.b)


@register
class Minimum(Op):
    """The smaller of a and b; where they are equal, each gets half of the gradient.

    Shapes: a: (...), b: (...) -> broadcast.
    """

    cases = binary_cases(kinked=True)

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return current.xp.minimum(a, b)

    def backward(self, gradient: Array) -> Any:
        return _to_chosen(gradient, self.a == self.b, self.a > self.b, self.a < self.b)


def _to_chosen(gradient: Any, equal: Any, not_a: Any, not_b: Any) -> tuple[Any, Any]:
    """The gradients of two operands, from where they are equal, and where each of them was not chosen."""
    xp = current.xp
    gradient = xp.where(equal, gradient / 2, gradient)
    of_a, of_b = (backend.selected(xp.logical_not(off), gradient) for off in (not_a, not_b))
    return of_a, of_b


@register
class Clip(Op):
    """x limited to [low, high]; the gradient is 0 outside. Shapes: x: (...) -> (...)."""

    cases = tuple(
        Case((shape,), {"low": low, "high": high}, kinked=True)
        for shape in ((3, 4), (), (0, 2))
        for low, high in ((-1.0, 1.0), (None, 0.5), (0.25, None))
    )

    def __init__(self, low: float | None, high: float | None) -> None:
        self.low, self.high = low, high

    def forward(self, x: Array) -> Array:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        self.inside = (x >= low) * (x <= high)
        return current.xp.clip(x, self.low, self.high)

    def backward(self, gradient: Array) -> Any:
        return backend.selected(self.inside, gradient)


@register
class Where(Op):
    """a where the condition holds, otherwise b. Shapes: a: (...), b: (...) -> broadcast with condition."""

    cases = (
        Case(((3, 4), (3, 4)), {"condition": np.arange(12).reshape(3, 4) % 3 == 0}),
        Case(((), (4,)), {"condition": np.array([[True], [False]])}),
        Case(((0, 2), (2,)), {"condition": np.array(True)}),
        Case(((1,), ()), {"condition": np.array(False)}),
    )

    def __init__(self, condition: Any) -> None:
        self.condition = current.xp.array(
            numbers(condition), dtype=bool
        )  # a copy: backward needs it as it is now

    def forward(self, a: Array, b: Array) -> Array:
        return current.xp.where(self.condition, a, b)

    def backward(self, gradient: Array) -> Any:
        return backend.selected(self.condition, gradient), backend.selected(~self.condition, gradient)


def absolute(x: Any) -> Tensor:
    """|x|."""
    return Absolute()(as_tensor(x))


def relu(x: Any) -> Tensor:
    """max(x, 0)."""
    return Relu()(countable(x))


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of a and b, element by element, with broadcasting."""
    return Maximum()(*operands(a, b))


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of a and b, element by element, with broadcasting."""
    return Minimum()(*operands(a, b))


def clip(x: Any, low: Any = None, high: Any = None) -> Tensor:
    """x limited to [low, high]; None leaves that side open.

    Bounds are numbers, or arrays and Tensors that broadcast against x; a Tensor has the gradient where x is beyond it.
    """
    low, high = (bound.item() if isinstance(bound, np.generic) else bound for bound in (low, high))
    if all([bound is None or isinstance(bound, (int, float)) for bound in (low, high)]):
        has_fraction = isinstance(low, float) or isinstance(high, float)
        return Clip(low, high)(*(floating(x) if has_fraction else (countable(x),)))
    y = countable(x)
    if low is not None:
        y, low = operands(y, low)
        y = where((y < low) | (low != low), low, y)
    if high is not None:
        y, high = operands(y, high)
        y = where((y > high) | (high != high), high, y)
    return y


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where `condition` (boolean array or Tensor) holds, otherwise b, with broadcasting."""
    return Where(primal(condition))(*operands(a, b))


def masked_fill(x: Any, mask: Any, value: Any) -> Tensor:
    """`value` where the boolean `mask` is True, otherwise x, with broadcasting. Raises TypeError for other masks."""
    mask = as_tensor(mask)
    if mask.dtype != bool:
        raise TypeError(f"masked_fill: a mask holds booleans; got {mask.dtype}. Compare, as in `mask == 0`")
    return where(mask, value, as_tensor(x))

"""Primitive ops that act on each element: arithmetic, exponentials, trigonometry, choices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.forward_mode import Dual, primal
from tinyllm.autograd.tensor import (
    Case,
    Op,
    Tensor,
    as_tensor,
    countable,
    floating,
    numbers,
    operands,
    register,
)
from tinyllm.backend import Array, current
from tinyllm.ops.error_function import erf as _erf


def unary_cases(low: float = -2.0, high: float = 2.0, kinked: bool = False) -> tuple[Case, ...]:
    """Cases for a function of one argument: a matrix, a scalar, an empty array, lengths of one."""
    shapes: tuple[tuple[int, ...], ...] = ((3, 4), (), (0, 3), (1, 5, 1))
    return tuple(Case((shape,), low=low, high=high, kinked=kinked) for shape in shapes)


def binary_cases(low: float = -2.0, high: float = 2.0, kinked: bool = False) -> tuple[Case, ...]:
    """Cases for a function of two arguments that broadcast against each other."""
    shapes = (
        ((3, 4), (3, 4)),
        ((3, 1), (1, 4)),
        ((4,), (2, 3, 4)),
        ((2, 3), ()),
        ((), ()),
        ((0, 3), (3,)),
        ((1, 1), (2, 1)),
    )
    return tuple(Case(pair, low=low, high=high, kinked=kinked) for pair in shapes)


@register
class Add(Op):
    """a + b. Shapes: a: (...), b: (...) -> broadcast."""

    cases = binary_cases()

    def forward(self, a: Array, b: Array) -> Array:
        return a + b

    def backward(self, gradient: Array) -> Any:
        return gradient, gradient


@register
class Subtract(Op):
    """a - b. Shapes: a: (...), b: (...) -> broadcast."""

    cases = binary_cases()

    def forward(self, a: Array, b: Array) -> Array:
        return a - b

    def backward(self, gradient: Array) -> Any:
        return gradient, -gradient


@register
class Multiply(Op):
    """a b. Shapes: a: (...), b: (...) -> broadcast."""

    cases = binary_cases()

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a * b

    def backward(self, gradient: Array) -> Any:
        return gradient * self.b, gradient * self.a


@register
class Divide(Op):
    """a / b. Shapes: a: (...), b: (...) -> broadcast."""

    cases = binary_cases(low=0.5)

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a / b

    def backward(self, gradient: Array) -> Any:
        gradient_a = gradient / self.b
        return gradient_a, -gradient_a * self.a / self.b


@register
class Negative(Op):
    """-x. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        return -x

    def backward(self, gradient: Array) -> Any:
        return -gradient


@register
class Power(Op):
    """a**b. Shapes: a: (...), b: (...) -> broadcast. The gradient of b is NaN where a < 0."""

    cases = binary_cases(low=0.5)

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        self.y = a**b
        return self.y

    def backward(self, gradient: Array) -> Any:
        """d a^b/da = b a^(b - 1), 0 for b = 0; d a^b/db = a^b ln a, whose limit at a = 0 is 0 for b >= 0."""
        xp = current.xp
        zero = self.a == 0
        with backend.ignore_non_finite():
            no_inverse = xp.logical_not(xp.isfinite(1 / primal(self.a)))  # 0 a^-1 would be NaN
        n = xp.where(no_inverse * (self.b == 0), 1, self.b)
        gradient_a = gradient * self.b * self.a ** (n - 1) if self.needs(0) else None
        base = xp.where(zero * (self.b >= 0), 1, self.a)
        gradient_b = gradient * self.y * xp.log(base) if self.needs(1) else None
        return gradient_a, gradient_b


@register
class Remainder(Op):
    """a mod b = a - b floor(a / b), which has the sign of b. Shapes: a: (...), b: (...) -> broadcast."""

    cases = binary_cases(low=0.5, kinked=True)

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a % b

    def backward(self, gradient: Array) -> Any:
        return gradient, -gradient * (self.a // self.b)


@register
class PowerOfConstant(Op):
    """x**n for a Python number n. Shapes: x: (...) -> (...)."""

    cases = tuple(
        Case((shape,), {"exponent": exponent}, low=0.5)
        for exponent in (2, -1, 0.5, 0, 1)
        for shape in ((3, 4), (), (0, 2))
    )

    def __init__(self, exponent: float) -> None:
        self.exponent = exponent

    def forward(self, x: Array) -> Array:
        self.x = x
        return x**self.exponent

    def backward(self, gradient: Array) -> Any:
        if self.exponent == 0:
            return current.xp.zeros_like(gradient)
        return gradient * self.exponent * self.x ** (self.exponent - 1)


@register
class Exp(Op):
    """e^x. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.y = current.xp.exp(x)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return gradient * self.y


@register
class Expm1(Op):
    """e^x - 1, precise near 0. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.y = current.xp.expm1(x)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return gradient * (self.y + 1)


@register
class Log(Op):
    """ln x. Shapes: x: (...) -> (...)."""

    cases = unary_cases(low=0.5)

    def forward(self, x: Array) -> Array:
        self.x = x
        return current.xp.log(x)

    def backward(self, gradient: Array) -> Any:
        return gradient / self.x


@register
class Log1p(Op):
    """ln(1 + x), precise near 0. Shapes: x: (...) -> (...)."""

    cases = unary_cases(low=-0.5)

    def forward(self, x: Array) -> Array:
        self.x = x
        return current.xp.log1p(x)

    def backward(self, gradient: Array) -> Any:
        return gradient / (1 + self.x)


@register
class Sqrt(Op):
    """x^(1/2). Shapes: x: (...) -> (...)."""

    cases = unary_cases(low=0.5)

    def forward(self, x: Array) -> Array:
        self.y = current.xp.sqrt(x)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return gradient / (2 * self.y)


@register
class Rsqrt(Op):
    """x^(-1/2). Shapes: x: (...) -> (...)."""

    cases = unary_cases(low=0.5)

    def forward(self, x: Array) -> Array:
        self.x = x
        self.y = 1 / current.xp.sqrt(x)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return gradient * self.y / (-2 * self.x)


@register
class Tanh(Op):
    """tanh x. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.y = current.xp.tanh(x)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return gradient * (1 - self.y * self.y)


@register
class Sigmoid(Op):
    """1 / (1 + e^-x), which is e^x / (1 + e^x). Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        xp, is_negative = current.xp, x < 0
        e = xp.exp(xp.where(is_negative, x, -x))  # the one of e^x and e^-x that cannot be infinite
        self.y = xp.where(is_negative, e, 1) / (1 + e)
        return self.y

    def backward(self, gradient: Array) -> Any:
        return gradient * self.y * (1 - self.y)


@register
class Sin(Op):
    """sin x, x in radians. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.x = x
        return current.xp.sin(x)

    def backward(self, gradient: Array) -> Any:
        return gradient * current.xp.cos(self.x)


@register
class Cos(Op):
    """cos x, x in radians. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.x = x
        return current.xp.cos(x)

    def backward(self, gradient: Array) -> Any:
        return -gradient * current.xp.sin(self.x)


@register
class Erf(Op):
    """The error function, 2/sqrt(pi) times the integral of e^(-t^2) from 0 to x. Shapes: x: (...) -> (...)."""

    cases = unary_cases()

    def forward(self, x: Any) -> Any:
        self.x = x
        if isinstance(x, Dual):  # its pieces of rational functions are no formula to differentiate
            return x.through(lambda part: Erf()(part), lambda x: np.exp(-x * x) * (2 / math.sqrt(math.pi)))
        return _erf(x)

    def backward(self, gradient: Array) -> Any:
        return gradient * current.xp.exp(-self.x * self.x) * (2 / math.sqrt(math.pi))


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


@register
class Cast(Op):
    """x converted to another floating-point dtype; its gradient is converted back. Shapes: x: (...) -> (...)."""

    cases = tuple(Case((shape,), {"dtype": np.dtype("float64")}) for shape in ((3, 4), (), (0,)))
    changes_dtype = True

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def forward(self, x: Array) -> Array:
        self.source_dtype = x.dtype
        return x.astype(self.dtype)

    def backward(self, gradient: Array) -> Any:
        return gradient.astype(self.source_dtype)


def add(a: Any, b: Any) -> Tensor:
    """a + b with broadcasting."""
    return Add()(*operands(a, b))


def subtract(a: Any, b: Any) -> Tensor:
    """a - b with broadcasting."""
    return Subtract()(*operands(a, b))


def multiply(a: Any, b: Any) -> Tensor:
    """a times b, element by element, with broadcasting."""
    return Multiply()(*operands(a, b))


def divide(a: Any, b: Any) -> Tensor:
    """a / b with broadcasting."""
    return Divide()(*floating(*operands(a, b)))


def negative(x: Any) -> Tensor:
    """-x."""
    return Negative()(as_tensor(x))


def power(a: Any, b: Any) -> Tensor:
    """a**b with broadcasting. A gradient of b is NaN where a is negative."""
    if isinstance(b, (int, float, np.integer)) and isinstance(a, Tensor) and a.dtype != bool:
        return PowerOfConstant(backend.read(b))(*(floating(a) if isinstance(b, float) else (a,)))
    return Power()(*_numbers(a, b))


def remainder(a: Any, b: Any) -> Tensor:
    """a % b, with the sign of b, with broadcasting."""
    return Remainder()(*_numbers(a, b))


def floor_divide(a: Any, b: Any) -> Tensor:
    """a // b with broadcasting. Its derivative is 0 wherever it has one: a Tensor without a graph."""
    a, b = _numbers(a, b)
    return Tensor(a.detach().data // b.detach().data)


def square(x: Any) -> Tensor:
    """x**2."""
    return power(as_tensor(x), 2)


def exp(x: Any) -> Tensor:
    """e^x."""
    return Exp()(*floating(x))


def expm1(x: Any) -> Tensor:
    """e^x - 1, precise near 0."""
    return Expm1()(*floating(x))


def log(x: Any) -> Tensor:
    """The natural logarithm."""
    return Log()(*floating(x))


def log1p(x: Any) -> Tensor:
    """ln(1 + x), precise near 0."""
    return Log1p()(*floating(x))


def sqrt(x: Any) -> Tensor:
    """The square root."""
    return Sqrt()(*floating(x))


def rsqrt(x: Any) -> Tensor:
    """One over the square root."""
    return Rsqrt()(*floating(x))


def tanh(x: Any) -> Tensor:
    """The hyperbolic tangent."""
    return Tanh()(*floating(x))


def sigmoid(x: Any) -> Tensor:
    """1 / (1 + e^-x)."""
    return Sigmoid()(*floating(x))


def sin(x: Any) -> Tensor:
    """The sine of x in radians."""
    return Sin()(*floating(x))


def cos(x: Any) -> Tensor:
    """The cosine of x in radians."""
    return Cos()(*floating(x))


def tan(x: Any) -> Tensor:
    """The tangent of x in radians."""
    return sin(x) / cos(x)


def erf(x: Any) -> Tensor:
    """The error function."""
    return Erf()(*floating(x))


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


def astype(x: Any, dtype: Any) -> Tensor:
    """x converted to `dtype`; a gradient flows between floating-point dtypes."""
    if dtype is None:
        raise TypeError("astype: got no dtype, but None; give one, for example 'float32'")
    tensor = as_tensor(x)
    dtype = np.dtype(dtype)
    if dtype == tensor.dtype:
        return tensor
    if dtype.kind == "f" and tensor.dtype.kind == "f":
        return Cast(dtype)(tensor)
    return Tensor(tensor.data.astype(dtype))


def _numbers(*values: Any) -> tuple[Tensor, ...]:
    """The operands, where booleans among themselves become int64: NumPy would make int8 of them."""
    return tuple([countable(x) for x in operands(*values)])

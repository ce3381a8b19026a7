"""Primitive ops that act on each element: arithmetic, exponentials, trigonometry, conversion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.forward_mode import Dual, primal
from tinyllm.autograd.operands import as_tensor, countable, floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
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

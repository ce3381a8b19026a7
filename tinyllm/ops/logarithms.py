"""Logarithms, and those of sums of exponentials: softplus, log-sigmoid, logaddexp."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm.autograd.operands import floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.ops.elementwise import Sigmoid, binary_cases, unary_cases


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
class Log2(Op):
    """The logarithm to base 2, exact at its powers. Shapes: x: (...) -> (...)."""

    cases = unary_cases(low=0.5)

    def forward(self, x: Array) -> Array:
        self.x = x
        return np.log2(x)

    def backward(self, gradient: Array) -> Any:
        return gradient / (self.x * math.log(2))


@register
class Log10(Op):
    """The logarithm to base 10, exact at its powers. Shapes: x: (...) -> (...)."""

    cases = unary_cases(low=0.5)

    def forward(self, x: Array) -> Array:
        self.x = x
        return np.log10(x)

    def backward(self, gradient: Array) -> Any:
        return gradient / (self.x * math.log(10))


@register
class Logaddexp(Op):
    """ln(e^a + e^b) = max(a, b) + ln(1 + e^-|a - b|). Shapes: a: (...), b: (...) -> broadcast."""

    cases = (*binary_cases(), Case(((3, 4), (3, 1)), low=-30, high=30))

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return np.logaddexp(a, b)

    def backward(self, gradient: Array) -> Any:
        """e^a / (e^a + e^b) = sigmoid(a - b), which no e^a overflows; NaN where both are the same infinity."""
        difference = self.a - self.b
        return gradient * Sigmoid()(difference), gradient * Sigmoid()(-difference)


@register
class Softplus(Op):
    """y = ln(1 + e^x), a smooth max(x, 0). Shapes: x: (...) -> (...).

    Source: Dugas et al., "Incorporating second-order functional knowledge for better option pricing", 2000, equation 4.
    """

    cases = (*unary_cases(), Case(((3, 4),), low=-30, high=30))

    def forward(self, x: Array) -> Array:
        self.x = x
        return np.logaddexp(x, 0)

    def backward(self, gradient: Array) -> Any:
        return gradient * Sigmoid()(self.x)


def log(x: Any) -> Tensor:
    """The natural logarithm."""
    return Log()(*floating(x))


def log1p(x: Any) -> Tensor:
    """ln(1 + x), precise near 0."""
    return Log1p()(*floating(x))


def log2(x: Any) -> Tensor:
    """The logarithm to base 2."""
    return Log2()(*floating(x))


def log10(x: Any) -> Tensor:
    """The logarithm to base 10."""
    return Log10()(*floating(x))


def logaddexp(a: Any, b: Any) -> Tensor:
    """ln(e^a + e^b) with broadcasting, without forming e^a."""
    return Logaddexp()(*floating(*operands(a, b)))


def softplus(x: Any) -> Tensor:
    """ln(1 + e^x), without forming e^x where it is large."""
    return Softplus()(*floating(x))


def log_sigmoid(x: Any) -> Tensor:
    """ln(1 / (1 + e^-x)) = -softplus(-x), without forming the sigmoid."""
    (x,) = floating(x)
    return -softplus(-x)

"""Mistakes in the derivatives of functions of single elements."""

from __future__ import annotations

import math
from typing import Any

from tinyllm.backend import current
from tinyllm.ops import choice, logarithms
from tinyllm.ops import elementwise as e
from tinyllm.testing.mutants.planting import mutant


@mutant(e.Multiply, "backward")
def multiply_backward_swapped(self: Any, gradient: Any) -> Any:
    """d(ab)/da is taken to be a, and d(ab)/db to be b. Right only where both are equal, as in x * x, which is the
    example that one tries first."""
    return gradient * self.a, gradient * self.b


@mutant(e.Subtract, "backward")
def subtract_backward_without_sign(self: Any, gradient: Any) -> Any:
    """The second operand of a - b gets the gradient without its minus sign, as if it were a + b."""
    return gradient, gradient


@mutant(e.Divide, "backward")
def divide_backward_not_squared(self: Any, gradient: Any) -> Any:
    """d(a/b)/db is -a/b instead of -a/b^2: the inner derivative of 1/b is half remembered. Right for b = 1."""
    return gradient / self.b, -gradient * self.a / self.b


@mutant(e.Divide, "backward")
def divide_backward_without_sign(self: Any, gradient: Any) -> Any:
    """d(a/b)/db has lost its minus sign: denominators are pushed the wrong way, and a softmax out of primitives
    diverges."""
    return gradient / self.b, gradient * self.a / self.b / self.b


@mutant(e.PowerOfConstant, "backward")
def power_exponent_not_lowered(self: Any, gradient: Any) -> Any:
    """The derivative of x^n is n x^n: the exponent was not lowered by one. Right at x = 1 alone."""
    return gradient * self.exponent * self.x**self.exponent


@mutant(e.Power, "backward")
def power_exponent_gradient_without_log(self: Any, gradient: Any) -> Any:
    """The derivative of a^b by b is a^b, as for e^b: the factor ln a is missing."""
    return gradient * self.b * self.a ** (self.b - 1), gradient * self.y


@mutant(logarithms.Log, "backward")
def log_backward_multiplies(self: Any, gradient: Any) -> Any:
    """The derivative of ln x is x instead of 1/x."""
    return gradient * self.x


@mutant(e.Exp, "backward")
def exp_backward_uses_the_input_twice(self: Any, gradient: Any) -> Any:
    """The kept output of exp is exponentiated again in backward: e^(e^x) instead of e^x."""
    return gradient * current.xp.exp(self.y)


@mutant(e.Sqrt, "backward")
def sqrt_backward_without_half(self: Any, gradient: Any) -> Any:
    """The derivative of sqrt(x) is 1/sqrt(x): the factor one half is missing."""
    return gradient / self.y


@mutant(e.Rsqrt, "backward")
def rsqrt_backward_without_sign(self: Any, gradient: Any) -> Any:
    """The derivative of x^(-1/2) has lost its minus sign. A norm that is composed of it pushes lengths apart instead
    of together."""
    return gradient * self.y / (2 * self.x)


@mutant(e.Tanh, "backward")
def tanh_backward_not_squared(self: Any, gradient: Any) -> Any:
    """The derivative of tanh is 1 - y instead of 1 - y^2: about right for small x, wrong for all others."""
    return gradient * (1 - self.y)


@mutant(e.Sigmoid, "backward")
def sigmoid_backward_without_its_value(self: Any, gradient: Any) -> Any:
    """The derivative of the logistic function is 1 - y instead of y (1 - y): gradients are too large where y is small,
    and nothing saturates on that side."""
    return gradient * (1 - self.y)


@mutant(e.Cos, "backward")
def cos_backward_without_sign(self: Any, gradient: Any) -> Any:
    """The derivative of cos is sin instead of -sin."""
    return gradient * current.xp.sin(self.x)


@mutant(e.Erf, "backward")
def erf_backward_of_the_density(self: Any, gradient: Any) -> Any:
    """The derivative of erf has the constant 1/sqrt(2 pi) of the normal density instead of 2/sqrt(pi): the two are
    easily taken for each other."""
    return gradient * current.xp.exp(-self.x * self.x) * (1 / math.sqrt(2 * math.pi))


@mutant(choice.Absolute, "backward")
def absolute_backward_ignores_the_sign(self: Any, gradient: Any) -> Any:
    """|x| passes its gradient on as it is, also where x is negative."""
    return gradient * 1


@mutant(choice.Relu, "backward")
def relu_passes_where_the_gradient_is_positive(self: Any, gradient: Any) -> Any:
    """The mask of relu is made from the gradient instead of from x: positive gradients pass, negative ones do not.
    The loss falls at first, because some of the signs agree."""
    return gradient * (gradient > 0)


@mutant(choice.Maximum, "backward")
def maximum_backward_to_both(self: Any, gradient: Any) -> Any:
    """Both operands of maximum(a, b) get the whole gradient, whichever was larger."""
    return gradient * 1, gradient * 1


@mutant(e.Remainder, "backward")
def remainder_backward_of_the_fraction(self: Any, gradient: Any) -> Any:
    """The gradient of the divisor is multiplied by a / b, where a % b = a - b floor(a / b) has its floor."""
    return gradient, -gradient * (self.a / self.b)


@mutant(choice.Where, "backward")
def where_backward_swapped(self: Any, gradient: Any) -> Any:
    """where(c, a, b) sends the gradient of the chosen elements to the operand that was not chosen."""
    return gradient * ~self.condition, gradient * self.condition


@mutant(choice.Clip, "backward")
def clip_backward_outside_too(self: Any, gradient: Any) -> Any:
    """clip passes the gradient outside of its range as well, where its value is constant. (As an estimator it has a
    name, straight-through; as a derivative it is wrong.)"""
    return gradient * 1

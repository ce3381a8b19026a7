"""softmax, log_softmax and logsumexp, stable for logits of any size."""

from __future__ import annotations

from typing import Any

from tinyllm.autograd.tensor import Case, FusedOp, Tensor, as_tensor, register
from tinyllm.backend import current
from tinyllm.ops.elementwise import exp, log
from tinyllm.ops.reduce import Axis, Reduction, reduction_cases
from tinyllm.ops.reduce import sum as sum_over

AXIS_CASES = (
    Case(((3, 4),), {"axis": -1}),
    Case(((2, 3, 4),), {"axis": 1}),
    Case(((1, 1),), {"axis": 0}),
    Case(((0, 3),), {"axis": -1}),
    Case(((2, 5),), {"axis": -1}, low=-50, high=50),
)


def shifted(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """x minus its maximum over `axis`, and that maximum as a constant; the shift cancels in a softmax."""
    maximum = x.detach().max(axis=axis, keepdims=True)
    return x - maximum, maximum


@register
class Softmax(FusedOp):
    """p_i = e^(x_i) / sum_j e^(x_j) along an axis. Shapes: x: (...) -> (...)."""

    cases = AXIS_CASES

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Any) -> Any:
        self.p = current.xp.exp(x - x.max(axis=self.axis, keepdims=True))
        self.p /= self.p.sum(axis=self.axis, keepdims=True)
        return self.p

    def backward(self, gradient: Any) -> Any:
        mean = (gradient * self.p).sum(axis=self.axis, keepdims=True)
        return self.p * (gradient - mean)

    def reference(self, x: Tensor) -> Tensor:
        exponentials = exp(shifted(x, self.axis)[0])
        return exponentials / sum_over(exponentials, self.axis, keepdims=True)


@register
class LogSoftmax(FusedOp):
    """ln p_i = x_i - ln sum_j e^(x_j) along an axis. Shapes: x: (...) -> (...)."""

    cases = AXIS_CASES

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Any) -> Any:
        xp = current.xp
        shifted_x = x - x.max(axis=self.axis, keepdims=True)
        self.log_p = shifted_x - xp.log(xp.exp(shifted_x).sum(axis=self.axis, keepdims=True))
        return self.log_p

    def backward(self, gradient: Any) -> Any:
        return gradient - current.xp.exp(self.log_p) * gradient.sum(axis=self.axis, keepdims=True)

    def reference(self, x: Tensor) -> Tensor:
        shifted_x, _ = shifted(x, self.axis)
        return shifted_x - log(sum_over(exp(shifted_x), self.axis, keepdims=True))


@register
class Logsumexp(Reduction, FusedOp):
    """ln sum_j e^(x_j) over axes. Shapes: x: (...) -> x without the axes."""

    cases = reduction_cases(empty=False)

    def forward(self, x: Any) -> Any:
        xp = current.xp
        maximum = x.max(axis=self.axis, keepdims=True)
        exponentials = xp.exp(x - maximum)
        total = exponentials.sum(axis=self.axis, keepdims=True)
        self.p = exponentials / total
        y = maximum + xp.log(total)
        return y if self.keepdims else y.reshape(x.sum(axis=self.axis).shape)

    def backward(self, gradient: Any) -> Any:
        return self.expand(gradient, self.p.shape) * self.p

    def reference(self, x: Tensor) -> Tensor:
        shifted_x, maximum = shifted(x, self.axis)
        total = log(sum_over(exp(shifted_x), self.axis, keepdims=True)) + maximum
        return total if self.keepdims else sum_over(total, self.axis)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """e^(x_i) / sum_j e^(x_j) along `axis`."""
    return Softmax(axis)(as_tensor(x))


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """The logarithm of softmax along `axis`, without forming the softmax."""
    return LogSoftmax(axis)(as_tensor(x))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """ln sum e^x over `axis`."""
    return Logsumexp(axis, keepdims)(as_tensor(x))

"""softmax, log_softmax and logsumexp, stable for logits of any size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.operands import constant, floating
from tinyllm.autograd.operators import Axis
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.ops.reduce import Reduction, reduction_cases

AXIS_CASES = (
    Case(((3, 4),), {"axis": -1}),
    Case(((2, 3, 4),), {"axis": 1}),
    Case(((1, 1),), {"axis": 0}),
    Case(((0, 3),), {"axis": -1}),
    Case(((2, 5),), {"axis": -1}, low=-50, high=50),
)

_MASK = np.array([[True, False, True], [False, False, False]])


@register
class Softmax(Op):
    """p_i = e^(x_i) / sum_j e^(x_j) along an axis, over the elements that the mask lets through; p = 0 elsewhere.

    Shapes: x: (...) -> (...), mask: booleans that broadcast to it. Where nothing is let through, p is 0.
    """

    cases = (*AXIS_CASES, Case(((2, 2, 3),), {"axis": -1, "mask": _MASK}))

    def __init__(self, axis: int = -1, mask: Any = True) -> None:
        self.axis = axis
        self.mask = mask if mask is True else current.xp.array(mask)  # a copy: the caller may change his

    def forward(self, x: Array) -> Array:
        z = np.where(self.mask, x, -math.inf) if self.mask is not True else x
        # Less the largest, which cancels in p, no e^z overflows; where nothing is let through, that is -infinity.
        largest = constant(z).max(axis=self.axis, keepdims=True)
        e = np.exp(z - np.where(np.isfinite(largest), largest, 0))
        total = e.sum(axis=self.axis, keepdims=True)
        self.p = e / np.where(total == 0, 1, total)
        return self.p

    def backward(self, gradient: Array) -> Any:
        """dp_i/dx_j = p_i (1[i = j] - p_j), so dL/dx_j = p_j (g_j - sum_i g_i p_i)."""
        mean = (gradient * self.p).sum(axis=self.axis, keepdims=True)
        return self.p * (gradient - mean)


@register
class LogSoftmax(Op):
    """ln p_i = x_i - ln sum_j e^(x_j) along an axis. Shapes: x: (...) -> (...)."""

    cases = AXIS_CASES

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Array) -> Array:
        z = x - constant(x).max(axis=self.axis, keepdims=True)  # cancels, and no e^z overflows
        self.log_p = z - np.log(np.exp(z).sum(axis=self.axis, keepdims=True))
        return self.log_p

    def backward(self, gradient: Array) -> Any:
        """d ln p_i/dx_j = 1[i = j] - p_j, so dL/dx_j = g_j - p_j sum_i g_i."""
        return gradient - np.exp(self.log_p) * gradient.sum(axis=self.axis, keepdims=True)


@register
class Logsumexp(Reduction):
    """ln sum_j e^(x_j) over axes. Shapes: x: (...) -> x without the axes."""

    cases = reduction_cases(empty=False)

    def forward(self, x: Array) -> Array:
        limit = float(np.finfo(x.dtype).max)  # infinity less infinity would be NaN
        largest = np.clip(constant(x).max(axis=self.axis, keepdims=True), -limit, limit)
        e = np.exp(x - largest)  # no overflow
        total = e.sum(axis=self.axis, keepdims=True)
        with backend.ignore_non_finite():  # where all are -infinity the total is 0, and p is NaN
            self.p = e / total
            y = np.log(total) + largest
        return y if self.keepdims else y.reshape(x.sum(axis=self.axis).shape)

    def backward(self, gradient: Array) -> Any:
        return self.expand(gradient, self.p.shape) * self.p


def softmax(x: Any, axis: int = -1) -> Tensor:
    """e^(x_i) / sum_j e^(x_j) along `axis`."""
    return Softmax(axis)(*floating(x))


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """The logarithm of softmax along `axis`, without forming the softmax."""
    return LogSoftmax(axis)(*floating(x))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """ln sum e^x over `axis`."""
    return Logsumexp(axis, keepdims)(*floating(x))

"""Running sums and products along an axis."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from tinyllm.autograd.operands import summable
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array
from tinyllm.ops.axes import named_axes


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


@register
class Cumprod(Op):
    """y_i = x_1 ... x_i along an axis, with the right gradient at zeros. Shapes: x: (...) -> (...)."""

    cases = (
        Case(((3, 4),), {"axis": 0}),
        Case(((3, 4),), {"axis": -1}),
        Case(((2, 3, 2),), {"axis": 1}, low=0.5),
        Case(((1, 5),), {"axis": 0}),
        Case(((0, 2),), {"axis": 0}),
    )

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, x: Array) -> Array:
        self.x = x
        return np.cumprod(x, axis=self.axis)

    def backward(self, gradient: Array) -> Any:
        """dL/dx_k = x_1 ... x_(k-1) S_k, S_k = sum_(i >= k) g_i x_(k+1) ... x_i = g_k + x_(k+1) S_(k+1)."""
        x, g = self.x.swapaxes(0, self.axis), gradient.swapaxes(0, self.axis)
        if len(x) == 0:
            return gradient
        before = np.cumprod(np.concatenate([np.ones_like(x[:1]), x[:-1]]), axis=0)  # x_1 ... x_(k-1)
        S = [g[-1]]
        for k in range(len(x) - 2, -1, -1):
            S.append(g[k] + x[k + 1] * S[-1])
        return (before * np.stack(S[::-1])).swapaxes(0, self.axis)


def cumsum(x: Any, axis: int | None = None) -> Tensor:
    """The running sum along `axis`, or of all elements as one row."""
    x = summable(x)
    if axis is None:
        return Cumsum(0)(x.reshape(-1))
    return Cumsum(axis)(x) if x.ndim else x.sum(axis)


def cumprod(x: Any, axis: int | None = None) -> Tensor:
    """The running product along `axis`, or of all elements as one row."""
    x = summable(x)
    if axis is None:
        return Cumprod(0)(x.reshape(-1))
    axes = named_axes(axis, x.ndim)
    return Cumprod(*axes)(x) if axes else x.prod(axis)

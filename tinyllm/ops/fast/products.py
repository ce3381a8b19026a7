"""Fast forms of matrix products: a batch as one large product, and sums of rows as products with ones."""

from __future__ import annotations

import functools
import math
from typing import Any

from tinyllm.autograd.registry import fast_form_of
from tinyllm.backend import Array, current
from tinyllm.ops.matrix import LinearMap, Matmul


def product(a: Any, b: Any) -> Any:
    """a @ b. One matrix b for a whole batch is one large product instead of a loop of small ones."""
    if len(a.shape) > 2 and len(b.shape) == 2:
        return (rows(a) @ b).reshape((*a.shape[:-1], b.shape[-1]))
    return a @ b


def rows(x: Any) -> Any:
    """x as a matrix of its last axis. x: (..., D) -> (N, D)."""
    return x if x.ndim == 2 else x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))


def row_sum(x: Any, weight: Any = None) -> Any:
    """The sum of each row times `weight`, or times ones: several times faster than a reduction of short rows.

    x: (..., D), weight: (D,) -> (..., 1).
    """
    weight = _ones(x.shape[-1], x.dtype, current.xp) if weight is None else weight
    return (rows(x) @ weight).reshape((*x.shape[:-1], 1))


def column_sum(x: Any) -> Any:
    """The sum of all rows, likewise. x: (..., D) -> (D,)."""
    matrix = rows(x)
    return _ones(matrix.shape[0], x.dtype, current.xp) @ matrix


@functools.lru_cache(maxsize=16)
def _ones(length: int, dtype: Any, xp: Any) -> Any:
    return xp.ones(length, dtype=dtype)


@fast_form_of(Matmul)
class FastMatmul(Matmul):
    """One matrix b for a whole batch is one large product instead of a loop of small ones."""

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return product(a, b)

    def backward(self, gradient: Array) -> Any:
        gradient_a = product(gradient, self.b.swapaxes(-1, -2)) if self.needs(0) else None
        if not self.needs(1):
            return gradient_a, None
        if len(self.a.shape) > 2 and len(self.b.shape) == 2:
            return gradient_a, rows(self.a).swapaxes(-1, -2) @ rows(gradient)
        return gradient_a, self.a.swapaxes(-1, -2) @ gradient


@fast_form_of(LinearMap)
class FastLinearMap(LinearMap):
    """One large product in place of a batch, none for gradients that nobody needs, and the bias in place."""

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.x, self.weight, self.bias = x, weight, bias
        y = rows(x) @ weight.T
        if bias is not None:
            y += bias
        return y.reshape((*x.shape[:-1], weight.shape[0]))

    def backward(self, gradient: Array) -> Any:
        gradient_rows = rows(gradient)
        gradient_x = (gradient_rows @ self.weight).reshape(self.x.shape) if self.needs(0) else None
        gradient_weight = gradient_rows.T @ rows(self.x) if self.needs(1) else None
        if self.bias is None:
            return gradient_x, gradient_weight
        return gradient_x, gradient_weight, column_sum(gradient_rows)

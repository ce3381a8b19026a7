"""Products of vectors and matrices beside `matmul`, the diagonal, the trace, and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinyllm.autograd.operands import floating, operands
from tinyllm.autograd.operators import Axis
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops import reduce
from tinyllm.ops.arrangement import moveaxis
from tinyllm.ops.axes import named_axes
from tinyllm.ops.choice import absolute, where
from tinyllm.ops.elementwise import sqrt
from tinyllm.ops.matrix import matmul
from tinyllm.ops.shape import reshape


def outer(a: Any, b: Any) -> Tensor:
    """a_i b_j, of the elements of a and of b as vectors."""
    a, b = operands(a, b)
    return reshape(a, -1, 1) * reshape(b, 1, -1)


def tensordot(a: Any, b: Any, axes: int | Sequence[Any] = 2) -> Tensor:
    """The sum of products over pairs of axes: the last `axes` of a with the first of b, or two lists of them."""
    a, b = operands(a, b)
    if isinstance(axes, int):
        axes = (tuple(range(a.ndim - axes, a.ndim)), tuple(range(axes)))
    of_a, of_b = named_axes(axes[0], a.ndim), named_axes(axes[1], b.ndim)
    if [a.shape[axis] for axis in of_a] != [b.shape[axis] for axis in of_b]:
        raise ValueError(
            f"tensordot: axes {of_a} of shape {a.shape} and {of_b} of {b.shape} differ in length"
        )
    kept_a = tuple(axis for axis in range(a.ndim) if axis not in of_a)
    kept_b = tuple(axis for axis in range(b.ndim) if axis not in of_b)
    n = math.prod(a.shape[axis] for axis in of_a)
    rows = reshape(a.transpose(kept_a + of_a), math.prod(a.shape[axis] for axis in kept_a), n)
    columns = reshape(b.transpose(of_b + kept_b), n, math.prod(b.shape[axis] for axis in kept_b))
    shape = [a.shape[axis] for axis in kept_a] + [b.shape[axis] for axis in kept_b]
    return reshape(matmul(rows, columns), shape)


def dot(a: Any, b: Any) -> Tensor:
    """The product over the last axis of a and the last but one of b, as `numpy.dot`; of vectors, over the only one."""
    a, b = operands(a, b)
    if a.ndim == 0 or b.ndim == 0:
        return a * b
    return tensordot(a, b, (-1, -2 if b.ndim > 1 else -1))


def inner(a: Any, b: Any) -> Tensor:
    """The product over the last axes of both."""
    a, b = operands(a, b)
    return a * b if a.ndim == 0 or b.ndim == 0 else tensordot(a, b, (-1, -1))


def diagonal(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The elements at (i, i + offset) of two axes, which go, along a new last axis."""
    x = moveaxis(x, (axis1, axis2), (-2, -1))
    rows, columns = x.shape[-2:]
    row, column = (-offset, 0) if offset < 0 else (0, offset)
    n = current.xp.arange(max(0, min(rows - row, columns - column)))
    return x[..., n + row, n + column]


def trace(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The sum of a diagonal."""
    return reduce.sum(diagonal(x, offset, axis1, axis2), -1)


@reduce.in_float32
def vector_norm(x: Any, ord: float | None = None, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """(sum |x|^ord)^(1/ord) over `axis`, of all elements without one; `ord` is 2 by default.

    With `ord` infinite, the largest |x| (or with -inf the smallest). The gradient at a norm of 0 is 0, as in torch.
    """
    (x,) = floating(x)
    if ord in (math.inf, -math.inf):
        return (reduce.max if ord > 0 else reduce.min)(absolute(x), axis, keepdims)
    if ord == 0:
        return reduce.sum(x != 0, axis, keepdims).astype(x.dtype)
    if ord == 1:
        return reduce.sum(absolute(x), axis, keepdims)
    total = reduce.sum(x * x if ord in (None, 2) else absolute(x) ** float(ord), axis, keepdims)
    positive = where(total == 0, 1, total)  # the root has no finite slope at 0
    return where(total == 0, 0, sqrt(positive) if ord in (None, 2) else positive ** (1 / float(ord)))

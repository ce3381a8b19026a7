"""Primitive ops that select elements: indexing, its adjoint, and gathering along an axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Case, Op, Tensor, as_tensor, register
from tinyllm.backend import current
from tinyllm.ops.elementwise import where

_ROWS = np.array([2, 0, -1, 2])


@register
class GetItem(Op):
    """x[index] for slices, integers, integer arrays, boolean masks, `...` and `None`. Shapes: as in NumPy."""

    cases = (
        Case(((3, 4),), {"index": (slice(None, None, -2), 1)}),
        Case(((3, 4),), {"index": _ROWS}),
        Case(((3, 4),), {"index": (Ellipsis, None, _ROWS)}),
        Case(((3, 4, 2),), {"index": (_ROWS, slice(1, 3), np.array([[0], [1]]))}),
        Case(((3, 4),), {"index": np.arange(12).reshape(3, 4) % 2 == 0}),
        Case(((3,),), {"index": 1}),
        Case(((),), {"index": (None, Ellipsis)}),
        Case(((0, 2),), {"index": slice(None)}),
        Case(((2, 3),), {"index": np.zeros(0, dtype=int)}),
    )

    def __init__(self, index: Any) -> None:
        self.index = index

    def forward(self, x: Any) -> Any:
        self.shape = x.shape
        return x[self.index]

    def backward(self, gradient: Any) -> Any:
        return Scatter(self.index, self.shape)(gradient)


@register
class Scatter(Op):
    """Zeros with values added at an index; the adjoint of GetItem. Shapes: values: those of x[index] -> shape."""

    cases = (
        Case(((2, 4),), {"index": slice(0, 4, 2), "shape": (3, 4)}),
        Case(((4, 2),), {"index": _ROWS, "shape": (3, 2)}),
        Case(((),), {"index": (1, 0), "shape": (2, 2)}),
        Case(((0, 2),), {"index": np.zeros(0, dtype=int), "shape": (3, 2)}),
    )

    def __init__(self, index: Any, shape: tuple[int, ...]) -> None:
        self.index, self.shape = index, shape

    def forward(self, values: Any) -> Any:
        if isinstance(values, Tensor):
            return values  # a replay: backward needs only the index
        xp = current.xp
        result = xp.zeros(self.shape, dtype=values.dtype)
        index = self.index
        if backend.is_array(index) and index.dtype.kind in "iu":
            rows = (index.size, *self.shape[1:])
            backend.scatter_add(result, index.reshape(-1), values.reshape(rows))
        elif _repeats(index):
            backend.add_at(result, index, values)
        else:
            result[index] = values
        return result

    def backward(self, gradient: Any) -> Any:
        return gradient[self.index]


def _repeats(index: Any) -> bool:
    """Whether an index can name the same element twice: only integer arrays can."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(hasattr(part, "dtype") and part.dtype.kind in "iu" for part in parts)


@register
class TakeAlongAxis(Op):
    """The elements of x at indices along an axis. Shapes: x: (..., n, ...), indices: (..., m, ...) -> (..., m, ...)."""

    cases = (
        Case(((3, 4),), {"indices": np.array([[0, 0], [3, 1], [2, -1]]), "axis": 1}),
        Case(((3, 4),), {"indices": np.array([[2, 0, 1, 1]]), "axis": 0}),
        Case(((1, 1),), {"indices": np.zeros((1, 0), dtype=int), "axis": 1}),
        Case(((0, 2),), {"indices": np.zeros((0, 1), dtype=int), "axis": 1}),
    )

    def __init__(self, indices: Any, axis: int) -> None:
        self.indices, self.axis = indices, axis

    def forward(self, x: Any) -> Any:
        self.shape = x.shape
        return x[_along_axis(self.indices, self.axis, x.shape)]

    def backward(self, gradient: Any) -> Any:
        return Scatter(_along_axis(self.indices, self.axis, self.shape), self.shape)(gradient)


def _along_axis(indices: Any, axis: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The full index that takes `indices` along `axis` and keeps every other position."""
    ndim = len(shape)
    if len(indices.shape) != ndim:
        raise ValueError(f"indices with {len(indices.shape)} axes, the tensor has shape {shape}")
    axis %= ndim
    return tuple(
        indices if i == axis else current.xp.arange(n).reshape((-1,) + (1,) * (ndim - 1 - i))
        for i, n in enumerate(shape)
    )


def getitem(x: Any, index: Any) -> Tensor:
    """x[index]; Tensors and lists of integers or booleans in the index act as arrays."""
    if isinstance(index, tuple):
        return GetItem(tuple(_plain(part) for part in index))(as_tensor(x))
    return GetItem(_plain(index))(as_tensor(x))


def _plain(part: Any) -> Any:
    if isinstance(part, Tensor):
        part = part.data
    elif isinstance(part, list):
        part = backend.asarray(part, dtype=None if part else int)
    elif isinstance(part, np.ndarray):
        part = backend.asarray(part)
    if hasattr(part, "dtype") and part.dtype.kind not in "iub":
        raise IndexError(f"an index is made of integers or booleans; got dtype {part.dtype}")
    return part


def take_along_axis(x: Any, indices: Any, axis: int) -> Tensor:
    """The elements of x at `indices` along `axis`, as `numpy.take_along_axis`."""
    return TakeAlongAxis(_plain(indices), axis)(as_tensor(x))


def gather(x: Any, axis: int, indices: Any) -> Tensor:
    """`take_along_axis` with torch's order of arguments."""
    return take_along_axis(x, indices, axis)


def tril(x: Any, diagonal: int = 0) -> Tensor:
    """The last two axes with zeros above a diagonal."""
    x = as_tensor(x)
    return where(current.xp.tri(x.shape[-2], x.shape[-1], diagonal, dtype=bool), x, 0)


def triu(x: Any, diagonal: int = 0) -> Tensor:
    """The last two axes with zeros below a diagonal."""
    x = as_tensor(x)
    return where(~current.xp.tri(x.shape[-2], x.shape[-1], diagonal - 1, dtype=bool), x, 0)

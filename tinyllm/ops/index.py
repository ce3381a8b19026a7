"""Primitive ops that select elements: indexing, its adjoint, and gathering along an axis."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.forward_mode import Dual
from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.ops.axes import named_axes
from tinyllm.ops.choice import where

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
        self.index = own_index(index)

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x[self.index]

    def backward(self, gradient: Array) -> Any:
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
        self.index, self.shape = own_index(index), shape

    def forward(self, values: Any) -> Any:
        if isinstance(values, Tensor):
            return values  # a replay: backward needs only the index
        if isinstance(values, Dual):
            return values.through(lambda part: Scatter(self.index, self.shape)(part))  # linear
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

    def backward(self, gradient: Array) -> Any:
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
        self.indices, self.axis = own_index(indices), operator.index(axis)

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x[index_along_axis(self.indices, self.axis, x.shape)]

    def backward(self, gradient: Array) -> Any:
        return Scatter(index_along_axis(self.indices, self.axis, self.shape), self.shape)(gradient)


def index_along_axis(indices: Any, axis: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The full index that takes `indices` along `axis` and keeps every other position."""
    ndim = len(shape)
    if len(indices.shape) != ndim:
        raise ValueError(f"indices with {len(indices.shape)} axes, the tensor has shape {shape}")
    (axis,) = named_axes(axis, ndim)
    return tuple(
        indices if i == axis else current.xp.arange(n).reshape((-1,) + (1,) * (ndim - 1 - i))
        for i, n in enumerate(shape)
    )


def getitem(x: Any, index: Any) -> Tensor:
    """x[index]; Tensors, and sequences of integers or booleans that stand for one axis, act as arrays."""
    return GetItem(index)(as_tensor(x))


def own_index(index: Any) -> Any:
    """The index in slices, numbers, `...`, `None` and arrays, none of which its caller can change any more.

    As in NumPy, a tuple has a part for each axis, and every other sequence is an array; so is a tuple in a tuple.
    Raises IndexError for arrays of anything but integers or booleans.
    """
    return tuple([_own_part(part) for part in index]) if isinstance(index, tuple) else _own_part(index)


def _own_part(part: Any) -> Any:
    if part is None or part is Ellipsis or isinstance(part, int):
        return part
    if isinstance(part, slice):
        bounds = (part.start, part.stop, part.step)
        return slice(*[None if bound is None else operator.index(bound) for bound in bounds])
    if isinstance(part, np.integer) or (hasattr(part, "__index__") and not hasattr(part, "dtype")):
        return operator.index(part)
    array = current.xp.array(part.data if isinstance(part, Tensor) else part)
    if array.size == 0 and not hasattr(part, "dtype"):
        array = array.astype(int)  # an empty sequence holds no floats
    if array.dtype.kind not in "iub":
        raise IndexError(f"an index is made of integers or booleans; got dtype {array.dtype}")
    return array if array.dtype == bool else array.astype(int, copy=False)


def take_along_axis(x: Any, indices: Any, axis: int) -> Tensor:
    """The elements of x at `indices` along `axis`, as `numpy.take_along_axis`."""
    return TakeAlongAxis(indices, axis)(as_tensor(x))


def gather(x: Any, dim: int, index: Any) -> Tensor:
    """y[i, j, k] = x[index[i, j, k], j, k] for dim 0, likewise along any other: in the shape of `index`, as in torch.

    Raises ValueError where `index` has other axes than x, or a longer one than x besides `dim`.
    """
    x, index = as_tensor(x), own_index(index)
    (axis,) = named_axes(dim, x.ndim)
    if len(index.shape) != x.ndim or any(
        n > m for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True)) if i != axis
    ):
        raise ValueError(
            f"gather: index of shape {index.shape} along dim {dim} of shape {x.shape}; it needs as many axes, none of "
            "them longer but that one"
        )
    corner = tuple([slice(None) if i == axis else slice(n) for i, n in enumerate(index.shape)])
    return take_along_axis(x[corner], index, axis)


def tril(x: Any, diagonal: int = 0) -> Tensor:
    """The last two axes with zeros above a diagonal."""
    x = as_tensor(x)
    return where(current.xp.tri(x.shape[-2], x.shape[-1], diagonal, dtype=bool), x, x.dtype.type(0))


def triu(x: Any, diagonal: int = 0) -> Tensor:
    """The last two axes with zeros below a diagonal."""
    x = as_tensor(x)
    return where(~current.xp.tri(x.shape[-2], x.shape[-1], diagonal - 1, dtype=bool), x, x.dtype.type(0))

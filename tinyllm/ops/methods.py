"""Operators and methods of Tensor, and NumPy's functions on Tensors.

`TensorMethods` is where they are written; importing `tinyllm.ops` puts them on Tensor. NumPy functions called
on Tensors (`numpy.exp(x)`, `numpy.where(c, x, y)`) build a graph too: that is how an op's own forward and
backward, written for arrays, are differentiated when gradients of gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops import elementwise, index, matrix, reduce, shape
from tinyllm.ops.reduce import Axis

if TYPE_CHECKING:
    from tinyllm.backend import Array


def _compared(self: Any, other: Any, compare: Callable[[Any, Any], Any]) -> Any:
    other = other.data if isinstance(other, Tensor) else other
    return Tensor(compare(self.data, other))


class TensorMethods:
    """The part of Tensor that is made of ops."""

    __slots__ = ()

    def __add__(self, other: Any) -> Tensor:
        return elementwise.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return elementwise.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return elementwise.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return elementwise.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return elementwise.multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return elementwise.multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return elementwise.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return elementwise.divide(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return elementwise.power(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return elementwise.power(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return matrix.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return matrix.matmul(other, self)

    def __neg__(self) -> Tensor:
        return elementwise.negative(self)

    def __abs__(self) -> Tensor:
        return elementwise.absolute(self)

    def __getitem__(self, key: Any) -> Tensor:
        return index.getitem(self, key)

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(len(cast(Tensor, self))):
            yield index.getitem(self, i)

    # Comparisons carry no gradient: they return boolean Tensors without a graph.
    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return _compared(self, other, lambda a, b: a == b)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return _compared(self, other, lambda a, b: a != b)

    def __lt__(self, other: Any) -> Tensor:
        return _compared(self, other, lambda a, b: a < b)

    def __le__(self, other: Any) -> Tensor:
        return _compared(self, other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> Tensor:
        return _compared(self, other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> Tensor:
        return _compared(self, other, lambda a, b: a >= b)

    def any(self) -> bool:
        """Whether any element is true (not zero)."""
        return bool(backend.read(cast(Tensor, self).data.any()))

    def all(self) -> bool:
        """Whether all elements are true (not zero)."""
        return bool(backend.read(cast(Tensor, self).data.all()))

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The sum over `axis`."""
        return reduce.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The mean over `axis`."""
        return reduce.mean(self, axis, keepdims)

    def var(self, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Tensor:
        """The variance over `axis`, divided by n - correction."""
        return reduce.var(self, axis, keepdims, correction)

    def std(self, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Tensor:
        """The standard deviation over `axis`, divided by n - correction inside the root."""
        return reduce.std(self, axis, keepdims, correction)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The maximum over `axis`; equal maxima share the gradient equally."""
        return reduce.max(self, axis, keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The minimum over `axis`; equal minima share the gradient equally."""
        return reduce.min(self, axis, keepdims)

    def prod(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The product over `axis`."""
        return reduce.prod(self, axis, keepdims)

    def cumsum(self, axis: int) -> Tensor:
        """The running sum along `axis`."""
        return reduce.cumsum(self, axis)

    def argmax(self, axis: int | None = None) -> Array:
        """The position of the first maximum over `axis`, as an array of integers."""
        return cast("Array", cast(Tensor, self).data.argmax(axis=axis))

    def argmin(self, axis: int | None = None) -> Array:
        """The position of the first minimum over `axis`, as an array of integers."""
        return cast("Array", cast(Tensor, self).data.argmin(axis=axis))

    def reshape(self, *lengths: Any) -> Tensor:
        """The same elements in another shape; one length may be -1."""
        return shape.reshape(self, *lengths)

    def transpose(self, *axes: Any) -> Tensor:
        """The axes in the order given, reversed when none is given, as in NumPy."""
        return shape.transpose(self, *axes)

    def permute(self, *axes: Any) -> Tensor:
        """The axes in the order given."""
        return shape.transpose(self, *axes)

    @property
    def T(self) -> Tensor:
        """The axes reversed."""
        return shape.transpose(self)

    def swapaxes(self, first: int, second: int) -> Tensor:
        """Two axes exchanged."""
        return shape.swapaxes(self, first, second)

    def broadcast_to(self, lengths: Sequence[int]) -> Tensor:
        """This Tensor repeated to a shape."""
        return shape.broadcast_to(self, lengths)

    def squeeze(self, axis: int | tuple[int, ...] | None = None) -> Tensor:
        """This Tensor without axes of length 1."""
        return shape.squeeze(self, axis)

    def expand_dims(self, axis: int | tuple[int, ...]) -> Tensor:
        """This Tensor with new axes of length 1."""
        return shape.expand_dims(self, axis)

    def clip(self, low: float | None = None, high: float | None = None) -> Tensor:
        """This Tensor limited to [low, high]."""
        return elementwise.clip(self, low, high)

    def abs(self) -> Tensor:
        """The magnitude of each element."""
        return elementwise.absolute(self)

    def exp(self) -> Tensor:
        """e to the power of each element."""
        return elementwise.exp(self)

    def log(self) -> Tensor:
        """The natural logarithm of each element."""
        return elementwise.log(self)

    def sqrt(self) -> Tensor:
        """The square root of each element."""
        return elementwise.sqrt(self)

    def tanh(self) -> Tensor:
        """The hyperbolic tangent of each element."""
        return elementwise.tanh(self)

    def sigmoid(self) -> Tensor:
        """1 / (1 + e^-x) of each element."""
        return elementwise.sigmoid(self)

    def relu(self) -> Tensor:
        """max(x, 0) of each element."""
        return elementwise.relu(self)

    def astype(self, dtype: Any) -> Tensor:
        """This Tensor converted to `dtype`."""
        return elementwise.astype(self, dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        values = cast(Tensor, self).numpy()
        if copy is False and dtype is not None and values.dtype != dtype:
            raise ValueError(f"converting {values.dtype} to {dtype} needs a copy")
        return np.array(values, dtype=dtype) if copy else np.asarray(values, dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        if method != "__call__" or keywords:
            return NotImplemented
        if ufunc in UFUNCS:
            return UFUNCS[ufunc](*inputs)
        if ufunc in WITHOUT_GRADIENT:
            function = getattr(current.xp, ufunc.__name__)
            return Tensor(function(*[x.data if isinstance(x, Tensor) else x for x in inputs]))
        return NotImplemented

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, keywords: Any) -> Any:
        if function in FUNCTIONS:
            return FUNCTIONS[function](*args, **keywords)
        return NotImplemented


UFUNCS: dict[Any, Callable[..., Tensor]] = {
    np.add: elementwise.add,
    np.subtract: elementwise.subtract,
    np.multiply: elementwise.multiply,
    np.divide: elementwise.divide,
    np.negative: elementwise.negative,
    np.power: elementwise.power,
    np.square: elementwise.square,
    np.exp: elementwise.exp,
    np.expm1: elementwise.expm1,
    np.log: elementwise.log,
    np.log1p: elementwise.log1p,
    np.sqrt: elementwise.sqrt,
    np.tanh: elementwise.tanh,
    np.sin: elementwise.sin,
    np.cos: elementwise.cos,
    np.absolute: elementwise.absolute,
    np.maximum: elementwise.maximum,
    np.minimum: elementwise.minimum,
    np.matmul: matrix.matmul,
}

WITHOUT_GRADIENT = {
    np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal, np.sign, np.floor, np.ceil,
    np.isfinite, np.isnan, np.isinf, np.logical_and, np.logical_or, np.logical_not,
}  # fmt: skip

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.sum: reduce.sum,
    np.mean: reduce.mean,
    np.max: reduce.max,
    np.min: reduce.min,
    np.prod: reduce.prod,
    np.cumsum: reduce.cumsum,
    np.reshape: shape.reshape,
    np.transpose: shape.transpose,
    np.swapaxes: shape.swapaxes,
    np.broadcast_to: shape.broadcast_to,
    np.concatenate: shape.concatenate,
    np.stack: shape.stack,
    np.squeeze: shape.squeeze,
    np.expand_dims: shape.expand_dims,
    np.pad: lambda x, widths, constant_values=0.0: shape.pad(x, widths, constant_values),
    np.where: elementwise.where,
    np.clip: elementwise.clip,
    np.take_along_axis: index.take_along_axis,
    np.einsum: matrix.einsum,
    np.shape: lambda x: x.shape,
    np.zeros_like: lambda x: Tensor(current.xp.zeros_like(x.data)),
    np.ones_like: lambda x: Tensor(current.xp.ones_like(x.data)),
}


def attach() -> None:
    """Put the operators and methods on Tensor."""
    for name, member in vars(TensorMethods).items():
        if name not in (
            "__module__",
            "__qualname__",
            "__doc__",
            "__slots__",
            "__hash__",
            "__dict__",
            "__weakref__",
        ):
            setattr(Tensor, name, member)

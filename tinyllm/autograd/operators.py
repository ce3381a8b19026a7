"""Operators and methods of Tensor that are ops, and NumPy's functions on Tensors.

NumPy functions called on Tensors (`numpy.exp(x)`, `numpy.where(c, x, y)`) build a graph too: that is how a formula,
written for arrays, is differentiated when gradients of gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, cast

import numpy as np

from tinyllm import backend
from tinyllm.backend import Array

Axis = int | tuple[int, ...] | None

ops: Any = None
"""The package `tinyllm.ops`, which stands above this one and puts itself here when it is imported."""


class Operators:
    """The part of Tensor that is made of ops."""

    __slots__ = ()
    data: Any

    def _compared(self, other: Any, compare: Callable[[Any, Any], Any]) -> Self:
        """A boolean Tensor without a graph."""
        make: Any = type(self)
        return cast(Self, make(compare(self.data, other.data if isinstance(other, Operators) else other)))

    def __add__(self, other: Any) -> Self:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Self:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Self:
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Self:
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Self:
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> Self:
        return ops.multiply(other, self)

    def __truediv__(self, other: Any) -> Self:
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Self:
        return ops.divide(other, self)

    def __pow__(self, other: Any) -> Self:
        return ops.power(self, other)

    def __rpow__(self, other: Any) -> Self:
        return ops.power(other, self)

    def __matmul__(self, other: Any) -> Self:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Self:
        return ops.matmul(other, self)

    def __neg__(self) -> Self:
        return ops.negative(self)

    def __abs__(self) -> Self:
        return ops.absolute(self)

    def __getitem__(self, key: Any) -> Self:
        return ops.getitem(self, key)

    def __iter__(self) -> Iterator[Self]:
        for i in range(len(cast(Any, self))):
            yield ops.getitem(self, i)

    # Comparisons carry no gradient: they return boolean Tensors without a graph.
    def __eq__(self, other: object) -> Self:  # type: ignore[override]
        return self._compared(other, lambda a, b: a == b)

    def __ne__(self, other: object) -> Self:  # type: ignore[override]
        return self._compared(other, lambda a, b: a != b)

    def __lt__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a < b)

    def __le__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a >= b)

    def any(self) -> bool:
        """Whether any element is true (not zero)."""
        return bool(backend.read(self.data.any()))

    def all(self) -> bool:
        """Whether all elements are true (not zero)."""
        return bool(backend.read(self.data.all()))

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Self:
        """The sum over `axis`."""
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Self:
        """The mean over `axis`."""
        return ops.mean(self, axis, keepdims)

    def var(self, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Self:
        """The variance over `axis`, divided by n - correction."""
        return ops.var(self, axis, keepdims, correction)

    def std(self, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Self:
        """The standard deviation over `axis`, divided by n - correction inside the root."""
        return ops.std(self, axis, keepdims, correction)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Self:
        """The maximum over `axis`; equal maxima share the gradient equally."""
        return ops.max(self, axis, keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Self:
        """The minimum over `axis`; equal minima share the gradient equally."""
        return ops.min(self, axis, keepdims)

    def prod(self, axis: Axis = None, keepdims: bool = False) -> Self:
        """The product over `axis`."""
        return ops.prod(self, axis, keepdims)

    def cumsum(self, axis: int) -> Self:
        """The running sum along `axis`."""
        return ops.cumsum(self, axis)

    def argmax(self, axis: int | None = None) -> Array:
        """The position of the first maximum over `axis`, as an array of integers."""
        return self.data.argmax(axis=axis)

    def argmin(self, axis: int | None = None) -> Array:
        """The position of the first minimum over `axis`, as an array of integers."""
        return self.data.argmin(axis=axis)

    def reshape(self, *lengths: Any) -> Self:
        """The same elements in another shape; one length may be -1."""
        return ops.reshape(self, *lengths)

    def transpose(self, *axes: Any) -> Self:
        """The axes in the order given, reversed when none is given, as in NumPy."""
        return ops.transpose(self, *axes)

    def permute(self, *axes: Any) -> Self:
        """The axes in the order given."""
        return ops.transpose(self, *axes)

    @property
    def T(self) -> Self:
        """The axes reversed."""
        return ops.transpose(self)

    def swapaxes(self, first: int, second: int) -> Self:
        """Two axes exchanged."""
        return ops.swapaxes(self, first, second)

    def broadcast_to(self, lengths: Sequence[int]) -> Self:
        """This Tensor repeated to a shape."""
        return ops.broadcast_to(self, lengths)

    def squeeze(self, axis: int | tuple[int, ...] | None = None) -> Self:
        """This Tensor without axes of length 1."""
        return ops.squeeze(self, axis)

    def expand_dims(self, axis: int | tuple[int, ...]) -> Self:
        """This Tensor with new axes of length 1."""
        return ops.expand_dims(self, axis)

    def clip(self, low: float | None = None, high: float | None = None) -> Self:
        """This Tensor limited to [low, high]."""
        return ops.clip(self, low, high)

    def abs(self) -> Self:
        """The magnitude of each element."""
        return ops.absolute(self)

    def exp(self) -> Self:
        """e to the power of each element."""
        return ops.exp(self)

    def log(self) -> Self:
        """The natural logarithm of each element."""
        return ops.log(self)

    def sqrt(self) -> Self:
        """The square root of each element."""
        return ops.sqrt(self)

    def tanh(self) -> Self:
        """The hyperbolic tangent of each element."""
        return ops.tanh(self)

    def sigmoid(self) -> Self:
        """1 / (1 + e^-x) of each element."""
        return ops.sigmoid(self)

    def relu(self) -> Self:
        """max(x, 0) of each element."""
        return ops.relu(self)

    def astype(self, dtype: Any) -> Self:
        """This Tensor converted to `dtype`."""
        return ops.astype(self, dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        values = cast(Any, self).numpy()
        if copy is False and dtype is not None and values.dtype != dtype:
            raise ValueError(f"converting {values.dtype} to {dtype} needs a copy")
        return np.array(values, dtype=dtype) if copy else np.asarray(values, dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        return ops.apply_ufunc(ufunc, method, inputs, keywords)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, keywords: Any) -> Any:
        return ops.apply_function(function, args, keywords)

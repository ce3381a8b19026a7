"""Operators and methods of Tensor that are ops, and NumPy's functions on Tensors.

A method that is a function of `tinyllm.ops` stands here by its name alone: `x.softmax(axis)` is `ops.softmax(x, axis)`,
with the docstring of that function.

NumPy functions called on Tensors (`numpy.exp(x)`, `numpy.where(c, x, y)`) build a graph too: that is how a formula,
written for arrays, is differentiated when gradients of gradients are asked for.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import is_grad_enabled
from tinyllm.backend import Array, cuda

Axis = int | Sequence[int] | None

ops: Any = None
"""The package `tinyllm.ops`, which stands above this one and puts itself here when it is imported."""


def _in_place(operator: str) -> Callable[[Any, Any], Any]:
    """The operator `x += y`, or another: x = x + y, which names a new Tensor.

    A leaf that requires a gradient is a parameter, and others hold it: within `no_grad` it takes the new values, as in
    torch; elsewhere it raises RuntimeError.
    """

    def change(self: Any, other: Any) -> Any:
        changed = getattr(self, f"__{operator}__")(other)
        if not (self.requires_grad and self.is_leaf):
            return changed
        if is_grad_enabled():
            raise RuntimeError(
                f"__i{operator}__ in place on a leaf that requires a gradient: write x = x + y for another Tensor, or "
                "change the leaf within no_grad()"
            )
        if changed.shape != self.shape:
            raise ValueError(f"__i{operator}__ in place: shape {self.shape} cannot become {changed.shape}")
        self.data = changed.data
        return self

    return change


def _converted(dtype: str) -> Callable[[Operators], Any]:
    """torch's method for a conversion to `dtype`."""

    def convert(self: Operators) -> Any:
        return ops.astype(self, dtype)

    convert.__doc__ = f"This Tensor converted to {dtype}."
    return convert


class Operators:
    """The part of Tensor that is made of ops."""

    __slots__ = ()
    data: Any
    op: Any
    requires_grad: bool

    def _compared(self, other: Any, compare: Callable[[Any, Any], Any]) -> Self:
        """A Tensor without a graph."""
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

    def __floordiv__(self, other: Any) -> Self:
        return ops.floor_divide(self, other)

    def __rfloordiv__(self, other: Any) -> Self:
        return ops.floor_divide(other, self)

    def __mod__(self, other: Any) -> Self:
        return ops.remainder(self, other)

    def __rmod__(self, other: Any) -> Self:
        return ops.remainder(other, self)

    def __pos__(self) -> Self:
        return self

    def __neg__(self) -> Self:
        return ops.negative(self)

    def __abs__(self) -> Self:
        return ops.absolute(self)

    def __getitem__(self, key: Any) -> Self:
        return ops.getitem(self, key)

    def __iter__(self) -> Iterator[Self]:
        for i in range(len(cast(Any, self))):
            yield ops.getitem(self, i)

    def __setitem__(self, key: Any, value: Any) -> None:
        """x[key] = value: x has a new array, and what holds the old one, such as a graph, keeps it.

        Raises TypeError where a gradient would be lost, and for a view, with which the whole would not change.
        """
        this: Any = self
        recorded = this.requires_grad or getattr(value, "requires_grad", False)
        # Dual numbers, inside `jvp`, are no array, and have no base.
        if (
            this.op is not None
            or (recorded and is_grad_enabled())
            or getattr(self.data, "base", key) is not None
        ):
            raise TypeError(
                "a Tensor that a graph holds, or that is a view of another one, is not changed in place: "
                "ops.where(mask, value, x) and x.masked_fill(mask, value) make another one; "
                "x.data[...] = value changes the array beneath"
            )
        changed = self.data.copy()
        changed[ops.index.own_index(key)] = value.data if isinstance(value, Operators) else value
        self.data = changed

    # Comparisons and logic carry no gradient: they return Tensors without a graph.
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

    def __and__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a & b)

    def __or__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a | b)

    def __xor__(self, other: Any) -> Self:
        return self._compared(other, lambda a, b: a ^ b)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Self:
        return self._compared(self, lambda a, _: ~a)

    # Functions of `tinyllm.ops`, which installs them here, under the same name.
    abs: Callable[..., Self]
    absolute: Callable[..., Self]
    add: Callable[..., Self]
    all: Callable[..., Self]
    allclose: Callable[..., builtins.bool]
    amax: Callable[..., Self]
    amin: Callable[..., Self]
    any: Callable[..., Self]
    argmax: Callable[..., Self]
    argmin: Callable[..., Self]
    argsort: Callable[..., Self]
    array_equal: Callable[..., builtins.bool]
    astype: Callable[..., Self]
    broadcast_to: Callable[..., Self]
    ceil: Callable[..., Self]
    chunk: Callable[..., list[Self]]
    clamp: Callable[..., Self]
    clip: Callable[..., Self]
    clone: Callable[..., Self]
    contiguous: Callable[..., Self]
    copy: Callable[..., Self]
    cos: Callable[..., Self]
    cumprod: Callable[..., Self]
    cumsum: Callable[..., Self]
    diagonal: Callable[..., Self]
    div: Callable[..., Self]
    dot: Callable[..., Self]
    elu: Callable[..., Self]
    erf: Callable[..., Self]
    exp: Callable[..., Self]
    expand: Callable[..., Self]
    expand_dims: Callable[..., Self]
    expm1: Callable[..., Self]
    flatten: Callable[..., Self]
    flip: Callable[..., Self]
    floor: Callable[..., Self]
    gather: Callable[..., Self]
    gelu: Callable[..., Self]
    inner: Callable[..., Self]
    isclose: Callable[..., Self]
    isfinite: Callable[..., Self]
    isinf: Callable[..., Self]
    isnan: Callable[..., Self]
    leaky_relu: Callable[..., Self]
    log: Callable[..., Self]
    log10: Callable[..., Self]
    log1p: Callable[..., Self]
    log2: Callable[..., Self]
    log_sigmoid: Callable[..., Self]
    log_softmax: Callable[..., Self]
    logaddexp: Callable[..., Self]
    logsigmoid: Callable[..., Self]
    logsumexp: Callable[..., Self]
    masked_fill: Callable[..., Self]
    matmul: Callable[..., Self]
    max: Callable[..., Self]
    maximum: Callable[..., Self]
    mean: Callable[..., Self]
    min: Callable[..., Self]
    minimum: Callable[..., Self]
    moveaxis: Callable[..., Self]
    mul: Callable[..., Self]
    neg: Callable[..., Self]
    norm: Callable[..., Self]
    outer: Callable[..., Self]
    pad: Callable[..., Self]
    permute: Callable[..., Self]
    pow: Callable[..., Self]
    power: Callable[..., Self]
    prod: Callable[..., Self]
    ravel: Callable[..., Self]
    relu: Callable[..., Self]
    repeat: Callable[..., Self]
    repeat_interleave: Callable[..., Self]
    reshape: Callable[..., Self]
    roll: Callable[..., Self]
    round: Callable[..., Self]
    rsqrt: Callable[..., Self]
    scatter_add: Callable[..., Self]
    sigmoid: Callable[..., Self]
    sign: Callable[..., Self]
    silu: Callable[..., Self]
    sin: Callable[..., Self]
    softmax: Callable[..., Self]
    softplus: Callable[..., Self]
    sort: Callable[..., Self]
    split: Callable[..., list[Self]]
    sqrt: Callable[..., Self]
    square: Callable[..., Self]
    squeeze: Callable[..., Self]
    std: Callable[..., Self]
    sub: Callable[..., Self]
    sum: Callable[..., Self]
    swapaxes: Callable[..., Self]
    take_along_axis: Callable[..., Self]
    tan: Callable[..., Self]
    tanh: Callable[..., Self]
    tile: Callable[..., Self]
    topk: Callable[..., tuple[Self, Self]]
    trace: Callable[..., Self]
    transpose: Callable[..., Self]
    tril: Callable[..., Self]
    triu: Callable[..., Self]
    type: Callable[..., Self]
    unsqueeze: Callable[..., Self]
    var: Callable[..., Self]
    view: Callable[..., Self]

    @property
    def T(self) -> Self:
        """The axes reversed."""
        return ops.transpose(self)

    @property
    def mT(self) -> Self:
        """The last two axes exchanged."""
        return ops.swapaxes(self, -1, -2)

    def tolist(self) -> Any:
        """The values as Python numbers in nested lists."""
        return backend.to_numpy(self.data).tolist()

    def numel(self) -> builtins.int:
        """The number of elements, as in torch."""
        return int(self.data.size)

    def dim(self) -> builtins.int:
        """The number of axes, as in torch."""
        return len(self.data.shape)

    def t(self) -> Self:
        """A matrix transposed, as in torch."""
        return ops.transpose(self)

    @property
    def device(self) -> str:
        """Where the values lie, in torch's words: "cpu" or "cuda"."""
        return cuda.here()

    def to(self, *targets: Any, dtype: Any = None, device: Any = None, non_blocking: Any = False) -> Self:
        """This Tensor converted to a dtype, or to that of another Tensor.

        All arrays lie on one device (`use_backend`): it is accepted here, and raises ValueError if it is another.
        """
        wanted = cuda.wanted_dtype(*targets, dtype, device)
        return self if wanted is None else ops.astype(self, wanted)

    def cpu(self) -> Self:
        """This Tensor: `numpy()` fetches the values from wherever they lie."""
        return self

    float, double, half = map(_converted, ("float32", "float64", "float16"))
    int, long, bool = map(_converted, ("int32", "int64", "bool"))
    __iadd__, __isub__, __imul__, __itruediv__ = map(_in_place, ("add", "sub", "mul", "truediv"))
    __ifloordiv__, __imod__, __ipow__, __imatmul__ = map(_in_place, ("floordiv", "mod", "pow", "matmul"))

    def __array__(self, dtype: Any = None, copy: builtins.bool | None = None) -> Array:
        values = cast(Any, self).numpy()
        if copy is False and dtype is not None and values.dtype != dtype:
            raise ValueError(f"converting {values.dtype} to {dtype} needs a copy")
        return np.array(values, dtype=dtype) if copy else np.asarray(values, dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        return ops.apply_ufunc(ufunc, method, inputs, keywords)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, keywords: Any) -> Any:
        return ops.apply_function(function, args, keywords)


def install_methods(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Make each function that `Operators` names a method of it."""
    for name in set(inspect.get_annotations(Operators)) & set(functions):
        setattr(Operators, name, functions[name])

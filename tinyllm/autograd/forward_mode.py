"""Forward-mode differentiation: dual numbers, on which formulas compute as they do on arrays.

A dual number x + t e, where e^2 = 0, carries a tangent t beside the value x, and f(x + t e) = f(x) + f'(x) t e. NumPy
hands its functions on to Dual, which has a rule for each. The rules are the derivatives of mathematics, and know
nothing of any op's backward. Value and tangent are arrays, Tensors (so that the result can be differentiated again), or
dual numbers of an outer `jvp`: each `jvp` has a level of its own, and to those of one level all others are constants.

Sources: Griewank and Walther, "Evaluating derivatives", 2008, chapter 3; levels: Siskind and Pearlmutter, "Nesting
forward-mode AD in a functional framework", 2008.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from tinyllm.autograd.operators import Operators
from tinyllm.backend import current, ignore_non_finite, read


class Dual(NDArrayOperatorsMixin):
    """An array with a tangent of the same shape and dtype; inside `jvp` it stands where Tensors have an array.

    A tangent of None is that of a constant.
    """

    __slots__ = ("level", "tangent", "value")
    __array_priority__ = 1000  # for arrays of a device

    def __init__(self, level: int, value: Any, tangent: Any) -> None:
        if tangent is not None and tangent.dtype != value.dtype:
            tangent = tangent.astype(value.dtype)
        if tangent is not None and tangent.shape != value.shape:
            tangent = current.xp.broadcast_to(tangent, value.shape)
        self.level, self.value, self.tangent = level, value, tangent

    def through(self, function: Callable[[Any], Any], slope: Callable[[Any], Any] | None = None) -> Dual:
        """A function of one argument that NumPy cannot hand on, by its derivative `slope`; without one it is linear."""
        tangent = self.tangent
        if tangent is not None:
            tangent = function(tangent) if slope is None else tangent * slope(self.value)
        return Dual(self.level, function(self.value), tangent)

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        shape: tuple[int, ...] = self.value.shape
        return shape

    @property
    def dtype(self) -> Any:
        """The dtype of value and tangent."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def T(self) -> Dual:
        """The axes reversed."""
        return self.transpose()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Dual:
        return self.through(lambda part: part[index])

    def __iter__(self) -> Iterator[Dual]:
        return (self[i] for i in range(len(self)))

    def reshape(self, *shape: Any) -> Dual:
        """The same elements in another shape."""
        return self.through(lambda part: part.reshape(*shape))

    def transpose(self, *axes: Any) -> Dual:
        """The axes in another order."""
        return self.through(lambda part: part.transpose(*axes))

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        """Converted to `dtype`, in which integers and booleans have no tangent."""
        if np.dtype(dtype).kind != "f":
            return primal(self).astype(dtype)
        return self.through(lambda part: part.astype(dtype))

    def copy(self) -> Dual:
        """Itself: nothing changes a dual number in place."""
        return self

    def __repr__(self) -> str:
        return f"Dual(value={self.value!r}, tangent={self.tangent!r})"

    def _as_numbers(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses."""
        raise TypeError(
            "inside jvp this would make plain numbers of what carries a tangent, and lose it: compute with the Tensor "
            "itself, or call .detach() first if a constant is meant"
        )

    __array__ = __float__ = __int__ = __index__ = __complex__ = __bool__ = __setitem__ = _as_numbers
    item = tolist = _as_numbers

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        if method != "__call__" or keywords:
            _refuse(f"{ufunc.__name__}{'' if method == '__call__' else '.' + method}", keywords)
        if ufunc in WITHOUT_TANGENT:
            return _call(ufunc, *map(primal, inputs))
        if ufunc in MULTILINEAR:
            return _multilinear(ufunc, *inputs)
        if ufunc not in DERIVATIVES:
            _refuse(ufunc.__name__)
        level = top(inputs)
        values = [value_of(x, level) for x in inputs]
        y = _call(ufunc, *values)
        shares = [
            _share(rule, tangent_of(x, level), y, *values)
            for rule, x in zip(DERIVATIVES[ufunc], inputs, strict=True)
            if moves(x, level)
        ]
        return Dual(level, y, _total(shares))

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Any:
        if function in FUNCTIONS:
            return FUNCTIONS[function](*args, **keywords)
        if function in LINEAR:
            return _linear(function, *args, **keywords)
        if function in MULTILINEAR:
            return _multilinear(function, *args, **keywords)
        if function in WITHOUT_TANGENT:
            return _call(function, *map(primal, args), **keywords)
        return _refuse(function.__name__)


def _inside(x: Any) -> Any:
    """What a Tensor holds; anything else is itself."""
    return x.data if isinstance(x, Operators) else x


def level_of(x: Any) -> int:
    """Which `jvp` a dual number, or a Tensor that holds one, belongs to; 0 for what is neither."""
    x = _inside(x)
    return x.level if isinstance(x, Dual) else 0


def top(values: Sequence[Any]) -> int:
    """The innermost level among the values."""
    return max(map(level_of, values))


def moves(x: Any, level: int) -> bool:
    """Whether x has a tangent of this level."""
    return level_of(x) == level and _inside(x).tangent is not None


def value_of(x: Any, level: int) -> Any:
    """The value of a dual number of this level; everything else is its own value."""
    return _inside(x).value if level_of(x) == level else x


def tangent_of(x: Any, level: int) -> Any:
    """The tangent of a dual number of this level; zeros for everything else."""
    return _inside(x).tangent if moves(x, level) else current.xp.zeros_like(primal(x))


def primal(x: Any) -> Any:
    """The array inside a Tensor or a dual number, without tangents of any level; anything else is itself."""
    while isinstance(x, (Dual, Operators)):
        x = x.value if isinstance(x, Dual) else x.data
    return x


def _call(function: Any, *args: Any, **keywords: Any) -> Any:
    """A function of NumPy as the method that arrays and Tensors have of it, or the library's that computes."""
    name = function.__name__
    if name in ("sum", "mean", "max", "min", "prod", "cumsum", "swapaxes"):
        return getattr(args[0], name)(*args[1:], **keywords)
    return getattr(current.xp, name)(*args, **keywords)


def _total(shares: Sequence[Any]) -> Any:
    """The sum of the shares in a tangent; None of none."""
    return functools.reduce(operator.add, shares) if shares else None


def _refuse(name: str, keywords: Any = ()) -> NoReturn:
    given = f" with {', '.join(keywords)}=" if keywords else ""
    raise TypeError(
        f"jvp has no rule for numpy.{name}{given}; write the formula with functions that have one (see "
        "tinyllm/autograd/forward_mode.py), or hand a Dual on with .through(function, slope)"
    )


# ---- Functions of single elements --------------------------------------------------------------

Rule = Callable[..., Any]


def _share(rule: Rule, t: Any, y: Any, *values: Any) -> Any:
    """The share of one operand in the tangent of y; where the operand does not move, 0, however steep y is there."""
    with ignore_non_finite():
        share = rule(t, y, *values)
    lost = np.isnan(primal(share)) & (primal(t) == 0) & ~np.isnan(primal(y))
    return current.xp.where(lost, 0, share) if read(lost.any()) else share


def _chosen(t: Any, equal: Any, not_chosen: Any) -> Any:
    """The tangent of an operand of maximum or minimum: half of it where both are equal."""
    return current.xp.where(not_chosen, 0, current.xp.where(equal, t / 2, t))


def _sigmoid(x: Any) -> Any:
    small = np.exp(-np.abs(x))  # at most 1, so that nothing overflows
    return np.where(primal(x) > 0, 1, small) / (1 + small)


def _of_maximum(t: Any, y: Any, a: Any, b: Any) -> Any:
    a, b = primal(a), primal(b)
    return _chosen(t, a == b, a < b)


def _of_minimum(t: Any, y: Any, a: Any, b: Any) -> Any:
    a, b = primal(a), primal(b)
    return _chosen(t, a == b, a > b)


def _of_base(t: Any, y: Any, a: Any, b: Any) -> Any:
    """b a^(b - 1), which is 0 for b = 0 whatever a is."""
    if isinstance(b, (int, float)):
        return t * (b * a ** ((b or 1) - 1))
    return t * (b * a ** (current.xp.where(primal(b) == 0, 1, b) - 1))


def _of_exponent(t: Any, y: Any, a: Any, b: Any) -> Any:
    """a^b ln a, which is 0 for a = 0 and b >= 0."""
    is_zero = (primal(a) == 0) & (primal(b) >= 0)
    return t * (y * current.xp.log(current.xp.where(is_zero, 1, a)))


def _of_logarithm(t: Any, y: Any, x: Any, base: float = math.e) -> Any:
    """1 / (x ln base); NaN where the logarithm is NaN."""
    return t / (current.xp.where(primal(x) < 0, math.nan, x) * math.log(base))


def _second(rule: Rule) -> Rule:
    """The rule for the first operand, for the second."""
    return lambda t, y, a, b: rule(t, y, b, a)


DERIVATIVES: dict[Any, tuple[Rule, ...]] = {
    np.add: (lambda t, y, a, b: t, lambda t, y, a, b: t),
    np.subtract: (lambda t, y, a, b: t, lambda t, y, a, b: -t),
    np.multiply: (lambda t, y, a, b: t * b, lambda t, y, a, b: a * t),
    np.divide: (lambda t, y, a, b: t / b, lambda t, y, a, b: -t * y / b),
    np.power: (_of_base, _of_exponent),
    np.maximum: (_of_maximum, _second(_of_maximum)),
    np.minimum: (_of_minimum, _second(_of_minimum)),
    np.remainder: (lambda t, y, a, b: t, lambda t, y, a, b: -t * (primal(a) // primal(b))),
    np.logaddexp: (
        lambda t, y, a, b: t * _sigmoid(a - b),
        lambda t, y, a, b: t * _sigmoid(b - a),
    ),
    np.hypot: (lambda t, y, a, b: t * a / y, lambda t, y, a, b: t * b / y),
    np.arctan2: (lambda t, y, a, b: t * b / (a * a + b * b), lambda t, y, a, b: -t * a / (a * a + b * b)),
    np.positive: (lambda t, y, x: t,),
    np.negative: (lambda t, y, x: -t,),
    np.absolute: (lambda t, y, x: t * current.xp.sign(primal(x)),),
    np.square: (lambda t, y, x: 2 * x * t,),
    np.sqrt: (lambda t, y, x: t / (2 * y),),
    np.cbrt: (lambda t, y, x: t / (3 * y * y),),
    np.reciprocal: (lambda t, y, x: -t * y * y,),
    np.exp: (lambda t, y, x: t * y,),
    np.exp2: (lambda t, y, x: t * y * math.log(2),),
    np.expm1: (lambda t, y, x: t * (y + 1),),
    np.log: (_of_logarithm,),
    np.log2: (lambda t, y, x: _of_logarithm(t, y, x, 2),),
    np.log10: (lambda t, y, x: _of_logarithm(t, y, x, 10),),
    np.log1p: (lambda t, y, x: _of_logarithm(t, y, 1 + x),),
    np.sin: (lambda t, y, x: t * current.xp.cos(x),),
    np.cos: (lambda t, y, x: -t * current.xp.sin(x),),
    np.tan: (lambda t, y, x: t * (1 + y * y),),
    np.arcsin: (lambda t, y, x: t / current.xp.sqrt(1 - x * x),),
    np.arccos: (lambda t, y, x: -t / current.xp.sqrt(1 - x * x),),
    np.arctan: (lambda t, y, x: t / (1 + x * x),),
    np.sinh: (lambda t, y, x: t * current.xp.cosh(x),),
    np.cosh: (lambda t, y, x: t * current.xp.sinh(x),),
    np.tanh: (lambda t, y, x: t * (1 - y * y),),
}
"""The share of each operand in the tangent of y = f(a, b), from its tangent t, y, and the operands."""

# ---- Functions of whole arrays -----------------------------------------------------------------


def _linear(function: Any, x: Any, *rest: Any, **keywords: Any) -> Any:
    """A function that is linear in its first argument, an array or a sequence of them: tangents go through it too."""
    if not isinstance(x, (list, tuple)):
        return x.through(lambda part: _call(function, part, *rest, **keywords))
    level = top(x)
    y = _call(function, [value_of(each, level) for each in x], *rest, **keywords)
    if not any(moves(each, level) for each in x):
        return Dual(level, y, None)
    return Dual(level, y, _call(function, [tangent_of(each, level) for each in x], *rest, **keywords))


def _multilinear(function: Any, *args: Any, **keywords: Any) -> Dual:
    """A sum of products: one tangent in the place of its value at a time."""
    level = top(args)
    values = [value_of(x, level) for x in args]
    shares = [
        _call(function, *values[:i], tangent_of(x, level), *values[i + 1 :], **keywords)
        for i, x in enumerate(args)
        if moves(x, level)
    ]
    return Dual(level, _call(function, *values, **keywords), _total(shares))


def _where(condition: Any, *choices: Any) -> Any:
    if not choices:
        return current.xp.where(primal(condition))
    condition, level = primal(condition), top(choices)
    if level == 0:
        return current.xp.where(condition, *choices)
    y = current.xp.where(condition, *[value_of(x, level) for x in choices])
    if not any(moves(x, level) for x in choices):
        return Dual(level, y, None)
    tangents = [tangent_of(x, level) if moves(x, level) else 0 for x in choices]
    return Dual(level, y, current.xp.where(condition, *tangents))


def _clip(x: Any, low: Any = None, high: Any = None) -> Any:
    """At a bound the tangent is that of x, and that of NaN is 0."""
    x = _where(primal(x) == primal(x), x, primal(x))
    if low is not None:
        x = _where((primal(x) < primal(low)) | (primal(low) != primal(low)), low, x)
    if high is not None:
        x = _where((primal(x) > primal(high)) | (primal(high) != primal(high)), high, x)
    return x


def _extreme(function: Any) -> Rule:
    """max or min, whose tangent is the mean of those of all elements that equal it; among NaN, NaN is the extreme."""

    def rule(x: Dual, axis: Any = None, out: None = None, keepdims: bool = False) -> Dual:
        values, y = primal(x), _call(function, x.value, axis=axis, keepdims=keepdims)
        if x.tangent is None:
            return Dual(x.level, y, None)
        is_extreme = (values == _call(function, values, axis=axis, keepdims=True)) | (values != values)
        count = is_extreme.sum(axis=axis, keepdims=keepdims).astype(x.dtype)
        total = current.xp.where(is_extreme, x.tangent, 0).sum(axis=axis, keepdims=keepdims)
        return Dual(x.level, y, total / count)

    return rule


def _running_products(x: Any, axis: int) -> Any:
    """Running products, each of the products of the 1, 2, 4, ... factors up to it: right at zeros too."""
    before, width, n = (slice(None),) * axis, 1, x.shape[axis]
    while width < n:
        products = x[(*before, slice(width, None))] * x[(*before, slice(n - width))]
        x = current.xp.concatenate([x[(*before, slice(width))], products], axis=axis)
        width *= 2
    return x


def _cumprod(x: Dual, axis: int | None = None) -> Dual:
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis % x.ndim)
    return Dual(x.level, _call(np.cumprod, x.value, axis=axis), _running_products(x, axis).tangent)


def _prod(x: Dual, axis: Any = None, keepdims: bool = False) -> Dual:
    value = x.value.prod(axis=axis, keepdims=keepdims)
    if not x.size:
        return Dual(x.level, value, _linear(np.sum, x, axis=axis, keepdims=keepdims).tangent)
    if not x.shape:
        return Dual(x.level, value, x.tangent)
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    reduced = [each % x.ndim for each in axes]
    kept = [each for each in range(x.ndim) if each not in reduced]
    rows = x.transpose((*kept, *reduced)).reshape((*[x.shape[each] for each in kept], -1))
    return Dual(x.level, value, _running_products(rows, len(kept))[..., -1].reshape(value.shape).tangent)


def _pad(x: Dual, widths: Any, constant_values: Any = 0) -> Dual:
    padded = x.through(lambda part: current.xp.pad(part, widths, constant_values=0))
    return Dual(x.level, current.xp.pad(x.value, widths, constant_values=constant_values), padded.tangent)


def _sort(x: Dual, axis: int = -1, **keywords: Any) -> Any:
    order = np.argsort(primal(x), axis=axis, **keywords)
    return np.take_along_axis(x, order, axis)


FUNCTIONS: dict[Any, Rule] = {
    np.where: _where,
    np.clip: lambda a, a_min=None, a_max=None, min=None, max=None: _clip(
        a, a_min if min is None else min, a_max if max is None else max
    ),
    np.max: _extreme(np.max),
    np.min: _extreme(np.min),
    np.prod: _prod,
    np.cumprod: _cumprod,
    np.pad: _pad,
    np.sort: _sort,
}
LINEAR = {
    np.sum, np.mean, np.cumsum, np.diff, np.reshape, np.ravel, np.transpose, np.swapaxes, np.moveaxis, np.squeeze,
    np.expand_dims, np.broadcast_to, np.flip, np.roll, np.repeat, np.tile, np.diagonal, np.diag, np.trace, np.tril,
    np.triu, np.take, np.take_along_axis, np.concatenate, np.stack, np.vstack, np.hstack,
}  # fmt: skip
MULTILINEAR = {np.matmul, np.einsum, np.dot, np.inner, np.outer, np.tensordot}
WITHOUT_TANGENT = {
    np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal, np.logical_and, np.logical_or,
    np.logical_not, np.isfinite, np.isnan, np.isinf, np.isclose, np.allclose, np.array_equal, np.any, np.all, np.sign,
    np.floor, np.ceil, np.rint, np.round, np.trunc, np.floor_divide, np.argmax, np.argmin, np.argsort, np.nonzero,
    np.count_nonzero, np.shape, np.ndim, np.size, np.zeros_like, np.ones_like, np.empty_like,
}  # fmt: skip
"""What is constant in pieces, and functions of shapes: they return plain arrays."""


def _add_methods() -> None:
    """The methods of arrays that are functions of NumPy."""

    def method(function: Any) -> Any:
        def call(self: Dual, *args: Any, **keywords: Any) -> Any:
            return function(self, *args, **keywords)

        call.__doc__ = f"`numpy.{function.__name__}` of this."
        return call

    for name in (
        "sum", "mean", "max", "min", "prod", "cumsum", "cumprod", "clip", "swapaxes", "squeeze", "ravel", "repeat",
        "take", "diagonal", "trace", "dot", "any", "all", "argmax", "argmin", "argsort",
    ):  # fmt: skip
        setattr(Dual, name, method(getattr(np, name)))


_add_methods()

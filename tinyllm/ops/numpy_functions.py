"""NumPy's functions on Tensors: which function of `tinyllm.ops` each of them is.

A function of NumPy that has the name of one of ours is that one (`install`); here stand the others, and those whose
arguments differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops import choice, linear_algebra, matrix, ordering, shape
from tinyllm.ops.arrangement import repeat
from tinyllm.ops.axes import along, named_axes
from tinyllm.ops.without_gradient import on_arrays


def apply_ufunc(ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A NumPy ufunc on inputs of which some are Tensors; NotImplemented for one that is no op."""
    if method != "__call__" or keywords:
        return NotImplemented
    if ufunc in UFUNCS:
        return UFUNCS[ufunc](*inputs)
    if ufunc in WITHOUT_GRADIENT:
        return on_arrays(getattr(current.xp, ufunc.__name__), *inputs)
    return NotImplemented


def apply_function(function: Callable[..., Any], args: Any, keywords: Any) -> Any:
    """Another function of NumPy on Tensors; NotImplemented for one that is no op."""
    if function in FUNCTIONS:
        if function in REDUCTIONS and len(args) > 2:
            raise TypeError(
                f"numpy.{function.__name__} of Tensors: give what comes after the axis by its name"
            )
        return FUNCTIONS[function](*args, **keywords)
    if function in WITHOUT_GRADIENT:
        return on_arrays(getattr(current.xp, function.__name__), *args, **keywords)
    return NotImplemented


def install(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Make each of the functions what NumPy's function of this name is on Tensors, unless that is said here."""
    for name, function in functions.items():
        known = getattr(np, name, None)
        if isinstance(known, np.ufunc):
            UFUNCS.setdefault(known, function)
        elif callable(known) and not isinstance(known, type):
            FUNCTIONS.setdefault(known, function)


def _average(x: Any, axis: Any = None, weights: Any = None) -> Tensor:
    x = as_tensor(x)
    if weights is None:
        return x.mean(axis)
    weights = as_tensor(weights, x.dtype)
    if weights.shape != x.shape:
        weights = weights.reshape([n if i == axis else 1 for i, n in enumerate(x.shape)])
    weights = weights.broadcast_to(x.shape)
    return (x * weights).sum(axis) / weights.sum(axis)


def _diagonal(x: Any, k: int = 0) -> Tensor:
    x = as_tensor(x)
    if x.ndim == 1:
        square = choice.where(current.xp.eye(x.size, dtype=bool), x, x.dtype.type(0))
        return shape.pad(square, ((max(-k, 0), max(k, 0)), (max(k, 0), max(-k, 0))))
    return linear_algebra.diagonal(x, k)


def _difference(x: Any, n: int = 1, axis: int = -1) -> Tensor:
    x = as_tensor(x).moveaxis(axis, -1)
    for _ in range(n):
        x = x[..., 1:] - x[..., :-1]
    return x.moveaxis(-1, axis)


def _norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Tensor:
    x = as_tensor(x)
    axes = x.ndim if axis is None else np.size(axis)
    if ord is not None and axes > 1 and ord != "fro":
        raise ValueError(
            f"numpy.linalg.norm of Tensors: ord={ord!r} over {axes} axes is a norm of matrices; only 'fro' is offered. "
            "x.norm(ord) is that of all elements"
        )
    return linear_algebra.vector_norm(x, None if ord == "fro" else ord, axis, keepdims)


def _pad(x: Any, widths: Any, mode: str = "constant", constant_values: float = 0.0) -> Tensor:
    if mode != "constant":
        raise ValueError(f"numpy.pad of Tensors: mode={mode!r}; only 'constant' is offered")
    return shape.pad(x, widths, constant_values)


def _split(x: Any, sections: Any, axis: int = 0) -> list[Tensor]:
    """`numpy.array_split`, whose parts may differ by one."""
    x = as_tensor(x)
    if np.ndim(sections) == 0:
        whole, longer = divmod(x.shape[axis], sections)
        sections = np.cumsum([whole + 1] * longer + [whole] * (sections - longer))[:-1].tolist()
    return shape.split(x, sections, axis)


def _take(x: Any, indices: Any, axis: int | None = None) -> Tensor:
    x = as_tensor(x)
    if axis is None:
        return x.reshape(-1)[indices]
    (axis,) = named_axes(axis, x.ndim)
    return x[along(axis, indices)]


def _where(condition: Any, *choices: Any) -> Any:
    return choice.where(condition, *choices) if choices else on_arrays(current.xp.nonzero, condition)


UFUNCS: dict[Any, Callable[..., Any]] = {
    np.positive: as_tensor,
    np.reciprocal: lambda x: 1 / as_tensor(x),
    np.fabs: choice.absolute,
}

WITHOUT_GRADIENT: set[Any] = {
    np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal, np.trunc, np.rint, np.signbit,
    np.logical_and, np.logical_or, np.logical_not, np.logical_xor, np.bitwise_and, np.bitwise_or, np.bitwise_xor,
    np.invert, np.argwhere, np.array2string, np.array_repr, np.array_str, np.bincount, np.count_nonzero, np.isin,
    np.may_share_memory, np.nonzero, np.result_type, np.searchsorted, np.shares_memory, np.unique,
    np.zeros_like, np.ones_like, np.full_like, np.empty_like,
}  # fmt: skip
"""Functions of the arrays beneath, whose results are Tensors without a graph."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.around: lambda x, decimals=0: as_tensor(x).round(decimals),
    np.argsort: lambda x, axis=-1, kind=None, stable=None: ordering.argsort(x, axis),
    np.array_split: _split,
    np.average: _average,
    np.diag: _diagonal,
    np.diff: _difference,
    np.einsum: lambda subscripts, *tensors, optimize=False: matrix.einsum(subscripts, *tensors),
    np.linalg.norm: _norm,
    np.ndim: lambda x: x.ndim,
    np.pad: _pad,
    np.repeat: lambda x, repeats, axis=None: repeat(x, repeats, axis=axis),
    np.shape: lambda x: x.shape,
    np.size: lambda x, axis=None: x.size if axis is None else x.shape[axis],
    np.sort: lambda x, axis=-1, kind=None, stable=None: ordering.sort(x, axis),
    np.take: _take,
    np.where: _where,
}

REDUCTIONS = {
    np.sum, np.prod, np.mean, np.var, np.std, np.max, np.min, np.amax, np.amin, np.cumsum, np.any, np.all, np.argmax,
    np.argmin,
}  # fmt: skip
"""Functions whose third argument is not ours in NumPy: a dtype, or an array to write to."""

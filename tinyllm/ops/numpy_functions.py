"""NumPy's functions on Tensors: which op each of them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops import elementwise, index, logarithms, matrix, reduce, running, shape


def apply_ufunc(ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A NumPy ufunc on inputs of which some are Tensors; NotImplemented for one that is no op."""
    if method != "__call__" or keywords:
        return NotImplemented
    if ufunc in UFUNCS:
        return UFUNCS[ufunc](*inputs)
    if ufunc in WITHOUT_GRADIENT:
        function = getattr(current.xp, ufunc.__name__)
        return Tensor(function(*[x.data if isinstance(x, Tensor) else x for x in inputs]))
    return NotImplemented


def apply_function(function: Callable[..., Any], args: Any, keywords: Any) -> Any:
    """Another function of NumPy on Tensors; NotImplemented for one that is no op."""
    return FUNCTIONS[function](*args, **keywords) if function in FUNCTIONS else NotImplemented


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
    np.log2: logarithms.log2,
    np.log10: logarithms.log10,
    np.logaddexp: logarithms.logaddexp,
    np.sqrt: elementwise.sqrt,
    np.tanh: elementwise.tanh,
    np.sin: elementwise.sin,
    np.cos: elementwise.cos,
    np.tan: elementwise.tan,
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
    np.cumprod: running.cumprod,
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

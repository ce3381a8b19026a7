"""Gradients of many parameters at once: clipping, as torch.nn.utils has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.nn.module import Parameter
from tinyllm.system.wording import shown


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Multiply the gradients of parameters with max_norm / (norm + 1e-6), if that is below 1; returns the norm.

    The norm is that of all gradients together; parameters without one are passed over. A norm that is not finite makes
    the gradients 0 or NaN, as in torch, unless `error_if_nonfinite`: `tinyllm.optim.clip_grad_norm` is stricter.

    Raises TypeError and ValueError for what would be passed over in silence (see `gradient_arrays`).
    """
    _, arrays = gradient_arrays(parameters)
    norms = [_norm(array, norm_type) for array in arrays]
    total = (
        max(norms, default=0.0)
        if norm_type == math.inf
        else sum(x**norm_type for x in norms) ** (1 / norm_type)
    )
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(f"the norm of the gradients is {total}; they are not changed")
    scale = max_norm / (total + 1e-6)
    if not scale >= 1:
        with backend.ignore_non_finite():
            for array in arrays:
                array *= scale
    return Tensor(total)


def clip_grad_value_(parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
    """Limit each number of the gradients to [-clip_value, clip_value]."""
    for array in gradient_arrays(parameters)[1]:
        array.clip(-clip_value, clip_value, out=array)


def _norm(array: Array, order: float) -> float:
    x = abs(array.astype("float64"))
    return (
        float(backend.read(x.max() if order == math.inf else (x**order).sum() ** (1 / order)))
        if x.size
        else 0.0
    )


def gradient_arrays(gradients: Iterable[Array | Tensor]) -> tuple[int, list[Array]]:
    """How many there are, and the arrays to be scaled: those given, and the `.grad` of parameters that have one.

    A single parameter stands for a list of it. Raises TypeError and ValueError for what would pass unclipped.
    """
    if isinstance(gradients, Tensor):
        gradients = [gradients]
    if isinstance(gradients, Mapping):
        raise TypeError("got a dictionary, whose items are names; give its .values()")
    items = list(gradients)
    if not items and isinstance(gradients, Iterator):
        raise ValueError(
            "the iterator of parameters is used up; give a list, or call model.parameters() again"
        )
    arrays = []
    for item in items:
        is_parameter = isinstance(item, Parameter) or (
            isinstance(item, Tensor) and item.requires_grad and item.op is None
        )
        if isinstance(item, Tensor) and item.grad is None and not is_parameter:
            raise TypeError(
                "a Tensor that has no .grad and is no parameter is not clipped; of gradients, give the arrays (.data)"
            )
        array = item.grad if isinstance(item, Tensor) else item
        if array is not None and not (backend.is_array(array) and array.dtype.kind == "f"):
            raise TypeError(
                f"gradients are floating-point arrays, or parameters that have .grad; got {shown(item)}"
            )
        if array is not None:
            arrays.append(array)
    return len(items), arrays

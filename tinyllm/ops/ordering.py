"""Sorting, by taking along an axis what the order of the values says."""

from __future__ import annotations

from typing import Any

from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops.axes import along, named_axes
from tinyllm.ops.index import take_along_axis


def argsort(x: Any, axis: int | None = -1, descending: bool = False) -> Tensor:
    """The positions that sort x along `axis` (None: all of x, flat). Equal elements stay in order, NaN is largest."""
    values = as_tensor(x).detach().data
    if axis is None:
        return Tensor(_order(values.reshape(-1), 0, descending))
    axes = named_axes(axis, len(values.shape))
    return Tensor(_order(values, axes[0], descending) if axes else current.xp.zeros((), dtype=int))


def _order(values: Any, axis: int, descending: bool) -> Any:
    if not descending:
        return values.argsort(axis=axis, kind="stable")
    # Backwards twice, so that equal elements stay in order.
    reverse = along(axis, slice(None, None, -1))
    ascending = values[reverse].argsort(axis=axis, kind="stable")
    return (values.shape[axis] - 1 - ascending)[reverse]


def sort(x: Any, axis: int | None = -1, descending: bool = False) -> Tensor:
    """x sorted along `axis` (None: all of x, flat); NaN counts largest. `argsort` has the positions."""
    x = as_tensor(x)
    if axis is None:
        return sort(x.reshape(-1), 0, descending)
    positions = argsort(x, axis, descending)
    return take_along_axis(x, positions.data, axis) if x.ndim else x


def topk(x: Any, k: int, axis: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest elements along `axis` (or the smallest), best first, and their positions.

    Raises ValueError when there are fewer than k.
    """
    x = as_tensor(x)
    (axis,) = named_axes(axis, x.ndim) or (0,)
    n = x.shape[axis] if x.ndim else 1
    if not 0 <= k <= n:
        raise ValueError(f"topk: k={k} along axis {axis} of shape {x.shape}, which has {n} elements")
    order = argsort(x, axis, descending=largest)
    if x.ndim == 0:
        return (x, order) if k == 1 else (x[None][:0], order[None][:0])
    positions = order.data[along(axis, slice(k))]
    return take_along_axis(x, positions, axis), Tensor(positions)

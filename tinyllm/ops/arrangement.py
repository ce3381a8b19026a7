"""Repeating, turning and cutting, composed of the ops that move elements and select them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.operators import Axis
from tinyllm.autograd.tensor import Tensor
from tinyllm.ops.axes import along, named_axes
from tinyllm.ops.shape import broadcast_to, concatenate, expand_dims, lengths_of, reshape, transpose


def copy(x: Any) -> Tensor:
    """x in memory of its own; the gradient flows through."""
    x = as_tensor(x)
    return concatenate([x]) if x.ndim else reshape(concatenate([reshape(x, 1)]), ())


def contiguous(x: Any) -> Tensor:
    """x itself: how it lies in memory concerns nobody here. For programs written for torch."""
    return as_tensor(x)


def flatten(x: Any, start_axis: int = 0, end_axis: int = -1) -> Tensor:
    """x with the axes from `start_axis` to `end_axis` as one."""
    x = as_tensor(x)
    if x.ndim == 0:
        return reshape(x, 1)
    (start,), (end,) = named_axes(start_axis, x.ndim), named_axes(end_axis, x.ndim)
    if start > end:
        raise ValueError(
            f"flatten: start_axis={start_axis} comes after end_axis={end_axis} in shape {x.shape}"
        )
    n = int(np.prod(x.shape[start : end + 1]))
    return reshape(x, (*x.shape[:start], n, *x.shape[end + 1 :]))


def moveaxis(x: Any, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    """x with the axes `source` at the places `destination`, the others in their order."""
    x = as_tensor(x)
    sources, destinations = named_axes(source, x.ndim), named_axes(destination, x.ndim)
    if not len(set(sources)) == len(sources) == len(destinations) == len(set(destinations)):
        raise ValueError(
            f"moveaxis: from {source} to {destination}; as many places as axes, none of them twice"
        )
    order = [axis for axis in range(x.ndim) if axis not in sources]
    for place, axis in sorted(zip(destinations, sources, strict=True)):
        order.insert(place, axis)
    return transpose(x, order)


def tile(x: Any, *counts: Any) -> Tensor:
    """x repeated as a whole, so many times along each axis: `tile(x, 2, 3)` or `tile(x, (2, 3))`.

    Counts for fewer axes are those of the last; counts for more make new axes in front. It is torch's `Tensor.repeat`.
    """
    x = as_tensor(x)
    repetitions = lengths_of(counts)
    ndim = max(len(repetitions), x.ndim)
    repetitions = (1,) * (ndim - len(repetitions)) + repetitions
    lengths = (1,) * (ndim - x.ndim) + x.shape
    pairs = list(zip(repetitions, lengths, strict=True))
    alternating = broadcast_to(
        reshape(x, [m for n in lengths for m in (1, n)]), [m for pair in pairs for m in pair]
    )
    return reshape(alternating, [count * n for count, n in pairs])


def expand(x: Any, *lengths: Any) -> Tensor:
    """x repeated along new first axes and axes of length 1, as torch's `expand`; -1 leaves an axis as it is."""
    x = as_tensor(x)
    wanted = lengths_of(lengths)
    known = (1,) * (len(wanted) - x.ndim) + x.shape
    return broadcast_to(x, [m if n == -1 else n for n, m in zip(wanted, known, strict=True)])


_UNSAID: Any = object()


def repeat(x: Any, repeats: Any, *more: Any, axis: int | None = _UNSAID) -> Tensor:
    """Each element repeated in its place along `axis` (None: of x as one row), as `numpy.repeat`.

    repeats: a number, or one for each element along the axis.

    Raises TypeError without `axis=`: torch's `Tensor.repeat` is another function, which is here `tile`.
    """
    if more or axis is _UNSAID:
        raise TypeError(
            "repeat: say axis=: repeat(n, axis=0) repeats each element, as in NumPy (axis=None: of the flat array); "
            "tile(...) repeats the whole, as torch's Tensor.repeat"
        )
    x = as_tensor(x)
    if axis is None:
        x, axis = reshape(x, -1), 0
    (axis,) = named_axes(axis, x.ndim)
    counts = repeats.data if isinstance(repeats, Tensor) else repeats
    if np.ndim(counts) == 0:
        wide = expand_dims(x, axis + 1)
        wide = broadcast_to(wide, (*x.shape[: axis + 1], operator.index(counts), *x.shape[axis + 1 :]))
        return flatten(wide, axis, axis + 1)
    return x[along(axis, np.repeat(np.arange(x.shape[axis]), counts))]


def roll(x: Any, shift: Any, axis: Axis = None) -> Tensor:
    """x with its elements moved on by `shift` along `axis`, those beyond the end to the front.

    Without an axis, the elements as one row. Several shifts and axes are taken one after the other.
    """
    x = as_tensor(x)
    if axis is None:
        return reshape(roll(reshape(x, -1), shift, 0), x.shape)
    for step, each in np.broadcast(shift, axis):
        for position in named_axes(each, x.ndim):
            cut = -step % max(x.shape[position], 1)
            if cut:
                parts = x[along(position, slice(cut, None))], x[along(position, slice(cut))]
                x = concatenate(parts, position)
    return x


def chunk(x: Any, chunks: int, axis: int = 0) -> list[Tensor]:
    """x cut along `axis` into at most `chunks` parts of one length, of which the last may be shorter."""
    x = as_tensor(x)
    (axis,) = named_axes(axis, x.ndim)
    if chunks < 1:
        raise ValueError(f"chunk: chunks={chunks}; it needs at least 1")
    n = x.shape[axis]
    length = max(-(-n // chunks), 1)
    return [x[along(axis, slice(i, i + length))] for i in range(0, max(n, 1), length)]


def vstack(tensors: Sequence[Any]) -> Tensor:
    """The tensors one below the other: along the first axis, a vector as one row."""
    rows = [as_tensor(x) for x in tensors]
    return concatenate([x if x.ndim > 1 else reshape(x, 1, -1) for x in rows], 0)


def hstack(tensors: Sequence[Any]) -> Tensor:
    """The tensors side by side: along the second axis, vectors along their only one."""
    columns = [as_tensor(x) for x in tensors]
    columns = [x if x.ndim else reshape(x, 1) for x in columns]
    return concatenate(columns, 0 if columns[0].ndim == 1 else 1)

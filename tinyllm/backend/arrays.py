"""What NumPy and CuPy have no fast function for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from tinyllm.backend import current
from tinyllm.backend.current import Array

CACHED_ELEMENTS = 1 << 16
"""Elements of a part in `cache_parts`."""
FEW_ROWS = 256
"""Up to so many target rows, `scatter_add` is a product with a one-hot matrix."""


def selected(condition: Array, x: Array) -> Array:
    """x where `condition` holds and 0 elsewhere, whatever x is there: as a product, infinity times 0 would be NaN."""
    if current.xp is not numpy or type(x) is not numpy.ndarray or x.dtype.char not in "efd":
        return current.xp.where(condition, x, 0)
    # The bits as an integer, times 0 or 1: ten times faster than numpy.where, which branches at each element.
    result = numpy.empty(numpy.broadcast_shapes(x.shape, numpy.shape(condition)), dtype=x.dtype)
    bits = f"i{x.itemsize}"
    numpy.multiply(x.view(bits), condition, out=result.view(bits))
    return result


def clear_rows(x: Array, rows: Array) -> None:
    """x[rows] = 0, in place. x: (N, D), rows: (N,) booleans."""
    if current.xp is numpy:
        x[rows] = 0
    else:
        current.xp.copyto(x, 0, where=rows[:, None])  # an assignment would upload the 0


def scatter_add(target: Array, index: Array, values: Array) -> None:
    """Add `values` into `target` at `index` along the first axis, in place; repeated indices add up in a fixed order.

    target: (N, ...), index: (M,) integers in [-N, N), values: (M, ...).
    """
    if index.size == 0 or target.size == 0:
        return
    index = current.xp.where(index < 0, index + target.shape[0], index)
    if target.shape[0] <= FEW_ROWS:
        one_hot = current.xp.zeros((target.shape[0], index.size), dtype=target.dtype)
        one_hot[index, current.xp.arange(index.size)] = 1
        with current.ignore_non_finite():
            sums = one_hot @ values.reshape((index.size, -1))
        # An infinity times the zeros of other rows is NaN. To look for one would mean to wait for a device.
        if current.xp is not numpy or numpy.isfinite(sums).all():
            target += sums.reshape(target.shape)
            return
    # Sorting brings equal indices together, so that each target row is touched once: several times faster
    # than numpy.add.at, and the order of summation is fixed.
    if current.xp is not numpy:
        order = current.xp.argsort(index)
        rows = current.xp.arange(target.shape[0])[:, None]
        begin, end = (current.xp.searchsorted(index[order], rows, side=side) for side in ("left", "right"))
        current.xp.library.segment_sums(
            target.reshape((len(target), -1)), values.reshape((index.size, -1)), order, begin, end
        )
        return
    order = numpy.argsort(index, kind="stable")
    sorted_index = index[order]
    starts = numpy.flatnonzero(numpy.diff(sorted_index, prepend=sorted_index[0] - 1))
    target[sorted_index[starts]] += numpy.add.reduceat(values[order], starts, axis=0)


def add_at(target: Array, index: Array, values: Array) -> None:
    """target[index] += values, in place, where an element that `index` names several times gets every value."""
    if current.xp is numpy:
        numpy.add.at(target, index, values)
    else:
        current.xp.library.add.at(target, index, values)


def swap_halves(x: Array) -> Array:
    """A new array: x with the halves of its last axis, whose length is even, exchanged."""
    half = x.shape[-1] // 2
    if current.xp is not numpy or half == 0 or not x.flags.c_contiguous:
        return concatenate_last(x[..., half:], x[..., :half])
    # Each half as one opaque item: several times faster than copying short rows of numbers.
    swapped = numpy.empty_like(x)
    swapped.view(f"V{half * x.itemsize}")[...] = x.view(f"V{half * x.itemsize}")[..., ::-1]
    return swapped


def concatenate_last(a: Array, b: Array) -> Array:
    """A new array: a and b one after the other along the last axis. CuPy's `concatenate` uploads where they lie."""
    whole = current.xp.empty((*a.shape[:-1], a.shape[-1] + b.shape[-1]), dtype=a.dtype)
    whole[..., : a.shape[-1]] = a
    whole[..., a.shape[-1] :] = b
    return whole


def cache_parts(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape in flat parts, as views, small enough to stay in a core's cache.

    Many cheap passes over each part cost less than over arrays that have to come from memory every time. On a device
    there is one part; arrays that are not C-contiguous come whole.
    """
    if not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    size = flat[0].size
    step = CACHED_ELEMENTS if current.xp is numpy else max(size, 1)
    for start in range(0, size, step):
        yield tuple([array[start : start + step] for array in flat])

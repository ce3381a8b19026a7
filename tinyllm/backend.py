"""The array library under every Tensor: NumPy, or CuPy after `use_backend("cupy")`.

This is the only module that imports CuPy. Write `backend.xp.exp(...)`, never `from backend import xp`: a
value import freezes the choice of backend at import time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy
import numpy.typing

from tinyllm.errors import InputError

Array = numpy.typing.NDArray[Any]

CACHED_ELEMENTS = 1 << 16
"""Elements of a part in `cache_parts`."""
FEW_ROWS = 256
"""Up to so many target rows, `scatter_add` is a product with a one-hot matrix."""

xp: Any = numpy
"""The module whose functions compute: `numpy` or `cupy`."""


def use_backend(name: str) -> None:
    """Choose the array library for all Tensors made from now on: "numpy" or "cupy".

    Raises InputError when the library is missing or finds no device.
    """
    global xp
    if name == "numpy":
        xp = numpy
    elif name == "cupy":
        xp = _import_cupy()
    else:
        raise InputError(f"backend {name!r} is unknown; choose 'numpy' or 'cupy'")


def _import_cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise InputError(
            "backend 'cupy' needs CuPy, which is not installed; install tinyllm-numpy[cupy12x] for CUDA 12 "
            "or tinyllm-numpy[cupy13x] for CUDA 13"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"backend 'cupy' found no usable CUDA device: {error}") from error
    if devices == 0:
        raise InputError("backend 'cupy' found no CUDA device; use the 'numpy' backend on this machine")
    module: ModuleType = cupy
    return module


def is_array(value: object) -> bool:
    """Whether `value` is an array of the current backend."""
    return isinstance(value, xp.ndarray)


def asarray(values: Any, dtype: Any = None) -> Any:
    """`values` as an array of the current backend; no copy when it is one of that dtype already."""
    return xp.asarray(values, dtype=dtype)


def to_numpy(array: Any) -> Array:
    """`array` as a NumPy array: itself on NumPy, a copy from the device on CuPy."""
    if isinstance(array, numpy.ndarray):
        return array
    if hasattr(array, "get"):
        return numpy.asarray(array.get())
    return numpy.asarray(array)


def magnitude(x: Any) -> Any:
    """|x| for real x. For complex x, the continuation x sign(Re x), which is what complex-step derivatives need."""
    return xp.absolute(x) if x.dtype.kind != "c" else xp.where(x.real < 0, -x, x)


def scatter_add(target: Any, index: Any, values: Any) -> None:
    """Add `values` into `target` at `index` along the first axis, in place; repeated indices add up.

    target: (N, ...), index: (M,) integers in [-N, N), values: (M, ...).
    """
    if xp is not numpy:
        xp.add.at(target, index, values)
        return
    if index.size == 0:
        return
    index = numpy.where(index < 0, index + target.shape[0], index)
    if target.shape[0] <= FEW_ROWS:
        one_hot = numpy.zeros((target.shape[0], index.size), dtype=target.dtype)
        one_hot[index, numpy.arange(index.size)] = 1
        target += (one_hot @ values.reshape((index.size, -1))).reshape(target.shape)
        return
    # Sorting brings equal indices together, so that each target row is touched once: several times faster
    # than numpy.add.at, and the order of summation is fixed.
    order = numpy.argsort(index, kind="stable")
    sorted_index = index[order]
    starts = numpy.flatnonzero(numpy.diff(sorted_index, prepend=sorted_index[0] - 1))
    target[sorted_index[starts]] += numpy.add.reduceat(values[order], starts, axis=0)


def swap_halves(x: Any) -> Any:
    """A new array: x with the halves of its last axis, whose length is even, exchanged."""
    half = x.shape[-1] // 2
    if xp is not numpy or half == 0 or not x.flags.c_contiguous:
        return xp.concatenate([x[..., half:], x[..., :half]], axis=-1)
    # Each half as one opaque item: several times faster than copying short rows of numbers.
    swapped = numpy.empty_like(x)
    swapped.view(f"V{half * x.itemsize}")[...] = x.view(f"V{half * x.itemsize}")[..., ::-1]
    return swapped


def cache_parts(*arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Arrays of one shape in flat parts, as views, small enough to stay in a core's cache.

    Many cheap passes over each part cost less than over arrays that have to come from memory every time. On a device
    there is one part; arrays that are not C-contiguous come whole.
    """
    if not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    size = flat[0].size
    step = CACHED_ELEMENTS if xp is numpy else max(size, 1)
    for start in range(0, size, step):
        yield tuple([array[start : start + step] for array in flat])


def ignore_overflow() -> contextlib.AbstractContextManager[Any]:
    """Silence NumPy's overflow warnings where an infinity is the right intermediate value."""
    return numpy.errstate(over="ignore")


def ignore_non_finite() -> contextlib.AbstractContextManager[Any]:
    """Silence NumPy's warnings of infinities and of what follows from them, where the caller checks the result."""
    return numpy.errstate(over="ignore", invalid="ignore", divide="ignore")


def synchronize() -> None:
    """Wait until the device has finished all queued work; returns at once on NumPy."""
    if xp is not numpy:
        xp.cuda.get_current_stream().synchronize()

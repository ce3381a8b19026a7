"""The array library under every Tensor: NumPy, or CuPy after `use_backend("cupy")`.

This is the only module that imports CuPy. Write `backend.xp.exp(...)`, never `from backend import xp`: a
value import freezes the choice of backend at import time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, TypeVar

import numpy
import numpy.typing

from tinyllm import kernels
from tinyllm.errors import InputError

Array = numpy.typing.NDArray[Any]
Chosen = TypeVar("Chosen")

CACHED_ELEMENTS = 1 << 16
"""Elements of a part in `cache_parts`."""
FEW_ROWS = 256
"""Up to so many target rows, `scatter_add` is a product with a one-hot matrix."""

xp: Any = numpy
"""The module whose functions compute: NumPy, or the `Namespace` of a device's library."""


class Namespace:
    """The functions of a device's library, such as CuPy.

    Called on what only stands in for an array of the device, as a Tensor does while a graph of a gradient is built,
    they hand on by NumPy's protocols, which such libraries follow for their own arrays alone.
    """

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.library, name)
        of_numpy = getattr(numpy, name, None)
        if callable(value) and callable(of_numpy) and not isinstance(of_numpy, type):
            value = functools.partial(self._call, value, of_numpy)
        setattr(self, name, value)
        return value

    def _call(self, function: Callable[..., Any], of_numpy: Any, *args: Any, **keywords: Any) -> Any:
        for value in args[0] if args and isinstance(args[0], (list, tuple)) else args:
            kind = type(value)
            if kind in _HANDED_ON or (kind not in _OWN and self._stands_in(kind)):
                if isinstance(of_numpy, numpy.ufunc):
                    return value.__array_ufunc__(of_numpy, "__call__", *args, **keywords)
                return value.__array_function__(of_numpy, (kind,), args, keywords)
        return function(*args, **keywords)

    def _stands_in(self, kind: type) -> bool:
        foreign = (
            getattr(kind, "__array_ufunc__", None) is not None
            and not issubclass(kind, (self.library.ndarray, numpy.generic))
            and kind is not numpy.ndarray  # which the library shall refuse
        )
        (_HANDED_ON if foreign else _OWN).add(kind)
        return foreign


_HANDED_ON: set[type] = set()
_OWN: set[type] = set()


BACKENDS = ("numpy", "cupy")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


def use_backend(name: str, precision: str = "float32", memory: float = 0.0) -> None:
    """Choose the array library for all Tensors made from now on.

    Args:
        name: "numpy" or "cupy". precision: to what a device may round the factors of float32 products, whose sums
            remain float32: "tf32" has 10 bits after the point, as "float16", and "bfloat16" has 7. memory: how much of
            the device's to take at most, in GiB; 0: all.

    Raises InputError when the library is missing or finds no device, and for a choice that it does not have.
    """
    global xp
    if name not in BACKENDS or precision not in PRECISIONS:
        raise InputError(
            f"backend={name!r} and precision={precision!r}; there are {', '.join(BACKENDS)}, and the precisions "
            f"{', '.join(PRECISIONS)}"
        )
    if name == "numpy":
        if precision != "float32" or memory:
            raise InputError(
                f"precision={precision!r} and a memory limit of {memory:g} GiB are choices of the 'cupy' backend; give "
                "--backend cupy, or leave them out"
            )
        xp = numpy
    else:
        xp = Namespace(CuPy(_import_cupy(), precision, memory))


@contextlib.contextmanager
def library(module: Any) -> Iterator[None]:
    """Compute with `module`, which has what `CuPy` has, within this context."""
    global xp
    before = xp
    xp = Namespace(module)
    try:
        yield
    finally:
        xp = before


def choose(on_cpu: Chosen, on_device: Chosen) -> Chosen:
    """What is faster here: a CPU likes parts that stay in its cache, a device a few calls on large arrays."""
    return on_cpu if xp is numpy else on_device


def products_underflow() -> bool:
    """Whether small factors of products become zero, so that the loss has to be scaled."""
    return xp is not numpy and xp.library.precision == "float16"


def reads_wait() -> bool:
    """Whether to look at a number means to wait for a device, so that it is done only where it must be."""
    return xp is not numpy


class CuPy:
    """CuPy, with what a device is asked for beside functions of arrays."""

    def __init__(self, module: ModuleType, precision: str, memory: float) -> None:
        self.module, self.precision = module, precision
        self.memory_pool = module.get_default_memory_pool()
        self.memory_pool.set_limit(size=int(memory * 2**30))
        products = module._core._routines_linalg
        compute_types = {
            "float32": products.COMPUTE_TYPE_FP32,
            "tf32": products.COMPUTE_TYPE_TF32,
            "bfloat16": products.COMPUTE_TYPE_BF16,
            "float16": products.COMPUTE_TYPE_FP16,
        }
        module._core.set_compute_type("float32", compute_types[precision])
        self._kernels: dict[Any, tuple[Any, kernels.Source]] = {}
        self._segment_sums = module.ElementwiseKernel(*kernels.SEGMENT_SUMS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def elementwise(self, function: Callable[..., Any], arguments: tuple[Any, ...], where: Any) -> Any:
        """`function` as one kernel; complex numbers, which only checks of derivatives have, go through it plainly."""
        arrays = [x for x in arguments if isinstance(x, self.ndarray)]
        if any(x.dtype.kind == "c" for x in arrays):
            return function(*arguments)
        key = (function, where is None, *map(kernels.describe, arguments))
        if key not in self._kernels:
            source = kernels.trace(function, key[2:], where is not None)
            made = self.module.ElementwiseKernel(
                source.in_params, source.out_params, source.operation, source.name
            )
            self._kernels[key] = made, source
        kernel, source = self._kernels[key]
        shape = numpy.broadcast_shapes(*[x.shape for x in arrays])
        fresh = [self.empty(shape, dtype=dtype) for dtype in source.fresh]
        inputs = [arguments[position] for position in source.inputs]
        condition = [where] if source.guarded else []
        kernel(*inputs, *condition, *[arguments[position] for position in source.changed], *fresh)
        return source.result(arguments, fresh)

    def segment_sums(self, target: Any, values: Any, order: Any, begin: Any, end: Any) -> None:
        """target[n] += values[order[j]] for j from begin[n] to end[n], in that order.

        target: (N, D), values: (M, D), C-contiguous; order: (M,), begin, end: (N, 1).
        """
        D = values.shape[1]
        column = self.arange(D)
        self._segment_sums(values, order, begin, end, column, D, target)


def _import_cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise InputError(
            "backend 'cupy' needs CuPy, which is not installed; install tinyllm-numpy[cupy12x] for CUDA 12 "
            "or tinyllm-numpy[cupy13x] for CUDA 13"
        ) from error
    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise InputError(_no_device(runtime, error)) from error
    if devices == 0:
        raise InputError("backend 'cupy' found no CUDA device; use the 'numpy' backend on this machine")
    module: ModuleType = cupy
    return module


def _no_device(runtime: Any, error: Exception) -> str:
    """Why CuPy cannot compute, and what to do about it."""
    driver, built = runtime.driverGetVersion() // 1000, runtime.runtimeGetVersion() // 1000
    if driver == 0:
        return "backend 'cupy' found no NVIDIA driver; use the 'numpy' backend on this machine"
    if driver < built:
        return (
            f"backend 'cupy': this CuPy is for CUDA {built}, and the driver for CUDA {driver}; install "
            f"tinyllm-numpy[cupy{driver}x] in its place, or a newer driver"
        )
    return f"backend 'cupy' cannot use the device: {error}"


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


def free_to_read(values: Any) -> Array | None:
    """`values` as a NumPy array; None where they lie on a device, so that looking at them would wait for it."""
    if xp is not numpy and isinstance(values, xp.ndarray):
        return None
    return numpy.asarray(values)


def read(value: Any) -> Any:
    """A single element as a Python number; waits for the device, if there is one."""
    return value.item() if hasattr(value, "item") else value


def magnitude(x: Any) -> Any:
    """|x| for real x. For complex x, the continuation x sign(Re x), which is what complex-step derivatives need."""
    return xp.absolute(x) if x.dtype.kind != "c" else xp.where(x.real < 0, -x, x)


def selected(condition: Any, x: Any) -> Any:
    """x where `condition` holds and 0 elsewhere, whatever x is there: as a product, infinity times 0 would be NaN."""
    if xp is not numpy or type(x) is not numpy.ndarray or x.dtype.char not in "efd":
        return xp.where(condition, x, 0)
    # The bits as an integer, times 0 or 1: ten times faster than numpy.where, which branches at each element.
    result = numpy.empty(numpy.broadcast_shapes(x.shape, numpy.shape(condition)), dtype=x.dtype)
    bits = f"i{x.itemsize}"
    numpy.multiply(x.view(bits), condition, out=result.view(bits))
    return result


def clear_rows(x: Any, rows: Any) -> None:
    """x[rows] = 0, in place. x: (N, D), rows: (N,) booleans."""
    if xp is numpy:
        x[rows] = 0
    else:
        xp.copyto(x, 0, where=rows[:, None])  # an assignment would upload the 0


def scatter_add(target: Any, index: Any, values: Any) -> None:
    """Add `values` into `target` at `index` along the first axis, in place; repeated indices add up in a fixed order.

    target: (N, ...), index: (M,) integers in [-N, N), values: (M, ...).
    """
    if index.size == 0 or target.size == 0:
        return
    index = xp.where(index < 0, index + target.shape[0], index)
    if target.shape[0] <= FEW_ROWS:
        one_hot = xp.zeros((target.shape[0], index.size), dtype=target.dtype)
        one_hot[index, xp.arange(index.size)] = 1
        with ignore_non_finite():
            sums = one_hot @ values.reshape((index.size, -1))
        # An infinity times the zeros of other rows is NaN. To look for one would mean to wait for a device.
        if xp is not numpy or numpy.isfinite(sums).all():
            target += sums.reshape(target.shape)
            return
    # Sorting brings equal indices together, so that each target row is touched once: several times faster
    # than numpy.add.at, and the order of summation is fixed.
    if xp is not numpy:
        order = xp.argsort(index)
        rows = xp.arange(target.shape[0])[:, None]
        begin, end = (xp.searchsorted(index[order], rows, side=side) for side in ("left", "right"))
        xp.library.segment_sums(
            target.reshape((len(target), -1)), values.reshape((index.size, -1)), order, begin, end
        )
        return
    order = numpy.argsort(index, kind="stable")
    sorted_index = index[order]
    starts = numpy.flatnonzero(numpy.diff(sorted_index, prepend=sorted_index[0] - 1))
    target[sorted_index[starts]] += numpy.add.reduceat(values[order], starts, axis=0)


def add_at(target: Any, index: Any, values: Any) -> None:
    """target[index] += values, in place, where an element that `index` names several times gets every value."""
    if xp is numpy:
        numpy.add.at(target, index, values)
    else:
        xp.library.add.at(target, index, values)


def swap_halves(x: Any) -> Any:
    """A new array: x with the halves of its last axis, whose length is even, exchanged."""
    half = x.shape[-1] // 2
    if xp is not numpy or half == 0 or not x.flags.c_contiguous:
        return joined(x[..., half:], x[..., :half])
    # Each half as one opaque item: several times faster than copying short rows of numbers.
    swapped = numpy.empty_like(x)
    swapped.view(f"V{half * x.itemsize}")[...] = x.view(f"V{half * x.itemsize}")[..., ::-1]
    return swapped


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function that computes each element of arrays from the same element of others, or a number.

    It may change arguments in place. On NumPy it is called as it is; on a device it becomes one kernel (see `kernels`).
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if xp is numpy:
            return function(*arguments)
        return xp.library.elementwise(function, arguments, _condition.get())

    return call


_condition: ContextVar[Any] = ContextVar("condition", default=None)


@contextlib.contextmanager
def only_where(condition: Any) -> Iterator[None]:
    """Within this context, elementwise functions change arguments only if `condition`, a boolean on a device, is true.

    None: always. So a step can be given up without waiting for the number that decides it.
    """
    token = _condition.set(condition)
    try:
        yield
    finally:
        _condition.reset(token)


def joined(a: Any, b: Any) -> Any:
    """A new array: a and b one after the other along the last axis. CuPy's `concatenate` uploads where they lie."""
    whole = xp.empty((*a.shape[:-1], a.shape[-1] + b.shape[-1]), dtype=a.dtype)
    whole[..., : a.shape[-1]] = a
    whole[..., a.shape[-1] :] = b
    return whole


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

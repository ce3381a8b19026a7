"""CuPy behind the functions that every op calls, and what a device is asked for beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy

from tinyllm.backend import kernel_sources
from tinyllm.system.errors import InputError


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
        self._kernels: dict[Any, tuple[Any, kernel_sources.Source]] = {}
        self._segment_sums = module.ElementwiseKernel(*kernel_sources.SEGMENT_SUMS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def elementwise(self, function: Callable[..., Any], arguments: tuple[Any, ...], where: Any) -> Any:
        """`function` as one kernel."""
        arrays = [x for x in arguments if isinstance(x, self.ndarray)]
        key = (function, where is None, *map(kernel_sources.describe, arguments))
        if key not in self._kernels:
            source = kernel_sources.trace(function, key[2:], where is not None)
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


def import_cupy() -> ModuleType:
    """The cupy module; raises InputError where it is missing or finds no device."""
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

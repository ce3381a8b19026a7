"""The library whose functions compute: NumPy, or CuPy after `use_backend("cupy")`.

Write `current.xp.exp(...)`, never `from current import xp`: a value import freezes the choice at import time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy
import numpy.typing

from tinyllm.backend.device import CuPy, Namespace, import_cupy
from tinyllm.system.errors import InputError

HostArray = numpy.typing.NDArray[Any]
"""An array of NumPy, in this machine's memory."""
Array = HostArray
"""An array of the current library. CuPy's have NumPy's interface, so the type checker takes them for NumPy's."""
Chosen = TypeVar("Chosen")

xp: Any = numpy
"""The module whose functions compute: NumPy, or the `Namespace` of a device's library."""

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
        xp = Namespace(CuPy(import_cupy(), precision, memory))


@contextlib.contextmanager
def use_library(module: Any) -> Iterator[None]:
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


def is_asynchronous() -> bool:
    """Whether to look at a number means to wait for a device, so that it is done only where it must be."""
    return xp is not numpy


def is_array(value: object) -> bool:
    """Whether `value` is an array of the current backend."""
    return isinstance(value, xp.ndarray)


def asarray(values: Any, dtype: Any = None) -> Array:
    """`values` as an array of the current backend; no copy when it is one of that dtype already."""
    return xp.asarray(values, dtype=dtype)


def to_numpy(array: Any) -> HostArray:
    """`array` as a NumPy array: itself on NumPy, a copy from the device on CuPy."""
    if isinstance(array, numpy.ndarray):
        return array
    if hasattr(array, "get"):
        return numpy.asarray(array.get())
    return numpy.asarray(array)


def to_numpy_without_waiting(values: Any) -> HostArray | None:
    """`values` as a NumPy array; None where they lie on a device, so that looking at them would wait for it."""
    if xp is not numpy and isinstance(values, xp.ndarray):
        return None
    return numpy.asarray(values)


def read(value: Any) -> Any:
    """A single element as a Python number; waits for the device, if there is one."""
    return value.item() if hasattr(value, "item") else value


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

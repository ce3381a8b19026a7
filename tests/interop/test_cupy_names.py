"""The strict double has nothing that CuPy does not have. This needs CuPy, and no device."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from support.strict_device import FUNCTIONS, METHODS, UFUNC_KEYWORDS, UFUNCS, StrictDevice

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
DTYPES = (
    "bool",
    "int32",
    "int64",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def keywords_of(function: object) -> set[str]:
    """The keywords that a function of CuPy names in its signature, or in the first line of its documentation."""
    try:
        return set(inspect.signature(function).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        line = (inspect.getdoc(function) or "").partition("\n\n")[0]
        return set(re.findall(r"(\w+)(?=[=,)])", line))


@pytest.mark.parametrize("name", UFUNCS)
def test_ufunc(name: str) -> None:
    function = getattr(cupy, name)
    assert isinstance(function, cupy.ufunc)
    assert set(UFUNC_KEYWORDS) <= keywords_of(function)


@pytest.mark.parametrize("name", UFUNCS)
def test_ufunc_gives_the_dtype_that_numpy_gives(name: str) -> None:
    """CuPy's table of loops, read as NumPy reads its own: the first that all inputs cast to safely."""
    numpy_function, types = getattr(np, name), getattr(cupy, name).types
    for dtype in map(np.dtype, DTYPES):
        try:
            expected = numpy_function(*[np.ones(1, dtype)] * numpy_function.nin).dtype
        except TypeError:
            continue  # NumPy, with which the double computes, refuses it as well
        if dtype.kind == "c" and name.startswith("logical"):
            continue  # refused by the double
        loops = [loop.split("->") for loop in types]
        found = [out for into, out in loops if all(np.can_cast(dtype, char) for char in into)]
        assert found, (name, dtype)
        assert np.dtype(found[0]) == expected, (name, dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    found = keywords_of(getattr(cupy, name))
    assert "kwargs" in found or set(FUNCTIONS[name]) <= found, found


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str) -> None:
    method = getattr(cupy.ndarray, name)
    assert set(METHODS[name]) <= keywords_of(method) | ({"order"} if name == "reshape" else set())


def test_everything_else_that_is_used() -> None:
    for name in ("array", "asarray", "ndarray", "ElementwiseKernel"):
        assert hasattr(cupy, name)
    for name in ("T", "base", "dtype", "flags", "get", "imag", "item", "itemsize", "nbytes", "ndim", "real", "set",
                 "shape", "size", "strides", "__matmul__", "__len__"):  # fmt: skip
        assert hasattr(cupy.ndarray, name)
    assert callable(cupy.add.at)
    assert hasattr(StrictDevice(), "cuda")
    for name in ("begin_capture", "end_capture", "synchronize"):
        assert hasattr(cupy.cuda.Stream, name)
    assert hasattr(cupy.cuda.MemoryPool, "set_limit")
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)

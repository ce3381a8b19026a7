"""The text of kernels, compiled as C, computes what the function itself computes on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.strict_device import DeviceArray, StrictDevice, strict_device

from tinyllm import backend
from tinyllm.autograd.registry import REGISTRY
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.backend.kernel_sources import SEGMENT_SUMS, Returned, Source, describe, trace
from tinyllm.backend.philox import philox_4x32
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.ops.fast import activation, attention, loss, norm, tiled_attention
from tinyllm.optim.adamw import _adamw
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import StepMetrics
from tinyllm.training.trainer import Trainer

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler on the PATH")
FLOATS = ("float32", "float64")
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1e-30, -90.0, 90.0)
C_NAMES = {
    "bool": "bool", "float16": "_Float16", "float32": "float", "float64": "double",
    **{f"{u}int{bits}": f"{u}int{bits}_t" for u in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


@functools.cache
def compiled(source: Source) -> Any:
    """The operation in a loop over elements, where cupy has a kernel, as a C function of the size and the arrays."""
    parameters, names = [], []
    for text, const in ((source.in_params, "const "), (source.out_params, "")):
        for dtype, name in re.findall(r"(\w+) (\w+)", text):
            parameters.append(f"{const}{C_NAMES[dtype]} *array_{name}")
            names.append(f"#define {name} (array_{name}[element])\n")
    half = (
        "typedef _Float16 float16;\n"
        if "float16" in source.in_params + source.out_params + source.operation
        else ""
    )
    code = (
        "#include <stdbool.h>\n#include <stdint.h>\n#include <tgmath.h>\n"
        f"{half}void kernel(int64_t size, {', '.join(parameters)}) {{\n"
        f"for (int64_t element = 0; element < size; element++) {{\n{''.join(names)}{source.operation}}}\n}}\n"
    )
    return built(code)


def built(code: str) -> Any:
    """The function `kernel` of a text in C."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        assert COMPILER is not None
        # Signed integers wrap, as NumPy's do; no product is fused with a sum.
        flags = [
            "-O1",
            "-fwrapv",
            "-ffp-contract=off",
            "-fPIC",
            "-shared",
            "-x",
            "c",
            "-",
            "-o",
            str(library),
            "-lm",
        ]
        done = subprocess.run([COMPILER, *flags], input=code, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{code}"
        return ctypes.CDLL(str(library)).kernel


def run(source: Source, arguments: list[Any], condition: bool | None = None) -> Any:
    """As a backend would: changes arguments, returns what the function returns."""
    shape = np.broadcast_shapes(*[np.shape(argument) for argument in arguments])
    inputs = [arguments[position] for position in source.inputs] + ([condition] if source.guarded else [])
    dtypes = [text.split()[0] for text in source.in_params.split(", ") if text]
    arrays = [
        np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), shape))
        for value, dtype in zip(inputs, dtypes, strict=True)
    ]
    for position in source.changed:
        assert arguments[position].flags.c_contiguous
        assert arguments[position].shape == shape
    fresh = [np.full(shape, 77, dtype) for dtype in source.fresh]
    arrays += [arguments[position] for position in source.changed] + fresh
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    compiled(source)(ctypes.c_int64(math.prod(shape)), *pointers)
    return source.result(arguments, fresh)


def copies(arguments: list[Any]) -> list[Any]:
    return [argument.copy() if isinstance(argument, np.ndarray) else argument for argument in arguments]


def leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [] if value is None else [value]


def assert_close(found: Any, expected: Any, ulps: float, scale: Any = 0.0) -> None:
    """Equal to within so many roundings of the expected number or of `scale`; with 0, equal but for what NaN it is."""
    expected = np.broadcast_to(np.asarray(expected), found.shape)
    assert found.dtype == expected.dtype
    if ulps == 0 or found.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected)
        if found.dtype.kind == "f":
            numbers = ~np.isnan(expected)
            np.testing.assert_array_equal(np.signbit(found)[numbers], np.signbit(expected)[numbers])
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    expected, size = (
        expected[finite],
        np.broadcast_to(np.asarray(scale, expected.dtype), finite.shape)[finite],
    )
    error = np.abs(found[finite].astype("float64") - expected.astype("float64"))
    assert np.all(error <= ulps * np.spacing(np.maximum(np.abs(expected), size)).astype("float64"))


@np.errstate(all="ignore")
def check(function: Callable[..., Any], *arguments: Any, ulps: float = 0, scale: Any = 0.0) -> Source:
    """The kernel returns what the function returns, and changes what it changes."""
    plain = getattr(function, "__wrapped__", function)
    source = trace(plain, [describe(argument) for argument in arguments])
    expected_arguments, found_arguments = copies(list(arguments)), copies(list(arguments))
    expected = plain(*expected_arguments)
    found = run(source, found_arguments)
    assert type(found) is type(expected) or not isinstance(expected, tuple)
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    for here, there in pairs:
        assert [x is here for x in found_arguments] == [x is there for x in expected_arguments]
    pairs += [
        pair
        for pair in zip(found_arguments, expected_arguments, strict=True)
        if isinstance(pair[0], np.ndarray)
    ]
    for here, there in pairs:
        assert_close(here, there, ulps, scale)
    return source


def numbers(dtype: str, seed: int, size: int = 257, spread: float = 4.0) -> Any:
    """Random data, at the start of it what is special."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(size) < 0.5
    if dtype.startswith("float"):
        with np.errstate(all="ignore"):
            x = (rng.standard_normal(size) * spread).astype(dtype)
            x[rng.permutation(size)[: len(SPECIAL)]] = SPECIAL
        return x
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max, size, dtype, endpoint=True)
    x[::3] = rng.integers(0, 70, size, dtype)[::3]
    x[rng.permutation(size)[:6]] = (info.min, info.max, 0, 1, 2, np.array(-1).astype(dtype))
    return x


# ---- Functions of the library ------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations(dtype: str) -> None:
    x, y, z = (numbers(dtype, seed) for seed in range(3))
    size = np.where(np.isfinite(x), np.abs(x), 0)
    # exp to 6 roundings, then a few operations that each keep a relative error.
    check(activation._swiglu, x, y, ulps=16)
    check(activation._silu, x, ulps=16)
    # 1 + tanh and 1 + erf cancel, so that errors are relative to x.
    gelu_tanh = activation.GeluTanh
    constants = gelu_tanh.scale, gelu_tanh.cubic, gelu_tanh.saturation
    check(activation._gelu_tanh, x, *constants, ulps=32, scale=size + 1)
    check(activation._gelu, x, ulps=64, scale=size + 1)
    # No function of libm: to the bit.
    check(activation._silu_backward, x, y, z)
    check(activation._swiglu_backward, x, y, z, x)
    check(activation._gelu_tanh_backward, x, y, z, *constants)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS)
def test_adamw_to_the_bit(dtype: str) -> None:
    theta, g, m, v = (numbers(dtype, seed) for seed in range(4))
    source = check(_adamw, theta, g, m, np.abs(v), 0.9, 0.999, 1e-3, 1e-8)
    assert source.changed == (0, 2, 3)
    assert (source.returns, source.fresh) == (None, ())
    assert source.in_params == f"{dtype} g, float64 beta1, float64 beta2, float64 step_size, float64 eps"


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_and_softmax(dtype: str) -> None:
    x, y, z, w, p, scratch = (numbers(dtype, seed) for seed in range(6))
    check(norm.inverse_root, np.abs(x), 12, 1e-6)
    check(norm._normalise, x, y, z, w)
    check(norm._rms_backward, x, y, z, w, p, scratch)
    check(norm._standardise_backward, x, y, z, w, p, 7)
    source = check(tiled_attention._next_maximum, x, y, ulps=6)
    assert (source.changed, len(source.fresh)) == ((0,), 2)
    check(tiled_attention._finish, x, y, z, ulps=6, scale=np.where(np.isfinite(z), np.abs(z), 0))
    check(loss._exponentials_of, x, y, z, ulps=6)


@needs_compiler
def test_philox_to_the_bit() -> None:
    words = [numbers("uint64", seed) & np.uint64(0xFFFFFFFF) for seed in range(4)]
    source = check(philox_4x32, *words, 0x12345678, 0xFFFFFFFF)
    assert "4294967295ULL" in source.operation
    assert "int64 k0" in source.in_params
    check(philox_4x32, *words, words[1], words[2])


# ---- One operation at a time -------------------------------------------------------------------

EXACT = (
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "less", "less_equal", "greater", "greater_equal",
    "equal", "not_equal", "logical_and", "logical_or", "logical_xor", "floor_divide", "remainder",
)  # fmt: skip
OF_ONE = (
    "sqrt", "absolute", "reciprocal", "negative", "square", "sign", "isfinite", "isnan", "isinf", "floor", "ceil",
    "logical_not",
)  # fmt: skip
OF_LIBM = ("exp", "expm1", "log", "log1p", "tanh", "sin", "cos")
OF_BITS = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift")
INTEGERS = ("int8", "uint8", "int32", "uint32", "int64", "uint64")


def all_of(names: tuple[str, ...]) -> Callable[..., Any]:
    """NumPy's functions of these names, in one kernel."""

    def function(*operands: Any) -> Any:
        results = [getattr(np, name)(*operands) for name in names]
        # Which of two zeros is the larger is not NumPy's to say.
        pairs = zip(results, names, strict=True)
        return tuple(result + 0 if name in ("maximum", "minimum") else result for result, name in pairs)

    return function


@needs_compiler
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "float16"])
def test_each_ufunc(dtype: str) -> None:
    integer, half = "int" in dtype, dtype == "float16"
    x, y = numbers(dtype, 1), numbers(dtype, 2)
    y[:64] = x[:64]  # so that some are equal
    of_two = EXACT[: -2 if half else None] + (
        OF_BITS if integer else ()
    )  # of halves, NumPy rounds steps of a // b
    check(all_of(of_two), x, y)
    of_one = [name for name in OF_ONE if not (integer and name in ("reciprocal", "sqrt"))]
    check(all_of((*of_one, "invert") if integer else tuple(of_one)), x)
    check(np.sqrt, x, ulps=int(dtype.endswith("int8")))  # NumPy computes those in float16
    if not integer:
        check(all_of(OF_LIBM), x, ulps=1 if half else 6)  # NumPy promises 4 roundings, the library of C one
    size = np.where(np.isfinite(y), abs(y), 0) if half else 0
    check(lambda a, b: a - b * 2, x, y, ulps=2 * half, scale=size)


@needs_compiler
def test_booleans() -> None:
    a, b = numbers("bool", 1), numbers("bool", 2)
    x = numbers("float32", 3)
    check(lambda a, b: (a & b, a | b, a ^ b, ~a, a + b, a * b, np.maximum(a, b), np.isnan(a), a == b), a, b)
    check(lambda a, b, x: (np.where(a, x, 0.5), np.where(a & ~b, 2, x), x + a, np.where(x, a, b)), a, b, x)
    check(lambda a, x: (np.where(a, 1, 2), np.where(a, x, x.astype("float64")), np.where(True, x, a)), a, x)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS)
def test_powers_and_bounds(dtype: str) -> None:
    x = numbers(dtype, 5)
    check(lambda x: (x**0, x**1, x**2, x**-1), x)
    check(lambda x: (x**3, x**7, x**-3, x**0.5, x**1.5, x**2.0, 2**x, x**9), x, ulps=12)
    check(lambda x, y: (x**y, x * y**0.3), np.abs(x), 1.7, ulps=6)
    check(lambda x: (np.clip(x, -1, 2.5), np.clip(x, None, 1) + 0, np.clip(x, 0.25, None)), x)
    check(lambda k: (k**2, k**5, k**0), numbers("int32", 1))


@needs_compiler
def test_casts() -> None:
    x = numbers("float64", 1)
    small = np.random.default_rng(0).uniform(0, 100, 50)
    kinds = (
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "bool",
    )
    check(lambda x: tuple(x.astype(kind) for kind in kinds), small)
    check(lambda x: (x.astype("float32"), x.astype(bool), x.astype("float16").astype("float64") * 1.1), x)
    check(lambda k: tuple(k.astype(kind) for kind in (*kinds, "float64")), numbers("uint32", 1))
    check(lambda m: (m.astype("float32") * 0.5, m.astype("float16"), m.astype("uint8")), numbers("bool", 1))
    check(
        lambda x, k: (x * k, x + np.float64(0.1), x * np.float32(0.1)),
        numbers("float32", 2),
        numbers("int32", 2),
    )


@needs_compiler
def test_literals() -> None:
    x, k, n = numbers("float32", 1), numbers("int64", 2), numbers("int32", 3)
    check(
        lambda x: (x * 0.1, x + 1e-8, x * 1e20, x - math.inf, x + math.nan, -(-x - -0.5), x * 3, x * -1e300),
        x,
    )
    check(lambda x: (np.where(x < 0, -0.0, 1e39), x * 16777217), x)
    check(lambda k: (k + -(2**63), k * (2**63 - 1), k == -(2**63), k - -1), k)
    check(lambda n: (n + -(2**31), n ^ (2**31 - 1), np.where(n < 0, -(2**31), n)), n)
    check(lambda u: (u + (2**64 - 1), u >> 63, u << 64, (u >> np.uint64(70)) + 1), numbers("uint64", 4))


def test_float32_is_never_computed_in_double() -> None:
    single = np.dtype("float32")
    text = trace(
        lambda x: np.exp(x * 0.1) / 3 + np.where(x > 1, 2.5, x) ** 2 - np.maximum(x, 1e-3), [single]
    ).operation
    assert "double" not in text
    assert re.findall(r"\d\.\d*(?:e-?\d+)?", text)
    assert not re.findall(r"\d\.\d+(?:e-?\d+)?(?![\de.f])", text)


# ---- Python numbers ----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_weak_and_computed_with_as_python_does(dtype: str) -> None:
    x = numbers(dtype, 1)

    def function(x: Any, beta: float, k: int, flag: bool) -> Any:
        beta -= 0.5
        return (
            x * (1 - beta),
            x / k + flag,
            x * (k // -3 + k % -3 + flag * 2 + (k > 3)),
            x * (-k * 2 / 7),
            x * np.exp(beta),
        )

    source = check(function, x, 0.9999999, 7, True, ulps=2)
    assert source.in_params == f"{dtype} x, float64 beta, int64 k, bool flag"
    assert [kind.name for kind in source.fresh] == [dtype] * 4 + ["float64"]
    assert source == trace(function, [np.dtype(dtype), float, int, bool])  # whatever the numbers are
    check(lambda x, beta: x * (1 - beta), x, 1 - 1e-9)  # in float32, this beta is 1


@needs_compiler
def test_float16_is_rounded_where_it_is_stored() -> None:
    x = numbers("float16", 1)
    source = trace(lambda x: (x * 100) / 100 + 0.1, [x.dtype])
    with np.errstate(over="ignore"):
        step = x.astype("float32") * np.float32(100) / np.float32(100) + np.float32(np.float16(0.1))
        assert_close(run(source, [x]), step.astype("float16"), 0)
    assert source.out_params == "float16 y0"

    def in_place(x: Any) -> None:
        x *= 3

    check(in_place, x)


# ---- What is changed and what is returned ------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("condition", [False, True])
def test_where_it_is_false_arguments_keep_their_bits(condition: bool) -> None:
    payload = np.array([0x7FC01234, 0x80000000, 0xFFFFFFFF, 1, 0x3F800000], "uint32").view("float32")
    plain = _adamw.__wrapped__  # type: ignore[attr-defined]
    before = [payload, payload[::-1].copy(), payload + 1, np.abs(payload)]
    arguments: list[Any] = [*copies(before), 0.9, 0.999, 1e-3, 1e-8]
    run(trace(plain, [describe(argument) for argument in arguments], where=True), arguments, condition)
    pairs = zip(arguments, before, strict=False)
    changed = [bool((argument.view("uint32") != old.view("uint32")).any()) for argument, old in pairs]
    assert changed == [condition, False, condition, condition]

    def both(x: Any) -> Any:
        x += 1
        return x * 2, x

    x = payload.copy()
    fresh, same = run(trace(both, [x.dtype], where=True), [x], condition)
    assert same is x
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(fresh, (payload + 1) * 2)


@needs_compiler
def test_what_is_returned() -> None:
    x, y = numbers("float32", 1), numbers("float32", 2)

    def some(x: Any, y: Any) -> Any:
        x += y
        z = x * 2
        return y, x, z, z, (z + 1,)[0]

    source = check(some, x, y)
    assert source.returns == (
        Returned("argument", 1), Returned("argument", 0), Returned("fresh", 0), Returned("fresh", 0),
        Returned("fresh", 1),
    )  # fmt: skip
    assert check(lambda x: (x + 1,), x).returns == (Returned("fresh", 0),)
    assert check(lambda x: x + 1, x).returns == Returned("fresh", 0)


@needs_compiler
def test_cells() -> None:
    x, y, k = numbers("float32", 1), numbers("float32", 2), numbers("int32", 3)

    def exchange(x: Any, y: Any) -> None:
        before = x.astype("float32")
        np.copyto(x, y)
        np.copyto(y, before)

    def several(x: Any, y: Any, k: Any) -> Any:
        scratch = np.empty_like(x)
        np.multiply(x, y, out=scratch)
        alias = scratch
        alias -= 1.5
        np.copyto(x, 3, where=y > 0)
        k //= 3
        k <<= 1
        np.clip(k, 0, 1000, out=k)
        np.add(x, x.astype("float64"), out=y)  # rounded to float32 at the end
        return scratch, alias * x

    check(exchange, x, y)
    check(several, x, y, k)

    def unchanged_until_the_end(x: Any) -> Any:
        copy = x.astype(x.dtype)
        x *= 2
        return copy + x

    check(unchanged_until_the_end, x)


@needs_compiler
def test_names_that_c_or_cupy_would_not_take() -> None:
    x = numbers("float32", 1)
    check(lambda tanh, i, n, double, y0, t0, condition: np.tanh(tanh) + i * n - double + y0 * t0 / condition, *[x] * 7,
          ulps=32, scale=np.where(np.isfinite(x), x * x, 0) + 1)  # fmt: skip
    check(lambda *many: many[0] - many[1], x, x)
    check(lambda θ: θ * 2, x)
    source = trace(lambda tanh: tanh + 1, [x.dtype], where=True)
    assert (source.name, source.in_params) == ("tinyllm_lambda", "float32 tanh_, bool condition")


# ---- The text ----------------------------------------------------------------------------------


def test_the_text_is_short_and_says_the_same_each_time() -> None:
    def function(gate: Any, up: Any, unused: Any) -> Any:
        unused * 2 + gate  # dead
        gate *= up * up
        return np.exp(-gate) + np.exp(-gate), up * up

    kinds = [np.dtype("float32")] * 3
    source = trace(function, kinds)
    assert source == trace(function, kinds)
    assert source.operation.splitlines() == [
        "const float gate_0 = gate;",
        "const float t1 = up * up;",
        "const float gate_2 = gate_0 * t1;",
        "const float t3 = -gate_2;",
        "const float t4 = exp(t3);",
        "const float t5 = t4 + t4;",
        "gate = gate_2;",
        "y0 = t5;",
        "y1 = t1;",
    ]
    assert (source.inputs, source.changed, source.guarded) == ((1,), (0,), False)
    assert (source.in_params, source.out_params) == ("float32 up", "float32 gate, float32 y0, float32 y1")


# ---- Refusals ----------------------------------------------------------------------------------

TABLE = np.ones(3, "float32")


@pytest.mark.parametrize(
    "body",
    [
        lambda x, k, s: x[0], lambda x, k, s: x.sum(), lambda x, k, s: np.sum(x), lambda x, k, s: np.add.reduce(x),
        lambda x, k, s: x * (1 if x else 2), lambda x, k, s: x * float(x), lambda x, k, s: x * int(x),
        lambda x, k, s: x * len(x), lambda x, k, s: x @ x, lambda x, k, s: np.matmul(x, x), lambda x, k, s: x * x.shape,
        lambda x, k, s: x.reshape(-1), lambda x, k, s: np.concatenate([x, x]), lambda x, k, s: [*x],
        lambda x, k, s: np.asarray(x), lambda x, k, s: TABLE * x, lambda x, k, s: x * TABLE, lambda x, k, s: x * 2j,
        lambda x, k, s: np.arctan(x), lambda x, k, s: np.modf(x), lambda x, k, s: x.astype("complex64"),
        lambda x, k, s: np.add(x, x, where=x > 0), lambda x, k, s: np.add(x, x, dtype="float64"),
        lambda x, k, s: np.add(x, x, out=TABLE), lambda x, k, s: np.copyto(TABLE, x), lambda x, k, s: x + "a",
        lambda x, k, s: np.where(x), lambda x, k, s: np.empty_like(x) + 1, lambda x, k, s: np.empty_like(x),
        lambda x, k, s: np.add(k, x, out=k), lambda x, k, s: operator.iadd(k, 0.5), lambda x, k, s: np.copyto(k, 0.5),
        lambda x, k, s: x & 1, lambda x, k, s: k**k, lambda x, k, s: k**-1, lambda x, k, s: k**99,
        lambda x, k, s: np.reciprocal(k), lambda x, k, s: (x < 0) - (x > 0), lambda x, k, s: -(x < 0),
        lambda x, k, s: k.astype("uint64") < k, lambda x, k, s: s, lambda x, k, s: s + 1, lambda x, k, s: 0.5,
        lambda x, k, s: [x + 1], lambda x, k, s: None, lambda x, k, s: x, lambda x, k, s: s.dtype,
        lambda x, k, s: np.add(s, 1, out=s), lambda x, k, s: operator.setitem(x, 0, 1), lambda x, k, s: x.T,
        lambda x, k, s: 1 in x, lambda x, k, s: x * float(s), lambda x, k, s: range(s), lambda x, k, s: divmod(x, 2),
        lambda x, k, s: x.real, lambda x, k, s: np.where(x > 0, TABLE, x), lambda x, k, s: x * np.longdouble(1),
    ],
)  # fmt: skip
def test_what_no_elementwise_function_can_do_is_refused_by_name(body: Callable[..., Any]) -> None:
    def the_function(x: Any, k: Any, s: Any) -> Any:
        return body(x, k, s)

    with pytest.raises(TypeError, match=r"^the_function: "):
        trace(the_function, [np.dtype("float32"), np.dtype("int64"), int])


def test_values_of_another_function_are_refused() -> None:
    kept: list[Any] = []
    trace(lambda x: kept.append(x) or x + 1, [np.dtype("float32")])  # type: ignore[func-returns-value]
    with pytest.raises(TypeError, match="another"):
        trace(lambda x: x + kept[0], [np.dtype("float32")])


def test_descriptions_of_arguments() -> None:
    given = (TABLE, np.float64(1), np.True_, 1.0, 2, True)
    assert [describe(argument) for argument in given] == [
        *map(np.dtype, ("float32", "float64", "bool")),
        float,
        int,
        bool,
    ]
    for wrong in ("a", None, 1j, np.ones(1, "complex64"), np.ones(1, "O")):
        with pytest.raises(TypeError, match="arrays of real numbers"):
            describe(wrong)


def test_integers_that_do_not_fit_are_errors_as_on_numpy() -> None:
    with pytest.raises(OverflowError):
        trace(lambda k: k + 300, [np.dtype("uint8")])


# ---- Any expression ----------------------------------------------------------------------------

OPERATIONS = {
    1: (operator.neg, abs, np.square, np.sign, np.floor, np.logical_not, np.isfinite, np.sqrt,
        lambda x: (x * 1.0) ** 2),
    2: (
        operator.add, operator.sub, operator.mul, operator.truediv, operator.lt, operator.ge, operator.eq,
        lambda a, b: np.maximum(a, b) + 0, lambda a, b: np.minimum(a, b) + 0, np.logical_and, np.logical_xor,
    ),
    3: (np.where, lambda a, b, c: np.clip(a, np.minimum(b, c), np.maximum(b, c)) + 0.0),
}  # fmt: skip
INTEGER_OPERATIONS = {
    1: (np.square, np.sign, abs, np.invert),
    2: (
        operator.add, operator.mul, operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift,
        operator.floordiv, operator.mod, operator.lt, operator.eq, np.maximum, np.minimum, operator.sub,
    ),
    3: (np.where,),
}  # fmt: skip


def expressions(operations: dict[int, tuple[Any, ...]], arguments: int, literals: Any) -> Any:
    """Nested tuples of a function and its operands; a leaf is ("argument", position) or ("literal", number)."""
    leaf = st.tuples(st.just("argument"), st.integers(0, arguments - 1)) | st.tuples(
        st.just("literal"), literals
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            [
                st.tuples(st.sampled_from(functions), *[inner] * count)
                for count, functions in operations.items()
            ]
        ),
        max_leaves=12,
    )


def evaluate(expression: Any, arguments: tuple[Any, ...]) -> Any:
    head, *rest = expression
    if head in ("argument", "literal"):
        return arguments[rest[0]] if head == "argument" else rest[0]
    value = head(*[evaluate(operand, arguments) for operand in rest])
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value  # where of literals


def check_expressions(some: list[Any], arguments: list[Any]) -> None:
    def function(*arguments: Any) -> Any:
        values = [evaluate(expression, arguments) for expression in some]
        return tuple(np.where(arguments[0] == arguments[0], value, 0) for value in values)

    with np.errstate(all="ignore"):
        try:
            function(*copies(arguments))
        except (OverflowError, ZeroDivisionError, TypeError, ValueError):
            assume(False)  # Python and NumPy refuse it
    check(function, *arguments)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        expressions(OPERATIONS, 6, st.integers(-3, 9) | st.sampled_from([0.1, -2.5, 1e30])),
        min_size=1,
        max_size=4,
    )
)
def test_any_expression_of_floats(some: list[Any]) -> None:
    arguments = [
        *[numbers(dtype, seed) for seed, dtype in enumerate(("float32", "float32", "float64", "bool"))],
        0.3,
        -4,
    ]
    check_expressions(some, arguments)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.lists(expressions(INTEGER_OPERATIONS, 3, st.integers(0, 9)), min_size=1, max_size=4),
)
def test_any_expression_of_integers(dtype: str, some: list[Any]) -> None:
    try:
        check_expressions(some, [numbers(dtype, 1), numbers(dtype, 2), 5])
    except OverflowError:
        assume(False)  # a literal below 0 that is compared with unsigned integers


# ---- All kernels of the package ----------------------------------------------------------------


def run_compiled(device: Any, function: Any, arguments: tuple[Any, ...], where: Any) -> Any:
    """What the strict double does for a kernel, with the kernel's text compiled as C."""
    device.count.launches += 1
    key = (function, where is None, *map(describe, arguments))
    if key not in device.sources:
        device.sources[key] = trace(function, key[2:], where is not None)
    source = device.sources[key]
    hosts = [x._host if isinstance(x, DeviceArray) else x for x in arguments]
    for position in source.changed:
        hosts[position] = np.ascontiguousarray(hosts[position])
    result = run(source, hosts, None if where is None else where._host.item())
    for position in source.changed:
        arguments[position]._host[...] = hosts[position]

    def back(value: Any) -> Any:
        for argument, host in zip(arguments, hosts, strict=True):
            if value is host:
                return argument
        return DeviceArray(value, device)

    return tuple(map(back, result)) if isinstance(result, tuple) else None if result is None else back(result)


@needs_compiler
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_run_on_compiled_kernels(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Losses of a model whose every kernel is the compiled text, dropout and long attention among them."""
    monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    tokens = np.random.default_rng(0).integers(0, 40, 5000)

    def losses() -> list[float]:
        config = TrainConfig(
            steps=12, batch_size=3, optimizer=optimizer, threads=1, log_every=6, warmup_steps=3, z_loss=1e-3,
        )  # fmt: skip
        shape = ModelConfig(
            vocab_size=40, context_length=12, num_layers=2, num_heads=2, hidden_size=16, dropout=0.1
        )
        model = TransformerLM(shape, 1)
        tokenizer = CharTokenizer("".join(map(chr, range(65, 105))))
        trainer = Trainer(model, tokenizer, tokens, tokens[:200], config)
        found = []
        with trainer.engine:
            while trainer.step < config.steps:
                for made in trainer.train_steps():
                    assert isinstance(made, StepMetrics)
                    found.append(made.loss)
        return found

    expected = losses()
    monkeypatch.setattr(StrictDevice, "elementwise", run_compiled)
    with strict_device() as device:
        found = losses()
    assert len({source.name for source in device.sources.values()}) > 10
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@needs_compiler
@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_op_on_compiled_kernels(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    op = REGISTRY[name]

    def results(convert: Callable[[Any], Any]) -> list[Any]:
        found = []
        for case in op.cases:
            rng = np.random.default_rng(1)
            xs = [
                Tensor(convert(rng.uniform(case.low, case.high, shape).astype(dtype)), requires_grad=True)
                for shape in case.shapes
            ]
            y = op(**{key: convert(value) for key, value in case.arguments.items()})(*xs)
            cotangent = convert(rng.standard_normal(y.shape).astype(y.dtype))
            found += [backend.to_numpy(x) for x in (y.data, *gradients(y, xs, cotangent))]
        return found

    def uploaded(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(uploaded, value))
        return backend.asarray(value) if isinstance(value, np.ndarray) else value

    expected = results(lambda value: value)
    monkeypatch.setattr(StrictDevice, "elementwise", run_compiled)
    with strict_device():
        found = results(uploaded)
    for a, b in zip(found, expected, strict=True):
        scale = np.abs(b).max() if b.size else 0
        np.testing.assert_allclose(a, b, rtol=0, atol=200 * np.finfo(b.dtype).eps * max(1, scale))


@needs_compiler
def test_segment_sums() -> None:
    """The kernel that is written by hand, over all elements in turn."""
    _, _, operation, _ = SEGMENT_SUMS
    code = f"""#include <stdint.h>
void kernel(int64_t N, int64_t width, const double *values, const int64_t *order, const int64_t *begins,
            const int64_t *ends, double *targets) {{
    typedef double T;
    for (int64_t row = 0; row < N; row++) {{
        for (int64_t column = 0; column < width; column++) {{
            const int64_t begin = begins[row], end = ends[row];
            #define target (targets[row * width + column])
            {operation}
            #undef target
        }}
    }}
}}"""
    rng = np.random.default_rng(0)
    N, M, D = 7, 50, 3
    values, index, target = (
        rng.standard_normal((M, D)),
        rng.integers(0, N - 1, M),
        rng.standard_normal((N, D)),
    )
    order = np.argsort(index, kind="stable")
    begin, end = (np.searchsorted(index[order], np.arange(N), side=side) for side in ("left", "right"))
    expected = target.copy()
    np.add.at(expected, index, values)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, order, begin, end, target)]
    built(code)(ctypes.c_int64(N), ctypes.c_int64(D), *pointers)
    np.testing.assert_allclose(target, expected, rtol=1e-14)

"""tinygrad's tests of ops, run on tinyllm through a translation of names.

`python benchmarks/suites/tinygrad_ops.py test_ops.py`, with tinygrad's `test/backend/test_ops.py` (PyTorch is needed,
tinygrad is not). Each call of its `helper_test_op` compares values, and gradients of a sum, with PyTorch's. Each is
counted: it agrees; it differs; it is refused, where PyTorch computes something; or the name, or an argument, is not
offered. `--show differs` prints the calls of a kind.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tinyllm
from tinyllm import ops
from tinyllm.autograd.tensor import gradients

KINDS = ("agrees", "differs", "refused", "not offered")
KEYWORDS = {"keepdim": "keepdims", "dim": "axis"}


class NotOfferedError(Exception):
    """tinyllm has no function of this name, or it takes no such argument."""


class ByName(type):
    """Makes `Tensor.name` the function of that name."""

    def __getattr__(cls, name: str) -> Any:
        return Function(name)


class Function:
    """A function by tinygrad's name, on Tensors of the suite."""

    def __init__(self, name: str) -> None:
        self.name = name

    @staticmethod
    def _found(name: str) -> Callable[..., Any]:
        if hasattr(tinyllm.Tensor, name):
            return lambda x, *rest, **named: getattr(_as_tensor(x), name)(*rest, **named)
        for place in (ops, tinyllm):
            if callable(getattr(place, name, None)) and not name.startswith("_"):
                return getattr(place, name)
        raise NotOfferedError(name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        named = {KEYWORDS.get(key, key): _inside(value) for key, value in named.items()}
        try:
            function = TRANSLATED.get(self.name) or self._found(self.name)
            return _outside(function(*[_inside(x) for x in arguments], **named))
        except TypeError as error:
            if "unexpected keyword" in str(error) or "positional argument" in str(error):
                raise NotOfferedError(f"{self.name}: {error}") from error
            raise


class Tensor(metaclass=ByName):
    """A Tensor with tinygrad's names."""

    __hash__ = object.__hash__

    def __init__(self, values: Any, dtype: Any = None, **_: Any) -> None:
        values = _inside(values)
        if not isinstance(values, tinyllm.Tensor):
            array = np.asarray(values, dtype)
            if not hasattr(values, "dtype") and dtype is None and array.dtype.kind in "if":
                array = array.astype(np.int32 if array.dtype.kind == "i" else np.float32)
            values = tinyllm.Tensor(array, requires_grad=array.dtype.kind == "f")
        self.inner = values

    def __getattr__(self, name: str) -> Any:
        function = Function(name)
        return lambda *rest, **named: function(self, *rest, **named)

    @property
    def shape(self) -> Any:
        return self.inner.shape

    @property
    def ndim(self) -> int:
        return self.inner.ndim

    @property
    def dtype(self) -> Any:
        return self.inner.dtype

    @property
    def T(self) -> Any:
        return _outside(self.inner.T)

    def realize(self) -> Tensor:
        return self

    def contiguous(self) -> Tensor:
        return self

    def numpy(self) -> Any:
        return self.inner.data

    def gradient(self, *inputs: Tensor) -> list[Tensor]:
        found = gradients(self.inner, [x.inner for x in inputs])
        return [Tensor(value) for value in found]

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Any:
        return iter([_outside(part) for part in self.inner])

    def __getitem__(self, index: Any) -> Any:
        return _outside(self.inner[_inside(index)])


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Tensor, *others: Any) -> Any:
        if not hasattr(tinyllm.Tensor, name):
            raise NotOfferedError(name)
        return _outside(getattr(self.inner, name)(*[_inside(x) for x in others]))

    return apply


_binary = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]
for _name in [
    *_binary,
    *["r" + name for name in _binary],
    *["neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"],
]:
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))


def _inside(value: Any) -> Any:
    """What the suite's code passes, for tinyllm."""
    if isinstance(value, Tensor):
        return value.inner
    if isinstance(value, (tuple, list)):
        return type(value)(_inside(x) for x in value)
    if isinstance(value, slice):
        return slice(_inside(value.start), _inside(value.stop), _inside(value.step))
    return value


def _outside(value: Any) -> Any:
    """What tinyllm returns, for the suite's code."""
    if isinstance(value, (tuple, list)):
        return (
            type(value)([_outside(x) for x in value])
            if type(value) in (tuple, list)
            else tuple(map(_outside, value))
        )
    if isinstance(value, (np.ndarray, np.generic)):
        value = tinyllm.Tensor(np.asarray(value))
    if isinstance(value, tinyllm.Tensor):
        outside = Tensor.__new__(Tensor)
        outside.inner = value
        return outside
    return value


def _as_tensor(value: Any) -> Any:
    return value if isinstance(value, tinyllm.Tensor) else tinyllm.Tensor(value)


def _named(name: str, **words: str) -> Callable[..., Any]:
    """The function `name` here, for one of another name or other words in tinygrad."""

    def call(*arguments: Any, **named: Any) -> Any:
        return Function._found(name)(
            *arguments, **{words.get(key, key): value for key, value in named.items()}
        )

    return call


def _lengths(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def _pad(x: Any, padding: Any, mode: str = "constant", value: float = 0.0) -> Any:
    """tinygrad's: (before, after) or None for each axis, or torch's flat list from the last axis on."""
    if mode != "constant":
        raise NotOfferedError(f"pad(mode={mode!r})")
    if all(pair is None or isinstance(pair, (tuple, list)) for pair in padding):
        pairs = [pair or (0, 0) for pair in padding]
    else:
        flat = list(zip(padding[::2], padding[1::2], strict=True))
        pairs = [(0, 0)] * (x.ndim - len(flat)) + flat[::-1]
    if any(width < 0 for pair in pairs for width in pair):
        raise NotOfferedError("pad with negative widths")
    return ops.pad(x, pairs, value)


def _expand(x: Any, *shape: Any) -> Any:
    shape = _lengths(shape)
    lengths = (1,) * (len(shape) - x.ndim) + x.shape
    return ops.broadcast_to(
        x, tuple(n if m in (-1, None) else m for n, m in zip(lengths, shape, strict=True))
    )


def _variance(name: str) -> Callable[..., Any]:
    return lambda x, axis=None, keepdims=False, correction=1: getattr(ops, name)(
        x, axis, keepdims, correction
    )


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **named: Any) -> Any:
    named = {"mask": attn_mask, "causal": is_causal} | {key: value for key, value in named.items() if value}
    if named.pop("enable_gqa", False) and named:
        pass  # grouped heads need no word here
    return ops.scaled_dot_product_attention(q, k, v, **named)


def _created(function: Callable[..., Any]) -> Callable[..., Any]:
    """An array made by NumPy; float32 and int32 where nobody says."""

    def create(*arguments: Any, dtype: Any = None, **named: Any) -> Any:
        array = function(*arguments, **named)
        default = np.float32 if array.dtype.kind == "f" else np.int32
        return tinyllm.Tensor(array.astype(dtype or default))

    return create


def _chosen(condition: Any, x: Any, y: Any) -> Any:
    return ops.where(condition, x, y)


def _sorted(x: Any, axis: int = -1, descending: bool = False) -> Any:
    if not hasattr(ops, "argsort"):
        raise NotOfferedError("sort")
    positions = ops.argsort(x, axis, descending=descending)
    return ops.take_along_axis(x, positions, axis), positions.astype(np.int32)


def _class_loss(
    x: Any, target: Any, reduction: str = "mean", label_smoothing: float = 0.0, **named: Any
) -> Any:
    words = {"reduction": reduction, "label_smoothing": label_smoothing}
    words = {key: value for key, value in words.items() if value not in ("mean", 0.0)}
    return ops.cross_entropy(*_classes_last(x, target), **words, **named)


def _classes_last(x: Any, target: Any) -> tuple[Any, Any]:
    """Logits, and targets if they are probabilities, with the axis of classes last instead of second."""
    order = (0, *range(2, x.ndim), 1)
    both = len(target.shape) == x.ndim > 2
    return (
        (ops.transpose(x, *order), ops.transpose(target, *order) if both else target)
        if x.ndim > 2
        else (x, target)
    )


TRANSLATED: dict[str, Callable[..., Any]] = {
    "add": _named("add"),
    "mul": _named("multiply"),
    "sub": lambda x, y, reverse=False: ops.subtract(y, x) if reverse else ops.subtract(x, y),
    "div": lambda x, y: ops.divide(x, y),
    "pow": lambda x, y, reverse=False: ops.power(y, x) if reverse else ops.power(x, y),
    "neg": _named("negative"),
    "dot": _named("matmul"),
    "cat": lambda x, *others, axis=0: (
        ops.concatenate([x, *others], axis) if not isinstance(x, (tuple, list)) else ops.concatenate(x, axis)
    ),
    "stack": lambda x, *others, axis=0: ops.stack(
        [x, *others] if not isinstance(x, (tuple, list)) else x, axis
    ),
    "expand": _expand,
    "view": lambda x, *shape: ops.reshape(x, *shape),
    "unsqueeze": lambda x, axis: ops.expand_dims(x, axis),
    "transpose": lambda x, first=1, second=0: ops.swapaxes(x, first, second),
    "permute": lambda x, *axes: ops.transpose(x, *_lengths(axes)),
    "flip": lambda x, *axes, axis=None: ops.flip(x, _lengths(axes) if axes else axis),
    "cast": lambda x, dtype: ops.astype(x, dtype),
    "type": lambda x, dtype: ops.astype(x, dtype),
    "float": lambda x: ops.astype(x, np.float32),
    "half": lambda x: ops.astype(x, np.float16),
    "int": lambda x: ops.astype(x, np.int32),
    "bool": lambda x: ops.astype(x, np.bool_),
    "swish": _named("silu"),
    "quick_gelu": lambda x: x * ops.sigmoid(x * 1.702),
    "gelu": lambda x, approximate="tanh": ops.gelu(x, approximate),
    "einsum": lambda formula, *xs: ops.einsum(formula, *_lengths(xs)),
    "logsigmoid": _named("log_sigmoid"),
    "softplus": _named("softplus"),
    "var": _variance("var"),
    "std": _variance("std"),
    "sum": lambda x, axis=None, keepdims=False, **words: ops.sum(x, axis, keepdims, **words),
    "mean": lambda x, axis=None, keepdims=False: ops.mean(x, axis, keepdims),
    "max": lambda x, axis=None, keepdims=False: ops.max(x, axis, keepdims),
    "min": lambda x, axis=None, keepdims=False: ops.min(x, axis, keepdims),
    "prod": lambda x, axis=None, keepdims=False, **words: ops.prod(x, axis, keepdims, **words),
    "pad": _pad,
    "clamp": _named("clip", min_="low", max_="high"),
    "clip": _named("clip", min_="low", max_="high"),
    "where": _chosen,
    "repeat": lambda x, *counts: _named("tile")(x, _lengths(counts)),
    "repeat_interleave": lambda x, repeats, axis=None: _named("repeat")(x, repeats, axis=axis),
    "gather": lambda x, axis, index: ops.gather(x, axis, index),
    "sort": _sorted,
    "topk": lambda x, k, axis=-1, largest=True, sorted_=True: _named("topk")(x, k, axis, largest),
    "roll": lambda x, shifts, axis=None: _named("roll")(x, shifts, axis),
    "scaled_dot_product_attention": _attention,
    "cross_entropy": _class_loss,
    "sparse_categorical_crossentropy": _named("cross_entropy"),
    "nll_loss": lambda x, target, weight=None, **named: _named("nll_loss")(
        *_classes_last(x, target), weight=weight, **named
    ),
    "binary_crossentropy_logits": _named("binary_cross_entropy_with_logits"),
    "zeros": _created(lambda *shape: np.zeros(_lengths(shape))),
    "ones": _created(lambda *shape: np.ones(_lengths(shape))),
    "full": _created(np.full),
    "eye": _created(lambda n, m=None: np.eye(n, m)),
    "arange": _created(np.arange),
    "linspace": _created(np.linspace),
    "randn": _created(lambda *shape: np.random.default_rng(0).normal(size=_lengths(shape))),
    "zeros_like": lambda x, dtype=None: tinyllm.Tensor(np.zeros_like(x.data, dtype)),
    "ones_like": lambda x, dtype=None: tinyllm.Tensor(np.ones_like(x.data, dtype)),
    "full_like": lambda x, value, dtype=None: tinyllm.Tensor(np.full_like(x.data, value, dtype)),
    "randint": _created(
        lambda *shape, low=0, high=10: np.random.default_rng(0).integers(low, high, _lengths(shape))
    ),
    "scatter": lambda x, axis, index, src, reduce=None: (
        _named("scatter_add")(x, axis, index, src)
        if reduce == "add"
        else _named("scatter")(x, axis, index, src)
    ),
}
for _ufunc in ("sign", "floor", "ceil", "isnan", "isinf", "isfinite", "logical_not"):
    TRANSLATED[_ufunc] = getattr(np, _ufunc)


class Tally:
    """What came of each call."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.calls: list[tuple[str, str, str]] = []
        self.test = ""

    def add(self, kind: str, why: str = "") -> None:
        self.counts[kind] += 1
        self.calls.append((kind, self.test, why))

    def compare(
        self, suite: Any, shapes: Any, torch_function: Any, function: Any = None, **words: Any
    ) -> None:
        """In place of the suite's helper_test_op: nothing is raised, everything is counted."""
        limits = {"atol": 1e-6, "rtol": 1e-3, "grad_atol": 1e-4, "grad_rtol": 1e-3} | words
        forward_only, values = limits.get("forward_only", False), limits.get("vals")
        low, high = limits.get("low", -2), limits.get("high", 2)
        torch_inputs, inputs = suite.prepare_test_op(low, high, shapes, values, forward_only)
        expected = torch_function(*torch_inputs)
        try:
            found = (function or torch_function)(*inputs)
            _require_close(found.numpy(), expected, limits["atol"], limits["rtol"])
            if not forward_only and torch_inputs:
                expected_gradients = torch.autograd.grad(torch_function(*torch_inputs).sum(), torch_inputs)
                for got, wanted in zip(
                    (function or torch_function)(*inputs).sum().gradient(*inputs),
                    expected_gradients,
                    strict=True,
                ):
                    _require_close(got.numpy(), wanted, limits["grad_atol"], limits["grad_rtol"])
        except AssertionError as error:
            self.add("differs", " ".join(str(error).split())[:200])
        except (NotOfferedError, NotImplementedError, AttributeError) as error:
            self.add("not offered", str(error))
        except Exception as error:
            self.add("refused", f"{type(error).__name__}: {error}")
        else:
            self.add("agrees")

    def expect_error(self, suite: Any, shapes: Any, torch_function: Any, function: Any, **words: Any) -> None:
        """In place of helper_test_exception: what PyTorch refuses, by any error of ours."""
        _, inputs = suite.prepare_test_op(
            words.get("low", -1.5),
            words.get("high", 1.5),
            shapes,
            words.get("vals"),
            words.get("forward_only", False),
        )
        try:
            (function or torch_function)(*inputs)
        except (NotOfferedError, AttributeError) as error:
            self.add("not offered", str(error))
        except Exception:
            self.add("agrees")
        else:
            self.add("differs", "nothing is raised, and PyTorch refuses it")


def _require_close(found: Any, expected: Any, atol: float, rtol: float) -> None:
    """Shapes, kinds of dtype (integers of any length) and values; raises AssertionError."""
    wanted = expected.detach().numpy()
    assert found.shape == wanted.shape, f"shape {found.shape}, PyTorch's {wanted.shape}"
    assert found.dtype == wanted.dtype or (found.dtype.kind in "iu" and wanted.dtype.kind in "iu"), (
        f"dtype {found.dtype}, PyTorch's {wanted.dtype}"
    )
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=rtol)


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules under tinygrad's names, for what the suite imports."""
    modules = {
        name: types.ModuleType(name)
        for name in (
            "tinygrad",
            "tinygrad.helpers",
            "tinygrad.tensor",
            "tinygrad.renderer",
            "tinygrad.renderer.nir",
        )
    }
    device = types.SimpleNamespace(
        DEFAULT="CPU", renderer=types.SimpleNamespace(supported_dtypes=lambda: [np.float16, np.float64])
    )
    dtypes = types.SimpleNamespace(
        default_float=np.float32, default_int=np.int32, float=np.float32, half=np.float16, bool=np.bool_, int=np.int32,
        **{name: getattr(np, name) for name in ["float16", "float32", "float64", "int8", "int16", "int32", "int64"]},
        **{name: getattr(np, name) for name in ["uint8", "uint16", "uint32", "uint64"]},
    )  # fmt: skip
    vars(modules["tinygrad"]).update(Tensor=Tensor, dtypes=dtypes, Device=_Devices(device))
    vars(modules["tinygrad.helpers"]).update(
        getenv=lambda name, default=0: default,
        DEBUG=0,
        IMAGE=0,
        DEV=types.SimpleNamespace(renderer="", interface=""),
        Context=lambda **_: contextlib.nullcontext(),
    )
    vars(modules["tinygrad.tensor"])["_to_np_dtype"] = lambda dtype: dtype
    vars(modules["tinygrad.renderer.nir"])["NIRRenderer"] = type("NIRRenderer", (), {})
    return modules


class _Devices:
    """`Device.DEFAULT` and `Device[name]`."""

    def __init__(self, device: Any) -> None:
        self.device, self.DEFAULT = device, device.DEFAULT

    def __getitem__(self, name: str) -> Any:
        return self.device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="tinygrad's test/backend/test_ops.py")
    parser.add_argument(
        "--show", choices=KINDS, action="append", default=[], help="print the calls of this kind"
    )
    parser.add_argument("--only", default="test_", help="tests whose names hold this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    sys.modules.update(stand_ins())
    suite = types.ModuleType("suite")
    exec(compile(arguments.suite.read_text(), str(arguments.suite), "exec"), vars(suite))
    tally = Tally()

    def compare(
        shapes: Any, torch_function: Any, tinygrad_fxn: Any = None, *places: Any, **words: Any
    ) -> None:
        words |= dict(zip(("atol", "rtol", "grad_atol", "grad_rtol"), places, strict=False))
        tally.compare(suite, shapes, torch_function, tinygrad_fxn, **words)

    def expect_error(
        self: Any, shapes: Any, torch_function: Any, tinygrad_fxn: Any = None, *places: Any, **words: Any
    ) -> None:
        tally.expect_error(suite, shapes, torch_function, tinygrad_fxn, **words)

    vars(suite)["helper_test_op"] = compare
    outside: list[str] = []
    for case in list(vars(suite).values()):
        if not (isinstance(case, type) and issubclass(case, unittest.TestCase)):
            continue
        if hasattr(case, "helper_test_exception"):
            case.helper_test_exception = expect_error
        for name in unittest.TestLoader().getTestCaseNames(case):
            if arguments.only not in name:
                continue
            tally.test = name
            result = case(name).run()
            assert result is not None
            outside += [
                f"{name}: {text.strip().splitlines()[-1]}" for _, text in result.failures + result.errors
            ]
    for kind, test, why in tally.calls:
        if kind in arguments.show:
            print(f"{kind}: {test}: {why}")
    if arguments.show:
        print(*outside, sep="\n")
    print(
        ", ".join(f"{kind} {tally.counts[kind]}" for kind in KINDS),
        f"; {len(outside)} tests stopped outside of a call",
    )


if __name__ == "__main__":
    main()

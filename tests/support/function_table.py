"""What each function of `tinyllm.ops` is to compute: calls, and the same in NumPy and torch.

To add a function: an entry for each way to call it. `call(f, x, ...)` is made with our function and with NumPy's; where
NumPy's function has other arguments, or there is none, `numpy` says what it is of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One way to call one function.

    Attributes:
        name: in `tinyllm.ops`, and in NumPy. call: from the function and its inputs to one array or several.
        torch: from the module torch and its tensors to the same. None where torch has no such function.
        numpy: from arrays to the same, where it is not `call(numpy.NAME, ...)`.
        shapes: of the inputs, once for each case. low, high: their range.
        gradient: whether the result depends on the inputs differentiably.
        integers: the dtype that integers become: "same", "int64", "float32", "bool", or "" where they are refused.
    """

    name: str
    call: Callable[..., Any]
    torch: Callable[..., Any] | None
    shapes: tuple[tuple[Shape, ...], ...]
    numpy: Callable[..., Any] | None = None
    low: float = -2.0
    high: float = 2.0
    gradient: bool = True
    integers: str = "same"

    def expected(self, *arrays: Any) -> Any:
        """NumPy's result."""
        return self.numpy(*arrays) if self.numpy is not None else self.call(getattr(np, self.name), *arrays)

    def __str__(self) -> str:
        return self.name


def one(*shapes: Shape) -> tuple[tuple[Shape, ...], ...]:
    """Cases of one input."""
    return tuple((shape,) for shape in shapes)


SMALL = one((3, 4), (1, 3), (2, 0), (2, 3, 2))
ANY = one((3, 4), (), (0, 3), (1, 1, 2))
PAIRS: tuple[tuple[Shape, ...], ...] = (((3, 4), (3, 4)), ((3, 1), (4,)), ((), (2,)), ((0, 2), (2,)))
VECTORS: tuple[tuple[Shape, ...], ...] = (((3,), (3,)), ((0,), (0,)), ((1,), (1,)))
MASK = np.array([[True], [False], [True]])


def softmax(x: Any, axis: int) -> Any:
    """e^x / sum e^x in NumPy."""
    e = np.exp(x - x.max(axis=axis, keepdims=True, initial=-100))
    return e / e.sum(axis=axis, keepdims=True)


ENTRIES = (
    # ---- Arithmetic
    Entry("remainder", lambda f, a, b: f(a, b), lambda t, a, b: t.remainder(a, b), PAIRS, low=0.25),
    Entry("remainder", lambda f, a: f(a, -0.75), lambda t, a: t.remainder(a, -0.75), ANY, integers="float32"),
    Entry("floor_divide", lambda f, a, b: f(a, b), lambda t, a, b: a // b, PAIRS, low=0.25, gradient=False),
    Entry("floor_divide", lambda f, a: f(a, -0.7), lambda t, a: a // -0.7, ANY, gradient=False, integers="float32"),
    Entry("power", lambda f, a: f(a, 0.5), lambda t, a: a**0.5, ANY, low=0.5, integers="float32"),
    Entry("power", lambda f, a: f(a, 3), lambda t, a: a**3, ANY),
    Entry("clip", lambda f, x: f(x, -0.5, 1), lambda t, x: x.clamp(-0.5, 1), ANY, integers="float32"),
    Entry("clip", lambda f, x: f(x, -1, None), lambda t, x: x.clamp(min=-1), ANY),
    Entry("clip", lambda f, x: f(x, min=-1, max=1), lambda t, x: x.clamp(-1, 1), ANY,
          numpy=lambda x: np.clip(x, -1, 1)),
    Entry("clip", lambda f, x, low, high: f(x, low, high), lambda t, x, low, high: t.clamp(x, low, high),
          (((3, 4), (4,), (3, 1)), ((2,), (), (2,)), ((0, 2), (2,), ()))),
    Entry("clip", lambda f, x, high: f(x, 0, high), lambda t, x, high: t.clamp(x, t.zeros(()).to(x), high),
          (((3, 4), (4,)), ((), ()))),
    Entry("masked_fill", lambda f, x: f(x, MASK, 7), lambda t, x: x.masked_fill(t.from_numpy(MASK), 7),
          one((3, 4), (3, 0), (1,)), numpy=lambda x: np.where(MASK, 7, x).astype(x.dtype)),
    # ---- Reductions
    Entry("sum", lambda f, x: f(x, axis=-1), lambda t, x: x.sum(-1), (*SMALL, ((),)), integers="int64"),
    Entry("sum", lambda f, x: f(x, axis=[0, -1], keepdims=True), lambda t, x: x.sum((0, -1), True), SMALL,
          numpy=lambda x: x.sum((0, -1), keepdims=True), integers="int64"),
    Entry("prod", lambda f, x: f(x, axis=0), lambda t, x: x.prod(0), (*SMALL, ((),)), integers="int64"),
    Entry("cumsum", lambda f, x: f(x, axis=-1), lambda t, x: x.cumsum(-1), SMALL, integers="int64"),
    Entry("cumsum", lambda f, x: f(x), lambda t, x: x.flatten().cumsum(0), ANY, integers="int64"),
    Entry("mean", lambda f, x: f(x, axis=np.int64(1)), lambda t, x: x.mean(1), one((3, 4), (2, 1), (0, 2)),
          numpy=lambda x: x.mean(1), integers="float32"),
    Entry("var", lambda f, x: f(x, axis=[-1], ddof=1), lambda t, x: x.var(-1, correction=1), one((3, 4), (2, 2)),
          numpy=lambda x: x.var(-1, ddof=1), integers="float32"),
    Entry("std", lambda f, x: f(x, correction=1), lambda t, x: x.std(correction=1), one((3, 4), (3,)),
          numpy=lambda x: x.std(ddof=1), integers="float32"),
    Entry("std", lambda f, x: f(x, axis=0), lambda t, x: x.std(0, correction=0), one((3, 4)), integers="float32"),
    Entry("max", lambda f, x: f(x, axis=-2), lambda t, x: x.amax(-2), one((3, 4), (2, 3, 2), (3, 0))),
    Entry("amin", lambda f, x: f(x, axis=0, keepdims=True), lambda t, x: x.amin(0, True), one((3, 4), (1,), ())),
    Entry("any", lambda f, x: f(x, axis=-1), lambda t, x: t.any(x, -1), (*SMALL, ((),)), gradient=False,
          integers="bool"),
    Entry("all", lambda f, x: f(x, axis=(0, 1), keepdims=True), lambda t, x: x.all(0, True).all(1, True),
          SMALL, gradient=False, integers="bool"),
    Entry("argmax", lambda f, x: f(x, axis=1), lambda t, x: x.argmax(1), one((3, 4), (0, 2)), gradient=False,
          integers="int64"),
    Entry("argmin", lambda f, x: f(x, axis=-2, keepdims=True), lambda t, x: x.argmin(-2, True), one((3, 4)),
          gradient=False, integers="int64"),
    # ---- Tests and roundings
    Entry("isclose", lambda f, a, b: f(a, b, rtol=0.5), lambda t, a, b: t.isclose(a, b, rtol=0.5), PAIRS,
          gradient=False, integers="bool"),
    Entry("isnan", lambda f, x: f(x), lambda t, x: x.isnan(), ANY, gradient=False, integers="bool"),
    Entry("isinf", lambda f, x: f(x), lambda t, x: x.isinf(), ANY, gradient=False, integers="bool"),
    Entry("isfinite", lambda f, x: f(x), lambda t, x: x.isfinite(), ANY, gradient=False, integers="bool"),
    Entry("floor", lambda f, x: f(x), lambda t, x: x.floor(), ANY, gradient=False),
    Entry("ceil", lambda f, x: f(x), lambda t, x: x.ceil(), ANY, gradient=False),
    Entry("round", lambda f, x: f(x), lambda t, x: x.round(), ANY, gradient=False),
    Entry("round", lambda f, x: f(x, 1), lambda t, x: x.round(decimals=1), ANY, gradient=False),
    Entry("sign", lambda f, x: f(x), lambda t, x: x.sign(), ANY, gradient=False),
    # ---- Order
    Entry("sort", lambda f, x: f(x, axis=-2), lambda t, x: x.sort(-2).values, SMALL),
    Entry("sort", lambda f, x: f(x, axis=None), lambda t, x: x.flatten().sort().values, ANY),
    Entry("sort", lambda f, x: f(x, 0, descending=True), lambda t, x: x.sort(0, descending=True).values, SMALL,
          numpy=lambda x: np.sort(x, 0)[::-1]),
    Entry("argsort", lambda f, x: f(x), lambda t, x: x.argsort(dim=-1, stable=True), SMALL, gradient=False,
          integers="int64", numpy=lambda x: np.argsort(x, kind="stable")),
    Entry("topk", lambda f, x: f(x, 2, axis=-1), lambda t, x: tuple(x.topk(2, -1)), one((3, 4), (0, 2)),
          numpy=lambda x: (np.sort(x)[..., ::-1][..., :2], np.argsort(-x.astype(float), kind="stable")[..., :2])),
    Entry("topk", lambda f, x: f(x, 2, axis=0, largest=False)[0], lambda t, x: x.topk(2, 0, largest=False)[0],
          one((3, 4), (2,)), numpy=lambda x: np.sort(x, 0)[:2]),
    # ---- Arrangement
    Entry("copy", lambda f, x: f(x), lambda t, x: x.clone(), ANY),
    Entry("ravel", lambda f, x: f(x), lambda t, x: x.ravel(), ANY),
    Entry("flatten", lambda f, x: f(x, 1), lambda t, x: x.flatten(1), one((2, 3, 4), (2, 0, 3), (3, 4)),
          numpy=lambda x: x.reshape((len(x), int(np.prod(x.shape[1:]))))),
    Entry("flatten", lambda f, x: f(x, -3, -2), lambda t, x: x.flatten(-3, -2), one((2, 3, 4), (2, 1, 3, 2)),
          numpy=lambda x: x.reshape((*x.shape[:-3], -1, x.shape[-1]))),
    Entry("moveaxis", lambda f, x: f(x, 0, -1), lambda t, x: t.moveaxis(x, 0, -1), SMALL),
    Entry("moveaxis", lambda f, x: f(x, [2, 0], [0, 1]), lambda t, x: t.moveaxis(x, (2, 0), (0, 1)),
          one((2, 3, 4), (1, 0, 2))),
    Entry("tile", lambda f, x: f(x, (2, 3)), lambda t, x: t.tile(x, (2, 3)), ANY),
    Entry("tile", lambda f, x: f(x, 2), lambda t, x: t.tile(x, (2,)), ANY),
    Entry("tile", lambda f, x: f(x, [2, 1, 0]), lambda t, x: x.repeat(2, 1, 0), one((3, 4), (2,))),
    Entry("expand", lambda f, x: f(x, 2, -1, 4), lambda t, x: x.expand(2, -1, 4), one((3, 4), (3, 1), (1, 1)),
          numpy=lambda x: np.broadcast_to(x, (2, x.shape[-2], 4))),
    Entry("repeat", lambda f, x: f(x, 3, axis=-1), lambda t, x: x.repeat_interleave(3, -1), SMALL),
    Entry("repeat", lambda f, x: f(x, [1, 0, 2], axis=0), lambda t, x: t.repeat_interleave(x, t.tensor([1, 0, 2]), 0),
          one((3, 4), (3,))),
    Entry("repeat", lambda f, x: f(x, 2, axis=None), lambda t, x: x.repeat_interleave(2), ANY),
    Entry("roll", lambda f, x: f(x, 2, axis=-1), lambda t, x: x.roll(2, -1), SMALL),
    Entry("roll", lambda f, x: f(x, -1), lambda t, x: x.roll(-1), ANY),
    Entry("roll", lambda f, x: f(x, (1, -4), axis=(0, 1)), lambda t, x: x.roll((1, -4), (0, 1)), SMALL),
    Entry("roll", lambda f, x: f(x, (1, 2), axis=(1, 1)), lambda t, x: x.roll((1, 2), (1, 1)), SMALL),
    Entry("roll", lambda f, x: f(x, 1, axis=(0, 1)), lambda t, x: x.roll((1, 1), (0, 1)), SMALL),
    Entry("flip", lambda f, x: f(x, -1), lambda t, x: x.flip(-1), SMALL),
    Entry("flip", lambda f, x: f(x), lambda t, x: x.flip(tuple(range(x.ndim))), ANY),
    Entry("chunk", lambda f, x: f(x, 3, -1), lambda t, x: x.chunk(3, -1), one((2, 4), (2, 7), (3, 2), (2, 3)),
          numpy=lambda x: [x[..., i : i + -(-x.shape[-1] // 3)] for i in range(0, x.shape[-1], -(-x.shape[-1] // 3))]),
    Entry("split", lambda f, x: f(x, 2, axis=-1), lambda t, x: x.tensor_split(2, -1), one((3, 4), (2, 0), (2, 3, 2))),
    Entry("split", lambda f, x: f(x, [1, 3]), lambda t, x: x.tensor_split([1, 3]), one((4, 2), (4,))),
    Entry("vstack", lambda f, a, b: f([a, b]), lambda t, a, b: t.vstack([a, b]), (((2, 3), (3,)), ((3,), (3,)))),
    Entry("hstack", lambda f, a, b: f([a, b]), lambda t, a, b: t.hstack([a, b]),
          (((2, 3), (2, 1)), ((3,), (2,)), ((), (2,)))),
    Entry("expand_dims", lambda f, x: f(x, np.int64(-1)), lambda t, x: x.unsqueeze(-1), ANY),
    Entry("squeeze", lambda f, x: f(x, [0]), lambda t, x: x.squeeze(0), one((1, 3), (1, 0)),
          numpy=lambda x: x.squeeze(0)),
    Entry("tril", lambda f, x: f(x, -1), lambda t, x: x.tril(-1), SMALL),
    Entry("triu", lambda f, x: f(x, 1), lambda t, x: x.triu(1), SMALL),
    Entry("take_along_axis", lambda f, x: f(x, np.array([[2, -1]]), axis=1),
          lambda t, x: t.take_along_dim(x, t.tensor([[2, x.shape[1] - 1]]), 1), one((1, 3), (1, 4))),
    # ---- Vectors and matrices
    Entry("outer", lambda f, a, b: f(a, b), lambda t, a, b: t.outer(a, b), (((3,), (2,)), ((0,), (2,)))),
    Entry("outer", lambda f, a, b: f(a, b), None, (((2, 2), (3, 1)), ((), (2,)))),
    Entry("dot", lambda f, a, b: f(a, b), lambda t, a, b: t.dot(a, b), VECTORS),
    Entry("dot", lambda f, a, b: f(a, b), None,
          (((2, 3), (3, 4)), ((2, 3, 4), (4,)), ((2, 3), (4, 3, 2)), ((), (3, 2)), ((2, 0), (0, 3)))),
    Entry("inner", lambda f, a, b: f(a, b), lambda t, a, b: t.inner(a, b), (*VECTORS, ((2, 3), (4, 3)), ((), (3,)))),
    Entry("tensordot", lambda f, a, b: f(a, b), lambda t, a, b: t.tensordot(a, b, 2), (((2, 3, 4), (3, 4, 2)),)),
    Entry("tensordot", lambda f, a, b: f(a, b, ([0, -1], [1, 0])),
          lambda t, a, b: t.tensordot(a, b, ([0, 2], [1, 0])), (((2, 3, 4), (4, 2, 3)),)),
    Entry("diagonal", lambda f, x: f(x), lambda t, x: x.diagonal(), one((3, 4), (4, 3), (2, 0), (3, 3, 2))),
    Entry("diagonal", lambda f, x: f(x, 1, -1, 0), lambda t, x: x.diagonal(1, -1, 0), one((3, 4), (2, 3, 3))),
    Entry("diagonal", lambda f, x: f(x, -2), lambda t, x: x.diagonal(-2), one((3, 4), (2, 3))),
    Entry("trace", lambda f, x: f(x), lambda t, x: x.trace(), one((3, 4), (3, 3), (0, 0)), integers="int64"),
    Entry("trace", lambda f, x: f(x, 1, 1, 2), None, one((2, 3, 3)), integers="int64"),
    Entry("vector_norm", lambda f, x: f(x), lambda t, x: t.linalg.vector_norm(x), ANY,
          numpy=lambda x: np.linalg.vector_norm(x), integers="float32"),
    *(
        Entry("vector_norm", lambda f, x, p=p: f(x, p, axis=-1, keepdims=True),
              lambda t, x, p=p: t.linalg.vector_norm(x, p, -1, True), one((3, 4), (1, 3)),
              numpy=lambda x, p=p: np.linalg.vector_norm(x, ord=p, axis=-1, keepdims=True),
              gradient=p != 0, integers="float32")
        for p in (0, 1, 2, 3, 1.5, np.inf, -np.inf)
    ),
    # ---- What has no integer value
    Entry("softmax", lambda f, x: f(x, axis=0), lambda t, x: x.softmax(0), one((3, 4), (3, 0)),
          numpy=lambda x: softmax(x, 0), integers="float32"),
    Entry("log_softmax", lambda f, x: f(x, axis=-1), lambda t, x: x.log_softmax(-1), one((3, 4), (0, 2)),
          numpy=lambda x: np.log(softmax(x, -1)), integers="float32"),
    Entry("logsumexp", lambda f, x: f(x, axis=-1), lambda t, x: x.logsumexp(-1), one((3, 4), (0, 2)),
          numpy=lambda x: np.log(np.exp(x).sum(-1)), integers="float32"),
    Entry("divide", lambda f, a, b: f(a, b), lambda t, a, b: a / b, PAIRS, low=0.5, integers="float32"),
    Entry("relu", lambda f, x: f(x), lambda t, x: x.relu(), ANY, numpy=lambda x: np.maximum(x, 0).astype(x.dtype)),
    Entry("silu", lambda f, x: f(x), lambda t, x: t.nn.functional.silu(x), ANY,
          numpy=lambda x: x / (1 + np.exp(-x.astype(float))), integers="float32"),
)  # fmt: skip

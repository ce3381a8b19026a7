"""Layers that hold parameters: Linear, Embedding, RMSNorm, LayerNorm; and Dropout."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current
from tinyllm.backend.philox import Key
from tinyllm.nn import functional
from tinyllm.nn.module import Module, Parameter
from tinyllm.ops.fast.norm import FastRootMeanSquareNorm, FastStandardisation
from tinyllm.ops.fast.products import product, rows
from tinyllm.ops.lookup import row_numbers

# Outputs that `packed` copies together: their rows stay in cache, which makes it several times faster.
_PACKED_TOGETHER = 64


def normal_parameter(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Parameter:
    """A float32 parameter drawn from a normal distribution on the host, so that any backend gets the same bits."""
    return Parameter(backend.asarray(rng.standard_normal(shape, dtype=np.float32) * np.float32(std)))


def uniform_parameter(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> Parameter:
    """A float32 parameter drawn from [-bound, bound) on the host."""
    return Parameter(backend.asarray((rng.random(shape, dtype=np.float32) * 2 - 1) * np.float32(bound)))


class Linear(Module):
    """y = x W^T + b. x: (..., in_features) -> (..., out_features); weight: (out_features, in_features).

    Args:
        rng: draws the initial numbers; None: the generator of `tinyllm.manual_seed`.
        init_scale: weights begin with deviation init_scale / sqrt(in_features); 1 keeps the variance of x (LeCun
            et al., "Efficient backprop", 1998, section 4.6). None: as in torch, uniformly within 1 / sqrt(in_features)
            of zero. The bias always begins so.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    joined: Any = None
    """The matrices of this layer and of others, if it is packed beside them: (in_features, all out_features)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rng: np.random.Generator | None = None,
        init_scale: float | None = None,
    ) -> None:
        if not isinstance(bias, bool):
            raise TypeError(f"bias={bias!r}; it is True or False (a generator is given as rng=)")
        rng = rng or backend.default_generator()
        root = math.sqrt(max(1, in_features))
        shape = (out_features, in_features)
        if init_scale is None:
            self.weight = uniform_parameter(rng, shape, 1 / root)
        else:
            self.weight = normal_parameter(rng, shape, init_scale / root)
        self.bias = uniform_parameter(rng, (out_features,), 1 / root) if bias else None

    @property
    def in_features(self) -> int:
        """The length of the last axis of x."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """The length of the last axis of y."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def infer(self, x: Array) -> Array:
        y = _times(x, self.weight.data.T)
        return y if self.bias is None else y + self.bias.data

    def packed(self) -> Self:
        """A copy whose matrix lies in memory input by input: a single row reads it 1.5 times as fast."""
        (packed,) = _joined(self)
        return packed


def _times(x: Any, matrix: Any) -> Any:
    """x @ matrix, of several sequences as one product; a single one is spared the reshaping, which costs 1 us."""
    return x @ matrix if x.shape[0] == 1 else product(x, matrix)


def _joined(*layers: Any) -> list[Any]:
    """Copies of Linear layers whose matrices lie side by side in one array."""
    widths = [layer.weight.shape[0] for layer in layers]
    weight = layers[0].weight.data
    joined = current.xp.empty((weight.shape[1], sum(widths)), dtype=weight.dtype)
    copies = []
    for layer, end in zip(layers, itertools.accumulate(widths), strict=True):
        outputs, matrix = layer.weight.shape[0], layer.weight.data.T
        columns = joined[:, end - outputs : end]
        for start in range(0, outputs, _PACKED_TOGETHER):
            together = slice(start, start + _PACKED_TOGETHER)
            columns[:, together] = matrix[:, together]
        packed = copy.copy(layer)
        packed.weight, packed.joined = Parameter(columns.T), joined
        copies.append(packed)
    return copies


def packed_side_by_side(*layers: Any) -> list[Any]:
    """Packed copies of layers that share their input: of plain ones, in one array that `infer_side_by_side` uses."""
    if _are_plain(layers):
        return _joined(*layers)
    return [layer.packed() if layer.has_own_infer else layer for layer in layers]


def infer_side_by_side(x: Array, *layers: Any) -> Array:
    """What several layers infer of one array, side by side. x: (..., D) -> (..., N_1 + N_2 + ...)."""
    joined = getattr(layers[0], "joined", None)
    if joined is not None and getattr(layers[-1], "joined", None) is joined:
        return _times(x, joined)
    if not _are_plain(layers):
        return current.xp.concatenate([layer.infer(x) for layer in layers], axis=-1)
    width = sum([layer.weight.shape[0] for layer in layers])
    y = current.xp.empty((*x.shape[:-1], width), dtype=x.dtype)
    end = 0
    for layer in layers:
        begin, end = end, end + layer.weight.shape[0]
        current.xp.matmul(rows(x), layer.weight.data.T, out=rows(y)[:, begin:end])
    return y


def _are_plain(layers: tuple[Any, ...]) -> bool:
    """Whether these are Linear layers without a bias, and of no subclass, so that their matrices are all there is."""
    return all([type(layer) is Linear and layer.bias is None for layer in layers])


class Embedding(Module):
    """Rows of a table. indices: (...) in [0, num_embeddings) -> (..., width); weight: (num_embeddings, width).

    Args:
        num_embeddings, embedding_dim: the shape of the table.
        padding_idx: a row that begins at zero and gets no gradient.
        rng: draws the initial numbers; None: the generator of `tinyllm.manual_seed`. std: their standard deviation.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        rng: np.random.Generator | None = None,
        std: float = 1.0,
    ) -> None:
        if not isinstance(padding_idx, int | None):
            raise TypeError(
                f"padding_idx={padding_idx!r}; it is a row or None (a generator is given as rng=)"
            )
        self.weight = normal_parameter(
            rng or backend.default_generator(), (num_embeddings, embedding_dim), std
        )
        self.padding_idx = padding_idx
        if padding_idx is not None:
            self.weight.data[padding_idx] = 0

    def forward(self, indices: Any) -> Tensor:
        return functional.embedding(indices, self.weight, self.padding_idx)

    def infer(self, indices: Array) -> Array:
        weight = self.weight.data
        return weight[row_numbers(indices, weight.shape[0])]

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return ", ".join(map(str, self.weight.shape)) + padding


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., normalized_shape).

    Args:
        eps: None: as in torch, the spacing of floating-point numbers at 1.
        elementwise_affine: without it there is no weight.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight",)
    weight: Any
    eps: Any

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        self.normalized_shape = (functional.norm_width(normalized_shape),)
        self.weight = (
            Parameter(current.xp.ones(self.normalized_shape, dtype=np.float32))
            if elementwise_affine
            else None
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def infer(self, x: Array) -> Array:
        if self.weight is None or self.eps is None:
            return super().infer(x)
        if x.size != x.shape[-1]:
            return FastRootMeanSquareNorm(self.eps).forward(x, self.weight.data)
        # The same for a single row, without arrays of one element, which cost more than the row does.
        row = x.reshape(-1)
        y = x * (row @ row / len(row) + self.eps) ** -0.5
        y *= self.weight.data
        return y

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x: (..., normalized_shape).

    elementwise_affine: without it there are no weight and no bias. bias: whether there is a bias.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        self.normalized_shape = shape = (functional.norm_width(normalized_shape),)
        self.weight = Parameter(current.xp.ones(shape, dtype=np.float32)) if elementwise_affine else None
        self.bias = (
            Parameter(current.xp.zeros(shape, dtype=np.float32)) if elementwise_affine and bias else None
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def infer(self, x: Array) -> Array:
        if self.weight is None or self.bias is None:
            return super().infer(x)
        return FastStandardisation(self.eps).forward(x, self.weight.data, self.bias.data)

    def extra_repr(self) -> str:
        affine, bias = self.weight is not None, self.bias is not None
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={affine}, bias={bias}"


_dropout_position: contextvars.ContextVar[Key | None] = contextvars.ContextVar(
    "tinyllm_dropout", default=None
)


@contextlib.contextmanager
def dropout_position(seed: int, step: int = 0, micro_batch: int = 0) -> Iterator[None]:
    """Fix the masks that Dropout modules draw within this context: the same arguments give the same masks."""
    token = _dropout_position.set(Key(seed, step, 0, micro_batch))
    try:
        yield
    finally:
        _dropout_position.reset(token)


class Dropout(Module):
    """In training, each element is zero with probability p, otherwise divided by 1 - p.

    Args:
        inplace: is there for torch's sake; nothing is changed in place.
        stream: a number that tells the dropout modules of a model apart. The masks depend on it and on
            `dropout_position`, which training sets for each step. None: each call draws a mask from the generator of
            `tinyllm.manual_seed`.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, stream: int | None = None) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}; it is a probability, from 0 to 1")
        self.p, self.inplace, self.stream = p, inplace, stream

    @property
    def active(self) -> bool:
        """Whether this module drops anything now."""
        return self.training and self.p > 0

    def key(self) -> Key:
        """What the mask is a function of; raises RuntimeError for a stream outside `dropout_position`."""
        if self.stream is None:
            return functional.fresh_key()
        position = _dropout_position.get()
        if position is None:
            raise RuntimeError(
                "dropout in training needs to know which mask to draw; wrap the call in "
                "`with tinyllm.nn.dropout_position(seed, step):`, or call model.eval()"
            )
        return position._replace(stream=self.stream)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropped(x, self.p, self.key()) if self.active else x

    def infer(self, x: Array) -> Array:
        return x

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"

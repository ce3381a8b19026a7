"""Layers that hold parameters: Linear, Embedding, RMSNorm, LayerNorm; and Dropout."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.backend.philox import Key
from tinyllm.nn.module import Module, Parameter


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Parameter:
    """A float32 parameter drawn from a normal distribution on the host, so that any backend gets the same bits."""
    return Parameter(backend.asarray(rng.standard_normal(shape, dtype=np.float32) * np.float32(std)))


class Linear(Module):
    """y = x W^T + b. x: (..., in_features) -> (..., out_features); weight: (out_features, in_features).

    Weights begin with standard deviation scale / sqrt(in_features), which keeps the variance of x (LeCun et
    al., "Efficient backprop", 1998, section 4.6); the bias begins at zero.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rng: np.random.Generator,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        self.weight = normal(rng, (out_features, in_features), scale / math.sqrt(in_features))
        self.bias = Parameter(current.xp.zeros(out_features, dtype=np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """Rows of a table. indices: (...) in [0, num_embeddings) -> (..., width); weight: (num_embeddings, width)."""

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, num_embeddings: int, width: int, rng: np.random.Generator, std: float = 0.02) -> None:
        self.weight = normal(rng, (num_embeddings, width), std)

    def forward(self, indices: Any) -> Tensor:
        return ops.embedding(self.weight, indices)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., width)."""

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        self.weight = Parameter(current.xp.ones(width, dtype=np.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x: (..., width)."""

    declared_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.weight = Parameter(current.xp.ones(width, dtype=np.float32))
        self.bias = Parameter(current.xp.zeros(width, dtype=np.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


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

    `stream` tells the dropout modules of a model apart. The masks depend on it and on `dropout_position`,
    which training sets for each step.
    """

    def __init__(self, p: float, stream: int) -> None:
        self.p, self.stream = p, stream

    @property
    def active(self) -> bool:
        """Whether this module drops anything now."""
        return self.training and self.p > 0

    def key(self) -> Key:
        """What the mask is a function of; raises RuntimeError outside `dropout_position`."""
        position = _dropout_position.get()
        if position is None:
            raise RuntimeError(
                "dropout in training needs to know which mask to draw; wrap the call in "
                "`with tinyllm.nn.dropout_position(seed, step):`, or call model.eval()"
            )
        return position._replace(stream=self.stream)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, self.key()) if self.active else x

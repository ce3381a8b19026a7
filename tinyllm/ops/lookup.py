"""Rows of a table by integer, and dropout."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Case, Op, Tensor, as_tensor, floating, register
from tinyllm.backend import Array
from tinyllm.backend.philox import Key, keep_mask
from tinyllm.ops.index import Scatter


@register
class RowLookup(Op):
    """y = weight[indices]. Shapes: weight: (V, D), indices: (...) integers -> (..., D)."""

    name = "embedding"
    cases = (
        Case(((5, 3),), {"indices": np.array([[0, 4, 4], [1, 0, 4]])}),
        Case(((5, 3),), {"indices": np.array(2)}),
        Case(((1, 1),), {"indices": np.array([0, 0])}),
        Case(((4, 2),), {"indices": np.zeros((2, 0), dtype=int)}),
        Case(((4, 0),), {"indices": np.array([1, 3])}),
    )

    def __init__(self, indices: Any) -> None:
        self.indices = indices.astype(int)  # a copy: backward needs them as they are now

    def forward(self, weight: Array) -> Array:
        self.V = weight.shape[0]
        return weight[self.indices]

    def backward(self, gradient: Array) -> Any:
        D = gradient.shape[-1]
        # Row v is the sum of the gradients of all places whose index is v.
        return Scatter(self.indices, (self.V, D))(gradient)


@register
class RandomMask(Op):
    """Each element is zero with probability p, otherwise divided by 1 - p. Shapes: x: (...) -> (...).

    The mask is a function of `key` alone (Philox), so recomputing it gives the same bits.
    Source: Srivastava et al., "Dropout", 2014, in the inverted form.
    """

    name = "dropout"
    cases = (
        Case(((3, 4),), {"p": 0.5, "key": Key(7)}),
        Case(((),), {"p": 0.25, "key": Key(2)}),
        Case(((0, 3),), {"p": 0.5, "key": Key(3)}),
        Case(((1, 7),), {"p": 0.1, "key": Key(4, 1, 2, 3)}),
    )

    def __init__(self, p: float, key: Key) -> None:
        self.p, self.key = p, key

    def forward(self, x: Array) -> Array:
        self.mask = keep_mask(x.shape, self.p, self.key)
        return np.where(self.mask, x, 0) / (1 - self.p)

    def backward(self, gradient: Array) -> Any:
        return np.where(self.mask, gradient, 0) / (1 - self.p)


def embedding(weight: Any, indices: Any) -> Tensor:
    """Rows of `weight` by integer. weight: (V, D), indices: (...) in [0, V) -> (..., D).

    Raises:
        TypeError: indices are not integers. ValueError: weight is no matrix. IndexError: an index is outside [0, V).
        Indices that lie on a device already are not looked at.
    """
    weight = as_tensor(weight)
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight has shape {weight.shape}; it needs (V, D)")
    indices = indices.data if isinstance(indices, Tensor) else indices
    return RowLookup(row_numbers(indices, weight.shape[0]))(weight)


def row_numbers(indices: Any, V: int) -> Any:
    """`indices` as an array of the backend, found to be rows of a table of V; raises what `embedding` does."""
    known, indices = backend.to_numpy_without_waiting(indices), backend.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"embedding: indices are integers; got dtype {indices.dtype}")
    if known is not None and known.size and (int(known.min()) < 0 or int(known.max()) >= V):
        raise IndexError(
            f"embedding: indices span [{int(known.min())}, {int(known.max())}], the table has rows [0, {V})"
        )
    return indices


def dropout(x: Any, p: float, key: Key) -> Tensor:
    """Each element of x zero with probability p in [0, 1), otherwise divided by 1 - p; `key` fixes the mask."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p={p}; it needs 0 <= p < 1")
    (x,) = floating(x)
    return RandomMask(float(p), key)(x) if p > 0 else x

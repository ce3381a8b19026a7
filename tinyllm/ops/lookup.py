"""Rows of a table by integer, one-hot rows, rows added up at integers, and dropout."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.operands import as_tensor, floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.backend.philox import Key, keep_mask
from tinyllm.ops.axes import named_axes
from tinyllm.ops.choice import where
from tinyllm.ops.index import Scatter, index_along_axis


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


def embedding(weight: Any, indices: Any, padding_idx: int | None = None) -> Tensor:
    """Rows of `weight` by integer. weight: (V, D), indices: (...) in [0, V) -> (..., D).

    The row `padding_idx`, which counts from the end if negative, gets no gradient.

    Raises:
        TypeError: indices are not integers. ValueError: weight is no matrix. IndexError: an index is outside [0, V).
        Indices that lie on a device already are not looked at.
    """
    weight = as_tensor(weight)
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight has shape {weight.shape}; it needs (V, D)")
    indices = row_numbers(indices, weight.shape[0])
    rows = RowLookup(indices)(weight)
    if padding_idx is None:
        return rows
    if not -weight.shape[0] <= padding_idx < weight.shape[0]:
        raise IndexError(f"embedding: padding_idx={padding_idx}, the table has rows [0, {weight.shape[0]})")
    return where((indices == padding_idx % weight.shape[0])[..., None], rows.detach(), rows)


def row_numbers(indices: Any, V: int) -> Any:
    """`indices` as an array of the backend, found to be rows of a table of V; raises what `embedding` does."""
    known, indices = _integers("embedding", indices)
    if known is not None and known.size and (int(known.min()) < 0 or int(known.max()) >= V):
        raise IndexError(
            f"embedding: indices span [{int(known.min())}, {int(known.max())}], the table has rows [0, {V})"
        )
    return indices


def one_hot(indices: Any, num_classes: int | None = None) -> Tensor:
    """1 at each index and 0 elsewhere. indices: (...) in [0, V) -> integers (..., V), V = num_classes.

    Without `num_classes`, V is one more than the largest index. Raises TypeError for indices that are no integers, and
    ValueError for one outside [0, V). With `num_classes`, indices that lie on a device already are not looked at.
    """
    known, indices = _integers("one_hot", indices)
    if num_classes is None:
        if indices.size == 0:
            raise ValueError("one_hot: without indices, num_classes says how many columns there are")
        num_classes = int(backend.read(indices.max())) + 1
    if known is not None and known.size and (int(known.min()) < 0 or int(known.max()) >= num_classes):
        raise ValueError(
            f"one_hot: indices span [{int(known.min())}, {int(known.max())}]; expected [0, {num_classes})"
        )
    return Tensor(is_class(indices, num_classes).astype(int))


def is_class(classes: Any, V: int) -> Any:
    """True at each class. classes: (...) integers in [0, V) -> booleans (..., V)."""
    return classes[..., None] == current.xp.arange(V)


def _integers(name: str, indices: Any) -> tuple[Any, Any]:
    """`indices` on the host, if they can be had without waiting, and as an array of the backend; TypeError for others
    than integers."""
    indices = indices.data if isinstance(indices, Tensor) else indices
    known, indices = backend.to_numpy_without_waiting(indices), backend.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name}: indices are integers; got dtype {indices.dtype}")
    return known, indices


def scatter_add(x: Any, axis: int, indices: Any, source: Any) -> Tensor:
    """x, with each element of `source` added where its index along `axis` says; x is not changed.

    For axis 0 of two, y[indices[i, j], j] = x[indices[i, j], j] + the sum of source[i, j]. An index that comes again
    adds again. As in torch, source and, along other axes, x may be longer than `indices`; what is beyond does not
    count.

    Raises TypeError for indices that are no integers, and ValueError or IndexError for shapes that do not fit.
    """
    x, source = operands(x, source)
    _, indices = _integers("scatter_add", indices)
    (axis,) = named_axes(axis, x.ndim)
    shape = indices.shape
    limits = [
        min(n, m) if i != axis else m for i, (n, m) in enumerate(zip(x.shape, source.shape, strict=False))
    ]
    if not x.ndim == source.ndim == len(shape) or any(n > m for n, m in zip(shape, limits, strict=True)):
        raise ValueError(
            f"scatter_add: indices of shape {shape} along axis {axis}; no axis may be longer than that of source "
            f"{source.shape}, nor, axis {axis} apart, than that of x {x.shape}"
        )
    return x + Scatter(index_along_axis(indices, axis, shape), x.shape)(
        source[tuple([slice(n) for n in shape])]
    )


def dropout(x: Any, p: float, key: Key) -> Tensor:
    """Each element of x zero with probability p in [0, 1), otherwise divided by 1 - p; `key` fixes the mask."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p={p}; it needs 0 <= p < 1")
    (x,) = floating(x)
    return RandomMask(float(p), key)(x) if p > 0 else x

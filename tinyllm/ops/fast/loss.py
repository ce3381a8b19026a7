"""Fast form of cross-entropy."""

from __future__ import annotations

from typing import Any

from tinyllm import backend
from tinyllm.autograd.registry import fast_form_of
from tinyllm.backend import Array, current
from tinyllm.ops.fast.products import row_sum, rows
from tinyllm.ops.loss import CrossEntropy

CHUNK_ELEMENTS = 1 << 18
"""Logits handled at a time: small enough to stay in cache, so that temporaries cost little."""


@fast_form_of(CrossEntropy)
class FastCrossEntropy(CrossEntropy):
    """Rows in chunks that stay in cache.

    Exponentials are expensive: forward keeps them, and backward makes the gradient of them, in their memory.
    """

    def forward(self, logits: Array) -> Array:
        xp = current.xp
        self.logits = logits
        z = rows(logits)  # (N, V)
        self.kept = self.targets.reshape(-1) != self.ignore_index  # (N,)
        self.safe_targets = xp.where(self.kept, self.targets.reshape(-1), 0)
        self.exponentials: Any = xp.empty(z.shape, dtype=z.dtype)  # e^(z - max), until backward takes them
        self.total = xp.empty((z.shape[0], 1), dtype=z.dtype)
        self.logsumexp = xp.empty(z.shape[0], dtype=z.dtype)
        with backend.ignore_non_finite():  # ignored rows may hold anything
            for chunk in _chunks(z.shape):
                maximum = _exponentials(z[chunk], self.exponentials[chunk])
                self.total[chunk] = row_sum(self.exponentials[chunk])
                self.logsumexp[chunk] = (maximum + xp.log(self.total[chunk]))[:, 0]
            losses = self.logsumexp - z[xp.arange(z.shape[0]), self.safe_targets]  # (N,)
            if self.z_loss:
                losses += self.z_loss * self.logsumexp**2
        losses = backend.selected(self.kept, losses)
        if self.reduction == "none":
            return losses.reshape(self.targets.shape)
        return losses.sum() / self.divisor(z.dtype)

    def backward(self, gradient: Array) -> Any:
        xp = current.xp
        z = rows(self.logits)
        if self.reduction != "none":
            gradient = gradient / self.divisor(z.dtype)
        weight = backend.selected(self.kept, xp.broadcast_to(gradient.reshape(-1), self.kept.shape))  # (N,)
        with backend.ignore_non_finite():  # as in forward
            # The derivative of (logsumexp)^2 is 2 logsumexp softmax.
            of_softmax = weight * (1 + 2 * self.z_loss * self.logsumexp) if self.z_loss else weight
            gradient_z, self.exponentials = self.exponentials, None
            if gradient_z is None:  # a second backward pass
                gradient_z = xp.empty(z.shape, dtype=z.dtype)
                for chunk in _chunks(z.shape):
                    _exponentials(z[chunk], gradient_z[chunk])
            for chunk in _chunks(z.shape):
                p = gradient_z[chunk]
                p *= of_softmax[chunk][:, None] / self.total[chunk]  # softmax, weighted
                backend.clear_rows(p, ~self.kept[chunk])
                p[xp.arange(p.shape[0]), self.safe_targets[chunk]] -= weight[chunk]
        return gradient_z.reshape(self.logits.shape)


def _exponentials(z: Any, out: Any) -> Any:
    """Write e^(z - max) of each row into `out`; returns the maxima. z, out: (N, V) -> (N, 1)."""
    maximum = z.max(axis=-1, keepdims=True)
    _exponentials_of(z, maximum, out)
    return maximum


@backend.elementwise
def _exponentials_of(z: Any, maximum: Any, out: Any) -> None:
    current.xp.subtract(z, maximum, out=out)
    current.xp.exp(out, out=out)


def _chunks(shape: tuple[int, int]) -> list[slice]:
    """Slices of rows of about CHUNK_ELEMENTS elements."""
    N, V = shape
    step = max(1, backend.choose(CHUNK_ELEMENTS, on_device=1 << 28) // max(V, 1))
    return [slice(start, start + step) for start in range(0, N, step)]

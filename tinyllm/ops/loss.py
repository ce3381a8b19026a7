"""Cross-entropy straight from logits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Case, FusedOp, Tensor, as_tensor, register
from tinyllm.backend import current
from tinyllm.ops.index import take_along_axis
from tinyllm.ops.matrix import row_sum, rows
from tinyllm.ops.reduce import sum as sum_over
from tinyllm.ops.softmaxes import log_softmax, logsumexp

Reduce = Literal["mean", "sum", "none"]
CHUNK_ELEMENTS = 1 << 18
"""Logits handled at a time: small enough to stay in cache, so that temporaries cost little."""

_TARGETS = np.array([[0, 3, -100], [1, 1, 2]])


@register
class CrossEntropy(FusedOp):
    """-ln softmax(logits)[target], for targets other than `ignore_index`: their mean, their sum, or each.

    With `z_loss`, z_loss (ln sum e^logits)^2 is added to each, which keeps logits from drifting away from zero.
    Source: Chowdhery et al., "PaLM: scaling language modeling with pathways", 2022, section 5.

    Shapes: logits: (..., V), targets: (...) integers -> () or (...). Exponentials are expensive, so forward keeps
    them and backward makes the gradient of them, in their memory. Rows are handled in chunks that stay in cache.
    """

    cases = (
        Case(((2, 3, 4),), {"targets": _TARGETS, "reduction": "mean"}),
        Case(((2, 3, 4),), {"targets": _TARGETS, "reduction": "sum"}),
        Case(((2, 3, 4),), {"targets": _TARGETS, "reduction": "none"}),
        Case(((4,),), {"targets": np.array(2), "reduction": "mean"}),
        Case(((1, 1),), {"targets": np.array([0]), "reduction": "mean"}),
        Case(((0, 4),), {"targets": np.zeros(0, dtype=int), "reduction": "sum"}),
        Case(((3, 5),), {"targets": np.array([4, 0, 1]), "reduction": "mean"}, low=-100, high=100),
        Case(((2, 3, 4),), {"targets": _TARGETS, "reduction": "mean", "z_loss": 0.3}),
        Case(((2, 3, 4),), {"targets": _TARGETS, "reduction": "none", "z_loss": 0.01}),
    )

    def __init__(
        self, targets: Any, ignore_index: int = -100, reduction: Reduce = "mean", z_loss: float = 0.0
    ) -> None:
        self.targets, self.ignore_index, self.reduction = targets, ignore_index, reduction
        self.z_loss = z_loss

    def forward(self, logits: Any) -> Any:
        xp = current.xp
        self.logits = logits
        z = rows(logits)  # (N, V)
        self.kept = self.targets.reshape(-1) != self.ignore_index  # (N,)
        self.safe_targets = xp.where(self.kept, self.targets.reshape(-1), 0)
        self.exponentials: Any = xp.empty(z.shape, dtype=z.dtype)  # e^(z - max), until backward takes them
        self.total = xp.empty((z.shape[0], 1), dtype=z.dtype)
        self.logsumexp = xp.empty(z.shape[0], dtype=z.dtype)
        for chunk in _chunks(z.shape):
            maximum = _exponentials(z[chunk], self.exponentials[chunk])
            self.total[chunk] = row_sum(self.exponentials[chunk])
            self.logsumexp[chunk] = (maximum + xp.log(self.total[chunk]))[:, 0]
        losses = (self.logsumexp - z[xp.arange(z.shape[0]), self.safe_targets]) * self.kept  # (N,)
        if self.z_loss:
            losses += self.z_loss * self.logsumexp**2 * self.kept
        if self.reduction == "none":
            return losses.reshape(self.targets.shape)
        return losses.sum() / self.divisor(z.dtype)

    def backward(self, gradient: Any) -> Any:
        xp = current.xp
        z = rows(self.logits)
        if self.reduction != "none":
            gradient = gradient / self.divisor(z.dtype)
        weight = xp.broadcast_to(gradient.reshape(-1), self.kept.shape) * self.kept  # (N,)
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
            p[xp.arange(p.shape[0]), self.safe_targets[chunk]] -= weight[chunk]
        return gradient_z.reshape(self.logits.shape)

    def divisor(self, dtype: Any) -> Any:
        """How many losses the reduction averages over; 1 for a sum, and where every target is ignored."""
        if self.reduction != "mean":
            return 1
        return current.xp.maximum((self.targets != self.ignore_index).sum(), 1).astype(dtype)

    def reference(self, logits: Tensor) -> Tensor:
        kept = self.targets != self.ignore_index
        targets = current.xp.where(kept, self.targets, 0)
        losses = -take_along_axis(log_softmax(logits), targets[..., None], axis=-1).squeeze(-1) * kept
        if self.z_loss:
            losses = losses + self.z_loss * logsumexp(logits, axis=-1) ** 2 * kept
        return losses if self.reduction == "none" else sum_over(losses) / self.divisor(logits.dtype)


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


def cross_entropy(
    logits: Any, targets: Any, ignore_index: int = -100, reduction: Reduce = "mean", z_loss: float = 0.0
) -> Tensor:
    """-ln softmax(logits)[target] in nats.

    Args:
        logits: (..., V). targets: (...) integers in [0, V), or `ignore_index` for a place without a loss.
        reduction: "mean" over the targets that count, "sum", or "none".
        z_loss: how much of (ln sum e^logits)^2 is added to each loss; PaLM's is 1e-4.

    Raises:
        TypeError: targets are not integers. ValueError: shapes do not match, or a target is out of range. Targets that
        lie on a device already are not looked at.
    """
    logits = as_tensor(logits)
    targets = targets.data if isinstance(targets, Tensor) else targets
    known, targets = backend.to_numpy_without_waiting(targets), backend.asarray(targets)
    if targets.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: targets are integers; got dtype {targets.dtype}")
    if logits.ndim == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: logits have shape {logits.shape}, so targets need {logits.shape[:-1]}; got {targets.shape}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction={reduction!r}; choose 'mean', 'sum' or 'none'")
    V = logits.shape[-1]
    if known is not None:
        wrong = ((known < 0) | (known >= V)) & (known != ignore_index)
        if wrong.any():
            raise ValueError(
                f"cross_entropy: target {int(known[wrong].reshape(-1)[0])} is outside [0, {V}) and is not "
                f"ignore_index={ignore_index}"
            )
    return CrossEntropy(targets, ignore_index, reduction, z_loss)(logits)

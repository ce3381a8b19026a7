"""Cross-entropy straight from logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm.autograd.operands import constant, floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.ops.choice import where
from tinyllm.ops.criteria import Classes, Reduce, checked_targets, expected, reduced, weighted
from tinyllm.ops.elementwise import square
from tinyllm.ops.lookup import is_class
from tinyllm.ops.softmaxes import log_softmax, logsumexp

_TARGETS = np.array([[0, 3, -100], [1, 1, 2]])


@register
class CrossEntropy(Op):
    """-ln softmax(z)[target], for targets other than `ignore_index`: their mean, their sum, or each.

    With `z_loss`, z_loss (ln sum e^z)^2 is added to each, which keeps logits from drifting away from zero.
    Source: Chowdhery et al., "PaLM: scaling language modeling with pathways", 2022, section 5.

    Shapes: z: (..., V), targets: (...) integers -> () or (...).
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
        self.targets = targets.astype(int)  # a copy: backward needs them as they are now
        self.ignore_index, self.reduction, self.z_loss = ignore_index, reduction, z_loss

    def forward(self, z: Array) -> Array:
        self.kept = self.targets != self.ignore_index  # (...)
        z = np.where(self.kept[..., None], z, 0)  # an ignored row counts for nothing, whatever it holds
        self.one_hot = is_class(np.where(self.kept, self.targets, 0), z.shape[-1])  # (..., V)
        largest = constant(z).max(axis=-1, keepdims=True)  # no e^(z - largest) overflows
        e = np.exp(z - largest)
        total = e.sum(axis=-1, keepdims=True)
        self.p = e / total  # softmax
        self.log_total = (np.log(total) + largest)[..., 0]  # ln sum e^z, (...)
        losses = self.log_total - np.where(self.one_hot, z, 0).sum(axis=-1)
        losses = losses + self.z_loss * self.log_total * self.log_total
        losses = np.where(self.kept, losses, 0)
        return losses if self.reduction == "none" else losses.sum() / self.divisor(losses.dtype)

    def backward(self, gradient: Array) -> Any:
        """With Z = ln sum e^z: dZ/dz = p, so a loss Z - z_t + c Z^2 has the gradient p (1 + 2 c Z) - 1[t]."""
        if self.reduction != "none":
            gradient = gradient / self.divisor(gradient.dtype)
        weight = np.where(self.kept, gradient, 0)[..., None]  # of each loss, (..., 1)
        of_p = weight * (1 + 2 * self.z_loss * self.log_total[..., None])  # the derivative of ln sum e^z is p
        return of_p * self.p - np.where(self.one_hot, weight, 0)

    def divisor(self, dtype: Any) -> Any:
        """How many losses the reduction averages over; 1 for a sum, and where every target is ignored."""
        if self.reduction != "mean":
            return 1
        return current.xp.maximum((self.targets != self.ignore_index).sum(), 1).astype(dtype)


def cross_entropy(
    logits: Any,
    targets: Any,
    ignore_index: int = -100,
    reduction: Reduce = "mean",
    z_loss: float = 0.0,
    weight: Any = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-ln softmax(logits)[target] in nats.

    Args:
        logits: (..., V). targets: (...) integers in [0, V), or `ignore_index` for a place without a loss; or
            probabilities (..., V), floating-point numbers, whose loss is -sum q ln softmax(logits).
        reduction: "mean" over the targets that count, "sum", or "none".
        z_loss: how much of (ln sum e^logits)^2 is added to each loss; PaLM's is 1e-4.
        weight: (V,), how much each class counts. Where targets are integers, the mean is divided by their weights.
        label_smoothing: e in [0, 1]; targets become (1 - e) q + e / V.

    Raises:
        TypeError: targets are neither. ValueError: shapes do not match, or a target is out of range. Targets that
        lie on a device already are not looked at.
    """
    (logits,) = floating(logits)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction={reduction!r}; choose 'mean', 'sum' or 'none'")
    targets = targets if hasattr(targets, "dtype") else np.asarray(targets)
    if targets.dtype.kind == "f" and targets.shape == logits.shape and logits.ndim:
        logits, q = operands(logits, targets)
        losses = _of_probabilities(logits, weighted("cross_entropy", q, weight, label_smoothing), z_loss)
        return reduced("cross_entropy", losses, reduction)
    if weight is None and label_smoothing == 0:
        targets = checked_targets("cross_entropy", logits, targets, ignore_index)
        return CrossEntropy(targets, ignore_index, reduction, float(z_loss))(logits)
    classes = Classes.of("cross_entropy", logits, targets, ignore_index)
    logits = where(classes.kept[..., None], logits, 0)
    losses = _of_probabilities(logits, classes.one_hot(weight, label_smoothing), z_loss)
    return classes.reduced(losses, weight, reduction)


def _of_probabilities(logits: Tensor, q: Tensor, z_loss: float) -> Tensor:
    """-sum q ln softmax(logits) + z_loss (ln sum e^logits)^2. logits, q: (..., V) -> (...)."""
    losses = -expected(q, log_softmax(logits)).sum(axis=-1)
    return losses + square(logsumexp(logits, -1)) * z_loss if z_loss else losses

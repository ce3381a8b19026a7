"""Losses composed of other ops: of distances, and of log-probabilities against classes or probabilities.

All take `reduction`: "mean" over what counts, "sum", or "none", which gives each loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinyllm import backend
from tinyllm.autograd.operands import as_tensor, floating, operands
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops.choice import absolute, clip, where
from tinyllm.ops.elementwise import exp, square
from tinyllm.ops.logarithms import log, softplus
from tinyllm.ops.lookup import one_hot
from tinyllm.ops.reduce import in_float32, mean

Reduce = Literal["mean", "sum", "none"]


# ---- Distances ---------------------------------------------------------------------------------


def mse_loss(x: Any, target: Any, reduction: Reduce = "mean") -> Tensor:
    """(x - target)^2. x, target: (...), of one shape."""
    return reduced("mse_loss", square(_difference("mse_loss", x, target)), reduction)


def l1_loss(x: Any, target: Any, reduction: Reduce = "mean") -> Tensor:
    """|x - target|. x, target: (...), of one shape."""
    return reduced("l1_loss", absolute(_difference("l1_loss", x, target)), reduction)


def huber_loss(x: Any, target: Any, reduction: Reduce = "mean", delta: float = 1.0) -> Tensor:
    """d^2 / 2 where d = |x - target| is below delta, beyond it delta (d - delta / 2).

    Source: Huber, "Robust estimation of a location parameter", 1964. Raises ValueError unless delta > 0.
    """
    if not delta > 0:
        raise ValueError(f"huber_loss: delta={delta}; it needs delta > 0")
    return reduced("huber_loss", _huber(_difference("huber_loss", x, target), delta), reduction)


def smooth_l1_loss(x: Any, target: Any, reduction: Reduce = "mean", beta: float = 1.0) -> Tensor:
    """d^2 / (2 beta) where d = |x - target| is below beta, beyond it d - beta / 2; with beta = 0, d.

    Source: Girshick, "Fast R-CNN", 2015, equation 3. Raises ValueError unless beta >= 0.
    """
    if not beta >= 0:
        raise ValueError(f"smooth_l1_loss: beta={beta}; it needs beta >= 0")
    difference = _difference("smooth_l1_loss", x, target)
    return reduced(
        "smooth_l1_loss", _huber(difference, beta, beta) if beta else absolute(difference), reduction
    )


def _huber(difference: Tensor, delta: float, scale: float = 1.0) -> Tensor:
    """The loss divided by `scale`, before a product overflows; without |d|, whose second derivative at 0 would be 0."""
    near = clip(difference, -delta, delta)
    return near / scale * (difference - near / 2)


def _difference(name: str, x: Any, target: Any) -> Tensor:
    x, target = _of_one_shape(name, x, target)
    return x - target


def _of_one_shape(name: str, x: Any, target: Any) -> tuple[Tensor, ...]:
    x, target = floating(*operands(x, target))
    if x.shape != target.shape:
        raise ValueError(
            f"{name}: the first argument has shape {x.shape} and the target {target.shape}; they need one shape, and "
            "are not broadcast, since (N, 1) against (N,) would compare all with all"
        )
    return x, target


def reduced(name: str, losses: Tensor, reduction: str) -> Tensor:
    """The mean or the sum of `losses`, or themselves. Raises ValueError for another word."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction={reduction!r}; choose 'mean', 'sum' or 'none'")
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else mean(losses)


# ---- Probabilities -----------------------------------------------------------------------------


def expected(q: Tensor, x: Tensor) -> Tensor:
    """q x, and 0 where q = 0 meets an infinite x: what never happens counts for nothing."""
    return q * where((q.data == 0) & current.xp.isinf(x.data), 0, x)


def nll_loss(
    log_probabilities: Any,
    targets: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: Reduce = "mean",
) -> Tensor:
    """-ln p[target] weight[target] from log-probabilities, as `log_softmax` gives them.

    Args:
        log_probabilities: (..., V). targets: (...) integers in [0, V), or `ignore_index` for a place without a loss.
        weight: (V,), how much each class counts; the mean is divided by the weights of the targets.

    Raises what `cross_entropy` does.
    """
    (log_p,) = floating(log_probabilities)
    classes = Classes.of("nll_loss", log_p, targets, ignore_index)
    log_p = where(classes.kept[..., None], log_p, 0)
    return classes.reduced(-expected(classes.one_hot(weight), log_p).sum(axis=-1), weight, reduction)


def binary_cross_entropy_with_logits(
    logits: Any, targets: Any, weight: Any = None, reduction: Reduce = "mean", pos_weight: Any = None
) -> Tensor:
    """-(y ln sigmoid(x) pos_weight + (1 - y) ln(1 - sigmoid(x))) weight, for logits x and targets y in [0, 1].

    logits, targets: (...), of one shape; weight and pos_weight broadcast to it.
    """
    name = "binary_cross_entropy_with_logits"
    x, y = _of_one_shape(name, logits, targets)
    of_positive = expected(y, softplus(-x))
    of_positive = of_positive if pos_weight is None else of_positive * pos_weight
    losses = of_positive + expected(1 - y, softplus(x))
    return reduced(name, losses if weight is None else losses * weight, reduction)


def kl_div(
    log_probabilities: Any,
    target: Any,
    reduction: Reduce | Literal["batchmean"] = "mean",
    log_target: bool = False,
) -> Tensor:
    """q (ln q - ln p), the terms of the Kullback-Leibler divergence of p from q, with 0 ln 0 = 0.

    Args:
        log_probabilities: ln p, (...). target: q, (...), of the same shape; ln q with `log_target`.
        reduction: "batchmean" is the sum divided by the length of the first axis, the divergence by definition;
            "mean" divides by the number of all elements, as in torch.
    """
    log_p, target = _of_one_shape("kl_div", log_probabilities, target)
    if log_target:
        q = exp(target)
        never = q.data == 0
        terms = q * (where(never, 0, target) - where(never, 0, log_p))
    else:
        terms = target * log(where(target.data == 0, 1, target)) - expected(target, log_p)
    if reduction != "batchmean":
        return reduced("kl_div", terms, reduction)
    if terms.ndim == 0:
        raise ValueError(
            "kl_div: reduction='batchmean' divides by the length of the first axis; got shape ()"
        )
    return in_float32(lambda x: x.sum() / max(x.shape[0], 1))(terms)


# ---- Classes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """Targets (...) that are classes in [0, V), where they are `kept`; the others count for nothing, and are 0."""

    name: str
    targets: Any
    kept: Any
    V: int
    dtype: Any

    @classmethod
    def of(cls, name: str, x: Tensor, targets: Any, ignore_index: int) -> Classes:
        """Of x: (..., V). Raises what `cross_entropy` does."""
        targets = checked_targets(name, x, targets, ignore_index)
        kept = targets != ignore_index
        return cls(name, current.xp.where(kept, targets, 0), kept, x.shape[-1], x.dtype)

    def one_hot(self, weight: Any = None, label_smoothing: float = 0.0) -> Tensor:
        """The probability of each class times its weight: (..., V)."""
        return weighted(self.name, one_hot(self.targets, self.V).astype(self.dtype), weight, label_smoothing)

    def reduced(self, losses: Tensor, weight: Any, reduction: Reduce) -> Tensor:
        """The mean over the targets that count, by their weights, and 0 where none does; the sum; or each."""
        losses = where(self.kept, losses, 0)
        if reduction != "mean":
            return reduced(self.name, losses, reduction)
        of_each = as_tensor(self.kept.astype(self.dtype))
        if weight is not None:
            of_each = of_each * operands(losses, weight)[1][self.targets]
        wide = np.result_type(self.dtype, np.float32)  # of many, sums overflow float16
        total, count = losses.astype(wide).sum(), of_each.astype(wide).sum()
        return (total / where(self.kept.any(), count, 1)).astype(self.dtype)


def weighted(name: str, q: Tensor, weight: Any, label_smoothing: float = 0.0) -> Tensor:
    """(1 - e) q + e / V, times the weight of each class. q: (..., V), weight: (V,) or None.

    Source: Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016, section 7.
    """
    V = q.shape[-1]
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing={label_smoothing}; it needs a number in [0, 1]")
    if label_smoothing:
        q = q * (1 - label_smoothing) + label_smoothing / V
    if weight is None:
        return q
    q, weight = operands(q, weight)
    if weight.shape != (V,):
        raise ValueError(f"{name}: weight has shape {weight.shape}; {V} classes need ({V},)")
    return q * weight


def checked_targets(name: str, x: Tensor, targets: Any, ignore_index: int) -> Any:
    """`targets` as an array of the backend, found to be classes of x: (..., V); raises what `cross_entropy` does."""
    targets = targets.data if isinstance(targets, Tensor) else targets
    known, targets = backend.to_numpy_without_waiting(targets), backend.asarray(targets)
    if targets.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: targets are integers; got dtype {targets.dtype}"
            + (f" (probabilities need the shape of the logits, {x.shape})" if name == "cross_entropy" else "")
        )
    if not isinstance(ignore_index, int):
        raise TypeError(
            f"{name}: ignore_index is an integer; got {type(ignore_index).__name__}; weights of classes are weight="
        )
    if x.ndim == 0 or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: logits have shape {x.shape}, so targets need {x.shape[:-1]}; got {targets.shape}"
            + _classes_not_last(x, targets)
        )
    V = x.shape[-1]
    if V == 0:
        raise ValueError(f"{name}: logits have shape {x.shape}, without a class")
    if known is not None:
        wrong = ((known < 0) | (known >= V)) & (known != ignore_index)
        if wrong.any():
            raise ValueError(
                f"{name}: target {int(known[wrong].reshape(-1)[0])} is outside [0, {V}) and is not "
                f"ignore_index={ignore_index}"
            )
    return targets


def _classes_not_last(x: Tensor, targets: Any) -> str:
    """What to do, where classes lie on axis 1, as in torch's (N, C, T)."""
    if x.ndim < 3 or targets.shape != (x.shape[0], *x.shape[2:]):
        return ""
    axes = (0, *range(2, x.ndim), 1)
    return f". Classes are the last axis here, not axis 1: give logits.transpose{axes}"

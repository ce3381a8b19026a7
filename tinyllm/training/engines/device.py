"""Training steps on a device, queued without looking at a number between them.

A look at a loss waits for the device to finish, and leaves it idle until the host has queued new work. So whether a
step is made, how its gradient is clipped, and what its loss was stay on the device; all batches of a stretch of steps
go there in one transfer before it, and all figures come back in one transfer after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array, current
from tinyllm.data import SequentialWindows
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import OptimizerGroup
from tinyllm.training.engines.processes import batch_losses, cut
from tinyllm.training.safeguards.watch import Limits, LossScale


class Outcome(NamedTuple):
    """Of one step: the mean loss in nats, the gradient norm before clipping, and whether it was made.

    overflowed: it was not made since its scaled gradients overflowed in float16, which is no fault of the batch.
    """

    loss: float
    norm: float
    made: bool
    overflowed: bool


class DeviceSteps:
    """Steps of one model on a device; `data_parallel.DataParallel` is what a CPU has for it.

    Args:
        model, optimizer: what is trained. seed: of dropout. validation: the windows that `losses` is about.
        z_loss: of the training loss (see ops.cross_entropy).

    Attributes:
        loss_scale: where products are of float16, otherwise None. total: the gradients of the last step by name, if it
        was the only one.
    """

    def __init__(
        self,
        model: TransformerLM,
        optimizer: OptimizerGroup,
        seed: int = 0,
        validation: SequentialWindows | None = None,
        z_loss: float = 0.0,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.seed, self.z_loss = seed, z_loss
        self.validation = validation
        self.parameters = dict(model.named_parameters())
        self.loss_scale = LossScale() if backend.products_underflow() else None
        self.total: dict[str, Any] = {}

    def __enter__(self) -> DeviceSteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        backend.synchronize()

    def run(
        self, position: int, batches: Array, factors: Sequence[float], largest_norm: float, limits: Limits
    ) -> list[Outcome]:
        """Steps on these batches in turn.

        A step is made where its loss and gradient norm are finite and within `limits`. The number of a step, on which
        AdamW depends, counts every step of this call, made or not.

        Args:
            position: the number of the first batch. batches: (steps, 2, B, T) integers: inputs and targets.
            factors: the schedule's of each step. largest_norm: to which gradients are clipped.
        """
        first = self.optimizer.steps + 1
        figures = self.queue(position, backend.asarray(batches), factors, largest_norm, limits)
        loss_scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        outcomes = [
            Outcome(loss, norm, made > 0, math.isfinite(loss) and not math.isfinite(norm) and loss_scale > 1)
            for loss, norm, made in backend.to_numpy(figures).tolist()
        ]
        if self.loss_scale is not None:
            for outcome in outcomes:
                self.loss_scale.told(outcome.overflowed)
        for optimizer in self.optimizer.optimizers:
            optimizer.steps = first - 1 + sum(outcome.made for outcome in outcomes)
        return outcomes

    def queue(
        self, position: int, batches: Any, factors: Sequence[float], largest_norm: float, limits: Limits
    ) -> Any:
        """What `run` does on the device, from batches that lie there: (steps, 3) losses, norms, and whether made."""
        xp = current.xp
        first = self.optimizer.steps + 1
        loss_scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        figures = xp.empty((len(factors), 3), dtype="float32")
        for number, factor in enumerate(factors):
            loss, found = self._gradients(
                position + number, batches[number, 0], batches[number, 1], loss_scale
            )
            norm = _norm(list(found.values())) / loss_scale
            # False for what is not a number.
            made = (loss <= limits.loss) & (norm <= limits.norm) & (loss < math.inf) & (norm < math.inf)
            scale = xp.where(norm > largest_norm, largest_norm / norm, 1).astype(norm.dtype) / loss_scale
            for gradient in found.values():
                gradient *= scale
            self.optimizer.step(found, factor, number=first + number, where=made)
            self.total = found if len(factors) == 1 else {}
            for place, figure in enumerate((loss, norm, made)):
                figures[number, place] = figure
        return figures

    def losses(self) -> float:
        """The mean loss of the validation windows in nats, each target once, with dropout off."""
        assert self.validation is not None
        return math.fsum(batch_losses(self.model, self.validation, 0, 1)) / self.validation.num_targets

    def _gradients(
        self, position: int, inputs: Any, targets: Any, loss_scale: float
    ) -> tuple[Any, dict[str, Any]]:
        """The mean loss of a batch, of shape (), and its gradients times the scale by name."""
        self.model.train()
        tensors = list(self.parameters.values())
        total: Any = 0
        sums: list[Any] = []
        for number, (x, y) in enumerate(cut(inputs, targets, 1, self.model)):
            with dropout_position(self.seed, position, number):
                loss = ops.cross_entropy(self.model(x), y, reduction="sum", z_loss=self.z_loss)
            total = loss.data + total
            found = gradients(loss, tensors, gradient=_constant(loss_scale / targets.size, loss.dtype))
            if sums:
                for array, gradient in zip(sums, found, strict=True):
                    array += gradient
            else:
                sums = found
        return total / targets.size, dict(zip(self.parameters, sums, strict=True))


def _constant(value: float, dtype: Any) -> Any:
    """A number as an array of the device, without a transfer."""
    return current.xp.full((), value, dtype=dtype)


def _norm(arrays: Sequence[Any]) -> Any:
    """The Euclidean norm of all arrays together, of shape (); infinite where the squares overflow."""
    squares = current.xp.empty(len(arrays), dtype=arrays[0].dtype)
    for position, array in enumerate(arrays):
        flat = array.reshape(-1)
        squares[position] = current.xp.dot(flat, flat)
    return current.xp.sqrt(squares.sum())


def stack_batches(batches: Sequence[tuple[Array, Array]]) -> Array:
    """Pairs of inputs and targets (B, T) as one array (steps, 2, B, T)."""
    return np.stack([np.stack(pair) for pair in batches])

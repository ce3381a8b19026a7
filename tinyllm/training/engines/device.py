"""Training steps on a device, queued without looking at a number between them.

A look at a loss waits for the device to finish, and leaves it idle until the host has queued new work. So whether a
step is made, how its gradient is clipped, and what its loss was stay on the device; all batches of a stretch of steps
go there in one transfer before it, and all figures come back in one transfer after it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array, current
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import OptimizerGroup
from tinyllm.system.interrupts import Interrupts
from tinyllm.training.evaluation import batch_losses, mean_of
from tinyllm.training.events import Limits, Outcome
from tinyllm.training.micro_batches import split_batch
from tinyllm.training.objectives import Batch, Objective


@dataclass
class LossScale:
    """What the loss is multiplied with, and gradients are divided by, so that they do not underflow in float16.

    A power of two, halved when gradients overflow, doubled after GROWTH_STEPS in a row without.
    Source: Micikevicius et al., "Mixed precision training", 2018, section 3.2.
    """

    value: float = 2.0**16
    steps: int = 0
    """Since the last change."""

    GROWTH_STEPS: ClassVar[int] = 2000

    def update(self, overflowed: bool) -> None:
        """A step was made, or its gradients overflowed."""
        self.steps += 1
        if overflowed:
            self.value, self.steps = max(self.value / 2, 1.0), 0
        elif self.steps == self.GROWTH_STEPS:
            self.value, self.steps = min(self.value * 2, 2.0**24), 0

    def state_dict(self) -> dict[str, float]:
        """Value and steps; JSON can hold them."""
        return {"value": self.value, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved scale; raises ValueError, TypeError or KeyError, with nothing changed, if damaged."""
        value, steps = float(state["value"]), int(state["steps"])
        if not 1 <= value <= 2**24 or not 0 <= steps < self.GROWTH_STEPS:
            raise ValueError(f"a loss scale of {value} for {steps} steps")
        self.value, self.steps = value, steps


class DeviceSteps:
    """Steps of one model on a device; see `Engine`.

    The number of a step, on which AdamW depends, counts every step of one call of `run`, made or not.

    Args:
        model, optimizer: what is trained. objective: the loss. seed: of dropout. validation: what `evaluate` is about.
        interrupts: whose signals cut a first step before anything is changed.

    Attributes:
        loss_scale: where products are of float16, otherwise None.
    """

    most_steps = sys.maxsize

    def __init__(
        self,
        model: TransformerLM,
        optimizer: OptimizerGroup,
        objective: Objective,
        seed: int = 0,
        validation: Iterable[Batch] = (),
        interrupts: Interrupts | None = None,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.seed, self.validation = seed, validation
        self.interrupts = interrupts or Interrupts()
        self.parameters = dict(model.named_parameters())
        self.loss_scale = LossScale() if backend.products_underflow() else None
        self.total: dict[str, Array] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        backend.synchronize()

    def run(
        self,
        position: int,
        batches: Sequence[Batch],
        factors: Sequence[float],
        largest_norm: float,
        limits: Limits,
    ) -> list[Outcome]:
        """Steps on these batches in turn; see `Engine.run`."""
        first = self.optimizer.steps + 1
        counts = [self.objective.count(batch) for batch in batches]
        figures = self.queue(position, send_batches(batches), counts, factors, largest_norm, limits)
        loss_scale = self._loss_scale
        outcomes = [
            Outcome(loss, norm, made > 0, math.isfinite(loss) and not math.isfinite(norm) and loss_scale > 1)
            for loss, norm, made in backend.to_numpy(figures).tolist()
        ]
        if self.loss_scale is not None:
            for outcome in outcomes:
                self.loss_scale.update(outcome.overflowed)
        for optimizer in self.optimizer.optimizers:
            optimizer.steps = first - 1 + sum(outcome.made for outcome in outcomes)
        return outcomes

    def queue(
        self,
        position: int,
        batches: Sequence[Batch],
        counts: Sequence[int],
        factors: Sequence[float],
        largest_norm: float,
        limits: Limits,
    ) -> Array:
        """What `run` does on the device, from batches that lie there: (steps, 3) losses, norms, and whether made."""
        xp = current.xp
        first = self.optimizer.steps + 1
        figures = xp.empty((len(factors), 3), dtype="float32")
        for number, factor in enumerate(factors):
            # Later steps are not cut: those before them are made, and nobody knows yet with what outcome.
            with self.interrupts.droppable() if number == 0 else contextlib.nullcontext():
                loss, found = self._gradients(position + number, batches[number], counts[number])
            norm = _norm(list(found.values())) / self._loss_scale
            # False for what is not a number.
            made = (loss <= limits.loss) & (norm <= limits.norm) & (loss < math.inf) & (norm < math.inf)
            scale = xp.where(norm > largest_norm, largest_norm / norm, 1).astype(norm.dtype)
            scale = scale / self._loss_scale
            for gradient in found.values():
                gradient *= scale
            self.optimizer.step(found, factor, number=first + number, where=made)
            self.total = found if len(factors) == 1 else {}
            for place, figure in enumerate((loss, norm, made)):
                figures[number, place] = figure
        return figures

    def evaluate(self) -> float:
        """The mean loss of the validation batches, with dropout off."""
        return mean_of(batch_losses(self.model, self.objective, self.validation))

    def state_dict(self) -> dict[str, Any] | None:
        """The loss scale, where there is one."""
        return None if self.loss_scale is None else self.loss_scale.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a saved loss scale, where one is needed and was saved."""
        if self.loss_scale is not None and state is not None:
            self.loss_scale.load_state_dict(state)

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def _gradients(self, position: int, batch: Batch, count: int) -> tuple[Array, dict[str, Array]]:
        """The mean loss of a batch, of shape (), and its gradients times the loss scale by name."""
        self.model.train()
        tensors = list(self.parameters.values())
        total: Any = 0
        sums: list[Any] = []
        for number, micro_batch in enumerate(split_batch(batch, 1, self.model)):
            with dropout_position(self.seed, position, number):
                loss, _ = self.objective(self.model, micro_batch)
            total = loss.data + total
            found = gradients(loss, tensors, gradient=_constant(self._loss_scale / count, loss.dtype))
            if sums:
                for array, gradient in zip(sums, found, strict=True):
                    array += gradient
            else:
                sums = found
        return total / count, dict(zip(self.parameters, sums, strict=True))


def _constant(value: float, dtype: Any) -> Array:
    """A number as an array of the device, without a transfer."""
    return current.xp.full((), value, dtype=dtype)


def _norm(arrays: Sequence[Any]) -> Any:
    """The Euclidean norm of all arrays together, of shape (); infinite where the squares overflow."""
    squares = current.xp.empty(len(arrays), dtype=arrays[0].dtype)
    for position, array in enumerate(arrays):
        flat = array.reshape(-1)
        squares[position] = current.xp.dot(flat, flat)
    return current.xp.sqrt(squares.sum())


def send_batches(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches on the device, in one transfer for each dtype that they have."""
    arrays = [array for batch in batches for array in batch]
    sent: dict[int, Array] = {}
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        mine = [array for array in arrays if array.dtype == dtype]
        together = backend.asarray(np.concatenate([array.reshape(-1) for array in mine]))
        end = 0
        for array in mine:
            begin, end = end, end + array.size
            sent[id(array)] = together[begin:end].reshape(array.shape)
    return [tuple(sent[id(array)] for array in batch) for batch in batches]

"""Training steps in a plain loop, in the thread and the process of the caller: what a debugger steps through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import NonFiniteNormError, OptimizerGroup, clip_scale, global_norm
from tinyllm.system.allocator import keep_freed_memory
from tinyllm.system.cores import threads_allowed
from tinyllm.system.interrupts import Interrupts
from tinyllm.training.evaluation import batch_losses, mean_of
from tinyllm.training.events import Limits, Outcome
from tinyllm.training.micro_batches import split_batch
from tinyllm.training.objectives import Batch, Objective


class Serial:
    """Steps of one model by one worker; see `Engine`.

    Args:
        model, optimizer: what is trained. objective: the loss. seed: of dropout. validation: what `evaluate` is about.
        interrupts: whose signals cut a step before anything is changed.
    """

    most_steps = 1

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
        self.sums: dict[str, Array] = {}
        self._context = ExitStack()

    @property
    def total(self) -> Mapping[str, Array]:
        """The gradients of the last batch by name; scaled, after `update`."""
        return self.sums

    def run(
        self,
        position: int,
        batches: Sequence[Batch],
        factors: Sequence[float],
        largest_norm: float,
        limits: Limits,
    ) -> list[Outcome]:
        """Steps on these batches in turn; see `Engine.run`."""
        outcomes = []
        for number, (batch, factor) in enumerate(zip(batches, factors, strict=True)):
            with self.interrupts.droppable():
                loss = self.gradients(position + number, batch)
                norm = self.gradient_norm()
            made = math.isfinite(loss) and math.isfinite(norm) and loss <= limits.loss and norm <= limits.norm
            if made:
                self.update(factor, clip_scale(norm, largest_norm))
            outcomes.append(Outcome(loss, norm, made))
        return outcomes

    def gradients(self, position: int, batch: Batch) -> float:
        """Forward and backward: the mean loss of a batch, whose gradients are kept in `total`."""
        self.model.train()
        count = self.objective.count(batch)
        loss_sum = 0.0
        for number, micro_batch in enumerate(self.interrupts.between(split_batch(batch, 1, self.model))):
            with dropout_position(self.seed, position, number):
                loss, _ = self.objective(self.model, micro_batch)
            loss_sum += loss.item()
            found = gradients(loss, list(self.parameters.values()), gradient=1 / count)
            if number == 0:
                self.sums = dict(zip(self.parameters, found, strict=True))
            else:
                for array, gradient in zip(self.sums.values(), found, strict=True):
                    array += gradient
        return loss_sum / count

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients together, which may be infinite or not a number."""
        return measured_norm(self.total)

    def update(self, factor: float, scale: float = 1.0) -> None:
        """One step of the optimizer with the gradients times `scale`; `factor` is the schedule's."""
        if scale != 1:
            for gradient in self.total.values():
                gradient *= scale
        self.optimizer.step(self.total, factor)

    def evaluate(self) -> float:
        """The mean loss of the validation batches, with dropout off."""
        return mean_of(batch_losses(self.model, self.objective, self.interrupts.between(self.validation)))

    def __enter__(self) -> Self:
        keep_freed_memory()
        self._context.enter_context(threads_allowed(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()

    def state_dict(self) -> dict[str, Any] | None:
        """None: model and optimizer are all that there is."""
        return None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Nothing; a loss scale that a device has saved is not needed here."""


def measured_norm(gradients: Mapping[str, Array], squares: Mapping[str, float] | None = None) -> float:
    """`global_norm` of gradients by name, finite or not; squares: the sum of squares of each, where it is known."""
    known = None if squares is None else [squares[name] for name in gradients]
    try:
        return global_norm(list(gradients.values()), known)
    except NonFiniteNormError as error:
        return error.norm

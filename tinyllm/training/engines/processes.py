"""Training steps and evaluation by a team of workers on this machine, each with a part of every batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array, current
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import OptimizerGroup, squared_norm
from tinyllm.parallel.team import Task, Team, is_shared, is_watched, share
from tinyllm.system.cores import physical_cores, threads_allowed
from tinyllm.system.interrupts import Interrupts
from tinyllm.training.engines.serial import Serial, measured_norm
from tinyllm.training.evaluation import Sum, batch_losses, mean_of
from tinyllm.training.micro_batches import split_batch
from tinyllm.training.objectives import Batch, Objective


class Processes(Serial):
    """The loop of Serial with each phase made by `size` workers at the same time, to be used as a context.

    A batch is cut into micro-batches, one or more for each worker; each has a graph of its own, and each worker adds
    up its gradients in arrays of its own, in order. Then every worker adds up, in the order of the workers, and
    updates a part of the parameters. So the bits of a step depend on `size`, and not on timing.

    Where the system has safe forks the workers are processes, and entering the context moves parameters and optimizer
    state into shared memory. They are threads elsewhere, and also where something in this process wants to see every
    op: an observer, or a hook of a module.

    Args:
        model, optimizer: what is trained. objective: the loss. size: how many workers. seed: of dropout.
        validation: what `evaluate` is about. interrupts: as for Serial; cut off, the workers are ended on leaving.

    Example:
        >>> with Processes(model, optimizer, NextToken(), size=2) as workers:  # doctest: +SKIP
        ...     loss = workers.gradients(position, (inputs, targets))
        ...     norm = workers.gradient_norm()
        ...     workers.update(factor=1.0, scale=min(1.0, 1.0 / norm))
    """

    def __init__(
        self,
        model: TransformerLM,
        optimizer: OptimizerGroup,
        objective: Objective,
        size: int,
        seed: int = 0,
        validation: Iterable[Batch] = (),
        interrupts: Interrupts | None = None,
    ) -> None:
        super().__init__(model, optimizer, objective, seed, validation, interrupts)
        self.size = size
        self.shares = _balanced({name: parameter.size for name, parameter in self.parameters.items()}, size)
        self.by_worker: list[dict[str, Array]] = []
        """The gradients that each worker has added up."""
        self._team: Team | None = None

    @property
    def total(self) -> Mapping[str, Array]:
        """The gradients of the whole batch by name, after `gradient_norm`; scaled, after `update`."""
        return self.by_worker[0]

    def __enter__(self) -> Self:
        tasks: list[Task] = [self._gradients, self._add_up, self._update, self._losses]
        self._team = Team(self.size, tasks, processes=not is_watched(self.model))
        like = {name: parameter.data for name, parameter in self.parameters.items()}
        if self._team.processes:
            self._move_to_shared_memory()
            self.by_worker = [share(like) for _ in range(self.size)]
        else:
            self.by_worker = [
                {name: current.xp.empty_like(x) for name, x in like.items()} for _ in range(self.size)
            ]
        self._team.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._team is not None
        self._team.__exit__(kind, error, trace)
        self._team = None

    def gradients(self, position: int, batch: Batch) -> float:
        """The mean loss of a batch; its gradients stay with the workers."""
        return sum(self._run(self._gradients, position, batch)) / self.objective.count(batch)

    def gradient_norm(self) -> float:
        """Add up the gradients of all workers, once after each `gradients`; returns their Euclidean norm."""
        squares = {name: square for part in self._run(self._add_up) for name, square in part.items()}
        return measured_norm(self.total, squares)

    def update(self, factor: float, scale: float = 1.0) -> None:
        """One step of the optimizer with the gradients times `scale`; `factor` is the schedule's."""
        self._run(self._update, self.optimizer.steps + 1, factor, scale)

    def evaluate(self) -> float:
        """The mean loss of the validation batches, with dropout off."""
        return mean_of(loss for part in self._run(self._losses) for loss in part)

    def _run(self, task: Task, *arguments: Any) -> list[Any]:
        if self._team is None:
            raise RuntimeError("the workers are not running; use them within `with`")
        return self._team.run(task, *arguments)

    def _move_to_shared_memory(self) -> None:
        parameters = {name: p.data for name, p in self.parameters.items()}
        if not all(map(is_shared, parameters.values())):
            for name, array in share(parameters).items():
                self.parameters[name].data = array
        for optimizer in self.optimizer.optimizers:
            if not all(map(is_shared, optimizer.state_arrays().values())):
                for name, state in optimizer.state.items():
                    optimizer.state[name] = share(state)

    # ---- What each worker does -----------------------------------------------------------------

    def _gradients(self, rank: int, position: int, batch: Batch) -> float:
        """Add up the gradients of this worker's micro-batches; returns the sum of their losses."""
        count = self.objective.count(batch)
        micro_batches = split_batch(batch, self.size, self.model)
        mine = np.array_split(np.arange(len(micro_batches)), self.size)[rank]
        tensors = list(self.parameters.values())
        sums = self.by_worker[rank]
        self.model.train()
        total = 0.0
        # Where some workers have nothing to do, the others may use their cores.
        threads = min(self.size // len(micro_batches), physical_cores())
        with threads_allowed(threads) if threads > 1 else contextlib.nullcontext():
            for number in self.interrupts.between(map(int, mine)):
                with dropout_position(self.seed, position, number):
                    loss, _ = self.objective(self.model, micro_batches[number])
                total += loss.item()
                found = gradients(loss, tensors, gradient=1 / count)
                for array, gradient in zip(sums.values(), found, strict=True):
                    if number == mine[0]:
                        array[...] = gradient
                    else:
                        array += gradient
        if len(mine) == 0:
            for array in sums.values():
                array[...] = 0
        return total

    def _add_up(self, rank: int) -> dict[str, float]:
        """Add the gradients of all workers for this worker's parameters; returns the sum of squares of each."""
        squares = {}
        for name in self.shares[rank]:
            array = self.total[name]
            for other in self.by_worker[1:]:
                array += other[name]
            squares[name] = squared_norm(array)
        return squares

    def _update(self, rank: int, number: int, factor: float, scale: float) -> None:
        """The part of the optimizer's step that changes this worker's parameters."""
        if scale != 1:
            for name in self.shares[rank]:
                gradient = self.total[name]
                gradient *= scale
        self.optimizer.step(self.total, factor, self.shares[rank], number)

    def _losses(self, rank: int) -> list[Sum]:
        batches = self.interrupts.between(self.validation)
        return batch_losses(self.model, self.objective, batches, rank, self.size)


def _balanced(sizes: dict[str, int], parts: int) -> list[frozenset[str]]:
    """The names in `parts` sets of about the same total size: each in turn, largest first, to the smallest set."""
    names: list[list[str]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        names[smallest].append(name)
        totals[smallest] += sizes[name]
    return [frozenset(part) for part in names]

"""Training steps and evaluation by a team of workers on this machine, each with a part of every batch."""

from __future__ import annotations

import contextlib
import math
from types import TracebackType
from typing import Any

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.observer import observers
from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array, current
from tinyllm.data import SequentialWindows
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import OptimizerGroup, global_norm, squared_norm
from tinyllm.parallel.team import Task, Team, is_shared, share
from tinyllm.system.cores import physical_cores, threads_allowed

MICRO_BATCH_TOKENS = 1024
"""A micro-batch has about so many tokens at most: its arrays stay small, and products are large enough already."""
MICRO_BATCH_LOGITS = 1 << 24
"""And so many logits (64 MiB), where the vocabulary is large."""


class DataParallel:
    """Steps of one model by `size` workers, to be used as a context.

    A batch is cut into micro-batches, one or more for each worker; each has a graph of its own, and each worker adds
    up its gradients in arrays of its own, in order. Then every worker adds up, in the order of the workers, and
    updates a part of the parameters. So the bits of a step depend on `size`, and not on timing.

    Where the system has safe forks the workers are processes, and entering the context moves parameters and optimizer
    state into shared memory. They are threads elsewhere, and also where something in this process wants to see every
    op: an observer, or a hook of a module.

    Args:
        model, optimizer: what is trained. size: how many workers. seed: of dropout.
        validation: the windows that `losses` is about. z_loss: of the training loss (see ops.cross_entropy).

    Example:
        >>> with DataParallel(model, optimizer, size=2) as workers:  # doctest: +SKIP
        ...     loss = workers.gradients(step, inputs, targets)
        ...     norm = workers.gradient_norm()
        ...     workers.update(factor=1.0, scale=min(1.0, 1.0 / norm))
    """

    def __init__(
        self,
        model: TransformerLM,
        optimizer: OptimizerGroup,
        size: int,
        seed: int = 0,
        validation: SequentialWindows | None = None,
        z_loss: float = 0.0,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.size, self.seed, self.z_loss = size, seed, z_loss
        self.validation = validation
        self.parameters = dict(model.named_parameters())
        self.shares = _balanced({name: parameter.size for name, parameter in self.parameters.items()}, size)
        self.by_worker: list[dict[str, Array]] = []
        """The gradients that each worker has added up."""
        self._team: Team | None = None

    @property
    def total(self) -> dict[str, Array]:
        """The gradients of the whole batch by name, after `gradient_norm`; scaled, after `update`."""
        return self.by_worker[0]

    def __enter__(self) -> DataParallel:
        tasks: list[Task] = [self._gradients, self._add_up, self._update, self._losses]
        self._team = Team(self.size, tasks, processes=not _watched(self.model))
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

    def gradients(self, step: int, inputs: Array, targets: Array) -> float:
        """The mean loss of a batch in nats; its gradients stay with the workers.

        inputs, targets: (B, T) integers. step: what dropout depends on, with the seed.
        """
        return sum(self._run(self._gradients, step, inputs, targets)) / targets.size

    def gradient_norm(self) -> float:
        """Add up the gradients of all workers, once after each `gradients`; returns their Euclidean norm.

        Raises NonFiniteNormError when it is not finite.
        """
        squares = {name: square for part in self._run(self._add_up) for name, square in part.items()}
        return global_norm(list(self.total.values()), [squares[name] for name in self.total])

    def update(self, factor: float, scale: float = 1.0) -> None:
        """One step of the optimizer with the gradients times `scale`; `factor` is the schedule's."""
        self._run(self._update, self.optimizer.steps + 1, factor, scale)

    def losses(self) -> float:
        """The mean loss of the validation windows in nats, each target once, with dropout off."""
        assert self.validation is not None
        losses = [loss for part in self._run(self._losses) for loss in part]
        return math.fsum(losses) / self.validation.num_targets

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
            if not all(map(is_shared, optimizer.state_dict().values())):
                for name, state in optimizer.state.items():
                    optimizer.state[name] = share(state)

    # ---- What each worker does -----------------------------------------------------------------

    def _gradients(self, rank: int, step: int, inputs: Array, targets: Array) -> float:
        """Add up the gradients of this worker's micro-batches; returns the sum of their losses."""
        pieces = cut(inputs, targets, self.size, self.model)
        mine = np.array_split(np.arange(len(pieces)), self.size)[rank]
        tensors = list(self.parameters.values())
        sums = self.by_worker[rank]
        self.model.train()
        total = 0.0
        # Where some workers have nothing to do, the others may use their cores.
        threads = min(self.size // len(pieces), physical_cores())
        with threads_allowed(threads) if threads > 1 else contextlib.nullcontext():
            for number in map(int, mine):
                x, y = pieces[number]
                with dropout_position(self.seed, step, number):
                    logits = self.model(backend.asarray(x))
                    loss = ops.cross_entropy(logits, backend.asarray(y), reduction="sum", z_loss=self.z_loss)
                del logits
                total += loss.item()
                found = gradients(loss, tensors, gradient=1 / targets.size)
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
        if scale != 1:
            for name in self.shares[rank]:
                self.total[name] *= scale
        self.optimizer.step(self.total, factor, self.shares[rank], number)

    def _losses(self, rank: int) -> list[float]:
        assert self.validation is not None
        return batch_losses(self.model, self.validation, rank, self.size)


def count_micro_batches(windows: int, length: int, workers: int, vocab_size: int) -> int:
    """Into how many micro-batches a batch (windows, length) is cut: equally many for each worker, if it has enough."""
    most_tokens = backend.choose(MICRO_BATCH_TOKENS, on_device=1 << 20)
    most_logits = backend.choose(MICRO_BATCH_LOGITS, on_device=1 << 28)
    tokens = min(most_tokens, max(1, most_logits // vocab_size))
    for_each = max(1, math.ceil(windows * length / (tokens * workers)))
    return min(windows, workers * for_each)


def cut(inputs: Array, targets: Array, workers: int, model: TransformerLM) -> list[tuple[Array, Array]]:
    """The micro-batches of a batch (B, T)."""
    B, T = inputs.shape
    count = count_micro_batches(B, T, workers, model.config.vocab_size)
    windows = np.array_split(np.arange(B), count)
    return [(inputs[part[0] : part[-1] + 1], targets[part[0] : part[-1] + 1]) for part in windows]


def batch_losses(model: TransformerLM, windows: SequentialWindows, rank: int, size: int) -> list[float]:
    """The sum of the losses of every `size`-th batch, beginning with number `rank`, with dropout off."""
    model.eval()
    losses: list[Any] = []
    for number, batch in enumerate(windows):
        if number % size != rank:
            continue
        B, T = batch[0].shape
        parts = count_micro_batches(B, T, 1, model.config.vocab_size)
        for inputs, targets in zip(*(np.array_split(array, parts) for array in batch), strict=True):
            with no_grad():
                logits = model(backend.asarray(inputs))
                loss = ops.cross_entropy(logits, backend.asarray(targets), reduction="sum")
            losses.append(loss.data)
    return [float(backend.read(loss)) for loss in losses]


def mean_loss(model: TransformerLM, windows: SequentialWindows, workers: int = 1) -> float:
    """The mean cross-entropy in nats over all targets of `windows`, by a number of workers."""

    def of_rank(rank: int) -> list[float]:
        return batch_losses(model, windows, rank, workers)

    if backend.is_asynchronous():
        workers = 1
    with Team(workers, [of_rank], processes=not _watched(model)) as team:
        losses = [loss for part in team.run(of_rank) for loss in part]
    return math.fsum(losses) / windows.num_targets


def _watched(model: TransformerLM) -> bool:
    """Whether something in this process wants to see what is computed."""
    modules = [module for _, module in model.named_modules()]
    return bool(observers()) or any(m._forward_hooks or m._backward_hooks for m in modules)


def _balanced(sizes: dict[str, int], parts: int) -> list[frozenset[str]]:
    """The names in `parts` sets of about the same total size: each in turn, largest first, to the smallest set."""
    names: list[list[str]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        names[smallest].append(name)
        totals[smallest] += sizes[name]
    return [frozenset(part) for part in names]

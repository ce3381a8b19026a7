"""Trouble for a Trainer, to see that it is noticed and that training recovers.

Each function changes one Trainer so that trouble comes with the batch at position `at`, whenever training comes to it:

    troubles.nan_in_a_weight(trainer, at=1000)
    trainer.fit()

What happens depends on the position of the batch alone, so that a run that was killed meets the same trouble again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tinyllm import backend

if TYPE_CHECKING:
    from tinyllm.backend import Array
    from tinyllm.training.engines import Serial
    from tinyllm.training.objectives import Batch
    from tinyllm.training.trainer import Trainer

RATE_STEPS = 5
LABEL_STEPS = 20


def before_step(trainer: Trainer, act: Callable[[int], None]) -> None:
    """Call `act` with the position of the batch before each step, made or not."""
    train_steps = trainer.train_steps

    def troubled() -> Any:
        act(trainer.sampler.step)
        return train_steps()

    trainer.train_steps = troubled  # type: ignore[method-assign]


def _on_cpu(trainer: Trainer) -> Serial:
    if backend.is_asynchronous():
        raise TypeError("this trouble is made on the NumPy backend alone")
    return cast("Serial", trainer.engine)


def change_gradients(trainer: Trainer, when: Callable[[int], bool], change: Callable[[Array], None]) -> None:
    """Call `change` with each gradient array of this process in the steps whose position is one for `when`."""
    engine = _on_cpu(trainer)
    gradients = engine.gradients

    def changed(position: int, batch: Batch) -> float:
        loss = gradients(position, batch)
        if when(position):
            for array in engine.total.values():
                change(array)
        return loss

    engine.gradients = changed  # type: ignore[method-assign]


def change_batches(trainer: Trainer, change: Callable[[int, Array, Array], tuple[Array, Array]]) -> None:
    """Let `change` make the batch of each position: change(position, inputs, targets)."""
    batch = trainer.sampler.batch
    trainer.sampler.batch = lambda step: change(step, *batch(step))  # type: ignore[method-assign]


def nan_in_a_weight(trainer: Trainer, at: int) -> None:
    """One weight of the head becomes NaN."""

    def act(position: int) -> None:
        if position == at:
            trainer.parameters["head.weight"].data[-1, -1] = np.nan

    before_step(trainer, act)


def nan_in_a_gradient(trainer: Trainer, at: int) -> None:
    """One element of each gradient becomes NaN."""
    change_gradients(trainer, lambda position: position == at, lambda array: array.reshape(-1).put(0, np.nan))


def gradient_times_a_million(trainer: Trainer, at: int) -> None:
    """All that this process has added up is multiplied by 1e6."""

    def change(array: Array) -> None:
        array *= array.dtype.type(1e6)

    change_gradients(trainer, lambda position: position == at, change)


def one_token(trainer: Trainer, at: int) -> None:
    """A batch of one repeated token, the one with the highest number."""
    token = trainer.model.config.vocab_size - 1

    def change(position: int, inputs: Array, targets: Array) -> tuple[Array, Array]:
        if position != at:
            return inputs, targets
        return np.full_like(inputs, token), np.full_like(targets, token)

    change_batches(trainer, change)


def shuffled_labels(trainer: Trainer, at: int) -> None:
    """The targets of LABEL_STEPS batches in a row are shuffled."""

    def change(position: int, inputs: Array, targets: Array) -> tuple[Array, Array]:
        if not at <= position < at + LABEL_STEPS:
            return inputs, targets
        return inputs, np.random.default_rng(position).permuted(targets)

    change_batches(trainer, change)


def rate_times_a_hundred(trainer: Trainer, at: int) -> None:
    """The learning rate is a hundred times what it should be for RATE_STEPS batches in a row."""
    engine = _on_cpu(trainer)
    update = engine.update

    def changed(factor: float, scale: float = 1.0) -> None:
        position = trainer.sampler.step  # which moves on after the update
        update(factor * (100 if at <= position < at + RATE_STEPS else 1), scale)

    engine.update = changed  # type: ignore[method-assign]


TROUBLES: dict[str, Callable[[Trainer, int], None]] = {
    "NaN in a weight": nan_in_a_weight,
    "NaN in a gradient": nan_in_a_gradient,
    "gradient times 1e6": gradient_times_a_million,
    "batch of one token": one_token,
    "rate times 100, 5 steps": rate_times_a_hundred,
    "shuffled labels, 20 steps": shuffled_labels,
}
"""All of them, by what happens."""

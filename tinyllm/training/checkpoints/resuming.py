"""What a Trainer's checkpoints hold beside the model, and how a Trainer goes on from one.

Random numbers need no state: initial weights, the order of the data and dropout follow from the seed and positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tinyllm.system.errors import InputError
from tinyllm.system.settings import to_mapping
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints.checkpoint import Checkpoint, TrainingState

if TYPE_CHECKING:
    from tinyllm.training.callbacks import Callback
    from tinyllm.training.trainer import Trainer

# These may differ when a run is resumed: none changes what a step computes, but for the rounding with other threads
# or on another backend;
# the watch's decide which steps are made from then on.
CHANGEABLE = {"data", "special_tokens", "out", "steps", "threads", "eval_every", "eval_batch_size", "checkpoint_every",
              "keep_checkpoints", "log_every", "sample_tokens", "sample_temperature", "watch_loss", "watch_norm",
              "watch_window", "patience", "max_rollbacks", "backend", "precision",
              "device_memory"}  # fmt: skip
MOST_THREADS = 4096
"""More than any machine has: a checkpoint that says so is damaged."""


def training_state(trainer: Trainer) -> TrainingState:
    """All that decides the next step, but for the parameters and the tokenizer."""
    states = {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks}
    values = {
        "step": trainer.step,
        "evaluated_step": trainer.evaluated_step,
        "best_loss": trainer.best_loss if math.isfinite(trainer.best_loss) else None,
        "best_step": trainer.best_step,
        "optimizer_steps": trainer.optimizer.steps,
        "threads": trainer.threads,
        "sampler": trainer.sampler.state_dict(),
        "watch": trainer.watch.state_dict(),
        "recovery": trainer.recovery.state_dict(),
        "data": trainer.data_digests,
        "loss_scale": None if trainer.loss_scale is None else trainer.loss_scale.state_dict(),
        "callbacks": {name: state for name, state in states.items() if state},
        "model": to_mapping(trainer.model.current_config),
        "train": to_mapping(trainer.config),
    }
    return TrainingState(trainer.optimizer.state_dict(), values)


def restore(trainer: Trainer, found: Checkpoint, callbacks: Sequence[Callback] = ()) -> int:
    """Put a Trainer, and these of its callbacks, where they were when it wrote `found`.

    Returns how many threads it had. All arrays are changed in place. Raises InputError, with parameters and optimizer
    unchanged, when the checkpoint is damaged or belongs to another configuration or text.
    """
    state = found.training()
    values = state.values
    try:
        _check_same(trainer, found, values)
        best_loss = math.inf if values["best_loss"] is None else float(values["best_loss"])
        names = ("step", "optimizer_steps", "evaluated_step", "best_step", "threads")
        numbers = {name: values[name] for name in names}
        if not all(type(number) is int and number >= -1 for number in numbers.values()):
            raise ValueError(f"{numbers} must be whole numbers")
        if (
            numbers["step"] < 0
            or numbers["optimizer_steps"] < 0
            or not 1 <= numbers["threads"] <= MOST_THREADS
        ):
            raise ValueError(f"{numbers} are out of range")
        states = dict(values["callbacks"])
        for callback in callbacks:
            callback.load_state_dict(dict(states.get(type(callback).__name__, {})))
        parameters = found.model().state_dict()
        before, now = (next(iter(state.values())).dtype for state in (parameters, trainer.model.state_dict()))
        if before != np.result_type(np.float32, now):  # float16 is read as float32
            _refuse(trainer.run, [f"the weights were {before} and are {now}"])
        trainer.sampler.load_state_dict(values["sampler"])
        trainer.watch.load_state_dict(values["watch"])
        trainer.recovery.load_state_dict(values["recovery"])
        if trainer.loss_scale is not None and values.get("loss_scale") is not None:
            trainer.loss_scale.load_state_dict(values["loss_scale"])
        trainer.optimizer.load_state_dict(state.arrays, numbers["optimizer_steps"])
    except InputError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{found.folder}: the training state is damaged ({error}); begin a new run"
        ) from None
    trainer.model.load_state_dict(parameters)
    trainer.step, trainer.evaluated_step = numbers["step"], numbers["evaluated_step"]
    trainer.best_loss, trainer.best_step = best_loss, numbers["best_step"]
    return numbers["threads"]


def check_tokenizer(run: Path | None, tokenizer: Tokenizer, choice: str, found: Checkpoint) -> None:
    """Raise InputError when `found` has another tokenizer; choice: the setting that this one is of."""
    settings = found.training().values.get("train")
    before = settings.get("tokenizer") if isinstance(settings, dict) else None
    if before != choice and before is not None:
        _refuse(run, [f"tokenizer was {before!r} and is {choice!r}"])
    if found.tokenizer().to_json() != tokenizer.to_json():
        raise InputError(
            f"{run} cannot be resumed with this {'text' if choice in ('char', 'bpe') else 'tokenizer'}: its vocabulary "
            "is another; give the one it was begun with, or another --out"
        )


def _check_same(trainer: Trainer, found: Checkpoint, saved: dict[str, Any]) -> None:
    """Raise InputError naming all that differs from the saved run and matters."""
    run = trainer.run
    check_tokenizer(run, trainer.tokenizer, trainer.config.tokenizer, found)
    now = {**to_mapping(trainer.model.current_config), **to_mapping(trainer.config)}
    before = {**saved["model"], **saved["train"]}
    differing = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in CHANGEABLE and before.get(name) != value
    ]
    if differing:
        _refuse(run, differing)
    splits = [name for name, digest in trainer.data_digests.items() if saved["data"][name] != digest]
    if splits:
        raise InputError(
            f"{run} cannot be resumed with this text: its {' and '.join(splits)} tokens have another SHA-256; give the "
            "text it was begun with, or another --out"
        )


def _refuse(run: Path | None, differing: Sequence[str]) -> NoReturn:
    raise InputError(
        f"{run} cannot be resumed with other settings: {', '.join(differing)}; give the settings it was begun with, or "
        "another --out"
    )

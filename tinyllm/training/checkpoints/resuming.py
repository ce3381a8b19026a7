"""What a run's checkpoints hold beside the model, and how a run goes on from one.

Random numbers need no state: initial weights, the order of the data and dropout follow from the seed and positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from tinyllm.models import TransformerLM
from tinyllm.optim import OptimizerGroup
from tinyllm.system.errors import InputError
from tinyllm.system.settings import to_mapping
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints.checkpoint import Checkpoint, TrainingState
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Changes
from tinyllm.training.optimization import learning_rate

OF_THE_RATE = {"learning_rate", "steps", "schedule", "warmup_steps", "final_factor"}
"""What the learning rate of a step depends on."""
OF_THE_LOSS = {"batch_size", "gradient_accumulation", "dropout"}
"""With others of these, losses and gradient norms are not comparable with those before."""
PATHS = {"data", "validation_data", "out", "init_from"}
# These may differ when a run is resumed. What the weights and the state of the optimizer mean depends on none of them,
# and the text is compared by its tokens.
CHANGEABLE = {
    *OF_THE_RATE, *OF_THE_LOSS, *PATHS, "muon_learning_rate", "weight_decay", "muon_weight_decay", "clip_norm",
    "clip_running", "special_tokens", "threads", "formulas", "eval_every", "stop_after", "eval_batch_size",
    "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "log_every", "sample_tokens", "sample_temperature",
    "watch_loss", "watch_norm", "watch_window", "patience", "max_rollbacks", "backend", "precision", "device_memory",
    "newlines", "sample_every", "widen_vocabulary", "recompute", "eval_tokens",
}  # fmt: skip
OPTIONAL = {"loss_scale"}
"""Parts that a checkpoint may lack."""
MOST_THREADS = 4096
"""More than any machine has: a checkpoint that says so is damaged."""


class Part(Protocol):
    """A part of a run that must survive a kill."""

    def state_dict(self) -> Any:
        """What it needs to go on, for JSON."""

    def load_state_dict(self, state: Any) -> None:
        """Go on from a saved state; raises ValueError, TypeError or KeyError, with nothing changed, if damaged."""


class Split(Protocol):
    """What tells its tokens from others, such as a sampler of them."""

    @property
    def digest(self) -> str:
        """The same for the same tokens alone, see data.token_digest."""


class TextDigests:
    """The digest of the tokens of each split, as a part of a run: it goes on with the same text alone."""

    def __init__(self, run: Path | None, splits: Mapping[str, Split]) -> None:
        self.run, self.splits = run, splits
        self._digests: dict[str, str] = {}

    def state_dict(self) -> dict[str, str]:
        """The digest of each split by name."""
        if not self._digests:
            self._digests = {name: split.digest for name, split in self.splits.items()}
        return self._digests

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise InputError when the text is another one."""
        other = [name for name, digest in self.state_dict().items() if state[name] != digest]
        if other:
            raise InputError(
                f"{self.run} cannot be resumed with this text: its {' and '.join(other)} tokens have another SHA-256; "
                "give the text it was begun with, with the --newlines of then, or another --out"
            )


@dataclass
class Numbers:
    """How far a run has come: see the attributes of Trainer."""

    step: int
    evaluated_step: int
    best_loss: float
    best_step: int
    threads: int
    evaluated_loss: float = math.nan
    without_gain: int = 0


@dataclass
class RunState:
    """All of a run that must survive a kill.

    parts: by the name that each has in a checkpoint. run: the folder, for errors.
    """

    run: Path | None
    model: TransformerLM
    tokenizer: Tokenizer
    optimizer: OptimizerGroup
    config: TrainConfig
    parts: dict[str, Part]

    def collect(self, numbers: Numbers, callbacks: Sequence[Callback]) -> TrainingState:
        """All that decides the next step, but for the parameters and the tokenizer."""
        states = {type(callback).__name__: callback.state_dict() for callback in callbacks}
        values = {
            "step": numbers.step,
            "evaluated_step": numbers.evaluated_step,
            "best_loss": numbers.best_loss if math.isfinite(numbers.best_loss) else None,
            "best_step": numbers.best_step,
            "evaluated_loss": numbers.evaluated_loss if math.isfinite(numbers.evaluated_loss) else None,
            "without_gain": numbers.without_gain,
            "optimizer_steps": self.optimizer.steps,
            "threads": numbers.threads,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "callbacks": {name: state for name, state in states.items() if state},
            "model": to_mapping(self.model.current_config),
            "train": to_mapping(self.config),
        }
        return TrainingState(self.optimizer.state_dict(), values)

    def restore(self, found: Checkpoint, callbacks: Sequence[Callback] = ()) -> Numbers:
        """Put the run, and these callbacks, where they were when `found` was written.

        All arrays are changed in place. Raises InputError, with parameters and optimizer unchanged, when the checkpoint
        is damaged or belongs to another configuration or text.
        """
        state = found.training()
        values = state.values
        try:
            self._check_same_settings(found, values)
            numbers = _checked_numbers(values)
            states = dict(values["callbacks"])
            for callback in callbacks:
                callback.load_state_dict(dict(states.get(type(callback).__name__, {})))
            parameters = found.model().state_dict()
            before, now = (
                next(iter(arrays.values())).dtype for arrays in (parameters, self.model.state_dict())
            )
            if before != np.result_type(np.float32, now):  # float16 is read as float32
                _refuse(self.run, [f"the weights were {before} and are {now}"])
            # The text first: of a position in another one there is less to say.
            for name, part in sorted(self.parts.items(), key=lambda item: item[0] != "data"):
                if name == "watch" and OF_THE_LOSS & self._differences(values).keys():
                    continue
                part.load_state_dict(values.get(name) if name in OPTIONAL else values[name])
            self.optimizer.load_state_dict(state.arrays, values["optimizer_steps"])
        except InputError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{found.folder}: the training state is damaged ({error}); begin a new run"
            ) from None
        self.model.load_state_dict(parameters)
        return numbers

    def _check_same_settings(self, found: Checkpoint, saved: Mapping[str, Any]) -> None:
        """Raise InputError naming all settings that differ from the saved run and matter."""
        check_tokenizer(self.run, self.tokenizer, self.config.tokenizer, found)
        differing = [
            f"{name} was {before!r} and is {now!r}"
            for name, (before, now) in self._differences(saved).items()
            if name not in CHANGEABLE
        ]
        if differing:
            _refuse(self.run, differing)
        if _checked_numbers(saved).step > self.config.steps:
            raise InputError(
                f"{self.run} has made {saved['step']} steps, more than the {self.config.steps} asked for; give --steps "
                "a larger number, or leave it out"
            )

    def _differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What each setting that is another was, and is; one that the saved run does not know had its default."""
        defaults = {**vars(type(self.model.current_config)), **vars(type(self.config))}
        before = {**saved["model"], **saved["train"]}
        differences = {}
        for name, value in {**to_mapping(self.model.current_config), **to_mapping(self.config)}.items():
            earlier = before.get(name, defaults.get(name))
            if _as_json(earlier) != _as_json(value):
                differences[name] = earlier, value
        return differences

    def changes(self, found: Checkpoint) -> Changes | None:
        """What is other than in the run that `found` is of, once it is restored; None: nothing.

        A setting that the run did not have, of an older version, is none, and other paths to the same are none.
        """
        values = found.training().values
        before, step = values["train"], values["step"]
        known = {*values["model"], *before} - PATHS
        settings = {name: both for name, both in self._differences(values).items() if name in known}
        rates = None
        if OF_THE_RATE & settings.keys() and 0 < step < self.config.steps:
            earlier = replace(self.config, **{name: before[name] for name in OF_THE_RATE})
            rates = learning_rate(earlier, step - 1), learning_rate(self.config, step)
        return Changes(step, settings, rates) if settings else None


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checked_numbers(values: Mapping[str, Any]) -> Numbers:
    """The numbers of a saved run; raises ValueError, TypeError or KeyError when they are damaged."""
    names = ("step", "optimizer_steps", "evaluated_step", "best_step", "threads")
    numbers = {name: values[name] for name in names}
    numbers["without_gain"] = values.get("without_gain", 0)  # older runs have none
    if not all(type(number) is int and number >= -1 for number in numbers.values()):
        raise ValueError(f"{numbers} must be whole numbers")
    least = min(numbers["step"], numbers["without_gain"], numbers.pop("optimizer_steps"))
    if least < 0 or not 1 <= numbers["threads"] <= MOST_THREADS:
        raise ValueError(f"{numbers} are out of range")
    best, evaluated = values["best_loss"], values.get("evaluated_loss")
    return Numbers(
        **numbers,
        best_loss=math.inf if best is None else float(best),
        evaluated_loss=math.nan if evaluated is None else float(evaluated),
    )


def check_tokenizer(run: Path | None, tokenizer: Tokenizer, choice: str, found: Checkpoint) -> None:
    """Raise InputError when `found` has another tokenizer; choice: the setting that this one is of."""
    settings = found.training().values.get("train")
    before = settings.get("tokenizer") if isinstance(settings, dict) else None
    if before != choice and before is not None:
        _refuse(run, [f"tokenizer was {before!r} and is {choice!r}"])
    if found.tokenizer().to_json() != tokenizer.to_json():
        which, how = ("text", ", with the --newlines of then") if choice == "char" else ("tokenizer", "")
        raise InputError(
            f"{run} cannot be resumed with this {which}: its vocabulary is another; give the one it was begun with"
            f"{how}, or another --out"
        )


def _refuse(run: Path | None, differing: Sequence[str]) -> NoReturn:
    raise InputError(
        f"{run} cannot be resumed with other settings: {', '.join(differing)}; give the settings it was begun with, or "
        "another --out"
    )

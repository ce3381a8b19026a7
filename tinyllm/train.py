"""Training: the Trainer, its config, and the run folder that it writes."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyllm import backend, checkpoint
from tinyllm.backend import Array
from tinyllm.callbacks import Callback
from tinyllm.config import field, require_known, to_mapping
from tinyllm.cores import physical_cores
from tinyllm.data import BatchSampler, RandomOffsets, RandomWindows, SequentialWindows
from tinyllm.data_parallel import DataParallel
from tinyllm.errors import InputError
from tinyllm.nn import TransformerLM
from tinyllm.optim import (
    OPTIMIZERS,
    AdamW,
    NonFiniteNormError,
    OptimizerGroup,
    clip_scale,
    cosine_schedule,
    linear_schedule,
)
from tinyllm.recovery import Recovery, recover
from tinyllm.stability import Rejection, Watch
from tinyllm.tokenizer import Tokenizer

SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}
SAMPLERS: dict[str, type[BatchSampler]] = {"windows": RandomWindows, "offsets": RandomOffsets}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises InputError when a number is out of range."""

    data: tuple[str, ...] = field(
        (), "text to train on: files or folders; without it, Python's own help pages"
    )
    out: str | None = field(None, "folder for the run; none: runs/ and the preset's name")
    tokenizer: str = field(
        "char",
        "char: a token for each character; byte: for each byte; bpe: learned from the text; or a tokenizer.json",
    )
    steps: int = field(2000, "optimizer steps")
    batch_size: int = field(12, "windows in a batch")
    gradient_accumulation: int = field(1, "batches whose gradients are averaged in one step")
    sampling: Literal["windows", "offsets"] = field(
        "windows", "windows: shuffled windows, none twice in an epoch; offsets: anywhere, with replacement"
    )
    validation_fraction: float = field(0.1, "last part of the text, kept for validation")
    optimizer: str = field(
        "adamw", f"{', '.join(OPTIMIZERS)}; muon: for the matrices inside blocks, AdamW elsewhere"
    )
    learning_rate: float = field(3e-3, "peak rate of AdamW")
    muon_learning_rate: float = field(0.02, "peak rate of Muon")
    muon_momentum: float = field(0.95, "momentum of Muon")
    muon_weight_decay: float = field(0.0, "decoupled decay of Muon's matrices, times its rate")
    schedule: Literal["cosine", "linear"] = field("linear", "how the rate falls after the warm-up")
    warmup_steps: int = field(100, "steps in which the rate rises")
    final_factor: float = field(0.0, "the rate at the end, as a part of the peak")
    beta1: float = field(0.9, "AdamW: decay of the mean gradient")
    beta2: float = field(0.95, "AdamW: decay of the mean square gradient")
    weight_decay: float = field(0.1, "decoupled decay of matrices, times the rate")
    clip_norm: float = field(1.0, "largest global gradient norm")
    clip_running: float = field(
        0.0, "largest gradient norm as a multiple of the median of the last steps, beside clip_norm; 0: off"
    )
    z_loss: float = field(
        0.0,
        "times (ln sum e^logits)^2, added to the training loss so that logits stay small; PaLM: 1e-4; 0: off",
    )
    watch_loss: float = field(
        20.0,
        "a loss so many spreads above the median of the last steps is a spike, its step not made; inf: never",
    )
    watch_norm: float = field(300.0, "the same for the gradient norm; inf: never")
    watch_window: int = field(128, "steps that loss and gradient norm are compared with")
    patience: int = field(5, "rejected steps in a row before training goes back to an earlier checkpoint")
    max_rollbacks: int = field(3, "times that it goes back for the same trouble before it stops")
    seed: int = field(1, "of initial weights, data order and dropout")
    threads: int = field(0, "workers; 0: one for each physical core; 1: for a debugger")
    eval_every: int = field(500, "steps between evaluations of the whole validation split")
    eval_batch_size: int = field(64, "windows in a batch of the evaluation")
    checkpoint_every: int = field(500, "steps between checkpoints")
    keep_checkpoints: int = field(2, "how many of these are kept, beside the best and the latest")
    log_every: int = field(1, "steps between lines of metrics.jsonl")
    sample_tokens: int = field(500, "tokens to sample at the end")
    sample_temperature: float = field(0.8, "temperature of that sample")

    def __post_init__(self) -> None:
        whole = (
            "steps",
            "batch_size",
            "gradient_accumulation",
            "eval_every",
            "eval_batch_size",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "watch_window",
            "patience",
        )
        for name in whole:
            self._require(name, 1 <= getattr(self, name) < 2**31, "from 1 to 2147483647")
        for name in ("warmup_steps", "threads", "sample_tokens"):
            self._require(name, 0 <= getattr(self, name) < 2**31, "from 0 to 2147483647")
        for name in ("weight_decay", "sample_temperature", "muon_weight_decay", "clip_running", "z_loss"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("learning_rate", "muon_learning_rate"):
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0 and finite")
        for name in ("clip_norm", "watch_loss", "watch_norm"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("max_rollbacks", 0 <= self.max_rollbacks <= 20, "from 0 to 20")
        for name in ("beta1", "beta2", "muon_momentum"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("final_factor", 0 <= self.final_factor <= 1, "from 0 to 1")
        self._require("validation_fraction", 0 < self.validation_fraction < 1, "above 0 and below 1")
        require_known("optimizer", self.optimizer, OPTIMIZERS)
        self._require("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name}={getattr(self, name)}; it must be {expected}")


# These may differ when a run is resumed: none changes what a step computes, but for the rounding with other threads;
# the watch's decide which steps are made from then on.
CHANGEABLE = {"data", "out", "steps", "threads", "eval_every", "eval_batch_size", "checkpoint_every", "log_every",
              "sample_tokens", "sample_temperature", "keep_checkpoints", "watch_loss", "watch_norm", "watch_window",
              "patience", "max_rollbacks"}  # fmt: skip


@dataclass(frozen=True)
class StepMetrics:
    """One step: the mean loss of its batch in nats, the rate's peak times its factor, the norm before clipping.

    The loss has the z-loss in it, where there is one.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over the whole validation split, in nats a token and in bits a character."""

    step: int
    val_loss: float
    val_bits_per_character: float


def build_optimizer(model: TransformerLM, config: TrainConfig) -> OptimizerGroup:
    """The optimizer of the config; where it is for matrices only, AdamW changes the other parameters."""
    chosen = OPTIMIZERS[config.optimizer]
    named = dict(model.named_parameters())
    rest = {
        name: parameter
        for name, parameter in named.items()
        if chosen.matrices_only and not (name.startswith("blocks.") and parameter.ndim == 2)
    }
    mine = {name: parameter for name, parameter in named.items() if name not in rest}
    optimizers = [chosen.from_settings(mine.items(), config)]
    if rest:
        optimizers.append(AdamW.from_settings(rest.items(), config))
    return OptimizerGroup(optimizers)


class Trainer:
    """Trains a language model on an array of tokens.

    The bits of a run depend on the seed and the number of threads, and not on their timing (see DataParallel). Where
    these are processes, they see what the model and the optimizer were when `workers` was entered, which `fit` does;
    what a callback changes later reaches them only in parameters and optimizer state, changed in place.

    Args:
        model, tokenizer: what is trained and saved. train_tokens, validation_tokens: (N,) integers.
        config: how. run: the folder for checkpoints; None keeps none.
        callbacks: told of every step and evaluation.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        train_tokens: Array,
        validation_tokens: Array,
        config: TrainConfig,
        run: Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.run = run
        self.callbacks = list(callbacks)
        self.threads = config.threads or physical_cores()
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config)
        T = model.config.context_length
        windows = config.batch_size * config.gradient_accumulation
        self.sampler = SAMPLERS[config.sampling](train_tokens, T, windows, config.seed, "training text")
        self.validation = SequentialWindows(validation_tokens, T, config.eval_batch_size, "validation text")
        self.workers = DataParallel(
            model, self.optimizer, self.threads, config.seed, self.validation, config.z_loss
        )
        self.watch = Watch(config.watch_window, config.watch_loss, config.watch_norm)
        self.recovery = Recovery(config.patience, config.max_rollbacks, config.watch_window)
        self.tokens_per_character = self.validation.num_targets / len(tokenizer.decode(validation_tokens[1:]))
        self.step = 0
        self.best_loss = math.inf
        self.evaluated_step = -1
        """The step of the last evaluation."""
        self.saved_step = -1
        """The step of the last checkpoint."""

    def fit(self) -> None:
        """Train from the current step to `config.steps`, evaluating and saving on the way.

        Ctrl-C waits for the end of the step, and saves a checkpoint before it goes on as KeyboardInterrupt. A
        second one does not wait, and saves nothing.

        Steps that the watch rejects are not made; see `recovery`. Raises InputError when no way is found past them,
        or the run folder cannot be written.
        """
        try:
            # Whether a step is finite is checked once, on its loss and its gradient norm.
            with backend.ignore_non_finite(), self.workers:
                if self.step == 0:
                    self.save()
                self._tell("on_start", self.step, self.config.steps)
                if self.step and self.evaluated_step < self.step:
                    self._after_step()  # what an interrupt came before
                while self.step < self.config.steps:
                    with interrupt_after():
                        made = self.train_step()
                        if isinstance(made, Rejection):
                            recover(self, made)
                            continue
                        self._tell("on_step", made)
                    self._after_step()
        except HurriedInterrupt:
            raise
        except KeyboardInterrupt:
            with interrupt_after():
                self.save()
            raise
        finally:
            self._tell("on_end")

    def train_step(self) -> StepMetrics | Rejection:
        """One optimizer step on the next batch, or none where the watch rejects it; within `with self.workers:`."""
        begun = time.perf_counter()
        position = self.sampler.step
        inputs, targets = self.sampler.batch(position)  # (B, T) each
        loss = self.workers.gradients(position, inputs, targets)
        try:
            norm = self.workers.gradient_norm()
        except NonFiniteNormError as error:
            norm = error.norm
        verdict = self.watch.judge(loss, norm)
        self.sampler.step += 1
        if verdict.reason is not None:
            return Rejection(self.step + 1, position, loss, norm, verdict.reason, inputs, targets)
        factor = SCHEDULES[self.config.schedule](
            self.step, self.config.steps, self.config.warmup_steps, self.config.final_factor
        )
        largest = self.config.clip_norm
        if self.config.clip_running:
            largest = min(largest, self.config.clip_running * self.watch.usual_norm)
        self.workers.update(factor, clip_scale(norm, largest))
        self.step += 1
        self.watch.accept(loss, norm)
        self.recovery.accept(self.step)
        rate = targets.size / (time.perf_counter() - begun)
        return StepMetrics(self.step, loss, self.config.learning_rate * factor, norm, rate)

    def evaluate(self) -> Evaluation:
        """The loss over the whole validation split, each token predicted once; within `with self.workers:`."""
        val_loss = self.workers.losses()
        return Evaluation(self.step, val_loss, val_loss / math.log(2) * self.tokens_per_character)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint of this step, make it `latest` (and `best`), and delete older ones."""
        if self.run is None:
            return
        folder = self.run / "checkpoints" / f"step-{self.step:08}"
        if self.saved_step != self.step:
            checkpoint.save(folder, self.model, self.tokenizer, self.training_state())
            self.saved_step = self.step
        if best:
            checkpoint.point(self.run, "best", folder)
        checkpoint.point(self.run, "latest", folder)
        checkpoint.prune(self.run, self.config.keep_checkpoints, self.config.checkpoint_every)

    def resume(self) -> None:
        """Go on from the latest checkpoint of the run folder.

        Raises InputError when there is none, it is damaged, or it belongs to another configuration or text.
        """
        assert self.run is not None
        folder = checkpoint.find(self.run, ("latest",))
        self.restore(folder)
        checkpoint.remove_after(self.run, folder)

    def restore(self, folder: Path) -> None:
        """Take all state from a checkpoint, in place.

        Raises InputError when it is damaged, or belongs to another configuration or text.
        """
        model, tokenizer = checkpoint.load(folder)
        state = checkpoint.load_training(folder)
        try:
            self._check_same(state.values, tokenizer)
            best_loss = state.values["best_loss"]
            best_loss = math.inf if best_loss is None else float(best_loss)
            steps, evaluated_step = int(state.values["optimizer_steps"]), int(state.values["evaluated_step"])
            step = state.values["step"]
            if type(step) is not int or step < 0:
                raise ValueError(f"its step is {step!r}")
            self.sampler.load_state_dict(state.values["sampler"])
            self.watch.load_state_dict(state.values["watch"])
            self.recovery.load_state_dict(state.values["recovery"])
            self.optimizer.load_state_dict(state.arrays, steps)
        except InputError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: the training state is damaged ({error}); begin a new run") from None
        self.model.load_state_dict(model.state_dict())
        self.step = self.saved_step = step
        self.best_loss, self.evaluated_step = best_loss, evaluated_step

    def training_state(self) -> checkpoint.TrainingState:
        """What a checkpoint holds beside the model."""
        values = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "optimizer_steps": self.optimizer.steps,
            "sampler": self.sampler.state_dict(),
            "watch": self.watch.state_dict(),
            "recovery": self.recovery.state_dict(),
            "model": to_mapping(self.model.config),
            "train": to_mapping(self.config),
        }
        return checkpoint.TrainingState(self.optimizer.state_dict(), values)

    def _check_same(self, saved: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Raise InputError naming every setting that differs from those of the saved run and matters."""
        if tokenizer.to_json() != self.tokenizer.to_json():
            raise InputError(
                f"{self.run} cannot be resumed with this text: its vocabulary is another; "
                "give the text it was begun with, or another --out"
            )
        now = {**to_mapping(self.model.config), **to_mapping(self.config)}
        before = {**saved["model"], **saved["train"]}
        differing = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name not in CHANGEABLE and before.get(name) != value
        ]
        if differing:
            raise InputError(
                f"{self.run} cannot be resumed with other settings: {', '.join(differing)}; "
                "give the settings it was begun with, or another --out"
            )

    def _after_step(self) -> None:
        """Evaluate and save, where it is time for it."""
        last = self.step >= self.config.steps
        due = last or self.step % self.config.eval_every == 0
        evaluation = None
        if due:
            self._tell("on_evaluation_start", self.step)
            evaluation = self.evaluate()
        with interrupt_after():
            improved = False
            if evaluation is not None:
                self._tell("on_evaluation", evaluation)
                improved = evaluation.val_loss < self.best_loss
                self.best_loss = min(self.best_loss, evaluation.val_loss)
                self.evaluated_step = self.step
            if improved or last or self.step % self.config.checkpoint_every == 0:
                self.save(best=improved)

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*values)


class HurriedInterrupt(KeyboardInterrupt):
    """A second Ctrl-C, which may come in the middle of a step."""


@contextlib.contextmanager
def interrupt_after() -> Iterator[None]:
    """Put Ctrl-C off until the end of this context, so that no half step is saved; a second one comes at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    waiting = False

    def remember(number: int, frame: object) -> None:
        nonlocal waiting
        if waiting:
            raise HurriedInterrupt
        waiting = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if waiting:
        raise KeyboardInterrupt

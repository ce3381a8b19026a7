"""Training: the Trainer, which makes steps, evaluates, and saves."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllm import backend
from tinyllm.backend import Array, current
from tinyllm.data import BatchSampler, RandomOffsets, RandomWindows, SequentialWindows, token_digest
from tinyllm.models import TransformerLM
from tinyllm.optim import (
    OPTIMIZERS,
    AdamW,
    NonFiniteNormError,
    OptimizerGroup,
    clip_scale,
    cosine_schedule,
    linear_schedule,
)
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError, NoSpaceError
from tinyllm.system.interrupts import HurriedInterrupt, Interrupts
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.callbacks import Callback, Evaluation, StepMetrics
from tinyllm.training.checkpoints import checkpoint, resuming
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines.device import DeviceSteps, stack_batches
from tinyllm.training.engines.processes import DataParallel
from tinyllm.training.safeguards.recovery import Recovery, recover
from tinyllm.training.safeguards.watch import LossScale, Rejection, Watch

SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}
SAMPLERS: dict[str, type[BatchSampler]] = {"windows": RandomWindows, "offsets": RandomOffsets}


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

    Raises InputError for what cannot be trained on, and for a model that could not be loaded from its checkpoints.
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
        if run is not None:
            checkpoint.require_loadable(model, tokenizer)  # before work is done that could not be kept
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.run = run
        self.callbacks = list(callbacks)
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config)
        T = model.config.context_length
        windows = config.batch_size * config.gradient_accumulation
        self.sampler = SAMPLERS[config.sampling](train_tokens, T, windows, config.seed, "training text")
        self.validation = SequentialWindows(validation_tokens, T, config.eval_batch_size, "validation text")
        self.use_threads(config.threads or physical_cores())
        self.tokens_per_character = self.validation.num_targets / tokenizer.characters_predicted(
            validation_tokens
        )
        self.watch = Watch(config.watch_window, config.watch_loss, config.watch_norm)
        self.recovery = Recovery(config.patience, config.max_rollbacks, config.watch_window)
        self.interrupts = Interrupts()
        self.step = 0
        self.best_loss, self.best_step = math.inf, -1
        """Of the evaluation with the lowest loss whose checkpoint could be written."""
        self.evaluated_step = -1
        """The step of the last evaluation."""
        self.saved: Path | None = None
        """The last checkpoint that was written, or resumed from."""

    def fit(self) -> None:
        """Train from the current step to `config.steps`, evaluating and saving on the way.

        Ctrl-C and SIGTERM wait for the end of the step, and save a checkpoint before they go on as KeyboardInterrupt
        (SIGTERM as its subclass Terminated). A second one does not wait, and saves nothing.

        A checkpoint on the way that cannot be written is told to the callbacks, and tried again at the next one.
        Steps that the watch rejects are not made; see `recovery`. Raises InputError when no way is found past them, and
        when the first checkpoint, the last, or that of an interrupt cannot be written.
        """
        with self.interrupts:
            try:
                # Whether a step is finite is checked once, on its loss and its gradient norm.
                with backend.ignore_non_finite(), self.workers:
                    self._begin()
                    while self.step < self.config.steps:
                        with self.interrupts.put_off():
                            before = self.step
                            for made in self.train_steps():
                                if not isinstance(made, Rejection):
                                    self._tell("on_step", made)
                                elif recover(self, made) == "roll back":
                                    break
                        if self.step > before:
                            self._after_step()
            except HurriedInterrupt:
                raise
            except KeyboardInterrupt:
                self.save(interrupted=True)
                raise
            finally:
                self._tell("on_end")

    def _begin(self) -> None:
        self._tell("on_start", self.step, self.config.steps)
        if self.saved is None:
            with self.interrupts.put_off():
                self.save()  # so that there is always one
        if self.step and self.evaluated_step < self.step:
            self._after_step()  # what an interrupt came before

    def use_threads(self, threads: int) -> None:
        """From the next `fit` on, work in so many threads or processes, on which the rounding of a step depends."""
        self.threads = 1 if backend.is_asynchronous() else threads
        model, seed, z_loss = self.model, self.config.seed, self.config.z_loss
        self.workers: DataParallel | DeviceSteps
        if backend.is_asynchronous():
            self.workers = DeviceSteps(model, self.optimizer, seed, self.validation, z_loss)
        else:
            self.workers = DataParallel(model, self.optimizer, threads, seed, self.validation, z_loss)

    @property
    def loss_scale(self) -> LossScale | None:
        """What the loss is scaled with, where products are of float16."""
        return self.workers.loss_scale if isinstance(self.workers, DeviceSteps) else None

    @functools.cached_property
    def data_digests(self) -> dict[str, str]:
        """The SHA-256 of the tokens of each split."""
        splits = {"training": self.sampler.tokens, "validation": self.validation.tokens}
        return {name: token_digest(tokens) for name, tokens in splits.items()}

    def train_steps(self) -> Iterator[StepMetrics | Rejection]:
        """The next steps up to one whose figures are wanted: on a CPU one step; within `with self.workers:`.

        On a device these are the steps up to the next line of the log, evaluation or checkpoint. What they are compared
        with is what the watch knew before them. What came of them is yielded one by one; whoever stops taking leaves
        out the rest.
        """
        if isinstance(self.workers, DataParallel):
            yield self.train_step()
            return
        begun = time.perf_counter()
        count = self._steps_to_next_look()
        position = self.sampler.step
        batches = [self.sampler.batch(position + number) for number in range(count)]
        factors = [self._factor(self.step + number) for number in range(count)]
        outcomes = self.workers.run(
            position, stack_batches(batches), factors, self._largest_norm(), self.watch.limits
        )
        verdicts = [self.watch.judge(outcome.loss, outcome.norm) for outcome in outcomes]
        rate = count * batches[0][1].size / max(time.perf_counter() - begun, 1e-9)
        for number, (outcome, verdict) in enumerate(zip(outcomes, verdicts, strict=True)):
            self.sampler.step += 1
            if outcome.made:
                yield self._made(outcome.loss, outcome.norm, factors[number], rate)
            elif not outcome.overflowed:
                reason = verdict.reason or "the loss or the gradient norm is at its limit"
                yield Rejection(
                    self.step + 1, position + number, outcome.loss, outcome.norm, reason, *batches[number],
                    replayable=count == 1,
                )  # fmt: skip

    def train_step(self) -> StepMetrics | Rejection:
        """One optimizer step on the next batch, or none where the watch rejects it; within `with self.workers:`."""
        if not isinstance(self.workers, DataParallel):
            raise RuntimeError("a device makes several steps at a time; call train_steps()")
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
        factor = self._factor(self.step)
        self.workers.update(factor, clip_scale(norm, self._largest_norm()))
        return self._made(loss, norm, factor, targets.size / max(time.perf_counter() - begun, 1e-9))

    def _factor(self, step: int) -> float:
        """The schedule's factor of the learning rate in the step after `step`."""
        config = self.config
        return SCHEDULES[config.schedule](step, config.steps, config.warmup_steps, config.final_factor)

    def _largest_norm(self) -> float:
        """To which gradients are clipped in the next step."""
        if not self.config.clip_running:
            return self.config.clip_norm
        return min(self.config.clip_norm, self.config.clip_running * self.watch.usual_norm)

    def _made(self, loss: float, norm: float, factor: float, rate: float) -> StepMetrics:
        """One step more was made."""
        self.step += 1
        self.watch.accept(loss, norm)
        self.recovery.accept(self.step)
        return StepMetrics(self.step, loss, self.config.learning_rate * factor, norm, rate)

    def _steps_to_next_look(self) -> int:
        """How many steps there are to the next log line, evaluation or checkpoint, or the last."""
        config = self.config
        periods = (config.log_every, config.eval_every, config.checkpoint_every)
        return min(config.steps - self.step, *[period - self.step % period for period in periods])

    def evaluate(self) -> Evaluation:
        """The loss over the whole validation split, each token predicted once; within `with self.workers:`."""
        val_loss = self.workers.losses()
        return Evaluation(self.step, val_loss, val_loss / math.log(2) * self.tokens_per_character)

    def save(self, best: bool = False, interrupted: bool = False) -> None:
        """Write a checkpoint of this step, make it `latest` (and `best`), and delete those that are not to be kept.

        interrupted: the step may not be evaluated yet; a checkpoint of it that is there already will do. Raises
        InputError when it cannot be written, saying what there is instead.
        """
        if self.run is None or (interrupted and self.step == self.saved_step):
            return
        checkpoint.require_loadable(self.model, self.tokenizer)
        folder = checkpoint.folder_of(self.run, self.step, interrupted)
        there = (
            f"--resume goes on from step {self.saved_step}"
            if self.saved_step >= 0
            else "nothing is saved yet"
        )
        if not all(backend.read(current.xp.isfinite(p.data).all()) for p in self.parameters.values()):
            raise InputError(
                f"the parameters after step {self.step} are not finite, so they are not saved; {there}"
            )
        try:
            if folder != self.saved or not folder.exists():
                self._tell("on_save", self.step)
                self._write(folder)
                self.saved = folder
            if best:
                checkpoint.point(self.run, "best", folder)
            checkpoint.point(self.run, "latest", folder)
            checkpoint.prune(self.run, self.scheduled())
        except InputError as error:
            raise InputError(f"{error}; free space or mend the folder; {there}") from None

    def _write(self, folder: Path) -> None:
        """Write a checkpoint; on a full disk older ones make room, but for the newest and the best."""
        state = resuming.training_state(self)
        try:
            checkpoint.save(folder, self.model, self.tokenizer, state)
        except NoSpaceError:
            if self.run is None or self.saved is None or not self.saved.exists():
                raise
            checkpoint.prune(self.run, [self.saved])
            checkpoint.save(folder, self.model, self.tokenizer, state)
            self._tell(
                "on_message", "the disk is full: older checkpoints were removed to make room for a new one"
            )

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint, -1 if there is none or it is gone."""
        return checkpoint.step_of(self.saved) if self.saved is not None and self.saved.exists() else -1

    def scheduled(self) -> list[Path]:
        """The checkpoints that do not depend on interrupts and on the best loss, oldest first."""
        assert self.run is not None
        return checkpoint.scheduled(self.run, self.config.checkpoint_every)[-self.config.keep_checkpoints :]

    def resume(self, found: checkpoint.Checkpoint | None = None) -> None:
        """Go on from `found`, by default the newest checkpoint of the run folder that verifies.

        Raises InputError when there is none, it is damaged, or it belongs to another configuration or text.
        """
        assert self.run is not None
        if found is None:
            found = checkpoint.find_valid(self.run, training=True)
        checkpoint.say_passed_over(found)
        threads = resuming.restore(self, found, self.callbacks)
        self.saved = found.folder
        if self.threads != (self.config.threads or threads):
            self.use_threads(threads)
        if self.threads != threads:
            line = f"the run had {threads} threads and goes on with {self.threads}: the same steps, rounded otherwise"
            self._tell("on_message", line)
        checkpoint.remove_after(self.run, found.folder)
        checkpoint.mend_best(self.run, checkpoint.folder_of(self.run, self.best_step))

    def _after_step(self) -> None:
        """Evaluate and save, where it is time for it."""
        last = self.step >= self.config.steps
        due = last or self.step % self.config.eval_every == 0
        evaluation = None
        if due:
            self._tell("on_evaluation_start", self.step)
            evaluation = self.evaluate()
        with self.interrupts.put_off():
            before = self.best_loss, self.best_step
            improved = False
            if evaluation is not None:
                self._tell("on_evaluation", evaluation)
                if not math.isfinite(evaluation.val_loss):
                    line = "the last step has spoiled the parameters; lower --learning-rate or raise --warmup-steps"
                    self._tell("on_message", f"the validation loss is {evaluation.val_loss}: {line}")
                self.evaluated_step = self.step
                improved = evaluation.val_loss < self.best_loss
                if improved:
                    self.best_loss, self.best_step = evaluation.val_loss, self.step
            if last:
                self.save(best=improved)
            elif (improved or self.step % self.config.checkpoint_every == 0) and not self._try_to_save(
                improved
            ):
                self.best_loss, self.best_step = before

    def _try_to_save(self, best: bool) -> bool:
        """Save on the way, which is not the end when it fails."""
        try:
            self.save(best)
        except InputError as error:
            self._tell(
                "on_message", f"not saved: {error}. Training goes on, and tries again at the next checkpoint"
            )
            return False
        return True

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*values)

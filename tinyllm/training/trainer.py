"""The Trainer, which makes steps, evaluates, saves, and alone acts on what engines and safeguards say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllm import backend
from tinyllm.backend import Array, current
from tinyllm.data import BatchSampler, RandomOffsets, RandomWindows, SequentialWindows
from tinyllm.models import TransformerLM
from tinyllm.optim import OPTIMIZERS, AdamW, OptimizerGroup, cosine_schedule, linear_schedule
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError, NoSpaceError
from tinyllm.system.interrupts import HurriedInterrupt, Interrupts
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.checkpoints.checkpoint import Checkpoint, TrainingState
from tinyllm.training.checkpoints.resuming import Numbers, Part, RunState, TextDigests
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import build_engine
from tinyllm.training.events import Evaluation, Rejection, Rollback, StepMetrics
from tinyllm.training.objectives import NextToken, Objective
from tinyllm.training.safeguards import incidents
from tinyllm.training.safeguards.recovery import Recovery, Remedy
from tinyllm.training.safeguards.watch import Watch

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

    The bits of a run depend on the seed and the number of threads, and not on their timing (see engines). Where these
    are processes, they see what the model and the optimizer were when `engine` was entered, which `fit` does; what a
    callback changes later reaches them only in parameters and optimizer state, changed in place.

    Args:
        model, tokenizer: what is trained and saved. train_tokens, validation_tokens: (N,) integers.
        config: how. run: the folder for checkpoints; None keeps none.
        callbacks: told of every step and evaluation. objective: the loss; None: of the next token, as `config` says.

    Attributes:
        step: how many steps were made. evaluated_step: the step of the last evaluation. best_loss, best_step: of the
            evaluation with the lowest loss whose checkpoint could be written.
        saved: the last checkpoint that was written, or resumed from.
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
        objective: Objective | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config, self.run = config, run
        self.callbacks = list(callbacks)
        self.objective = NextToken(config.z_loss) if objective is None else objective
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config)
        T = model.config.context_length
        windows = config.batch_size * config.gradient_accumulation
        self.sampler = SAMPLERS[config.sampling](train_tokens, T, windows, config.seed, "training text")
        self.validation = SequentialWindows(validation_tokens, T, config.eval_batch_size, "validation text")
        self.tokens_per_character = self.validation.num_targets / tokenizer.characters_predicted(
            validation_tokens
        )
        self.watch = Watch(config.watch_window, config.watch_loss, config.watch_norm)
        self.recovery = Recovery(config.patience, config.max_rollbacks, config.watch_window)
        self.interrupts = Interrupts()
        self.step, self.evaluated_step = 0, -1
        self.best_loss, self.best_step = math.inf, -1
        self.saved: Path | None = None
        text = TextDigests(run, {"training": self.sampler.tokens, "validation": self.validation.tokens})
        parts: dict[str, Part] = {
            "sampler": self.sampler,
            "watch": self.watch,
            "recovery": self.recovery,
            "data": text,
        }
        self.state = RunState(run, model, tokenizer, self.optimizer, config, parts)
        self.use_threads(config.threads or physical_cores())

    def use_threads(self, threads: int) -> None:
        """From the next `fit` on, work in so many threads or processes, on which the rounding of a step depends."""
        self.threads = 1 if backend.reads_wait() else threads
        before = self.state.parts.get("loss_scale")
        self.engine = build_engine(
            self.model, self.optimizer, self.objective, self.threads, self.config.seed, self.validation
        )
        if before is not None:
            self.engine.load_state_dict(before.state_dict())
        self.state.parts["loss_scale"] = self.engine

    # ---- The loop ------------------------------------------------------------------------------

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
                with backend.ignore_non_finite(), self.engine:
                    self._begin()
                    while self.step < self.config.steps:
                        with self.interrupts.put_off():
                            before = self.step
                            for made in self.train_steps():
                                match made:
                                    case StepMetrics():
                                        self._notify("on_step", made)
                                    case Rejection():
                                        if self._recover(made).action == "roll back":
                                            break
                        if self.step > before:
                            self._after_step()
            except HurriedInterrupt:
                raise
            except KeyboardInterrupt:
                self.save(interrupted=True)
                raise
            finally:
                self._notify("on_end")

    def _begin(self) -> None:
        self._notify("on_start", self.step, self.config.steps)
        if self.saved is None:
            with self.interrupts.put_off():
                self.save()  # so that there is always one
        if self.step and self.evaluated_step < self.step:
            self._after_step()  # what an interrupt came before

    def train_steps(self) -> Iterator[StepMetrics | Rejection]:
        """The next steps, as many as the engine makes without a look, up to one whose figures are wanted.

        On a CPU this is one step; on a device those up to the next line of the log, evaluation or checkpoint, which are
        compared with what the watch knew before them. What came of them is yielded one by one; whoever stops taking
        leaves out the rest. To be used within `with self.engine:`.
        """
        begun = time.perf_counter()
        position = self.sampler.step
        count = min(self.engine.most_steps, self._steps_to_next_look())
        batches = [self.sampler.batch(position + number) for number in range(count)]
        factors = [self._factor(self.step + number) for number in range(count)]
        outcomes = self.engine.run(position, batches, factors, self._largest_norm(), self.watch.limits)
        reasons = [
            None if outcome.made else self.watch.judge(outcome.loss, outcome.norm).reason
            for outcome in outcomes
        ]
        losses = sum(map(self.objective.count, batches))
        rate = losses / max(time.perf_counter() - begun, 1e-9)
        for number, (outcome, reason) in enumerate(zip(outcomes, reasons, strict=True)):
            self.sampler.step += 1
            if outcome.made:
                self.step += 1
                self.watch.accept(outcome.loss, outcome.norm)
                self.recovery.accept(self.step)
                learning_rate = self.config.learning_rate * factors[number]
                yield StepMetrics(self.step, outcome.loss, learning_rate, outcome.norm, rate)
            elif not outcome.overflowed:
                yield Rejection(
                    self.step + 1, position + number, outcome.loss, outcome.norm, str(reason), batches[number],
                    replayable=count == 1,
                )  # fmt: skip

    def _steps_to_next_look(self) -> int:
        """How many steps there are to the next log line, evaluation or checkpoint, or the last."""
        config = self.config
        periods = (config.log_every, config.eval_every, config.checkpoint_every)
        return min(config.steps - self.step, *[period - self.step % period for period in periods])

    def _factor(self, step: int) -> float:
        """The schedule's factor of the learning rate in the step after `step`."""
        config = self.config
        return SCHEDULES[config.schedule](step, config.steps, config.warmup_steps, config.final_factor)

    def _largest_norm(self) -> float:
        """To which gradients are clipped in the next step."""
        if not self.config.clip_running:
            return self.config.clip_norm
        return min(self.config.clip_norm, self.config.clip_running * self.watch.usual_norm)

    # ---- After a rejected step -----------------------------------------------------------------

    def _recover(self, rejection: Rejection) -> Remedy:
        """Do what is to be done after a rejected step; raises InputError when nothing is left to try."""
        folders = [] if self.run is None else self.scheduled()
        remedy = self.recovery.reject(self.step, folders)
        if self.run is not None and rejection.replayable:
            rejection = self._with_report(self.run, rejection, remedy)
        self._notify("on_rejected", rejection)
        if remedy.action == "roll back":
            self._roll_back(remedy)
            rollback = Rollback(rejection.step, self.step, remedy.skipped, remedy.number)
            self._notify("on_rollback", rollback)
        elif remedy.action == "stop":
            report = f"; what led there is in {rejection.incident}" if rejection.incident else ""
            raise InputError(
                f"training diverged in step {rejection.step}: {rejection.reason}; {remedy.tried}; lower "
                f"--learning-rate (now {self.config.learning_rate}) or raise --warmup-steps "
                f"(now {self.config.warmup_steps}), in a new run: --out DIR or --overwrite{report}"
            )
        return remedy

    def _with_report(self, run: Path, rejection: Rejection, remedy: Remedy) -> Rejection:
        """The rejection with the folder that tells more, or in its reason why there is none."""
        step = incidents.Step(
            self.model, self.objective, rejection.batch, rejection.position, self.config.seed, self.threads
        )
        try:
            folder = incidents.record(
                run, rejection, remedy.in_words, step, self.engine.total, self.tokenizer, self._collect()
            )
        except Exception as error:  # whatever it is: a report is never worth a run
            line = str(error).partition("\n")[0]
            return replace(rejection, reason=f"{rejection.reason} (there is no report: {line})")
        return replace(rejection, incident=folder)

    def _roll_back(self, remedy: Remedy) -> None:
        """Go back to the first of the candidates that can be used, and on with batches that were not seen yet."""
        assert self.run is not None
        counts, position, best_loss = self.recovery.state_dict(), self.sampler.step, self.best_loss
        for folder in remedy.candidates:
            try:
                self._apply(self.state.restore(checkpoint.read(folder)))
            except InputError:
                if folder == remedy.candidates[-1]:
                    raise
                continue
            break
        self.sampler.step = position + remedy.skipped
        # The best checkpoint stays, under another name than its step's.
        self.best_loss, self.best_step = best_loss, -1
        self.saved = folder
        self.recovery.load_state_dict(counts)
        keeping.go_back(self.run, folder)

    # ---- Evaluating and saving -----------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """The loss over the whole validation split, each token predicted once; within `with self.engine:`."""
        val_loss = self.engine.evaluate()
        return Evaluation(self.step, val_loss, val_loss / math.log(2) * self.tokens_per_character)

    def _after_step(self) -> None:
        """Evaluate and save, where it is time for it."""
        last = self.step >= self.config.steps
        due = last or self.step % self.config.eval_every == 0
        evaluation = None
        if due:
            self._notify("on_evaluation_start", self.step)
            evaluation = self.evaluate()
        with self.interrupts.put_off():
            before = self.best_loss, self.best_step
            improved = False
            if evaluation is not None:
                self._notify("on_evaluation", evaluation)
                if not math.isfinite(evaluation.val_loss):
                    line = "the last step has spoiled the parameters; lower --learning-rate or raise --warmup-steps"
                    self._notify("on_message", f"the validation loss is {evaluation.val_loss}: {line}")
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
            self._notify(
                "on_message", f"not saved: {error}. Training goes on, and tries again at the next checkpoint"
            )
            return False
        return True

    def save(self, best: bool = False, interrupted: bool = False) -> None:
        """Write a checkpoint of this step, make it `latest` (and `best`), and delete those that are not to be kept.

        interrupted: the step may not be evaluated yet; a checkpoint of it that is there already will do. Raises
        InputError when it cannot be written, saying what there is instead.
        """
        if self.run is None or (interrupted and self.step == self.saved_step):
            return
        folder = keeping.folder_of(self.run, self.step, interrupted)
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
                self._notify("on_save", self.step)
                self._write_or_make_room(folder)
                self.saved = folder
            if best:
                keeping.link_to(self.run, "best", folder)
            keeping.link_to(self.run, "latest", folder)
            keeping.prune(self.run, self.scheduled())
        except InputError as error:
            raise InputError(f"{error}; free space or mend the folder; {there}") from None

    def _write_or_make_room(self, folder: Path) -> None:
        """Write a checkpoint; on a full disk older ones make room, but for the newest and the best."""
        state = self._collect()
        try:
            checkpoint.save(folder, self.model, self.tokenizer, state)
        except NoSpaceError:
            if self.run is None or self.saved is None or not self.saved.exists():
                raise
            keeping.prune(self.run, [self.saved])
            checkpoint.save(folder, self.model, self.tokenizer, state)
            self._notify(
                "on_message", "the disk is full: older checkpoints were removed to make room for a new one"
            )

    def _collect(self) -> TrainingState:
        """What a checkpoint of this moment holds beside the model."""
        numbers = Numbers(self.step, self.evaluated_step, self.best_loss, self.best_step, self.threads)
        return self.state.collect(numbers, self.callbacks)

    def _apply(self, numbers: Numbers) -> None:
        """Go on counting from the numbers of a checkpoint."""
        self.step, self.evaluated_step = numbers.step, numbers.evaluated_step
        self.best_loss, self.best_step = numbers.best_loss, numbers.best_step

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint, -1 if there is none or it is gone."""
        return keeping.step_of(self.saved) if self.saved is not None and self.saved.exists() else -1

    def scheduled(self) -> list[Path]:
        """The checkpoints that do not depend on interrupts and on the best loss, oldest first."""
        assert self.run is not None
        return keeping.scheduled(self.run, self.config.checkpoint_every)[-self.config.keep_checkpoints :]

    def resume(self, found: Checkpoint | None = None) -> None:
        """Go on from `found`, by default the newest checkpoint of the run folder that verifies.

        Raises InputError when there is none, it is damaged, or it belongs to another configuration or text.
        """
        assert self.run is not None
        if found is None:
            found = keeping.find_valid(self.run, training=True)
        keeping.report_passed_over(found)
        numbers = self.state.restore(found, self.callbacks)
        self._apply(numbers)
        threads = numbers.threads
        self.saved = found.folder
        if self.threads != (self.config.threads or threads):
            self.use_threads(threads)
        if self.threads != threads:
            line = f"the run had {threads} threads and goes on with {self.threads}: the same steps, rounded otherwise"
            self._notify("on_message", line)
        keeping.remove_after(self.run, found.folder)
        keeping.mend_best(self.run, keeping.folder_of(self.run, self.best_step))

    def _notify(self, event: str, *values: Any) -> None:
        """Call the method of this name of each callback."""
        for callback in self.callbacks:
            getattr(callback, event)(*values)

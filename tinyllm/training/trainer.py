"""The Trainer, which makes steps, evaluates, saves, and alone acts on what engines and safeguards say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllm import backend
from tinyllm.backend import Array
from tinyllm.data import SequentialWindows, Tokens
from tinyllm.models import TransformerLM
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.interrupts import HurriedInterrupt, Interrupts
from tinyllm.system.storage import StrPath
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.checkpoints.checkpoint import Checkpoint, TrainingState
from tinyllm.training.checkpoints.resuming import Numbers, Part, RunState, TextDigests
from tinyllm.training.checkpoints.run_checkpoints import RunCheckpoints
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import build_engine
from tinyllm.training.evaluation import predicted
from tinyllm.training.events import Changes, Evaluation, Rejection, Rollback, StepMetrics
from tinyllm.training.objectives import NextToken, Objective
from tinyllm.training.optimization import build_optimizer, clip_limit, lower_rates, rate_factor
from tinyllm.training.safeguards import incidents
from tinyllm.training.safeguards.recovery import Recovery, Remedy
from tinyllm.training.safeguards.watch import Watch
from tinyllm.training.samplers import build_sampler, document_starts

_OFTEN = 2
"""Evaluations in a row without gain that are more than noise, and are said."""


class Trainer:
    """Trains a language model on tokens: arrays, or what is sliced like them (see data.Tokens).

    The bits of a run depend on the seed and the number of threads, and not on their timing (see engines). Where these
    are processes, they see what the model and the optimizer were when `engine` was entered, which `fit` does; what a
    callback changes later reaches them only in parameters and optimizer state, changed in place.

    Args:
        model, tokenizer: what is trained and saved. train_tokens, validation_tokens: (N,) integers. A list of several
            to train on is mixed, by `config.weights`.
        config: how. run: the folder for checkpoints; None keeps none.
        callbacks: told of every step and evaluation. objective: the loss; None: of the next token, as `config` says.

    Attributes:
        step: how many steps were made. evaluated_step, evaluated_loss: of the last evaluation. best_loss, best_step: of
            the evaluation with the lowest loss whose checkpoint could be written. without_gain: evaluations since then.
        predicted: what the validation loss is about. changes: what is other than before in a run that was resumed.

    Raises InputError for what cannot be trained on, and for a model that could not be loaded from its checkpoints.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        train_tokens: Tokens | Sequence[Tokens],
        validation_tokens: Array,
        config: TrainConfig,
        run: StrPath | None = None,
        callbacks: Sequence[Callback] = (),
        objective: Objective | None = None,
    ) -> None:
        run = None if run is None else Path(run)
        if run is not None:
            checkpoint.require_loadable(model, tokenizer)  # before work is done that could not be kept
        self.model, self.tokenizer = model, tokenizer
        self.config, self.run = config, run
        model.recompute = config.recompute
        self.callbacks = list(callbacks)
        self.objective = NextToken(config.z_loss) if objective is None else objective
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config)
        T = model.config.context_length
        self.sampler = build_sampler(train_tokens, T, config)
        name = "validation text"
        starts = document_starts(validation_tokens, config, name)
        self.validation = SequentialWindows(
            validation_tokens, T, config.eval_batch_size, name, starts, config.eval_tokens
        )
        self.predicted = predicted(tokenizer, validation_tokens, self.validation.num_targets)
        self.watch = Watch(config.watch_window, config.watch_loss, config.watch_norm)
        self.recovery = Recovery(config.patience, config.max_rollbacks, config.watch_window)
        self.interrupts = Interrupts(saves=run is not None)
        self.seconds = 0.0
        """What the last steps took that were made without a look."""
        self.step, self.evaluated_step = 0, -1
        self.evaluated_loss, self.without_gain = math.nan, 0
        self.best_loss, self.best_step = math.inf, -1
        self.changes: Changes | None = None
        self.checkpoints = RunCheckpoints(
            run,
            model,
            tokenizer,
            config.checkpoint_every,
            config.keep_checkpoints,
            self._notify,
            60 * config.checkpoint_minutes,
        )
        text = TextDigests(run, {"training": self.sampler, "validation": self.validation})
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
        self.threads = 1 if backend.is_asynchronous() else threads
        before = self.state.parts.get("loss_scale")
        self.engine = build_engine(
            self.model,
            self.optimizer,
            self.objective,
            self.threads,
            self.config.seed,
            self.validation,
            self.interrupts,
        )
        if before is not None:
            self.engine.load_state_dict(before.state_dict())
        self.state.parts["loss_scale"] = self.engine

    # ---- The loop ------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the current step to `config.steps`, evaluating and saving on the way.

        Ctrl-C and SIGTERM drop the step under way, unless the optimizer is changing parameters already, and save a
        checkpoint before they go on as KeyboardInterrupt (SIGTERM as its subclass Terminated). A second one does not
        wait, and saves nothing.

        A checkpoint on the way that cannot be written is told to the callbacks, and tried again at the next one.
        Steps that the watch rejects are not made; see `recovery`. Raises InputError when no way is found past them, and
        when the first checkpoint, the last, or that of an interrupt cannot be written.
        """
        with self.interrupts:
            try:
                # Whether a step is finite is checked once, on its loss and its gradient norm.
                with backend.ignore_non_finite(), self.engine:
                    self._begin()
                    while self.step < self.config.steps and not self.stops_early:
                        with self.interrupts.put_off("this step", self.seconds):
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

    @property
    def stops_early(self) -> bool:
        """Whether so many evaluations came without gain that training stops."""
        return 0 < self.config.stop_after <= self.without_gain

    def _begin(self) -> None:
        self._notify("on_start", self.step, self.config.steps)
        if self.changes is not None:
            self._notify("on_changes", self.changes)
            self.changes = None
        if self.checkpoints.saved is None:
            with self.interrupts.put_off("the first checkpoint"):
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
        with self.interrupts.droppable():
            batches = [self.sampler.batch(position + number) for number in range(count)]
        factors = [rate_factor(self.config, self.step + number) for number in range(count)]
        largest_norm = clip_limit(self.config, self.watch.usual_norm)
        outcomes = self.engine.run(position, batches, factors, largest_norm, self.watch.limits)
        reasons = [
            None if outcome.made else self.watch.judge(outcome.loss, outcome.norm).reason
            for outcome in outcomes
        ]
        losses = sum(map(self.objective.count, batches))
        self.seconds = time.perf_counter() - begun
        rate = losses / max(self.seconds, 1e-9)
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
        """How many steps there are to the next log line, sample, evaluation or checkpoint, or the last."""
        config = self.config
        periods = filter(
            None, (config.log_every, config.sample_every, config.eval_every, config.checkpoint_every)
        )
        return min(config.steps - self.step, *[period - self.step % period for period in periods])

    # ---- After a rejected step -----------------------------------------------------------------

    def _recover(self, rejection: Rejection) -> Remedy:
        """Do what is to be done after a rejected step; raises InputError when nothing is left to try."""
        remedy = self.recovery.reject(self.step, self.checkpoints.scheduled())
        if self.run is not None and rejection.replayable:
            step = incidents.Step(
                self.model,
                self.objective,
                rejection.batch,
                rejection.position,
                self.config.seed,
                self.threads,
            )
            rejection = incidents.with_report(
                self.run, rejection, remedy.in_words, step, self.engine.total, self.tokenizer, self._collect()
            )
        self._notify("on_rejected", rejection)
        if remedy.action == "roll back":
            self._roll_back(remedy)
            rollback = Rollback(rejection.step, self.step, remedy.skipped, remedy.number)
            self._notify("on_rollback", rollback)
        elif remedy.action == "stop":
            report = f"; what led there is in {rejection.incident}" if rejection.incident else ""
            raise InputError(
                f"training diverged in step {rejection.step}: {rejection.reason}; {remedy.tried}; "
                f"{lower_rates(self.config)}, in a new run or with --resume{report}"
            )
        return remedy

    def _roll_back(self, remedy: Remedy) -> None:
        """Go back to the first of the candidates that can be used, and on with batches that were not seen yet."""
        counts, position, best_loss = self.recovery.state_dict(), self.sampler.state_dict(), self.best_loss
        for folder in remedy.candidates:
            try:
                self._apply(self.state.restore(checkpoint.read(folder)))
            except InputError:
                if folder == remedy.candidates[-1]:
                    raise
                continue
            break
        self.sampler.load_state_dict(position)
        self.sampler.step += remedy.skipped
        # The best checkpoint stays, under another name than its step's.
        self.best_loss, self.best_step = best_loss, -1
        self.recovery.load_state_dict(counts)
        self.checkpoints.go_back(folder)

    # ---- Evaluating and saving -----------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """The loss over the whole validation split, each token predicted once; within `with self.engine:`."""
        val_loss = self.engine.evaluate()
        _, *units = vars(self.predicted.score(val_loss)).values()
        return Evaluation(self.step, *units)

    def _after_step(self) -> None:
        """Evaluate and save, where it is time for it."""
        self._notify("on_step_end", self.step)
        last = self.step >= self.config.steps
        due = last or self.step % self.config.eval_every == 0
        evaluation = None
        if due:
            self._notify("on_evaluation_start", self.step)
            evaluation = self.evaluate()
        with self.interrupts.put_off("what follows the step"):
            before = self.best_loss, self.best_step, self.without_gain
            improved = False
            if evaluation is not None:
                self._notify("on_evaluation", evaluation)
                if not math.isfinite(evaluation.val_loss):
                    line = f"the last step has spoiled the parameters; {lower_rates(self.config)}"
                    self._notify("on_message", f"the validation loss is {evaluation.val_loss}: {line}")
                self.evaluated_step, self.evaluated_loss = self.step, evaluation.val_loss
                improved = evaluation.val_loss < self.best_loss
                self.without_gain = 0 if improved else self.without_gain + 1
                if improved:
                    self.best_loss, self.best_step = evaluation.val_loss, self.step
                elif self.without_gain == _OFTEN and math.isfinite(self.best_loss):
                    since = (
                        f"since step {self.best_step}" if self.best_step >= 0 else "since before it went back"
                    )
                    line = (
                        f"validation has been above {self.best_loss:.4f} {since}: learning the text by heart?"
                    )
                    self._notify("on_message", line)
            if last or self.stops_early:
                self.save(best=improved)
            elif (improved or self.checkpoints.is_due(self.step)) and not self._try_to_save(improved):
                self.best_loss, self.best_step, self.without_gain = before

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
        """Write a checkpoint of this step, as the best one too where it is; see `RunCheckpoints.save`."""
        self.checkpoints.save(self.step, self._collect, best, interrupted)

    def _collect(self) -> TrainingState:
        """What a checkpoint of this moment holds beside the model."""
        numbers = Numbers(
            self.step, self.evaluated_step, self.best_loss, self.best_step, self.threads, self.evaluated_loss,
            self.without_gain,
        )  # fmt: skip
        return self.state.collect(numbers, self.callbacks)

    def _apply(self, numbers: Numbers) -> None:
        """Go on counting from the numbers of a checkpoint."""
        self.step, self.evaluated_step = numbers.step, numbers.evaluated_step
        self.evaluated_loss, self.without_gain = numbers.evaluated_loss, numbers.without_gain
        self.best_loss, self.best_step = numbers.best_loss, numbers.best_step

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
        self.changes = self.state.changes(found)
        threads = numbers.threads
        if self.threads != (self.config.threads or threads):
            self.use_threads(threads)
        if self.threads != threads:
            line = f"the run had {threads} threads and goes on with {self.threads}: the same steps, rounded otherwise"
            self._notify("on_message", line)
        self.checkpoints.go_on_from(found.folder, self.best_step)

    def _notify(self, event: str, *values: Any) -> None:
        """Call the method of this name of each callback."""
        for callback in self.callbacks:
            getattr(callback, event)(*values)

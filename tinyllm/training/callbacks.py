"""Callbacks, which are told what a Trainer does, and the one that shows its progress on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, TextIO

from tinyllm.system.progress import duration, is_terminal, print_status
from tinyllm.training.evaluation import loss_in_words
from tinyllm.training.events import Changes, Evaluation, Rejection, Rollback, StepMetrics


class Callback:
    """Told what happens in training; a subclass defines the methods that it cares about."""

    def on_start(self, step: int, total_steps: int) -> None:
        """Training begins after `step` of `total_steps` steps."""

    def on_changes(self, changes: Changes) -> None:
        """Training goes on with other settings; comes after `on_start`."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step was made."""

    def on_rejected(self, rejection: Rejection) -> None:
        """A step was not made, because the watch rejected its batch."""

    def on_rollback(self, rollback: Rollback) -> None:
        """Training went back to an earlier checkpoint."""

    def on_step_end(self, step: int) -> None:
        """The model is as it is after `step`, whose evaluation and checkpoint follow; may take a while.

        It comes again, for the same step, where an interrupt came before these.
        """

    def on_evaluation_start(self, step: int) -> None:
        """The validation split is about to be evaluated, which may take a while."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The validation split was evaluated."""

    def on_save(self, step: int) -> None:
        """A checkpoint is about to be written; an InputError prevents it."""

    def on_message(self, line: str) -> None:
        """Something happened that whoever watches the run should know."""

    def on_end(self) -> None:
        """Training has ended, finished or not."""

    def state_dict(self) -> dict[str, Any]:
        """What this callback needs to go on from a checkpoint, for JSON; kept there under the name of its class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; {} where there is none. Raises ValueError when it is damaged."""


class Progress(Callback):
    """A progress bar on a terminal, plain lines elsewhere: loss, tokens a second, time left.

    There, the first step has a line, then every `line_every`-th, and each that comes `seconds` after the last line.
    """

    def __init__(self, line_every: int = 100, stream: TextIO | None = None, seconds: float = 30.0) -> None:
        self.line_every, self.seconds = line_every, seconds
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        self.total_steps = 0
        self.begun = (0, 0.0)
        self._last_line: float | None = None
        self.status = "starting"
        self.rejected_step = -1

    def on_start(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.begun = (step, time.monotonic())
        self._last_line = None
        if is_terminal(self.stream):
            from tqdm import tqdm  # slow to import

            self.bar = tqdm(
                total=total_steps,
                initial=step,
                file=self.stream,
                dynamic_ncols=True,
                smoothing=0.1,
                # A short bar, so that the ^C of a terminal does not run into the next line.
                bar_format="step {n_fmt}/{total_fmt} |{bar:20}| {desc}, {remaining} left",
                desc=self.status,
            )

    def on_changes(self, changes: Changes) -> None:
        settings = [
            f"{name} was {before!r} and is {now!r}" for name, (before, now) in changes.settings.items()
        ]
        self.on_message(f"other settings after step {changes.step}: {', '.join(settings)}")
        if changes.rates is not None:
            before, now = changes.rates
            self.on_message(
                f"the learning rate {'rises' if now > before else 'falls'} from {before:.3g} to {now:.3g} in the next "
                "step, as the new settings say for it; --learning-rate, --schedule and --final-factor change that"
            )

    def on_step(self, metrics: StepMetrics) -> None:
        if self.bar is not None:
            self.status = f"loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s"
            self.bar.set_description_str(self.status, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        late = self._last_line is None or now - self._last_line >= self.seconds
        if late or metrics.step % self.line_every == 0 or metrics.step == self.total_steps:
            self._last_line = now
            left = self._seconds_a_step(metrics.step) * (self.total_steps - metrics.step)
            print_status(
                f"step {metrics.step}/{self.total_steps}  loss {metrics.loss:.4f}  "
                f"{metrics.tokens_per_second:,.0f} tokens/s  {duration(left)} left",
                self.stream,
            )

    def _seconds_a_step(self, step: int) -> float:
        return (time.monotonic() - self.begun[1]) / max(step - self.begun[0], 1)

    def on_evaluation_start(self, step: int) -> None:
        if self.bar is not None:
            self.bar.set_description_str("evaluating")
        elif self._seconds_a_step(step) >= 1:
            print_status(f"step {step}  evaluating", self.stream)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        if self.bar is not None:
            self.bar.set_description_str(self.status, refresh=False)
        _, *units = vars(evaluation).values()
        self.on_message(f"step {evaluation.step}  validation loss {loss_in_words(*units)}")

    def on_rejected(self, rejection: Rejection) -> None:
        if rejection.step == self.rejected_step:
            return  # the first of a row is enough
        self.rejected_step = rejection.step
        report = f"; what led there is in {rejection.incident}" if rejection.incident else ""
        self.on_message(
            f"step {rejection.step} is not made: {rejection.reason}; its batch is skipped{report}"
        )

    def on_rollback(self, rollback: Rollback) -> None:
        if self.bar is not None:
            self.bar.n = rollback.to_step
            self.bar.refresh()
        self.rejected_step = -1
        # The time that is left is told from the steps made since here.
        self.begun = (rollback.to_step, time.monotonic())
        self.on_message(
            f"too many steps in a row were rejected: back to step {rollback.to_step}, and on without the next "
            f"{rollback.skipped} batches"
        )

    def on_message(self, line: str) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):  # a terminal that has gone; the bar itself falls silent then
                self.bar.write(line, file=self.stream)
        else:
            print_status(line, self.stream)

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

"""What a Trainer tells while it runs: progress on the terminal, metrics.jsonl, the loss curve."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyllm.config import write_text
from tinyllm.errors import InputError

if TYPE_CHECKING:
    from tinyllm.recovery import Rollback
    from tinyllm.stability import Rejection
    from tinyllm.train import Evaluation, StepMetrics

METRICS = "metrics.jsonl"


class Callback:
    """Told what happens in training; a subclass defines the methods that it cares about."""

    def on_start(self, step: int, total_steps: int) -> None:
        """Training begins after `step` of `total_steps` steps."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step was made."""

    def on_rejected(self, rejection: Rejection) -> None:
        """A step was not made, because the watch rejected its batch."""

    def on_rollback(self, rollback: Rollback) -> None:
        """Training went back to an earlier checkpoint."""

    def on_evaluation_start(self, step: int) -> None:
        """The validation split is about to be evaluated, which may take a while."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The validation split was evaluated."""

    def on_end(self) -> None:
        """Training has ended, finished or not."""


class Progress(Callback):
    """A progress bar on a terminal, plain lines elsewhere: loss, tokens a second, time left."""

    def __init__(self, line_every: int = 100, stream: TextIO | None = None) -> None:
        self.line_every = line_every
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        self.total_steps = 0
        self.begun = (0, 0.0)
        self.status = "starting"
        self.rejected_step = -1

    def on_start(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.begun = (step, time.monotonic())
        if self.stream.isatty():
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

    def on_step(self, metrics: StepMetrics) -> None:
        if self.bar is not None:
            self.status = f"loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s"
            self.bar.set_description_str(self.status, refresh=False)
            self.bar.update()
        elif metrics.step % self.line_every == 0 or metrics.step == self.total_steps:
            done = metrics.step - self.begun[0]
            left = (time.monotonic() - self.begun[1]) / max(done, 1) * (self.total_steps - metrics.step)
            print(
                f"step {metrics.step}/{self.total_steps}  loss {metrics.loss:.4f}  "
                f"{metrics.tokens_per_second:,.0f} tokens/s  {duration(left)} left",
                file=self.stream,
                flush=True,
            )

    def on_evaluation_start(self, step: int) -> None:
        if self.bar is not None:
            self.bar.set_description_str("evaluating")

    def on_evaluation(self, evaluation: Evaluation) -> None:
        if self.bar is not None:
            self.bar.set_description_str(self.status, refresh=False)
        self._say(
            f"step {evaluation.step}  validation loss {evaluation.val_loss:.4f} nats, "
            f"{evaluation.val_bits_per_character:.4f} bits per character"
        )

    def on_rejected(self, rejection: Rejection) -> None:
        if rejection.step == self.rejected_step:
            return  # the first of a row is enough
        self.rejected_step = rejection.step
        report = f"; what led there is in {rejection.incident}" if rejection.incident else ""
        self._say(f"step {rejection.step} is not made: {rejection.reason}; its batch is skipped{report}")

    def on_rollback(self, rollback: Rollback) -> None:
        if self.bar is not None:
            self.bar.n = rollback.to_step
            self.bar.refresh()
        self.rejected_step = -1
        # The time that is left is told from the steps made since here.
        self.begun = (rollback.to_step, time.monotonic())
        self._say(
            f"too many steps in a row were rejected: back to step {rollback.to_step}, and on without the next "
            f"{rollback.skipped} batches; if this does not help, lower --learning-rate or raise --warmup-steps"
        )

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


class MetricsFile(Callback):
    """Appends one JSON object a line to metrics.jsonl, and keeps a resumed run's file free of doubles."""

    def __init__(self, folder: Path, log_every: int = 1) -> None:
        self.path = folder / METRICS
        self.log_every = log_every
        self.file: TextIO | None = None
        self.evaluated: set[int] = set()

    def on_start(self, step: int, total_steps: int) -> None:
        # Lines after the checkpoint that training resumes from will be written again.
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        self.evaluated = {line["step"] for line in kept if "val_loss" in line}
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        try:
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step % self.log_every == 0:
            self._write(vars(metrics))

    def on_rejected(self, rejection: Rejection) -> None:
        # JSON has no NaN; the reason names it.
        numbers = {"loss": rejection.loss, "grad_norm": rejection.grad_norm}
        self._write(
            {
                "step": rejection.step,
                "event": "rejected",
                "position": rejection.position,
                **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
                "reason": rejection.reason,
            }
        )

    def on_rollback(self, rollback: Rollback) -> None:
        self._write({"step": rollback.step, "event": "rollback", **vars(rollback)})

    def on_evaluation(self, evaluation: Evaluation) -> None:
        # A run that was stopped after an evaluation and before the next checkpoint makes it again.
        if evaluation.step not in self.evaluated:
            self._write(vars(evaluation))

    def on_end(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, values: dict[str, Any]) -> None:
        assert self.file is not None
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to the first that is damaged; none where there is no file."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            break
        lines.append(line)
    return lines


def last_branch(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of steps and evaluations without those that training went back before, and without events."""
    branch: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == "rollback":
            branch = [earlier for earlier in branch if earlier["step"] <= line["to_step"]]
        elif "event" not in line:
            branch.append(line)
    return branch


class LossCurve(Callback):
    """Draws training and validation loss from metrics.jsonl into loss.png, where matplotlib is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_end(self) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = last_branch(read_metrics(self.folder / METRICS))
        steps = [line for line in lines if "loss" in line]
        evaluations = [line for line in lines if "val_loss" in line]
        if not steps:
            return
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        x = [line["step"] for line in steps]
        axes.plot(
            x,
            [line["loss"] for line in steps],
            color="C0",
            alpha=0.25,
            linewidth=0.8,
            label="training, each batch",
        )
        axes.plot(
            x, running_mean([line["loss"] for line in steps]), color="C0", label="training, running mean"
        )
        if evaluations:
            values = [line["val_loss"] for line in evaluations]
            axes.plot(
                [line["step"] for line in evaluations],
                values,
                "o-",
                color="C1",
                label="validation, whole split",
            )
            axes.annotate(
                f"{values[-1]:.3f}", (evaluations[-1]["step"], values[-1]), textcoords="offset points",
                xytext=(0, 8), ha="right",
            )  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=120)


def running_mean(values: list[float], span: int = 50) -> list[float]:
    """The exponential running mean over about `span` values, without a bias at the start."""
    keep = 1 - 1 / span
    total = weight = 0.0
    means = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        means.append(total / weight)
    return means


def duration(seconds: float) -> str:
    """A time span as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

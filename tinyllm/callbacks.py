"""What a Trainer tells while it runs: progress on the terminal, metrics.jsonl, the loss curve."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyllm.config import write_text
from tinyllm.errors import InputError

if TYPE_CHECKING:
    from tinyllm.train import Evaluation, StepMetrics

METRICS = "metrics.jsonl"


class Callback:
    """Told what happens in training; a subclass defines the methods that it cares about."""

    def on_start(self, step: int, total_steps: int) -> None:
        """Training begins after `step` of `total_steps` steps."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step was made."""

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
        line = (
            f"step {evaluation.step}  validation loss {evaluation.val_loss:.4f} nats, "
            f"{evaluation.val_bits_per_character:.4f} bits per character"
        )
        if self.bar is not None:
            self.bar.set_description_str(self.status, refresh=False)
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


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
        lines = read_metrics(self.folder / METRICS)
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

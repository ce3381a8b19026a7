"""What a Trainer tells while it runs: progress on the terminal, metrics.jsonl, the loss curve."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.progress import print_status
from tinyllm.system.wording import shown

if TYPE_CHECKING:
    from tinyllm.training.safeguards.recovery import Rollback
    from tinyllm.training.safeguards.watch import Rejection

METRICS = "metrics.jsonl"


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
            print_status(
                f"step {metrics.step}/{self.total_steps}  loss {metrics.loss:.4f}  "
                f"{metrics.tokens_per_second:,.0f} tokens/s  {duration(left)} left",
                self.stream,
            )

    def on_evaluation_start(self, step: int) -> None:
        if self.bar is not None:
            self.bar.set_description_str("evaluating")

    def on_evaluation(self, evaluation: Evaluation) -> None:
        if self.bar is not None:
            self.bar.set_description_str(self.status, refresh=False)
        self.on_message(
            f"step {evaluation.step}  validation loss {evaluation.val_loss:.4f} nats, "
            f"{evaluation.val_bits_per_character:.4f} bits per character"
        )

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
            f"{rollback.skipped} batches; if this does not help, lower --learning-rate or raise --warmup-steps"
        )

    def on_message(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print_status(line, self.stream)

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class MetricsFile(Callback):
    """Appends one JSON object a line to metrics.jsonl.

    Training that goes on from a checkpoint cuts the file to the lines that it had then. Lines that cannot be written,
    on a full disk for one, are kept and written later. A file that was deleted meanwhile is made again, and one that
    somebody else has put in its place, such as another run, is left alone. JSON has no NaN: it is null there.
    """

    def __init__(self, folder: Path, log_every: int = 1) -> None:
        self.path = folder / METRICS
        self.log_every = log_every
        self._file: io.FileIO | None = None
        self._size = 0
        """Of the whole lines in the file; what follows is a part of one."""
        self._lines = 0
        self._waiting: list[str] = []
        self._told = False
        """Whether the trouble that there is has been told."""

    def state_dict(self) -> dict[str, Any]:
        """The lines in the file, which are flushed to disk first, and those that could not be written."""
        self._write_waiting()
        if self._file is not None:
            with contextlib.suppress(OSError):
                storage.flush_file(self._file)
        return {"lines": self._lines, "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        lines, waiting = state.get("lines", 0), state.get("waiting", [])
        if type(lines) is not int or lines < 0 or not all(isinstance(line, str) for line in waiting):
            raise ValueError(f"the lines of {METRICS} are {shown(state)}")
        self._lines, self._waiting = lines, list(waiting)

    def on_start(self, step: int, total_steps: int) -> None:
        try:
            whole = storage.read_file(self.path).split(b"\n")[:-1] if self.path.exists() else []
            kept = [line + b"\n" for line in whole[: self._lines]]
            storage.replace(self.path, b"".join(kept))
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        self._lines, self._size = len(kept), sum(map(len, kept))
        self._write_waiting()

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step % self.log_every == 0:
            self._write(vars(metrics))

    def on_rejected(self, rejection: Rejection) -> None:
        self._write(
            {
                "step": rejection.step,
                "event": "rejected",
                "position": rejection.position,
                "loss": rejection.loss,
                "grad_norm": rejection.grad_norm,
                "reason": rejection.reason,
            }
        )

    def on_rollback(self, rollback: Rollback) -> None:
        self._write({"step": rollback.step, "event": "rollback", **vars(rollback)})

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self._write(vars(evaluation))

    def on_end(self) -> None:
        self._write_waiting()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, values: dict[str, Any]) -> None:
        values = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        self._waiting.append(json.dumps(values) + "\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write what waits, or keep it for the next time."""
        if self._file is None:
            return
        content = "".join(self._waiting).encode()
        try:
            self._find_again()
            self._file.seek(self._size)
            storage.write_bytes(self._file, content)
        except OSError as error:
            if not self._told:
                print_status(
                    f"{self.path}: cannot be written: {error.strerror or error}; its lines are kept and written later"
                )
            self._told = True
            return
        self._told = False
        self._size += len(content)
        self._lines += len(self._waiting)
        self._waiting.clear()

    def _find_again(self) -> None:
        """Where the file was deleted, put its lines, which an open file keeps, into a new one."""
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return
            raise OSError(errno.EEXIST, "somebody else has made another file of this name")
        self._file.seek(0)
        content = self._file.read(self._size)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.replace(self.path, content or b"")
        found = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._file.close()
        self._file = found


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


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
        evaluations = [line for line in lines if line.get("val_loss") is not None]
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
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        try:
            storage.replace(self.folder / "loss.png", image.getvalue())
        except OSError as error:
            # The end of a run has more important things to say.
            print_status(f"{self.folder / 'loss.png'}: cannot be written: {error.strerror or error}")


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

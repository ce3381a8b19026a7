"""loss.png: training and validation loss and learning rate of a run, drawn from its metrics."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from tinyllm.system import storage
from tinyllm.system.progress import print_status
from tinyllm.training.callbacks import Callback
from tinyllm.training.metrics import METRICS, last_branch, read_metrics


class LossCurve(Callback):
    """Draws the losses and the learning rate in metrics.jsonl into loss.png, where matplotlib is installed."""

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
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes, rate_axes = figure.subplots(2, sharex=True, height_ratios=(5, 1))
        axes.set_ylabel("loss (nats per token)")
        x, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(x, losses, color="C0", alpha=0.25, linewidth=0.8, label="training, each batch")
        axes.plot(x, running_mean(losses), color="C0", label="training, mean around each step")
        if evaluations:
            at, values = ([line[key] for line in evaluations] for key in ("step", "val_loss"))
            axes.plot(at, values, "o-", color="C1", label="validation, whole split")
            best, best_loss = min(zip(at, values, strict=True), key=lambda point: point[1])
            axes.axvline(best, color="C2", linestyle="--", label=f"best: step {best}, {best_loss:.3f}")
            axes.annotate(
                f"{values[-1]:.3f}",
                (at[-1], values[-1]),
                textcoords="offset points",
                xytext=(0, 8),
                ha="right",
            )
        axes.margins(y=0.1)
        axes.legend()
        rate_axes.plot(x, [line["learning_rate"] for line in steps], color="C3")
        rate_axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
        for panel in (axes, rate_axes):
            panel.grid(alpha=0.3)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        try:
            storage.replace(self.folder / "loss.png", image.getvalue())
        except OSError as error:
            # The end of a run has more important things to say.
            print_status(f"{self.folder / 'loss.png'}: cannot be written: {error.strerror or error}")


def running_mean(values: Sequence[float], span: int = 50) -> list[float]:
    """The mean of the values around each: half of `span` before it and as many after it; a tenth of all if less.

    Where there are fewer before it, as few are taken after it, so that the steep begin of a run does not lag; in the
    end, where a run is flat, those that there are.
    """
    sums = [0.0, *itertools.accumulate(values)]
    halves = [min(span // 2, len(values) // 20, i) for i in range(len(values))]
    ends = [min(i + half + 1, len(values)) for i, half in enumerate(halves)]
    return [
        (sums[end] - sums[i - half]) / (end - i + half)
        for i, (half, end) in enumerate(zip(halves, ends, strict=True))
    ]

"""loss.png: training and validation loss of a run, drawn from its metrics."""

from __future__ import annotations

import io
from pathlib import Path

from tinyllm.system import storage
from tinyllm.system.progress import print_status
from tinyllm.training.callbacks import Callback
from tinyllm.training.metrics import METRICS, last_branch, read_metrics


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

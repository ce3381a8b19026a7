"""A scaling law fitted to runs on disk: reading them, keeping the fit, and drawing it."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.models import ModelConfig
from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.system.settings import from_mapping
from tinyllm.system.text_files import read_whole, write_text
from tinyllm.system.toml_files import read_sections
from tinyllm.training.config import TrainConfig
from tinyllm.training.counts import architecture_of
from tinyllm.training.metrics import METRICS, last_branch, read_metrics
from tinyllm.training.scaling import (
    FLOPS_PER_WEIGHT,
    Fit,
    ScalingLaw,
    as_numbers,
    fit_law,
    parabola_minimum,
    power_law,
)


@dataclass(frozen=True)
class FinishedRun:
    """N weights in products, D tokens, the validation loss in nats per token, and the budget 6 N D it was made for."""

    N: int
    D: int
    loss: float
    budget: float


def read_runs(paths: Sequence[str]) -> tuple[list[FinishedRun], list[str]]:
    """(runs, why others were left out) of run folders and of .jsonl files with N, D and loss in each line.

    A run that has not made all its steps is left out: its learning rate had not fallen yet, so its loss is no measure
    of what so many tokens give.

    Raises InputError for a path that is neither.
    """
    runs: list[FinishedRun] = []
    left_out: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = _read_folder(path)
            if isinstance(found, str):
                left_out.append(found)
            else:
                runs.append(found)
        elif path.suffix == ".jsonl":
            runs += _read_lines(path)
        else:
            raise InputError(f"{path}: neither the folder of a run nor a .jsonl file with N, D and loss")
    return runs, left_out


def _read_lines(path: Path) -> list[FinishedRun]:
    runs = []
    for number, line in enumerate(read_whole(path).splitlines(), 1):
        try:
            values = json.loads(line)
            N, D, loss = int(values["N"]), int(values["D"]), float(values["loss"])
            runs.append(FinishedRun(N, D, loss, float(values.get("budget", FLOPS_PER_WEIGHT * N * D))))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} has no numbers N, D and loss") from None
    return runs


def _read_folder(folder: Path) -> FinishedRun | str:
    """The run in a folder, or why it is left out."""
    settings = folder / "run.toml"
    if not settings.exists():
        raise InputError(f"{folder}: no run.toml in it; give the folder of a run")
    sections = read_sections(settings, ("model", "train"))
    model = from_mapping(ModelConfig, sections.get("model", {}), f"{settings} [model]")
    train = from_mapping(TrainConfig, sections.get("train", {}), f"{settings} [train]")
    evaluations = [
        line for line in last_branch(read_metrics(folder / METRICS)) if line.get("val_loss") is not None
    ]
    if not evaluations or evaluations[-1]["step"] < train.steps:
        made = evaluations[-1]["step"] if evaluations else 0
        return f"{folder}: {made} of {train.steps} steps evaluated, so its rate had not fallen to the end"
    sizes = architecture_of(model).weights_in_products
    tokens = train.steps * train.batch_size * train.gradient_accumulation * model.context_length
    return FinishedRun(sizes, tokens, evaluations[-1]["val_loss"], FLOPS_PER_WEIGHT * sizes * tokens)


def fit_runs(runs: Sequence[FinishedRun], resamples: int = 200) -> Fit:
    """The law of these runs; see `fit_law`."""
    return fit_law([run.N for run in runs], [run.D for run in runs], [run.loss for run in runs], resamples)


# ---- Equal compute: Hoffmann's approach 2 ------------------------------------------------------


def equal_compute(runs: Sequence[FinishedRun]) -> dict[float, list[FinishedRun]]:
    """The runs by budget, of those budgets that at least three sizes share, smallest first."""
    groups: dict[float, list[FinishedRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.budget, run.N)):
        groups[float(f"{run.budget:.2g}")].append(run)
    return {budget: group for budget, group in groups.items() if len({run.N for run in group}) >= 3}


def minima(runs: Sequence[FinishedRun]) -> dict[float, float]:
    """The best N by budget, where a parabola through its runs has its lowest point among their sizes."""
    found = {
        budget: parabola_minimum([run.N for run in group], [run.loss for run in group])
        for budget, group in equal_compute(runs).items()
    }
    return {budget: best for budget, best in found.items() if best is not None}


def in_words(fit: Fit, runs: Sequence[FinishedRun]) -> list[str]:
    """The fit, with its bootstrap intervals, and how far it reaches."""
    law = fit.law
    lines = [
        f"{len(runs)} runs, {fit.smallest[0]:,.0f} to {fit.largest[0]:,.0f} weights, "
        f"{fit.smallest[1]:,.0f} to {fit.largest[1]:,.0f} tokens",
        f"L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"
        f", off by {100 * fit.residual:.2g}% in the median",
    ]
    for name in ("E", "A", "B", "alpha", "beta", "size_exponent"):
        low, high = fit.interval(name)
        lines.append(
            f"  {name.replace('_', ' '):<13} {getattr(law, name):<10.4g} 80% of resamples: {low:.4g} to {high:.4g}"
        )
    best = minima(runs)
    if len(best) >= 2:
        _, exponent = power_law(list(best), list(best.values()))
        lines.append(f"parabolas through {len(best)} budgets: the best size grows as C^{exponent:.2f}")
    low_ratio, high_ratio = (
        D / N for N, D in (law.optimal(FLOPS_PER_WEIGHT * N * D) for N, D in (fit.smallest, fit.largest))
    )
    lines.append(
        f"tokens a weight that are best: {low_ratio:.3g} at the smallest compute, {high_ratio:.3g} at the largest"
    )
    lines.append(
        "in nats per token of these runs' tokenizer, on text like theirs; beyond their sizes it is a guess"
    )
    return lines


# ---- On disk -----------------------------------------------------------------------------------


def write_fit(path: Path, fit: Fit) -> None:
    """Keep a fit as JSON."""
    content = {
        "law": as_numbers(fit.law),
        "resampled": [as_numbers(law) for law in fit.resampled],
        "smallest": fit.smallest,
        "largest": fit.largest,
        "residual": fit.residual,
    }
    write_text(path, json.dumps(content) + "\n")


def read_fit(path: Path) -> Fit:
    """A fit that `write_fit` has kept; raises InputError for another file."""
    content = read_json(path)
    try:
        return Fit(
            _law(content["law"]),
            tuple(map(_law, content["resampled"])),
            (float(content["smallest"][0]), float(content["smallest"][1])),
            (float(content["largest"][0]), float(content["largest"][1])),
            float(content["residual"]),
        )
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputError(f"{path}: not a fit that `plan fit --json` has written") from None


def _law(numbers: dict[str, Any]) -> ScalingLaw:
    return ScalingLaw(**{name: float(value) for name, value in numbers.items()})


def draw_fit(path: Path, fit: Fit, runs: Sequence[FinishedRun]) -> None:
    """The runs of equal compute with their parabolas and the law, and the best size by compute, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, growth = figure.subplots(1, 2)
    groups = equal_compute(runs)
    for number, (budget, group) in enumerate(groups.items()):
        N, losses = [run.N for run in group], [run.loss for run in group]
        colour = f"C{number % 10}"
        curves.plot(N, losses, "o", color=colour, label=f"C = {budget:.2g} FLOPs")
        x = np.geomspace(min(N), max(N), 100)
        parabola = np.polynomial.Polynomial.fit(np.log(N), losses, 2)
        curves.plot(x, parabola(np.log(x)), "-", color=colour, linewidth=1)
        curves.plot(x, [fit.law.loss(n, budget / FLOPS_PER_WEIGHT / n) for n in x], ":", color=colour)
    if not groups:
        curves.plot([run.N for run in runs], [run.loss for run in runs], "o")
    curves.set(xscale="log", xlabel="N, weights in products", ylabel="validation loss (nats per token)")
    curves.set_title("equal compute: parabolas, and the law (dotted)")
    budgets = [run.budget for run in runs]
    C = np.geomspace(min(budgets), max(budgets), 50)
    sizes = np.array([[law.optimal(c)[0] for c in C] for law in fit.resampled])
    growth.fill_between(C, *np.quantile(sizes, [0.1, 0.9], axis=0), alpha=0.2, label="80% of resamples")
    growth.plot(C, [fit.law.optimal(c)[0] for c in C], label=f"the law: C^{fit.law.size_exponent:.2f}")
    best = minima(runs)
    growth.plot(list(best), list(best.values()), "o", color="C1", label="lowest points of the parabolas")
    growth.set(xscale="log", yscale="log", xlabel="C = 6 N D (FLOPs)", ylabel="best N")
    for axes in (curves, growth):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    try:
        storage.replace(path, image.getvalue())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

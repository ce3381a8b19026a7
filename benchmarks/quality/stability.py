"""What the safeguards of training do: injected trouble, false alarms, learning rates, a long run.

    python benchmarks/quality/stability.py --part trouble [--data FILE] [--only WORD ...]
    python benchmarks/quality/stability.py --part alarms [--data FILE] [--seeds 1 2 3 4 5]
    python benchmarks/quality/stability.py --part sweep [--data FILE] [--only WORD ...] [--results FILE] [--plot FILE]
    python benchmarks/quality/stability.py --part long [--steps 50000]
    python benchmarks/quality/stability.py --quick

trouble: each kind of trouble at a step of the char preset; the loss on a fixed part of the validation split 200 steps
later must be within 2% of that of a run without trouble. alarms: clean steps of a small model; none may be rejected.
sweep: the final loss by learning rate with and without each safeguard; --results keeps the figures, so that it can be
made in pieces. long: memory and time of the steps of a tiny model, which must stay flat.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.troubles import TROUBLES

from tinyllm import data
from tinyllm.backend import ignore_non_finite
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.callbacks import Callback
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Evaluation, Rejection, Rollback, StepMetrics
from tinyllm.training.metrics import MetricsFile
from tinyllm.training.safeguards.watch import Verdict, Watch
from tinyllm.training.trainer import Trainer

VALIDATION_TOKENS = 20_000
SMALL = ModelConfig(context_length=32, num_layers=2, num_heads=2, hidden_size=32)
TINY = ModelConfig(context_length=8, num_layers=1, num_heads=1, hidden_size=8)


@dataclass(frozen=True)
class Text:
    """A text as tokens."""

    tokenizer: CharTokenizer
    train: Any
    validation: Any


def read(paths: list[str]) -> Text:
    text = data.read_text(paths) if paths else data.embedded_corpus()
    tokenizer = CharTokenizer.train(text)
    train, validation = data.split_by_position(tokenizer.encode_to_array(text), 0.1)
    return Text(tokenizer, train, validation[:VALIDATION_TOKENS])


def trainer_of(
    text: Text, model: ModelConfig, config: TrainConfig, run: Path | None, *callbacks: Callback
) -> Trainer:
    new = TransformerLM(replace(model, vocab_size=text.tokenizer.vocab_size), config.seed)
    return Trainer(new, text.tokenizer, text.train, text.validation, config, run, callbacks)


class Record(Callback):
    """What happened in a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validation: dict[int, float] = {}
        self.rejections: list[Rejection] = []
        self.rollbacks: list[Rollback] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.validation[evaluation.step] = evaluation.val_loss

    def on_rejected(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)

    def on_rollback(self, rollback: Rollback) -> None:
        self.rollbacks.append(rollback)


# ---- Injected trouble --------------------------------------------------------------------------


def trouble(text: Text, only: list[str], model: ModelConfig, config: TrainConfig, at: int) -> bool:
    """Each kind of trouble with the batch at position `at`; the run has 200 steps more."""
    config = replace(config, steps=at + 200, eval_every=at + 200)

    def run(name: str) -> tuple[float, Record, float]:
        record = Record()
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(text, model, config, Path(folder), record)
            if name in TROUBLES:
                TROUBLES[name](trainer, at)
            begun = time.perf_counter()
            trainer.fit()
            return record.validation[config.steps], record, time.perf_counter() - begun

    clean, record, seconds = run("clean")
    print(
        f"clean: loss {clean:.4f} after {config.steps} steps, {len(record.rejections)} rejected, {seconds:.0f} s"
    )
    good = not record.rejections
    for name in TROUBLES:
        if only and not any(word in name for word in only):
            continue
        loss, record, seconds = run(name)
        ratio = loss / clean
        good &= ratio <= 1.02 and bool(record.rejections)
        back = ", ".join(f"to step {r.to_step}" for r in record.rollbacks) or "none"
        print(
            f"{name:26} loss {loss:.4f}, {100 * (ratio - 1):+.2f}% of clean; {len(record.rejections)} steps rejected, "
            f"rollbacks: {back}; {seconds:.0f} s",
            flush=True,
        )
        for rejection in record.rejections[:1]:
            print(f"    step {rejection.step}: {rejection.reason}")
    return good


# ---- False alarms ------------------------------------------------------------------------------


class Scores(Watch):
    """A watch that keeps its highest scores, each with the number of the step."""

    judged = 0
    loss = norm = (0.0, 0)

    def judge(self, loss: float, norm: float) -> Verdict:
        verdict = super().judge(loss, norm)
        self.judged += 1
        if not math.isnan(verdict.loss_score):
            self.loss = max(self.loss, (verdict.loss_score, self.judged))
            self.norm = max(self.norm, (verdict.norm_score, self.judged))
        return verdict


def alarms(text: Text, seeds: list[int], model: ModelConfig, config: TrainConfig) -> bool:
    """Count rejections in clean runs, and tell the highest scores of the watch."""
    total = 0
    for seed in seeds:
        trainer = trainer_of(text, model, replace(config, seed=seed), None)
        scores = Scores(config.watch_window, config.watch_loss, config.watch_norm)
        trainer.watch = scores
        begun = time.perf_counter()
        with ignore_non_finite(), trainer.engine:
            rejected = sum(isinstance(next(trainer.train_steps()), Rejection) for _ in range(config.steps))
        print(
            f"seed {seed}: {rejected} of {config.steps} steps rejected; highest scores: loss {scores.loss[0]:.1f} "
            f"(step {scores.loss[1]}), gradient norm {scores.norm[0]:.1f} (step {scores.norm[1]}); "
            f"{time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        total += rejected
    print(f"{total} false alarms; the thresholds are {config.watch_loss:g} and {config.watch_norm:g}")
    return total == 0


# ---- Learning rates ----------------------------------------------------------------------------

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
NO_WATCH = {"watch_loss": math.inf, "watch_norm": math.inf}
# What is changed in the model and in training, where all safeguards are on.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all safeguards": ({}, {}),
    "without the watch": ({}, NO_WATCH),
    "without clipping": ({}, {"clip_norm": math.inf}),
    "without QK-norm": ({"qk_norm": False}, {}),
    "without warm-up": ({}, {"warmup_steps": 0}),
    "without any": ({"qk_norm": False}, {**NO_WATCH, "clip_norm": math.inf, "warmup_steps": 0}),
}


def sweep(
    text: Text,
    only: list[str],
    model: ModelConfig,
    config: TrainConfig,
    rates: Sequence[float],
    results: Path | None,
) -> dict[str, dict[str, Any]]:
    """The final loss of each variant by learning rate; figures that are in `results` are not made again."""
    found = json.loads(results.read_text()) if results is not None and results.exists() else {}
    for name, (of_model, of_training) in VARIANTS.items():
        if only and not any(word in name for word in only):
            continue
        for rate in rates:
            if f"{rate:g}" in found.setdefault(name, {}):
                continue
            settings = replace(config, learning_rate=rate, **of_training)
            found[name][f"{rate:g}"] = one_run(text, replace(model, **of_model), settings)
            print(f"{name:18} {rate:<7g} {found[name][f'{rate:g}']}", flush=True)
            if results is not None:
                results.write_text(json.dumps(found, indent=1))
    return found


def one_run(text: Text, model: ModelConfig, config: TrainConfig) -> dict[str, Any]:
    """The validation loss at the end, how many steps were rejected, and the message if it was stopped."""
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(text, model, config, Path(folder), record)
        try:
            trainer.fit()
        except InputError as error:
            stopped = str(error)
        else:
            stopped = ""
    loss = record.validation.get(config.steps, math.inf)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "rejected": len(record.rejections),
        "rollbacks": len(record.rollbacks),
        "stopped": stopped,
    }


def show_sweep(found: dict[str, dict[str, Any]], plot: Path | None, log_v: float) -> None:
    rates = sorted({float(rate) for line in found.values() for rate in line})
    print(f"{'final loss (steps rejected)':28}" + "".join(f"{rate:>14g}" for rate in rates))
    for name, line in found.items():
        cells = []
        for rate in rates:
            run = line.get(f"{rate:g}")
            rejected = f" ({run['rejected']})" if run and run["rejected"] else ""
            cells.append(
                "" if run is None else ("stopped" if run["loss"] is None else f"{run['loss']:.3f}") + rejected
            )
        print(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xscale="log", xlabel="learning rate (AdamW)", ylabel="final validation loss (nats)"
    )
    losses = [run["loss"] for line in found.values() for run in line.values()]
    highest = log_v * 1.1 if None in losses else max(losses)
    top = min(1.05 * highest, log_v * 1.15)
    if log_v < top:
        axes.axhline(log_v, color="gray", linestyle=":", linewidth=1)
        axes.text(rates[0], log_v, "a guess: ln V", va="bottom", fontsize=8, color="gray")
    for number, (name, line) in enumerate(found.items()):
        points = sorted((float(rate), run["loss"]) for rate, run in line.items())
        # What was stopped, and what is worse than the top of the plot, stands at the top.
        values = [top if loss is None else min(loss, top) for _, loss in points]
        style = {"all safeguards": "o-", "without any": "s--"}.get(name, ".-")
        axes.plot([rate for rate, _ in points], values, style, label=name, color=f"C{number}")
    axes.set_ylim(top=top * 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(plot, dpi=120)
    print(f"the plot is {plot}")


# ---- A long run --------------------------------------------------------------------------------


class Resources(Callback):
    """Resident memory, and the time of the steps, by `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.times: list[float] = []
        self.rows: list[tuple[int, float, float]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.times.append(time.perf_counter())
        if metrics.step % self.every == 0:
            spans = np.diff(self.times)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            # What neighbours on the machine take makes steps slower, and none faster.
            self.rows.append((metrics.step, memory, 1e3 * float(np.quantile(spans, 0.1))))
            self.times = []


def long(text: Text, steps: int) -> bool:
    """Memory and time of `steps` steps, with checkpoints, metrics, and ten rejected steps on the way."""
    every = max(steps // 50, 100)
    resources = Resources(every)
    config = TrainConfig(
        steps=steps, batch_size=2, threads=1, eval_every=every, checkpoint_every=every, learning_rate=1e-3
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(text, TINY, config, Path(folder), resources, MetricsFile(Path(folder)))
        for at in range(every // 2, 10 * every, every):
            TROUBLES["NaN in a gradient"](trainer, at)
        trainer.fit()
    print("step, resident MiB, milliseconds of a step (the fastest tenth takes at most)")
    for row in resources.rows[:: max(1, len(resources.rows) // 25)]:
        print(f"{row[0]:>7} {row[1]:>8.1f} {row[2]:>7.3f}")
    quarter = max(1, len(resources.rows) // 4)
    early, late = resources.rows[quarter : 2 * quarter], resources.rows[-quarter:]
    growth = max(row[1] for row in late) - max(row[1] for row in early)
    slowdown = statistics.median(row[2] for row in late) / statistics.median(row[2] for row in early)
    print(f"from the second quarter to the last: {growth:+.2f} MiB, time of a step x {slowdown:.3f}")
    return growth < 2 and (slowdown < 1.1 or steps < 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["trouble", "alarms", "sweep", "long"])
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kinds with one of these words")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, help="of alarms (10000), the sweep (300), the long run (50000)")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="all parts with small models and few steps")
    args = parser.parse_args()
    if not args.quick and args.part is None:
        parser.error("give --part or --quick")
    text = read(args.data)
    char = ModelConfig(**PRESETS["char"]["model"])
    small = TrainConfig(batch_size=8, threads=1, checkpoint_every=50, eval_batch_size=64)
    good = True
    if args.quick:
        text = replace(text, validation=text.validation[:4000])
        good &= trouble(text, args.only, SMALL, replace(small, learning_rate=1e-2), at=400)
        good &= alarms(text, [1], SMALL, replace(small, steps=500))
        found = sweep(
            text, ["all", "any"], SMALL, replace(small, steps=60, eval_every=60), (3e-3, 3e-1), None
        )
        show_sweep(found, args.plot, math.log(text.tokenizer.vocab_size))
        good &= long(text, 2000)
    elif args.part == "trouble":
        config = TrainConfig(**PRESETS["char"]["train"])
        good = trouble(text, args.only, char, replace(config, checkpoint_every=100), at=350)
    elif args.part == "alarms":
        good = alarms(text, args.seeds, SMALL, replace(small, steps=args.steps or 10_000))
    elif args.part == "sweep":
        steps = args.steps or 300
        config = TrainConfig(steps=steps, eval_every=steps, checkpoint_every=50, warmup_steps=steps // 6)
        found = sweep(text, args.only, char, config, RATES, args.results)
        show_sweep(found, args.plot, math.log(text.tokenizer.vocab_size))
    else:
        good = long(text, args.steps or 50_000)
    sys.exit(0 if good else "failed: see above")


if __name__ == "__main__":
    main()

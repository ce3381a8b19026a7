"""A scaling study: five sizes at equal-compute budgets, the losses, and the law that they follow.

    python benchmarks/quality/scaling_study.py --data FILE... --out DIR [--minutes 60] [--workers N]
    python benchmarks/quality/scaling_study.py --data FILE --out DIR --quick

Every run has a compute budget C = 6 N D and a size, from which its tokens D follow; N counts the weights that a token
is multiplied with: all but the input embedding. Each run has a learning-rate schedule of its own length, since a run
cut short of a longer one is worse than it could be (Hoffmann et al., 2022). No text is seen twice. Tokens are bytes.
The budgets are such that all takes about `--minutes` at the speed that each size is measured to have at first.

Writes plan.json (sizes and budgets), results.jsonl (a line for each finished run; started again, the study makes those
that are missing), and in the end isoflop.png and fit.json into DIR. Runs are made side by side, each by one worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import ByteTokenizer
from tinyllm.training import fitted_runs
from tinyllm.training.config import TrainConfig
from tinyllm.training.trainer import Trainer

SHAPES = ((32, 2), (48, 3), (80, 3), (128, 4), (256, 4))
"""Width and blocks; heads are 16 wide."""
QUICK_SHAPES = SHAPES[:3]
BUDGETS, BUDGET_RATIO = 4, 2.5
CONTEXT, WINDOWS = 64, 16
FEWEST_STEPS, QUICK_FEWEST_STEPS = 100, 10
"""Below, a run says more about its warm-up than about its size."""
HELD_OUT, BLOCK = 1 << 16, 1 << 13
"""Tokens held out, and the size of the blocks of them, which lie all over the text."""
MEASURED_SECONDS = 5.0


@dataclass(frozen=True)
class Run:
    """One run: N weights in products, D tokens, and the shape of the model."""

    width: int
    layers: int
    N: int
    D: int
    budget: float


def model_config(width: int, layers: int) -> ModelConfig:
    """The shape of the model of this width."""
    return ModelConfig(
        vocab_size=256, context_length=CONTEXT, num_layers=layers, num_heads=width // 16, hidden_size=width
    )


def weights_in_products(width: int, layers: int) -> int:
    """N: all parameters but the input embedding."""
    return model_config(width, layers).num_parameters - 256 * width


def read_tokens(files: list[str], most: int) -> tuple[Any, Any]:
    """(training, held out): the bytes of the files, up to `most` of them, as uint8.

    The held-out blocks lie all over the text, since one end of a collection is unlike the other.
    """
    size = sum(Path(file).stat().st_size for file in files)
    text = np.concatenate([np.fromfile(file, dtype=np.uint8) for file in files])
    whole = len(text) // BLOCK
    if whole < 10 * HELD_OUT // BLOCK:
        raise InputError(f"{size:,} bytes are too few; give ten times the {HELD_OUT:,} that are held out")
    blocks = text[: whole * BLOCK].reshape(whole, BLOCK)
    held_out = np.linspace(0, whole - 1, HELD_OUT // BLOCK).astype(int)
    training = np.delete(blocks, held_out, axis=0)
    # Where less than all is needed, it is taken from all over the text too.
    needed = min(len(training), most // BLOCK + 1)
    return training[np.linspace(0, len(training) - 1, needed).astype(int)].ravel(), blocks[held_out].ravel()


def trainer_of(run: Run, training: Any, held_out: Any) -> Trainer:
    """A trainer of one run; AdamW's rate, for embedding, head and norms, falls with width, and Muon's does not."""
    steps = max(1, run.D // (CONTEXT * WINDOWS))
    config = TrainConfig(
        steps=steps,
        batch_size=WINDOWS,
        optimizer="muon",
        learning_rate=3e-3 * min(1.0, (128 / run.width) ** 0.5),
        warmup_steps=max(1, steps // 20),
        eval_every=steps,
        threads=1,
    )
    model = TransformerLM(model_config(run.width, run.layers), config.seed)
    return Trainer(model, ByteTokenizer(), training, held_out, config)


def measured_rate(shape: tuple[int, int], training: Any, held_out: Any) -> float:
    """Tokens a second in training."""
    trainer = trainer_of(Run(*shape, N=0, D=1 << 30, budget=0), training, held_out)
    seconds: list[float] = []
    with trainer.engine:
        list(trainer.train_steps())
        while sum(seconds) < MEASURED_SECONDS or len(seconds) < 3:
            list(trainer.train_steps())
            seconds.append(trainer.seconds)
    return CONTEXT * WINDOWS / statistics.median(seconds)


def make_run(run: Run, training: Any, held_out: Any) -> dict[str, Any]:
    """Train, and the line of results."""
    begun = time.perf_counter()
    trainer = trainer_of(run, training, held_out)
    trainer.fit()
    tokens = trainer.step * CONTEXT * WINDOWS
    return {
        **asdict(run),
        "D": tokens,
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.step,
        "loss": trainer.evaluated_loss,
        "seconds": time.perf_counter() - begun,
    }


def runs_of(shapes: tuple[tuple[int, int], ...], budgets: list[float], fewest: int) -> Iterator[Run]:
    """The runs at each budget, of those sizes for which it is enough for so many steps."""
    for budget in budgets:
        for width, layers in shapes:
            N = weights_in_products(width, layers)
            D = round(budget / (6 * N))
            if fewest * CONTEXT * WINDOWS <= D:
                yield Run(width, layers, N, D, budget)


def set_budgets(
    shapes: tuple[tuple[int, int], ...], rates: list[float], seconds: float, workers: int, fewest: int
) -> list[float]:
    """Budgets, each BUDGET_RATIO times the one before, whose runs together take so many seconds."""
    flops = {shape: 6 * weights_in_products(*shape) * rate for shape, rate in zip(shapes, rates, strict=True)}
    lowest = 1e9
    while True:  # a few more tokens at a time, since how many runs there are depends on the budget
        budgets = [lowest * BUDGET_RATIO**number for number in range(BUDGETS)]
        needed = sum(run.budget / flops[run.width, run.layers] for run in runs_of(shapes, budgets, fewest))
        if needed > seconds * workers:
            return [budget / 1.05 for budget in budgets]
        lowest *= 1.05


def study(args: argparse.Namespace) -> None:
    """Make the runs that are missing, longest first."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plan_file, results_file = out / "plan.json", out / "results.jsonl"
    shapes = QUICK_SHAPES if args.quick else SHAPES
    fewest = QUICK_FEWEST_STEPS if args.quick else FEWEST_STEPS
    with ProcessPoolExecutor(args.workers, get_context("fork")) as pool:
        if not plan_file.exists():
            training, held_out = read_tokens(args.data, 1 << 20)
            waiting = [pool.submit(measured_rate, shape, training, held_out) for shape in shapes]
            rates = [future.result() for future in waiting]
            # A twentieth is for the evaluations, and for the last runs, which have the machine to themselves.
            budgets = set_budgets(shapes, rates, 57 * args.minutes, args.workers, fewest)
            plan = {"tokens": "bytes", "shapes": shapes, "tokens_per_second": rates, "budgets": budgets}
            plan_file.write_text(json.dumps(plan) + "\n")
        plan = json.loads(plan_file.read_text())
        wanted = list(runs_of(tuple(tuple(shape) for shape in plan["shapes"]), plan["budgets"], fewest))
    done = read_results(results_file)
    made = {(line["budget"], line["width"]) for line in done}
    missing = [run for run in wanted if (run.budget, run.width) not in made]
    rate = {shape[0]: rate for shape, rate in zip(plan["shapes"], plan["tokens_per_second"], strict=True)}
    missing.sort(key=lambda run: -run.D / rate[run.width])
    training, held_out = read_tokens(args.data, max(run.D for run in wanted) + CONTEXT * WINDOWS)
    if len(training) < max(run.D for run in wanted):
        raise InputError(
            f"the longest run reads {max(run.D for run in wanted):,} tokens, the text has {len(training):,} "
            "beside what is held out; give more text, or fewer --minutes in another folder"
        )
    planned = sum(run.D / rate[run.width] for run in missing) / args.workers
    print(f"{len(missing)} of {len(wanted)} runs to make, about {planned / 60:.0f} minutes", flush=True)
    with ProcessPoolExecutor(args.workers, get_context("fork")) as pool:
        waiting = [pool.submit(make_run, run, training, held_out) for run in missing]
        for number, future in enumerate(as_completed(waiting), 1):
            line = future.result()
            with results_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{number}/{len(missing)}  C {line['budget']:.2g}  N {line['N']:,}  D {line['D']:,}  "
                f"loss {line['loss']:.4f}  {line['seconds']:.0f} s",
                flush=True,
            )


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def report(out: Path) -> None:
    """Fit the law to all runs, draw it, and print it."""
    runs, _ = fitted_runs.read_runs([str(out / "results.jsonl")])
    fit = fitted_runs.fit_runs(runs)
    fitted_runs.write_fit(out / "fit.json", fit)
    fitted_runs.draw_fit(out / "isoflop.png", fit, runs)
    print(*fitted_runs.in_words(fit, runs), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=60.0, help="of all runs together (default: 60)")
    parser.add_argument("--workers", type=int, default=physical_cores(), help="runs made side by side")
    parser.add_argument("--quick", action="store_true", help="three sizes in half a minute or so")
    args = parser.parse_args()
    if args.quick:
        args.minutes = 0.5
    try:
        study(args)
        report(Path(args.out))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

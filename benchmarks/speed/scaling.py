"""How the time and memory of a training step grow with width, depth, context, vocabulary and threads.

    python benchmarks/speed/scaling.py [--axes width,depth,context,vocabulary,threads] [--out DIR] [--quick] [--redraw]

One axis changes at a time, from a model near the char preset: 4 layers, width 128 in heads of 32, context 64,
vocabulary 64, 24 windows (1,536 tokens) a step, a worker for each physical core. A wider model has more heads. Along
the context a step has 4,096 tokens, so that the longest windows are still two; where there are fewer windows than
workers, some of these wait.

A step is batch, forward, backward, clipping and AdamW, on random tokens. After a warm-up all points of an axis take
turns, several steps each, for several rounds.

- ms a step: the median over all these steps; the quartiles say how much the machine was disturbed.
- at the rate: what the products that the model needs would take, at the rate of large float32 products that the same
  number of workers reaches in the same rounds. `benchmarks/speed/training.py` says what is counted. Its part of the
  step falls where matrices are small or where work that is no product (norms, softmax, AdamW) counts.
- peak MiB: the most memory that three steps need in a process of its own, workers included, above what it held after
  its imports (Linux only). Memory shared by processes is counted once.
- kept MiB: weights, the two means of AdamW and one gradient for each worker, all float32, which is what stays between
  steps; the rest of the peak is activations, gradients being computed, and the workers themselves.

Axes that are not measured anew stay as they are in scaling.json, if they are from the same machine and versions.
--redraw measures nothing. scaling.png is drawn where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from training import memory_of_tree, peak_memory, product_rate, step_flops, trainer_of

import tinyllm
from tinyllm.models import ModelConfig
from tinyllm.parallel.team import Team
from tinyllm.system.cores import physical_cores
from tinyllm.system.settings import from_mapping, to_mapping

MIB = 2**20
FIELDS = {
    "width": "hidden_size",
    "depth": "num_layers",
    "context": "context_length",
    "vocabulary": "vocab_size",
}
UNITS = {
    "width": "width of the residual stream",
    "depth": "layers",
    "context": "tokens of context",
    "vocabulary": "tokens in the vocabulary",
    "threads": "workers, one on each core",
}


@dataclass(frozen=True)
class Plan:
    """What is measured: the base model, tokens in a batch, the points of each axis, and how often."""

    base: Mapping[str, int]
    head_dim: int
    tokens: int
    context_tokens: int
    values: Mapping[str, Sequence[int]]
    warmup: int
    rounds: int
    steps: int
    products: int


@dataclass(frozen=True)
class Point:
    """A model and how it is trained."""

    shape: ModelConfig
    windows: int
    threads: int


@dataclass(frozen=True)
class Row:
    """What was measured at one point of an axis; peak_mib is None where the system does not tell."""

    value: int
    parameters: int
    ms: float
    ms_quartiles: tuple[float, float]
    tokens_per_second: float
    gflop: float
    ms_at_rate: float
    peak_mib: float | None
    kept_mib: float


def plan(quick: bool) -> Plan:
    """The full measurement, or a tiny one that shows that all of it works."""
    cores = physical_cores()
    doubled = [2**i for i in range(cores.bit_length())]
    if quick:
        return Plan(
            base={"hidden_size": 32, "num_layers": 2, "context_length": 16, "vocab_size": 64},
            head_dim=16, tokens=256, context_tokens=512,
            values={
                "width": (32, 64, 128), "depth": (1, 2, 4), "context": (16, 64, 256),
                "vocabulary": (64, 512, 4096), "threads": sorted({1, 2, cores}),
            },
            warmup=1, rounds=2, steps=3, products=1,
        )  # fmt: skip
    return Plan(
        base={"hidden_size": 128, "num_layers": 4, "context_length": 64, "vocab_size": 64},
        head_dim=32, tokens=1536, context_tokens=4096,
        values={
            "width": (64, 96, 128, 192, 256, 384, 512), "depth": (1, 2, 3, 4, 6, 8, 12),
            "context": (64, 128, 256, 512, 1024, 2048), "vocabulary": (64, 256, 1024, 4096, 16384, 32768),
            "threads": sorted({2, *doubled, cores}),
        },
        warmup=3, rounds=8, steps=3, products=6,
    )  # fmt: skip


def point_on(axis: str, value: int, plan: Plan) -> Point:
    """The base model with `value` on this axis."""
    settings = {**plan.base, **({FIELDS[axis]: value} if axis in FIELDS else {})}
    settings["num_heads"] = settings["hidden_size"] // plan.head_dim
    tokens = plan.context_tokens if axis == "context" else plan.tokens
    threads = value if axis == "threads" else physical_cores()
    return Point(from_mapping(ModelConfig, settings), tokens // settings["context_length"], threads)


def step_times(points: Sequence[Point], plan: Plan) -> tuple[list[list[float]], dict[int, float]]:
    """The seconds of the steps of each point, and the rate of products by number of workers."""
    seconds: list[list[float]] = [[] for _ in points]
    rates: dict[int, list[float]] = {point.threads: [] for point in points}
    with contextlib.ExitStack() as stack:
        teams = {threads: stack.enter_context(Team(threads, [product_rate])) for threads in rates}
        trainers = [trainer_of(point.shape, point.windows, "adamw", point.threads) for point in points]
        for trainer in trainers:
            stack.enter_context(trainer.engine)
            for _ in range(plan.warmup):
                next(trainer.train_steps())
        for _ in range(plan.rounds):
            for threads, team in teams.items():
                rates[threads].append(sum(team.run(product_rate, plan.products)))
            for trainer, mine in zip(trainers, seconds, strict=True):
                for _ in range(plan.steps):
                    begun = time.perf_counter()
                    next(trainer.train_steps())
                    mine.append(time.perf_counter() - begun)
    return seconds, {threads: statistics.median(found) for threads, found in rates.items()}


@functools.cache
def bytes_above_idle(point: Point) -> int | None:
    """The most memory that training needs in a process of its own, above what it holds after its imports."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    settings = {"shape": to_mapping(point.shape), "windows": point.windows, "threads": point.threads}
    command = [sys.executable, __file__, "--point", json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # it says that its imports are done, and waits
        idle = memory_of_tree(process.pid)
        process.stdin.close()
        return peak_memory(process) - idle


def train_once(settings: dict[str, Any]) -> None:
    """What the process of one point does: wait until its memory has been looked at, then three steps."""
    print("ready", flush=True)
    sys.stdin.readline()
    shape = from_mapping(ModelConfig, settings["shape"])
    trainer = trainer_of(shape, settings["windows"], "adamw", settings["threads"])
    with trainer.engine:
        for _ in range(3):
            next(trainer.train_steps())


def measure(axis: str, plan: Plan) -> dict[str, Any]:
    """All that scaling.json says of an axis."""
    points = [point_on(axis, value, plan) for value in plan.values[axis]]
    seconds, rates = step_times(points, plan)
    rows = []
    for value, point, found in zip(plan.values[axis], points, seconds, strict=True):
        median = statistics.median(found)
        low, _, high = statistics.quantiles(found, n=4)
        needed = step_flops(point.shape, point.windows)
        peak, parameters = bytes_above_idle(point), point.shape.num_parameters
        rows.append(
            Row(
                value=value,
                parameters=parameters,
                ms=median * 1e3,
                ms_quartiles=(low * 1e3, high * 1e3),
                tokens_per_second=point.windows * point.shape.context_length / median,
                gflop=needed / 1e9,
                ms_at_rate=needed / rates[point.threads] * 1e3,
                peak_mib=None if peak is None else peak / MIB,
                kept_mib=4 * (3 + point.threads) * parameters / MIB,
            )
        )
    return {
        "date": datetime.date.today().isoformat(),
        "base": {**plan.base, "head_dim": plan.head_dim},
        "tokens_in_a_batch": plan.context_tokens if axis == "context" else plan.tokens,
        "gflop_per_second_by_workers": {str(threads): rate / 1e9 for threads, rate in rates.items()},
        "rows": [asdict(row) for row in rows],
    }


def rows_of(found: dict[str, Any]) -> list[Row]:
    """The rows of an axis as scaling.json has them."""
    return [Row(**row) for row in found["rows"]]


def show(axis: str, found: dict[str, Any]) -> None:
    """Print the table of an axis, and what the whole of it comes to."""
    rows = rows_of(found)
    rates = ", ".join(
        f"{rate:.0f} GFLOP/s with {n}" for n, rate in found["gflop_per_second_by_workers"].items()
    )
    print(f"\n{axis}: {found['tokens_in_a_batch']:,} tokens a step; matrix products: {rates} workers")
    print(
        f"{axis:>10} {'parameters':>12} {'ms a step':>10} {'quartiles':>18} {'tokens/s':>9} {'GFLOP':>8} "
        f"{'at the rate':>12} {'part':>5} {'peak MiB':>9} {'kept MiB':>9}"
    )
    for row in rows:
        low, high = row.ms_quartiles
        peak = "?" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        print(
            f"{row.value:10} {row.parameters:12,} {row.ms:10.1f} {low:8.1f} to {high:6.1f} "
            f"{row.tokens_per_second:9,.0f} {row.gflop:8.2f} {row.ms_at_rate:9.1f} ms "
            f"{row.ms_at_rate / row.ms:5.0%} {peak:>9} {row.kept_mib:9.1f}"
        )
    first, last = rows[0], rows[-1]
    memory = ""
    if first.peak_mib is not None and last.peak_mib is not None:
        memory = f", peak memory times {last.peak_mib / first.peak_mib:.2f}"
    print(
        f"from {first.value} to {last.value}: time times {last.ms / first.ms:.2f}, "
        f"operations times {last.gflop / first.gflop:.2f}{memory}"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each axis, with time above memory, and the key in the place that is over."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError:
        print(f"{path} is left out: it needs matplotlib; install it with: pip install 'tinyllm-numpy[plot]'")
        return
    figure = Figure(figsize=(13, 9), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    places = figure.add_gridspec(2, 3)
    key: dict[str, Any] = {}
    for number, axis in enumerate(axis for axis in UNITS if axis in result["axes"]):
        found = result["axes"][axis]
        inner = places[number // 3, number % 3].subgridspec(2, 1, height_ratios=(3, 2))
        pair: Any = inner.subplots(sharex=True)
        pair[0].set_title(f"{axis} ({found['tokens_in_a_batch']:,} tokens a step)")
        key |= draw_axis(pair[0], pair[1], UNITS[axis], rows_of(found))
    place = figure.add_subplot(places[1, 2])
    place.axis("off")
    place.legend(key.values(), key.keys(), loc="upper left", borderaxespad=0, fontsize=11)
    place.text(0, 0.68, caption(result), transform=place.transAxes, va="top", fontsize=10, linespacing=1.4)
    canvas.draw()
    # With a palette the file is a third as large as what savefig writes.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(path, optimize=True)


def draw_axis(time_axes: Any, memory_axes: Any, label: str, rows: list[Row]) -> dict[str, Any]:
    """Draw the panel of one axis; returns the lines by what they are."""
    values, times = [row.value for row in rows], [row.ms for row in rows]
    below = [row.ms - row.ms_quartiles[0] for row in rows]
    above = [row.ms_quartiles[1] - row.ms for row in rows]
    key = {
        "time of a step, median and quartiles": time_axes.errorbar(
            values, times, yerr=[below, above], color="C0", marker="o", markersize=5, capsize=3
        ),
        "its matrix products at the measured rate": time_axes.plot(
            values, [row.ms_at_rate for row in rows], "--", color="C0"
        )[0],
    }
    peaks = [row.peak_mib for row in rows if row.peak_mib is not None]
    if len(peaks) == len(rows):
        key["peak memory above the idle process"] = memory_axes.plot(
            values, peaks, "s-", color="C1", markersize=5
        )[0]
    key["weights, means of AdamW, gradients"] = memory_axes.plot(
        values, [row.kept_mib for row in rows], ":", color="C1"
    )[0]
    as_logarithms(time_axes, "ms a step")
    as_logarithms(memory_axes, "MiB")
    memory_axes.set_xscale("log", base=2)
    wide = values[-1] >= 10_000
    memory_axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30 if wide else 0)
    memory_axes.set_xticks([], minor=True)
    memory_axes.set_xlabel(label)
    return key


def as_logarithms(axes: Any, label: str) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def caption(result: dict[str, Any]) -> str:
    """What the picture was measured on."""
    machine, versions = result["machine"], result["versions"]
    found = list(result["axes"].values())
    base = found[0]["base"]
    return "\n".join(
        (
            "One axis changes at a time, from:",
            f"{base['num_layers']} layers, width {base['hidden_size']} in heads of {base['head_dim']},",
            f"context {base['context_length']}, vocabulary {base['vocab_size']}, "
            f"{machine['physical_cores']} workers, AdamW",
            "",
            f"{machine['processor']}, {machine['physical_cores']} cores",
            f"NumPy {versions['numpy']}, {versions['blas']}",
            f"Python {versions['python']}, tinyllm {versions['tinyllm']}, {max(axis['date'] for axis in found)}",
        )
    )


def here() -> dict[str, Any]:
    """This machine and the versions of what runs on it."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    libraries = [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]
    blas = ", ".join(f"{x['internal_api']} {x['version']} ({x.get('architecture')})" for x in libraries)
    return {
        "machine": {
            "processor": processor,
            "system": f"{platform.system()} {platform.machine()}",
            "physical_cores": physical_cores(),
        },
        "versions": {
            "tinyllm": tinyllm.__version__,
            "numpy": np.__version__,
            "blas": blas or "unknown BLAS",
            "python": platform.python_version(),
        },
    }


def earlier(path: Path, header: dict[str, Any], again: Sequence[str]) -> dict[str, Any]:
    """The axes of an earlier scaling.json that are not measured again; ends the program if they do not fit these."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    kept = {axis: found for axis, found in before.pop("axes").items() if axis not in again}
    if kept and before != header:
        differing = ", ".join(name for name in header if before.get(name) != header[name])
        raise SystemExit(
            f"{path} has {', '.join(kept)} from another run, which differs in {differing}; "
            "give another --out, or measure all axes again"
        )
    return kept


def axes_named(text: str) -> list[str]:
    """The axes of a list with commas, for argparse."""
    names = text.split(",")
    if unknown := [name for name in names if name not in UNITS]:
        raise argparse.ArgumentTypeError(f"no axis is called {unknown[0]!r}; there are {', '.join(UNITS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", type=axes_named, default=list(UNITS), help="some of the axes, with commas")
    parser.add_argument("--out", type=Path, default=Path("build/scaling"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="three points of each axis, tiny")
    parser.add_argument("--redraw", action="store_true", help="tables and picture from scaling.json alone")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        train_once(args.point)
        return
    path = args.out / "scaling.json"
    if args.redraw:
        if not path.exists():
            parser.error(f"there is no {path} to redraw; measure first, or give its folder with --out")
        result = json.loads(path.read_text())
        for axis in (axis for axis in UNITS if axis in result["axes"]):
            show(axis, result["axes"][axis])
    else:
        header = {**here(), "quick": args.quick}
        args.out.mkdir(parents=True, exist_ok=True)
        result = {**header, "axes": earlier(path, header, args.axes)}
        for axis in args.axes:
            result["axes"][axis] = measure(axis, plan(args.quick))
            show(axis, result["axes"][axis])
            path.write_text(
                json.dumps(result, indent=1) + "\n"
            )  # what was measured is safe if a later axis fails
    draw(result, args.out / "scaling.png")


if __name__ == "__main__":
    main()

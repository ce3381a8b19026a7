"""What `tinyllm profile` shows of its measurements: tables for a terminal of 100 columns, and a chart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllm.debug.profiler import PRODUCT_SIZE, Profile, Row, combined
from tinyllm.system.errors import InputError
from tinyllm.training.step_profile import TrainingProfile

WIDTH = 100
"""Columns of a line at most."""
_MOST_ROWS = 12
_LEAST_SHARE = 0.01  # of the step, for a row of its own

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """A unit of a column; `text` writes a number in it."""

    name: str
    size: float
    decimals: int = 2

    def text(self, value: float) -> str:
        """The number alone."""
        return f"{value / self.size:,.{self.decimals}f}"


def report(
    step: Profile, whole: TrainingProfile, micro_batches: int, windows: int, length: int
) -> Iterator[str]:
    """The lines of all tables.

    Args:
        step: of the largest micro-batch, `windows` windows of `length` tokens. whole: of training.
        micro_batches: those of the worker that has most of them.
    """
    exact = whole.tokens == whole.workers * micro_batches * windows * length
    parts = (
        f"{micro_batches:,} micro-batch{'es' if micro_batches > 1 else ''} of {windows:,} x {length:,} tokens"
    )
    workers = "1 worker" if whole.workers == 1 else f"{whole.workers} workers at the same time"
    yield f"WHOLE TRAINING STEP, {workers}"
    yield from _training_table(whole, f"each worker {'' if exact else 'up to '}{parts}")
    yield ""
    yield f"ONE MICRO-BATCH of {windows:,} x {length:,} tokens, forward and backward, alone on one core"
    yield from _step_table(step)
    yield f"The limit is its products alone, as fast as this core multiplies {PRODUCT_SIZE} x {PRODUCT_SIZE} matrices."
    yield ""
    yield "BY OP"
    yield from _row_table(step, step.ops)
    yield ""
    yield "BY MODULE, those whose names differ in a number together"
    yield from _row_table(step, alike_together(step.modules))
    yield ""
    yield "GFLOP/s: matrix products of a row over all its time; in attention, of the keys that queries see."
    yield "kept: arrays made there that are held until backward."
    yield ""
    yield "MEMORY of arrays"
    yield from _memory_table(step, whole)


def _training_table(whole: TrainingProfile, parts: str) -> list[str]:
    time = _time_unit(whole.step_seconds)
    rows: list[Cells] = [("", time.name, "% of step", "")]
    for name, seconds, note in (
        ("gradients", whole.gradients_seconds, parts),
        ("adding up", whole.add_up_seconds, "the gradients of all workers, and their norm"),
        ("update", whole.update_seconds, "the optimizer"),
        ("step", whole.step_seconds, f"{whole.tokens_per_second:,.0f} tokens a second"),
    ):
        rows.append((name, time.text(seconds), _percent(seconds, whole.step_seconds), note))
    return _table(rows, left=(0, 3))


def _step_table(step: Profile) -> list[str]:
    time, flops = _time_unit(step.step_seconds), _flops_unit(step.product_flops)
    calls = sum(row.calls for row in step.ops)
    products = f"{flops.text(step.product_flops)} {flops.name} of matrix products"
    outside = "Python between ops, sums of gradients"
    if step.outside_seconds < 0:
        outside = "less than the noise; something else keeps the machine busy"
    rows: list[Cells] = [("", time.name, "% of step", "")]
    for name, seconds, note in (
        ("in ops", step.op_seconds, f"{calls:,} ops, forward and backward"),
        ("outside ops", step.outside_seconds, outside),
        ("step", step.step_seconds, f"from {time.text(step.fastest)} to {time.text(step.slowest)}"),
        ("limit", step.limit_seconds, f"{products} at {step.machine_rate / 1e9:,.1f} GFLOP/s"),
    ):
        rows.append((name, time.text(seconds), _percent(seconds, step.step_seconds), note))
    return _table(rows, left=(0, 3))


def _row_table(step: Profile, rows: Sequence[Row]) -> list[str]:
    """The table of all rows, the smallest added up as one."""
    large = [row for row in rows[:_MOST_ROWS] if row.seconds >= _LEAST_SHARE * step.step_seconds]
    small = rows[len(large) :]
    shown = list(rows) if len(small) < 2 else [*large, combined(f"other ({len(small)})", small)]
    total = combined("all ops", rows)
    time, flops, size = _time_unit(step.step_seconds), _flops_unit(total.flops), _bytes_unit(total.kept_bytes)
    header = (
        "",
        "calls",
        f"forward {time.name}",
        f"backward {time.name}",
        "% of step",
        flops.name,
        "GFLOP/s",
    )
    cells: list[Cells] = [(*header, f"kept {size.name}")]
    for row in [*shown, total]:
        rate = "" if row.product_rate is None or row is total else f"{row.product_rate / 1e9:,.1f}"
        times = (time.text(row.forward_seconds), time.text(row.backward_seconds))
        share = _percent(row.seconds, step.step_seconds)
        count = flops.text(row.flops) if row.flops else ""
        cells.append((row.name, f"{row.calls:,}", *times, share, count, rate, size.text(row.kept_bytes)))
    return _table(cells, left=(0,))


def _memory_table(step: Profile, whole: TrainingProfile) -> list[str]:
    memory, unit = step.memory, _bytes_unit(step.memory.parameters)
    each = f"{unit.text(memory.gradients)} for each worker"
    return _table(
        [
            ("", unit.name, ""),
            ("parameters", unit.text(memory.parameters), "shared by all workers"),
            ("optimizer state", unit.text(whole.optimizer_bytes), "shared by all workers"),
            ("gradients", unit.text(whole.gradient_bytes), each),
            (
                "kept for backward",
                unit.text(memory.kept),
                "by each worker, when forward of a micro-batch has ended",
            ),
            (
                "peak of a micro-batch",
                unit.text(memory.peak),
                "by each worker: what is kept, gradients, temporary arrays",
            ),
        ],
        left=(0, 2),
    )


def alike_together(rows: Sequence[Row]) -> list[Row]:
    """Modules whose paths differ in numbers alone as one row: blocks.0.norm and blocks.1.norm as blocks.*.norm."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name), []).append(row)
    return sorted((combined(name, found) for name, found in groups.items()), key=lambda row: -row.seconds)


def _time_unit(seconds: float) -> Unit:
    if seconds >= 10:
        return Unit("s", 1.0)
    return Unit("ms", 1e-3, 3 if seconds < 10e-3 else 2)


def _flops_unit(flops: float) -> Unit:
    return Unit("GFLOP", 1e9, 3) if flops >= 1e8 else Unit("MFLOP", 1e6, 3)


def _bytes_unit(size: float) -> Unit:
    return Unit("MB", 1e6) if size >= 1e6 else Unit("kB", 1e3)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}"


def _table(rows: Sequence[Cells], left: Sequence[int]) -> list[str]:
    """Aligned columns, those in `left` to the left; the first is cut in front where a line would be too wide."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(8, min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    lines = []
    for first, *others in rows:
        cut = first if len(first) <= widths[0] else "..." + first[3 - widths[0] :]
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip((cut, *others), widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def draw(step: Profile, path: Path, title: str) -> None:
    """A bar for each op, forward and backward, with what its matrix products would take at the machine's rate.

    Raises InputError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(step.ops[:_MOST_ROWS])
    if len(step.ops) > len(rows):
        rows.append(combined("other ops", step.ops[len(rows) :]))
    figure = Figure(figsize=(8, 1.4 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=f"ms of a step of {1e3 * step.step_seconds:,.2f} ms", title=title)
    places = range(len(rows))
    forward = [1e3 * row.forward_seconds for row in rows]
    axes.barh(places, forward, color="C0", label="forward")
    axes.barh(
        places, [1e3 * row.backward_seconds for row in rows], left=forward, color="C1", label="backward"
    )
    axes.barh(len(rows), 1e3 * max(0.0, step.outside_seconds), color="C7")
    limits = {
        place: 1e3 * row.product_flops / step.machine_rate
        for place, row in enumerate(rows)
        if row.product_flops
    }
    axes.vlines(
        list(limits.values()), [place - 0.4 for place in limits], [place + 0.4 for place in limits],
        color="black", label="limit: its matrix products at the machine's rate",
    )  # fmt: skip
    axes.set_yticks(range(len(rows) + 1), [*(row.name for row in rows), "outside ops"])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

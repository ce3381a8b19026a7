"""Tables of what ran and what a model is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinyllm import backend, ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import Op, Tensor, gradients
from tinyllm.backend import Array, current
from tinyllm.debug.origin import module_path
from tinyllm.nn import Module


@dataclass
class Row:
    """One op that ran.

    Attributes:
        module: path of the module it ran in. op: its name. formula: the first line of its documentation.
        inputs, output: shapes. dtype: of the output. bytes: of the output. flops: of forward; backward of a
        matrix product costs twice as many. forward_ms, backward_ms: milliseconds, the latter 0 where backward
        did not run.
    """

    module: str
    op: str
    formula: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    dtype: str
    bytes: int
    flops: int
    forward_ms: float = 0.0
    backward_ms: float = 0.0


@dataclass
class Trace(Observer):
    """The ops that ran, in order, as `rows`; printing it gives the table."""

    rows: list[Row] = field(default_factory=list)
    _begun: float = 0.0

    def before_forward(self, op: Op, inputs: tuple[Tensor, ...]) -> None:
        backend.synchronize()
        self._begun = time.perf_counter()

    def after_forward(self, op: Op, inputs: tuple[Tensor, ...], output: Array) -> None:
        backend.synchronize()
        elapsed = time.perf_counter() - self._begun
        shapes = tuple(x.shape for x in inputs)
        row = Row(
            module_path(), op.name, formula_of(op), shapes, tuple(output.shape), str(output.dtype),
            int(output.nbytes), op.flops(shapes, tuple(output.shape)), elapsed * 1e3,
        )  # fmt: skip
        op.row = row  # type: ignore[attr-defined]
        self.rows.append(row)

    def before_backward(self, op: Op, gradient: Array | Tensor) -> None:
        backend.synchronize()
        self._begun = time.perf_counter()

    def after_backward(
        self, op: Op, gradient: Array | Tensor, results: tuple[Array | Tensor | None, ...]
    ) -> None:
        backend.synchronize()
        row: Row | None = getattr(op, "row", None)
        if row is not None:
            row.backward_ms += (time.perf_counter() - self._begun) * 1e3

    def __str__(self) -> str:
        header = ("module", "op", "formula", "shapes", "dtype", "bytes", "FLOPs", "forward ms", "backward ms")
        lines = [
            (
                row.module,
                row.op,
                row.formula,
                f"{' '.join(map(shape_text, row.inputs))} -> {shape_text(row.output)}",
                row.dtype,
                f"{row.bytes:,}",
                f"{row.flops:,}",
                f"{row.forward_ms:.3f}",
                f"{row.backward_ms:.3f}",
            )
            for row in self.rows
        ]
        total = (
            "total", f"{len(self.rows)} ops", "", "", "", f"{sum(row.bytes for row in self.rows):,}",
            f"{sum(row.flops for row in self.rows):,}", f"{sum(row.forward_ms for row in self.rows):.3f}",
            f"{sum(row.backward_ms for row in self.rows):.3f}",
        )  # fmt: skip
        return table([header, *lines, total], right=(5, 6, 7, 8))


def trace(
    model: Callable[..., Tensor], tokens: Array, targets: Array | None = None, fast: bool = False
) -> Trace:
    """Run `model` on tokens (B, T) forward and backward and return the table of every op that ran.

    The loss is the cross-entropy against `targets` (B, T); without them, each token's next one. The ops are those of
    the formulas; with `fast`, those that training runs.

    Example:
        print(trace(model, tokens))
    """
    tokens = backend.asarray(tokens)
    if targets is None:
        tokens, targets = tokens[:, :-1], tokens[:, 1:]
    watch = Trace()
    parameters = list(model.parameters()) if isinstance(model, Module) else []
    with observe(watch), use_formulas(not fast):
        loss = ops.cross_entropy(model(tokens), targets)
        if loss.requires_grad:
            gradients(loss, parameters)
    return watch


def summary(model: Module, tokens: Array | None = None) -> str:
    """A table of the modules that hold parameters: shapes, numbers, bytes; and FLOPs for each token.

    FLOPs are those of a forward pass over `tokens` (B, T), by default one window of the model's context length,
    divided by the number of tokens.
    """
    lines: list[tuple[str, ...]] = [("module", "class", "parameters", "numbers", "bytes")]
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [(name, item) for name, item in module.members() if isinstance(item, Tensor)]
        fresh = [(name, item) for name, item in own if id(item) not in seen]
        fresh_ids = {id(item) for _, item in fresh}
        seen.update(id(item) for _, item in own)
        if not own:
            continue
        shapes = " ".join(
            f"{name}{shape_text(item.shape)}" + ("" if id(item) in fresh_ids else " (shared)")
            for name, item in own
        )
        numbers, size = sum(item.size for _, item in fresh), sum(int(item.data.nbytes) for _, item in fresh)
        lines.append((path, type(module).__name__, shapes, f"{numbers:,}", f"{size:,}"))
    numbers = sum(parameter.size for parameter in model.parameters())
    size = sum(int(parameter.data.nbytes) for parameter in model.parameters())
    lines.append(("total", type(model).__name__, "", f"{numbers:,}", f"{size:,}"))
    text = table(lines, right=(3, 4))
    if tokens is None and hasattr(model, "config"):
        tokens = current.xp.zeros((1, model.config.context_length), dtype=int)
    if tokens is not None:
        watch = Trace()
        with observe(watch), use_formulas():
            model(tokens)
        flops = sum(row.flops for row in watch.rows) / tokens.size
        text += f"\nforward, for each of {tokens.size} tokens: {flops:,.0f} FLOPs; about three times that with backward"
    return text


def formula_of(op: Op) -> str:
    """The first sentence of an op's documentation, without the shapes."""
    first = (type(op).__doc__ or "").strip().split("\n")[0]
    return first.split(" Shapes:")[0].rstrip(".")


def shape_text(shape: Sequence[int]) -> str:
    """(2, 3) as (2,3): short enough for a table."""
    return f"({','.join(map(str, shape))})"


def table(lines: Sequence[Sequence[str]], right: Sequence[int] = (), width: int = 48) -> str:
    """Lines of cells as aligned text; columns in `right` are aligned to the right, long cells are shortened."""
    shortened = [
        [cell if len(cell) <= width else cell[: width - 3] + "..." for cell in line] for line in lines
    ]
    widths = [max(len(line[column]) for line in shortened) for column in range(len(shortened[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(n) if column in right else cell.ljust(n)
            for column, (cell, n) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in shortened
    )

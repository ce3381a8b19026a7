"""What a drawn graph is made of: nodes, edges, groups, and the statistics on them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinyllm import backend
from tinyllm.backend import Array
from tinyllm.debug.tracing import shape_text

Kind = Literal["module", "ops", "op", "parameter", "input", "constant"]


@dataclass(frozen=True)
class Statistics:
    """Of an array: its number of elements, of the finite ones mean, standard deviation, least and greatest, and the
    number of NaNs and infinities. Of a complex array they are those of the magnitudes.

    Example:
        >>> str(Statistics.of(np.array([1.0, 3.0, np.inf])))
        '2 ± 1 in [1, 3], 1 infinite'
    """

    size: int
    mean: float
    std: float
    least: float
    greatest: float
    nans: int
    infinities: int

    @classmethod
    def of(cls, array: Array) -> Statistics:
        """The statistics of an array of any dtype and shape."""
        values = np.asarray(backend.to_numpy(array))
        values = np.abs(values) if values.dtype.kind == "c" else values
        size, nans, infinities = values.size, 0, 0
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            nans, infinities = int(np.isnan(values).sum()), int(np.isinf(values).sum())
            values = values[np.isfinite(values)]
        if not values.size:
            return cls(size, math.nan, math.nan, math.nan, math.nan, nans, infinities)
        # In float64, because squares of large float32 overflow; scaled, because those of large float64 do too.
        values = values.astype(np.float64)
        scale = float(np.abs(values).max()) or 1.0
        mean, std = float((values / scale).mean()) * scale, float((values / scale).std()) * scale
        return cls(size, mean, std, float(values.min()), float(values.max()), nans, infinities)

    @property
    def non_finite(self) -> int:
        """How many elements are NaN or infinite."""
        return self.nans + self.infinities

    @property
    def finite_text(self) -> str:
        """The finite part: the number itself if there is one, otherwise mean, deviation and range."""
        if self.size == self.non_finite:
            return "nothing finite" if self.size else "no elements"
        if self.size == 1:
            return f"{self.mean:.6g}"
        return f"{self.mean:.3g} ± {self.std:.3g} in [{self.least:.3g}, {self.greatest:.3g}]"

    @property
    def alarm(self) -> str:
        """The NaNs and infinities, "" where there are none."""
        counts = ((self.nans, "NaN"), (self.infinities, "infinite"))
        return ", ".join(f"{count:,} {name}" for count, name in counts if count)

    def __str__(self) -> str:
        return f"{self.finite_text}, {self.alarm}" if self.alarm else self.finite_text


@dataclass(frozen=True)
class Part:
    """A Tensor that a node stands for: an output, or a parameter that is used nowhere else."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: Statistics
    gradient: Statistics | None

    def __str__(self) -> str:
        gradient = "" if self.gradient is None else f"; gradient {self.gradient}"
        return f"{self.name} {shape_text(self.shape)} {self.dtype}: {self.value}{gradient}"


@dataclass(frozen=True)
class Node:
    """One box of the graph.

    Attributes:
        id: unique in the graph. kind: "module" for the ops of one call of a module, "ops" for several ops in a
            row, "op" for one, and "parameter", "input" (another leaf that requires a gradient) or "constant".
        path: of the module, of the module that an op ran in, or of a parameter. label: its name in the picture.
        ops: the names of the ops inside, in the order in which they ran.
        outputs: the Tensors that are used outside, the last made last; for a leaf, itself.
        parameters: those that only this node uses. formula: of an op, from its documentation.
        constants: numbers that are inputs of an op, with their positions. group: id of the group around it.
    """

    id: str
    kind: Kind
    path: str
    label: str
    ops: tuple[str, ...]
    outputs: tuple[Part, ...]
    parameters: tuple[Part, ...] = ()
    formula: str = ""
    constants: tuple[tuple[int, str], ...] = ()
    group: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.outputs[-1].shape

    @property
    def dtype(self) -> str:
        """Of the output."""
        return self.outputs[-1].dtype

    @property
    def value(self) -> Statistics:
        """Of the output's values."""
        return self.outputs[-1].value

    @property
    def gradient(self) -> Statistics | None:
        """Of the output's gradient, where one is known."""
        return self.outputs[-1].gradient

    @property
    def alarm(self) -> str:
        """The NaNs and infinities in the output, its gradient and the parameters, "" where there are none."""
        inside = [("parameters", part.value) for part in self.parameters]
        inside += [("parameter gradients", part.gradient) for part in self.parameters if part.gradient]
        inside.append(("value", self.value))
        if self.gradient is not None:
            inside.append(("gradient", self.gradient))
        return "; ".join(dict.fromkeys(f"{found.alarm} in {name}" for name, found in inside if found.alarm))

    def lines(self) -> list[str]:
        """What the box says below its label."""
        lines = [self._contents(), f"{shape_text(self.shape)} {self.dtype}"]
        if self.kind in ("parameter", "input", "constant"):
            lines = [lines[1] if self.label == self.kind else f"{self.kind} {lines[1]}"]
        lines.append(f"value {self.value.finite_text}")
        if self.gradient is not None:
            lines.append(f"gradient {self.gradient.finite_text}")
        return [line for line in lines if line]

    def details(self) -> list[str]:
        """Everything that is known, for a tooltip."""
        lines = [f"{self.kind} {self.path}" if self.path else self.kind, self.formula]
        if len(self.ops) > 1:
            lines.append(", ".join(f"{count} {name}" for name, count in Counter(self.ops).most_common()))
        lines += [f"input {position} is {number}" for position, number in self.constants]
        lines += [f"parameter {part}" for part in self.parameters]
        lines += [f"output {part}" if self.ops else str(part) for part in self.outputs]
        return [line for line in lines if line]

    def _contents(self) -> str:
        counts = Counter(self.ops)
        parts = []
        if self.kind == "ops":
            parts.append(
                ", ".join(name for name, _ in counts.most_common(3)) + (" ..." if len(counts) > 3 else "")
            )
        elif len(self.ops) > 2 and len(counts) > 1:
            parts.append(f"{len(self.ops):,} ops")
        elif self.kind != "op":
            parts += [name if count == 1 else f"{count:,} {name}" for name, count in counts.items()]
        if self.parameters:
            numbers = sum(part.value.size for part in self.parameters)
            several = "s" if len(self.parameters) > 1 else ""
            parts.append(f"{len(self.parameters)} parameter{several} of {numbers:,} numbers")
        parts += [f"input {position} = {number}" for position, number in self.constants]
        if len(self.outputs) > 1:
            parts.append(f"{len(self.outputs)} outputs, the last:")
        return ", ".join(parts)


@dataclass(frozen=True)
class Edge:
    """What one node made and another uses.

    Attributes:
        source, target: ids of nodes. shapes: of the Tensors that pass, each once.
        positions: of the target op's inputs, where the target is one op. uses: how often the target uses them.
    """

    source: str
    target: str
    shapes: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    uses: int


@dataclass(frozen=True)
class Group:
    """A module that is opened: the frame around its nodes. `parent` is the id of the group around it."""

    id: str
    path: str
    label: str
    parent: str | None

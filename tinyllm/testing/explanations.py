"""What may be wrong with a gradient: candidates that would be equal if a certain mistake had been made.

Each explanation yields triples: a mistake in words, an array, and the array that it equals if that is the mistake. The
first pair that is equal names the cause, so the most specific come first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing.differences import Function
from tinyllm.testing.numeric import ElementDerivatives

EXPAND_LIMIT = 512
"""Most elements to differentiate by when a missing sum over a broadcast axis is looked for."""

DifferentiateWith = Callable[[int, dict[int, Array], Any], ElementDerivatives | None]
"""Derivatives by input `position` at flat indices (all if None), with other values for some inputs; None where the
function does not take them."""


@dataclass(frozen=True)
class Finding:
    """A gradient that failed, and what is needed to find out why.

    Attributes:
        names, inputs: of the function. position: whose gradient failed. gradients: the analytic gradients of all.
        forward, backward: the function, and its gradient as a function of cotangent and inputs. output, cotangent: at
        these inputs. numeric: derivatives by some elements or all. differentiate: more derivatives. worst: flat index.
        tolerance: at the worst element. closeness: relative difference below which two gradients count as equal.
        wrong: how many of the compared elements are.
    """

    names: Sequence[str]
    inputs: Sequence[Array]
    position: int
    gradients: Sequence[Array]
    forward: Function
    backward: Callable[..., Sequence[Any]]
    output: Array
    cotangent: Array
    numeric: ElementDerivatives
    differentiate: DifferentiateWith
    worst: int
    tolerance: float
    closeness: float
    wrong: int

    @property
    def x(self) -> Array:
        """The input whose gradient failed."""
        return self.inputs[self.position]

    @property
    def gradient(self) -> Array:
        """Its gradient, in float64."""
        return self.gradients[self.position].astype(np.float64)

    @property
    def whole(self) -> Array | None:
        """The derivatives in the shape of the input, where all are known."""
        complete = self.numeric.indices.size == self.x.size
        return self.numeric.values.reshape(self.x.shape) if complete else None

    def known(self, gradient: Any) -> Array:
        """The elements of an array of the input's shape whose derivative is known."""
        return np.asarray(gradient, dtype=np.float64).reshape(-1)[self.numeric.indices]

    def close(self, candidate: Array, wanted: Array) -> bool:
        """Whether two arrays are equal, relative to the larger of the derivatives."""
        scale = float(np.abs(self.numeric.values).max(initial=0))
        return scale > 0 and bool((np.abs(candidate - wanted) <= self.closeness * scale).all())

    def backward_of(self, cotangent: Array, x: Array | None = None) -> Array | None:
        """The gradient for another cotangent, or another value of this input; None where the backward refuses it."""
        inputs = [v.copy() for v in self.inputs]
        inputs[self.position] = self.x.copy() if x is None else x
        try:
            with np.errstate(all="ignore"):
                found = np.asarray(
                    self.backward(cotangent.astype(self.cotangent.dtype), *inputs)[self.position]
                )
        except Exception:  # it was made for the values that it was given
            return None
        return found.astype(np.float64) if found.shape == self.x.shape and np.isfinite(found).all() else None

    def argument(self, position: int) -> str:
        """How reports name an argument."""
        return f"argument {position} ({self.names[position]})"


Candidates = Iterator[tuple[str, Array, Array]]


def cause(finding: Finding) -> str:
    """The likely cause in words, the most specific first."""
    for explanation in EXPLANATIONS:
        for words, candidate, wanted in explanation(finding):
            if finding.close(candidate, wanted):
                return words
    return "values differ in no simple way; compare the formula with the derivative of each term"


def _zero(finding: Finding) -> Candidates:
    if not finding.known(finding.gradient).any():
        words = "zero gradient: the backward returns zeros, or the input was detached from the graph"
        yield words, finding.numeric.values, finding.numeric.values


def _not_linear(finding: Finding) -> Candidates:
    thrice = finding.backward_of(3 * finding.cotangent)
    if thrice is not None:
        words = (
            "upstream gradient ignored: the backward returns the same for three times as much; multiply by it"
        )
        yield words, thrice, finding.gradient
        yield "upstream gradient squared: it is multiplied by twice", thrice / 9, finding.gradient


def _factor(finding: Finding) -> Candidates:
    numeric, gradient = finding.numeric.values, finding.known(finding.gradient)
    square = float((numeric * numeric).sum())
    factor = float((gradient * numeric).sum()) / square if square > 0 else 0.0
    if factor:
        sign = "sign flipped and a constant factor" if factor < 0 else "constant factor"
        words = f"{sign}: the gradient is {_number(abs(factor))} times the derivative{_hint(finding, factor)}"
        exact = abs(factor + 1) <= finding.closeness
        yield "sign flipped" if exact else words, gradient / factor, numeric


def _hint(finding: Finding, factor: float) -> str:
    """What a constant factor may mean."""
    shapes = (finding.x.shape, finding.output.shape)
    for n in sorted({*itertools.chain(*shapes), *map(math.prod, shapes)} - {0, 1}):
        if abs(factor * n - 1) <= finding.closeness * n:
            hint = f" (1/{n}: a mean where a sum belongs, over {n} elements"
            return hint + ("; or one of the two uses of this input is not counted)" if n == 2 else ")")
        if abs(factor / n - 1) <= finding.closeness and n != 2:
            return f" ({n}: the 1/{n} of a mean over {n} elements is missing)"
    if abs(factor - 0.5) <= finding.closeness:
        return " (typical of an input that is used twice when only one use is counted)"
    for n, m in itertools.permutations(sorted({*finding.x.shape} - {0}), 2):
        if abs(factor * m / n - 1) <= finding.closeness:
            return f" ({n}/{m}: a mean over the wrong axis, divided by its length {m} where {n} belongs)"
    return ""


def _reordered(finding: Finding) -> Candidates:
    gradient, numeric = finding.gradient, finding.numeric.values
    shape = gradient.shape
    if numeric.size < 2:
        return
    for order in itertools.islice(itertools.permutations(range(len(shape))), 1, 24):
        turned = gradient.transpose(order)
        if turned.shape == shape:
            words = f"transposed: the gradient is right with its axes in the order {order}"
            yield words, finding.known(turned), numeric
        rearranged = gradient.reshape(tuple(shape[axis] for axis in order)).transpose(np.argsort(order))
        words = f"transposed: reshaped where axes had to be exchanged (order {order})"
        yield words, finding.known(rearranged), numeric
    for axes in _subsets(shape):
        words = f"reversed along {_axes(axes)}, as by a kernel that is not flipped"
        yield words, finding.known(np.flip(gradient, axes)), numeric
    for axis in range(len(shape)):
        for shift in range(1, min(shape[axis], 9)):
            words = f"shifted by {shift} along axis {axis}"
            yield words, finding.known(np.roll(gradient, -shift, axis)), numeric
        steps = np.diff(gradient, axis=axis, prepend=0)
        turned = np.flip(np.cumsum(np.flip(steps, axis), axis=axis), axis)
        words = f"accumulated from the wrong end along axis {axis}: flip, add up, and flip back"
        yield words, finding.known(turned), numeric


def _exchanged(finding: Finding) -> Candidates:
    gradient = finding.known(finding.gradient)
    for other, x in enumerate(finding.inputs):
        if other != finding.position and x.shape == finding.x.shape and x.dtype.kind == "f":
            found = finding.differentiate(other, {}, finding.numeric.indices)
            if found is not None:
                words = f"this is the gradient of {finding.argument(other)}: two are exchanged"
                yield words, gradient, found.values


def _slice(finding: Finding) -> Candidates:
    """The gradient misses the sum over an axis along which the input was broadcast."""
    x, shape = finding.x, finding.output.shape
    pairs = zip(x.shape[::-1], shape[::-1], strict=False)
    fits = x.ndim <= len(shape) and all(n in (1, m) for n, m in pairs)
    if finding.whole is None or not fits or shape == x.shape or not 0 < math.prod(shape) <= EXPAND_LIMIT:
        return
    full = finding.differentiate(
        finding.position, {finding.position: np.array(np.broadcast_to(x, shape))}, None
    )
    if full is None:
        return
    lengths = (1,) * (len(shape) - x.ndim) + x.shape
    axes = tuple(axis for axis, n in enumerate(lengths) if n != shape[axis])
    for axis in axes:
        partial = full.values.reshape(shape).sum(axis=tuple(a for a in axes if a != axis), keepdims=True)
        for i in range(shape[axis]):
            words = f"not summed over broadcast axis {axis} of the output: it holds only slice {i}"
            yield words, finding.gradient.reshape(lengths), np.take(partial, [i], axis=axis)


def _another_input(finding: Finding) -> Candidates:
    """The derivative is right for another value of another input."""
    for other, a in enumerate(finding.inputs):
        if other == finding.position or a.dtype.kind != "f" or finding.numeric.indices.size > EXPAND_LIMIT:
            continue
        name = finding.argument(other)
        changes = [
            (f"{name} is used with reversed {_axes(axes)}: a kernel that is not flipped", np.flip(a, axes))
            for axes in _subsets(a.shape)
        ]
        if a.ndim >= 2 and a.shape[-1] == a.shape[-2]:
            changes.insert(
                0, (f"{name} is used without its transpose: W for W.T, or W.T for W", np.swapaxes(a, -1, -2))
            )
        changes.append((f"{name} has the wrong sign: turned the wrong way", -a))
        for words, value in changes:
            found = finding.differentiate(finding.position, {other: value}, finding.numeric.indices)
            if found is not None:
                yield words, finding.known(finding.gradient), found.values


def _forwards(finding: Finding) -> Candidates:
    """J g in place of J^T g, g the upstream gradient."""
    g = finding.cotangent
    if g.shape != finding.x.shape or g.size < 2:
        return

    def difference(step: float) -> Array:
        sides = []
        for sign in (1, -1):
            inputs = [x.copy() for x in finding.inputs]
            inputs[finding.position] = finding.x + (sign * step * g).astype(finding.x.dtype)
            sides.append(np.asarray(finding.forward(*inputs), dtype=np.float64))
        return (sides[0] - sides[1]) / (2 * step)

    with np.errstate(all="ignore"):
        along = (4 * difference(1e-3) - difference(2e-3)) / 3
    turns = abs(float(np.linalg.norm(along)) / float(np.linalg.norm(g)) - 1) < 1e-6
    words = (
        "a rotation turned the wrong way: backward turns back"
        if turns
        else "W for W.T: the derivative is applied as in forward (J g), and its transpose belongs there (J.T g)"
    )
    if g.size > 0 and np.isfinite(along).all():
        yield words, finding.known(finding.gradient), finding.known(along)


def _one_use(finding: Finding) -> Candidates:
    """One of two uses of the input is not counted."""
    missing = finding.numeric.values - finding.known(finding.gradient)
    text = "one of two uses of this input is not counted"
    g, y = finding.cotangent, finding.output
    if y.shape == finding.x.shape:
        yield (
            f"{text}: what is missing is the upstream gradient, as of x in x + h(x)",
            missing,
            finding.known(g),
        )
        with np.errstate(all="ignore"):
            product = np.where(finding.x == 0, np.nan, g * y / finding.x)
        words = f"{text}: x * h(x) is a product, and its factor "
        yield words + "x was left out", missing, finding.known(product)
        yield words + "h(x) was left out", finding.known(finding.gradient), finding.known(product)
    if y.ndim >= 2 and y.shape[-1] == y.shape[-2]:
        other = finding.backward_of(np.swapaxes(g, -1, -2))
        if other is not None:
            yield f"{text}, as in x @ x.T", missing, finding.known(other)


def _output_for_input(finding: Finding) -> Candidates:
    if finding.output.shape == finding.x.shape:
        found = finding.backward_of(finding.cotangent, finding.output.astype(finding.x.dtype))
        if found is not None:
            words = "the formula holds for the output: x stands where y = f(x) belongs, as x (1 - x) for y (1 - y)"
            yield words, finding.known(found), finding.numeric.values


def _taken_as_constant(finding: Finding) -> Candidates:
    """What is missing is a multiple of 1, of x or of the output along an axis: a mean, a variance or a sum through
    which every element has an influence on all others."""
    whole, x = finding.whole, finding.x.astype(np.float64)
    if whole is None:
        return
    missing = whole - finding.gradient
    ones = np.ones_like(x)
    for axis in reversed(range(x.ndim)):
        directions = [
            ("mean", [ones]),
            ("variance", [x - x.mean(axis=axis, keepdims=True)]),
            ("mean square", [x]),
        ]
        if finding.output.shape == x.shape:
            directions.append(("sum over the outputs", [finding.output.astype(np.float64)]))
        directions.append(("mean and variance", [ones, x]))
        for name, columns in directions:
            if x.shape[axis] >= len(columns) + 2:
                fitted = _fitted(np.moveaxis(missing, axis, -1), [np.moveaxis(v, axis, -1) for v in columns])
                words = _constant_words(finding, name, columns[0] if len(columns) == 1 else None, axis)
                yield words, np.moveaxis(fitted, -1, axis), missing
    for first, second in itertools.combinations(range(x.ndim), 2):
        if min(x.shape[first], x.shape[second]) >= 3:
            means = missing.mean(axis=first, keepdims=True) + missing.mean(axis=second, keepdims=True)
            words = f"mean over the wrong axis: that along axis {first} in place of axis {second}, or the other way"
            yield words, means - missing.mean(axis=(first, second), keepdims=True), missing


def _fitted(rows: Array, columns: Sequence[Array]) -> Array:
    """The best multiples of the columns, row by row: all (..., n) -> (..., n)."""
    basis = np.stack(columns, axis=-1)  # (..., n, k)
    return (basis @ (np.linalg.pinv(basis) @ rows[..., None]))[..., 0]


def _constant_words(finding: Finding, name: str, column: Array | None, axis: int) -> str:
    """Not subtracted, or a sum in its place: then the gradient points against the upstream gradient."""
    words = f"{name} taken as constant along axis {axis}: it depends on every element"
    if name in ("mean", "sum over the outputs"):
        words = f"mean not subtracted along axis {axis}: " + (
            "all elements are off by the same"
            if name == "mean"
            else "missing is y * sum(y * g), as of a softmax"
        )
    if column is None or finding.cotangent.shape != column.shape:
        return words
    is_opposite = [
        (
            (finding.gradient * column).sum(axis=axis) * (finding.cotangent * weight * column).sum(axis=axis)
            < 0
        ).all()
        for weight in (
            np.ones(1),
            *[a for a in finding.inputs if a.shape == column.shape[-1:] and axis == column.ndim - 1],
        )
    ]
    total = f"sum for mean along axis {axis}: what is subtracted for the {name} is a sum, and 1/n is missing"
    return total if any(is_opposite) and name != "sum over the outputs" else words


def _inner_transpose(finding: Finding) -> Candidates:
    """M @ a in place of M.T @ a, for a matrix M inside and another input a, as the scores of attention."""
    g, whole = finding.gradient, finding.whole
    for other, a in enumerate(finding.inputs):
        if (
            whole is None
            or g.ndim < 2
            or a.shape != g.shape
            or a.dtype.kind != "f"
            or g.shape[-2] > g.shape[-1]
        ):
            continue
        inner = g @ np.linalg.pinv(a.astype(np.float64))
        if finding.close(inner @ a, g):
            words = f"inner transpose missing: this is M @ a where M.T @ a belongs, a being {finding.argument(other)}"
            yield words, np.swapaxes(inner, -1, -2) @ a, whole


def _partly(finding: Finding) -> Candidates:
    """Whole rows are right and others wrong, such as those that an index names twice."""
    numeric, gradient = finding.whole, finding.gradient
    if numeric is None or gradient.ndim == 0:
        return
    off = np.abs(gradient - numeric) > finding.closeness * float(np.abs(numeric).max(initial=0))
    wrong = [int(row) for row in np.flatnonzero(off.reshape(len(off), -1).any(axis=1))]
    if not 0 < len(wrong) < len(off):
        return
    words = f"right but for {'row' if len(wrong) == 1 else 'rows'} {', '.join(map(str, wrong))} of {len(off)}"
    for position, indices in enumerate(finding.inputs):
        if indices.dtype.kind in "iu" and indices.size:
            rows, counts = np.unique(indices % len(off), return_counts=True)
            if wrong == [int(row) for row in rows[counts > 1]]:
                words += (
                    f", exactly those that {finding.argument(position)} names more than once: repeated rows overwrite "
                    "each other; add them up, as np.add.at does"
                )
                break
    yield words, numeric, numeric


def _subsets(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sets of axes that can be reversed."""
    axes = [axis for axis, n in enumerate(shape) if n > 1]
    return [chosen for count in (1, 2) for chosen in itertools.combinations(axes, count)]


def _axes(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"


def _number(value: float) -> str:
    rounded = round(value, 6)
    return str(rounded) if math.isclose(rounded, value, rel_tol=1e-9) else f"{value:.9g}"


EXPLANATIONS: tuple[Callable[[Finding], Candidates], ...] = (
    _zero, _not_linear, _factor, _reordered, _exchanged, _slice, _another_input, _forwards,
    _output_for_input, _taken_as_constant, _one_use, _inner_transpose, _partly,
)  # fmt: skip
"""All explanations, the most specific first."""

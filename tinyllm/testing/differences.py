"""Derivatives of one direction with an error bound: the complex step, and differences over steps of every size.

Both differentiate a scalar, sum(cotangent * f(x)), along one direction of one input. The difference of f is
taken before the sum, so that outputs which do not depend on x cancel exactly.

Sources: Squire and Trapp, "Using complex variables to estimate derivatives of real functions", SIAM Review
40 (1998), 110-112; Martins, Sturdza, Alonso, "The complex-step derivative approximation", ACM TOMS 29 (2003),
245-262; Ridders, "Accurate computation of F'(x)", Advances in Engineering Software 4 (1982), 75-76; More and Wild,
"Estimating derivatives of noisy simulations", ACM TOMS 38 (2012), on rounding inside f as noise that small steps show.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.backend import Array

Function = Callable[..., Any]
"""Arrays in, one array out."""

Direction = int | Array
"""What moves: one element by its flat index, or all elements along an array of the input's shape."""

COMPLEX_STEP = 1e-100
"""Nothing is subtracted in the complex step, so it may be far below the precision of x: relative to it, or to 1."""

EPSILON = float(np.finfo(np.float64).eps)
SMALLEST = float(np.finfo(np.float64).smallest_subnormal)

LEAST = 1e-150
"""The least scale of x that steps are relative to: below it they, and what they do, would underflow."""

STEPS = tuple(2.0 ** -(3 + 2 * k) for k in range(13))
"""The steps of the central differences, each a quarter of the one before, relative to a scale of x."""

LEVELS = 4
"""How many times differences are extrapolated to step 0: errors of order 2, 4, 6 and 8."""


@dataclass(frozen=True)
class Derivative:
    """The derivative of sum(cotangent * f) along one direction.

    Attributes:
        value: the estimate. error: a bound on its error, from the differences themselves.
        magnitude: sum(|cotangent * df|), which rounding errors of a gradient are relative to.
        forward, backward: the one-sided derivatives; both `value` where f is smooth.
        size: the largest |cotangent * f| among the outputs that move. reach: the step over which f was seen to follow
        its derivative: what rounding hides of f, of this size, it hides of the derivative over this step.
        kink: whether the one-sided derivatives disagree however small the step.
    """

    value: float
    error: float
    magnitude: float
    forward: float
    backward: float
    size: float
    reach: float
    kink: bool = False


UNKNOWN = Derivative(math.nan, math.inf, math.nan, math.nan, math.nan, math.nan, math.nan)
"""Where no step lies in the domain of f."""


def moved(
    inputs: Sequence[Array], position: int, direction: Direction, amount: complex, dtype: Any
) -> tuple[list[Array], float]:
    """Copies of `inputs` in `dtype` with one of them moved, and how far it really moved after rounding."""
    arrays = [x.astype(dtype) if x.dtype.kind == "f" else x for x in inputs]
    x = arrays[position]
    if not isinstance(direction, int):
        x += np.asarray(amount * direction).astype(dtype)
        return arrays, abs(amount)
    before = x.flat[direction]  # not reshape(-1): x may lie in memory in another order
    x.flat[direction] += amount
    if np.iscomplexobj(amount):
        return arrays, abs(amount)
    return arrays, abs(float(x.flat[direction]) - float(before))


def complex_step(
    f: Function, inputs: Sequence[Array], position: int, direction: Direction, cotangent: Array
) -> Derivative:
    """The derivative as Im f(x + ih) / h, exact to rounding for a function that is analytic around x.

    Example:
        >>> x = np.array([1.0, 2.0])
        >>> bool(abs(complex_step(np.exp, [x], 0, 1, np.ones(2)).value - np.exp(2.0)) < 1e-14)
        True
    """
    step = COMPLEX_STEP * min(own_scale(inputs[position], direction), 1.0)
    arrays, _ = moved(inputs, position, direction, step * 1j, np.complex128)
    output = call(f, arrays)
    slopes = np.imag(output) / step
    value = float((slopes * cotangent).sum())
    magnitude = float(np.abs(slopes * cotangent).sum())
    error = 4 * EPSILON * magnitude + 8 * step**2  # that of the third derivative
    error += 4 * float(np.abs(cotangent).sum()) * SMALLEST / step
    size = float(np.abs(cotangent * np.real(output) * (slopes != 0)).max(initial=0))
    return Derivative(value, error, magnitude, value, value, size, unit(inputs[position]))


@dataclass
class _Row:
    """What one step of the central differences gives."""

    step: float
    extrapolated: list[float]
    forward: float
    backward: float
    magnitude: float
    noise: float
    shown: float  # the part of the noise that the values at this step show

    @property
    def gap(self) -> float:
        """How far the one-sided differences are apart: shrinks with the step where f is smooth."""
        return abs(self.forward - self.backward)


def central_differences(
    f: Function,
    inputs: Sequence[Array],
    position: int,
    direction: Direction,
    cotangent: Array,
    base: Array | None = None,
    growth: float = 1.0,
) -> Derivative:
    """The derivative from differences over a sweep of steps, extrapolated to step 0 (Ridders).

    Large steps suffer from the curvature of f and small ones from rounding; the estimate with the least sum
    of both errors is taken. Steps at which f is not finite (outside its domain) are left out.

    A function may vary over a unit of x ((x + 1).log() at 1e-10) or over the size of x (log(x) there): steps begin at
    the larger, and once more at the smaller where the first did not come down to it. What the smaller ones say
    counts where both cannot be true.

    Args:
        f: the function. inputs: its arrays. position: which of them moves. direction: how.
        cotangent: the weights of the outputs. base: f(*inputs) if known.
        growth: the rounding errors of f in units of its own precision.

    Example:
        >>> x = np.array([1.0, 2.0])
        >>> derivative = central_differences(np.exp, [x], 0, 1, np.ones(2))
        >>> bool(abs(derivative.value - np.exp(2.0)) < derivative.error < 1e-9)
        True
        >>> kinked = central_differences(np.abs, [np.zeros(1)], 0, 0, np.ones(1))
        >>> kinked.kink, kinked.backward, kinked.forward
        (True, -1.0, 1.0)
    """
    sweep = _Sweep(f, inputs, position, direction, cotangent, growth, base)
    own = own_scale(inputs[position], direction)
    wide, narrow = max(own, 1.0), min(own, 1.0)
    best, smallest = UNKNOWN, math.inf
    for scale in (wide, narrow) if wide > 64 * narrow else (wide,):
        if smallest > scale / 64 or best.kink:
            derivative, smallest, settled = sweep.run(scale)
            best = _better(best, derivative, settled)
    moves = inputs[position].flat[direction] if isinstance(direction, int) else 1.0
    if (own > 1 and smallest == math.inf) or 0 < abs(moves) < LEAST:
        # x is so large that a unit is lost in it, and a sine there is noise; or no step is as small as x.
        return dataclasses.replace(best, error=math.inf)
    return best


def straight_difference(
    f: Function, inputs: Sequence[Array], position: int, index: int, cotangent: Array, growth: float = 1.0
) -> Derivative:
    """The derivative by one element from the longest way on which f is straight, beyond a unit of x.

    What is added to a large number is lost in rounding over small steps, and shows over long ones. UNKNOWN where f is
    not straight.
    """
    sweep = _Sweep(f, inputs, position, index, cotangent, growth, None)
    found, first = UNKNOWN, max(1.0, own_scale(inputs[position], index))
    for power in (0, 4, 8, 12, 16, 20):
        row = sweep.difference(2.0**power * first)
        if row is None:
            break
        if row.magnitude > 0:
            value, bent = row.extrapolated[0], row.gap - 2 * row.noise
            if not math.isnan(found.value):
                bent = max(bent, abs(value - found.value) - found.error - row.noise)
            if bent > 1e-6 * row.magnitude:
                break
            error = row.noise + 1e-6 * row.magnitude
            found = Derivative(value, error, row.magnitude, value, value, sweep.moved_size(), row.step)
    return found if found.reach > first else UNKNOWN


def sizes_far_away(
    f: Function, inputs: Sequence[Array], position: int, index: int, cotangent: Array
) -> float:
    """The largest |cotangent * f| among the outputs that depend on one element at all: that change over long ways."""
    base = call(f, inputs)
    changes = np.zeros(base.shape, dtype=bool)
    for step in (2.0**6, -(2.0**6), 2.0**20, -(2.0**20)):
        away, _ = moved(
            inputs,
            position,
            index,
            step * max(1.0, own_scale(inputs[position], index)),
            inputs[position].dtype,
        )
        try:
            changes |= call(f, away) != base
        except Exception:  # whatever f raises outside its domain
            continue
    return float(np.abs(cotangent * base * changes).max(initial=0))


def _better(wide: Derivative, narrow: Derivative, settled: Derivative | None) -> Derivative:
    """Of two estimates, the second from smaller steps, the one to believe. settled: the second one, if its steps agree
    with each other so well that no rounding is hidden inside f."""
    if math.isnan(wide.value) or math.isnan(narrow.value):
        return wide if math.isnan(narrow.value) else narrow
    apart = abs(wide.value - narrow.value)
    if settled and not settled.kink and (wide.kink or apart > 0.5 * abs(settled.value)):
        return settled
    if wide.kink:  # small steps may not reach across it, if they are not lost in rounding
        gap = max(abs(wide.forward - wide.backward), abs(narrow.value))
        return wide if narrow.error > 0.1 * gap else narrow
    if apart <= wide.error + narrow.error:
        return narrow if narrow.error < wide.error else wide
    if apart < 0.01 * abs(wide.value):  # another function close to x, or rounding: not known better
        return dataclasses.replace(wide, error=wide.error + apart)
    return narrow


class _Sweep:
    """Differences of one function along one direction, over steps of every size."""

    def __init__(
        self,
        f: Function,
        inputs: Sequence[Array],
        position: int,
        direction: Direction,
        cotangent: Array,
        growth: float,
        base: Array | None,
    ) -> None:
        self.f, self.inputs, self.position, self.direction = f, inputs, position, direction
        self.cotangent, self.growth = cotangent, growth
        self.base = call(f, inputs) if base is None else base
        self.largest = 1.0 if isinstance(direction, int) else float(np.abs(direction).max(initial=0)) or 1.0
        self.size = np.abs(self.base).astype(np.float64)  # of each output, up to a unit from x
        self.moves = np.zeros(self.base.shape, dtype=bool)

    def run(self, scale: float) -> tuple[Derivative, float, Derivative | None]:
        """The derivative from steps that begin at an eighth of `scale`, the smallest of them, and the derivative
        without rounding that values do not show, if the steps agree well enough with each other to say so."""
        rows: list[_Row] = []
        estimates: list[tuple[float, float, _Row]] = []  # spread, value, and where it comes from

        def best(hidden: float = 0.0) -> tuple[float, float, float]:
            return min(
                (spread + max(row.noise, hidden / row.step), v, row.step) for spread, v, row in estimates
            )

        hidden = 0.0
        for relative in STEPS:
            row = self.difference(relative * scale / self.largest)
            if row is None:
                continue  # a step outside the domain
            if rows:
                estimates += _extrapolate(row, rows[-1])
            rows.append(row)
            noises = [row.noise for row in rows]
            smooth = len(rows) > 2 and not _gap_stays(rows, noises)
            if smooth and best()[0] <= 1e-11 * row.magnitude + 4 * row.noise:
                break
        else:
            if len(rows) < 2:
                return UNKNOWN, math.inf, None
            # Rounding inside f may be larger than its values show. The smallest steps, where nothing else is left, do.
            pairs = itertools.pairwise(rows[-4:])
            hidden = max(abs(b.extrapolated[0] - a.extrapolated[0]) * b.step for a, b in pairs)
        settled = None
        spread, value, row = min(estimates, key=lambda estimate: estimate[0] + estimate[2].shown)
        if spread < 1e-3 * abs(value):
            settled = self._result(rows, [row.shown for row in rows], spread + row.shown, value, row.step)
            size = float(np.abs(self.cotangent * self.base * self.moves).max(initial=0))
            settled = dataclasses.replace(settled, size=size)
        smallest = rows[-1].step * self.largest if len(rows) > 2 else math.inf
        return self._result(rows, noises, *best(hidden)), smallest, settled

    def difference(self, step: float) -> _Row | None:
        """Differences at one step, or None where f is not finite there."""
        dtype = self.inputs[self.position].dtype
        above, up = moved(self.inputs, self.position, self.direction, step, dtype)
        below, down = moved(self.inputs, self.position, self.direction, -step, dtype)
        try:
            plus, minus = call(self.f, above), call(self.f, below)
        except Exception:  # whatever f raises outside its domain
            return None
        if not (np.isfinite(plus).all() and np.isfinite(minus).all()) or up == 0 or down == 0:
            return None
        wide = np.float64
        here = np.maximum(np.abs(plus), np.abs(minus)).astype(wide)
        size = np.maximum(self.size, here)
        if step <= 1:
            self.size = size
        self.moves |= (plus != self.base) | (minus != self.base)
        change = plus.astype(wide) - minus
        magnitude = float(np.abs(self.cotangent * change).sum()) / (up + down)
        precision = max(float(np.finfo(dtype).eps), float(np.finfo(plus.dtype).eps))
        smallest = float(np.finfo(plus.dtype).smallest_subnormal)
        # Of many estimates the one that looks best is taken, so its error is given some room.
        noise, shown = (
            4 * float((np.abs(self.cotangent) * self.moves * (2 * self.growth * precision * values + smallest)).sum())
            / (up + down)
            for values in (size, here)
        )  # fmt: skip
        if not isinstance(self.direction, int):  # the step of each element was rounded to the precision of x
            noise += precision * magnitude * input_scale(self.inputs[self.position]) / step
        return _Row(
            (up + down) / 2,
            [float((self.cotangent * change).sum()) / (up + down)],
            float((self.cotangent * (plus.astype(wide) - self.base)).sum()) / up,
            float((self.cotangent * (self.base.astype(wide) - minus)).sum()) / down,
            magnitude,
            noise,
            shown,
        )

    def moved_size(self) -> float:
        """The largest |cotangent * f| among the outputs that have moved."""
        return float(np.abs(self.cotangent * self.size * self.moves).max(initial=0))

    def _result(
        self, rows: Sequence[_Row], noises: Sequence[float], error: float, value: float, step: float
    ) -> Derivative:
        last, previous, noise = rows[-1], rows[-2], noises[-1]
        size = self.moved_size()
        reach = max(step, unit(self.inputs[self.position]))
        magnitude = max(last.magnitude, abs(value))
        varies = max(magnitude, *(row.magnitude for row in rows))
        if not _gap_stays(rows, noises) and error <= 1e-4 * varies + 32 * noise:
            return Derivative(value, error, magnitude, value, value, size, reach)
        slack = abs(last.forward - previous.forward) + abs(last.backward - previous.backward) + 2 * noise
        magnitude = max(magnitude, abs(last.forward), abs(last.backward))
        return Derivative(value, slack, magnitude, last.forward, last.backward, size, reach, kink=True)


def _extrapolate(row: _Row, previous: _Row) -> list[tuple[float, float, _Row]]:
    """Extend `row` by Neville's scheme; its entries, each with how far it is from those that it comes from."""
    found = [(abs(row.extrapolated[0] - previous.extrapolated[0]), row.extrapolated[0], row)]
    for level, older in enumerate(previous.extrapolated[: LEVELS - 1]):
        last = row.extrapolated[level]
        value = last + (last - older) / (16.0 ** (level + 1) - 1)
        row.extrapolated.append(value)
        found.append((max(abs(value - last), abs(value - older)), value, row))
    return found


def _gap_stays(rows: Sequence[_Row], noises: Sequence[float]) -> bool:
    """Whether the one-sided differences stay apart as the step shrinks, beyond what rounding explains."""
    pairs = list(zip(rows, noises, strict=True))
    clear = [(row, noise) for row, noise in pairs if 64 * noise < max(abs(row.forward), abs(row.backward))]
    (previous, _), (last, noise) = (clear if len(clear) > 1 else pairs)[-2:]
    return last.gap > 0.5 * previous.gap and last.gap > 32 * noise


def input_scale(x: Array) -> float:
    """The largest finite magnitude in x; 1 where there is none."""
    magnitudes = np.abs(x[np.isfinite(x)])
    return float(magnitudes.max(initial=0)) or 1.0


def own_scale(x: Array, direction: Direction) -> float:
    """The magnitude of what moves: of one element, or of x where that is 0 or all of it moves."""
    own = abs(float(x.flat[direction])) if isinstance(direction, int) else 0.0
    return max(own or input_scale(x), LEAST)


def unit(x: Array) -> float:
    """The change of x over which a function is taken to vary: 1, or the size of x where that is smaller."""
    return min(max(input_scale(x), LEAST), 1.0)


def call(f: Function, arrays: Sequence[Array]) -> Array:
    """f(*arrays) as an array, quietly: steps may leave the domain of f, and the caller looks for that."""
    with np.errstate(all="ignore"):
        return np.asarray(f(*arrays))

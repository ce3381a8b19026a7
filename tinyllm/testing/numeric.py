"""Numerical derivatives with an error bound: the complex step, and central differences over many steps.

Both differentiate a scalar, sum(cotangent * f(x)), along one direction of one input. The difference of f is
taken before the sum, so that outputs which do not depend on x cancel exactly.

Sources: Squire and Trapp, "Using complex variables to estimate derivatives of real functions", SIAM Review
40 (1998), 110-112; Martins, Sturdza, Alonso, "The complex-step derivative approximation", ACM TOMS 29 (2003),
245-262; Ridders, "Accurate computation of F'(x)", Advances in Engineering Software 4 (1982), 75-76.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinyllm.backend import Array

Function = Callable[..., Any]
"""Arrays in, one array out."""

Direction = int | Array
"""What moves: one element by its flat index, or all elements along an array of the input's shape."""

COMPLEX_STEP = 1e-20
"""Nothing is subtracted in the complex step, so it may be far below the precision of x."""

STEPS = tuple(2.0 ** -(3 + 2 * k) for k in range(13))
"""The steps of the central differences, each a quarter of the one before, relative to the size of x."""

LEVELS = 4
"""How many times differences are extrapolated to step 0: errors of order 2, 4, 6 and 8."""

METHODS = ("auto", "complex step", "central differences")

Method = Literal["auto", "complex step", "central differences"]


@dataclass(frozen=True)
class Derivative:
    """The derivative of sum(cotangent * f) along one direction.

    Attributes:
        value: the estimate. error: a bound on its error, from the differences themselves.
        magnitude: sum(|cotangent * df|), which rounding errors of a gradient are relative to.
        low, high: the smaller and the larger one-sided derivative; both `value` where f is smooth.
        kink: whether the one-sided derivatives disagree however small the step.
    """

    value: float
    error: float
    magnitude: float
    low: float
    high: float
    kink: bool = False


@dataclass(frozen=True)
class NumericGradient:
    """Derivatives by single elements of one input: `indices` are flat, the other arrays are beside them.

    Attributes are those of `Derivative`, as arrays of shape (number of indices,).
    """

    indices: Array
    values: Array
    errors: Array
    magnitudes: Array
    lows: Array
    highs: Array
    kinks: Array


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
    arrays, _ = moved(inputs, position, direction, COMPLEX_STEP * 1j, np.complex128)
    slopes = np.imag(_call(f, arrays)) / COMPLEX_STEP
    value = float((slopes * cotangent).sum())
    magnitude = float(np.abs(slopes * cotangent).sum())
    error = 4 * float(np.finfo(np.float64).eps) * magnitude
    return Derivative(value, error, magnitude, value, value)


@dataclass
class _Row:
    """What one step of the central differences gives."""

    extrapolated: list[float]
    forward: float
    backward: float
    magnitude: float
    noise: float

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
        >>> kinked.kink, kinked.low, kinked.high
        (True, -1.0, 1.0)
    """
    if base is None:
        base = _call(f, inputs)
    size = input_scale(inputs[position])
    largest = 1.0 if isinstance(direction, int) else float(np.abs(direction).max(initial=0)) or 1.0
    rows: list[_Row] = []
    best = (math.inf, math.nan)
    for step in STEPS:
        row = _difference(f, inputs, position, direction, cotangent, base, step * size / largest, growth)
        if row is None:
            continue  # a step outside the domain
        if rows:
            best = min(best, _extrapolate(row, rows[-1]))
        rows.append(row)
        if len(rows) > 2 and best[0] <= 1e-11 * row.magnitude + 4 * row.noise and not _gap_stays(rows):
            break
    if len(rows) < 2:
        return Derivative(math.nan, math.inf, math.nan, math.nan, math.nan)
    return _result(rows, *best)


def _difference(
    f: Function,
    inputs: Sequence[Array],
    position: int,
    direction: Direction,
    cotangent: Array,
    base: Array,
    step: float,
    growth: float,
) -> _Row | None:
    """Differences at one step, or None where f is not finite there."""
    dtype = inputs[position].dtype
    above, up = moved(inputs, position, direction, step, dtype)
    below, down = moved(inputs, position, direction, -step, dtype)
    plus, minus = _call(f, above), _call(f, below)
    if not (np.isfinite(plus).all() and np.isfinite(minus).all()) or up == 0 or down == 0:
        return None
    wide = np.float64
    change = plus.astype(wide) - minus
    magnitude = float(np.abs(cotangent * change).sum()) / (up + down)
    precision = max(float(np.finfo(dtype).eps), float(np.finfo(plus.dtype).eps))
    size = np.where(change != 0, np.abs(plus) + np.abs(minus), 0)
    total = float((np.abs(cotangent) * size).sum())
    # Of many estimates the one that looks best is taken, so its error is given some room.
    noise = 4 * growth * precision * total / (up + down)
    if not isinstance(direction, int):  # the step of each element was rounded to the precision of x
        noise += precision * magnitude * input_scale(inputs[position]) / step
    return _Row(
        [float((cotangent * change).sum()) / (up + down)],
        float((cotangent * (plus.astype(wide) - base)).sum()) / up,
        float((cotangent * (base.astype(wide) - minus)).sum()) / down,
        magnitude,
        noise,
    )


def _extrapolate(row: _Row, previous: _Row) -> tuple[float, float]:
    """Extend `row` by Neville's scheme; the (error, value) of its best entry."""
    best = (abs(row.extrapolated[0] - previous.extrapolated[0]) + row.noise, row.extrapolated[0])
    for level, older in enumerate(previous.extrapolated[: LEVELS - 1]):
        last = row.extrapolated[level]
        value = last + (last - older) / (16.0 ** (level + 1) - 1)
        row.extrapolated.append(value)
        best = min(best, (max(abs(value - last), abs(value - older)) + row.noise, value))
    return best


def _gap_stays(rows: Sequence[_Row]) -> bool:
    """Whether the one-sided differences stay apart as the step shrinks, beyond what rounding explains."""
    last, previous = rows[-1], rows[-2]
    return last.gap > 0.5 * previous.gap and last.gap > 32 * last.noise


def _result(rows: Sequence[_Row], error: float, value: float) -> Derivative:
    last, previous = rows[-1], rows[-2]
    magnitude = max(last.magnitude, abs(value))
    if not _gap_stays(rows) and error <= 1e-4 * magnitude + 32 * last.noise:
        return Derivative(value, error, magnitude, value, value)
    slack = abs(last.forward - previous.forward) + abs(last.backward - previous.backward) + 2 * last.noise
    low, high = sorted((last.forward, last.backward))
    magnitude = max(magnitude, abs(low), abs(high))
    return Derivative(value, slack, magnitude, low, high, kink=True)


def is_analytic(
    f: Function, inputs: Sequence[Array], cotangent: Array, generator: np.random.Generator
) -> bool:
    """Whether the complex step may be trusted for `f` around `inputs`, which are float64.

    f must accept complex arrays, return complex ones with the real part of the real evaluation, and agree
    roughly with a central difference along a random direction of every input, output by output.
    """
    base = _call(f, inputs)
    for position, x in enumerate(inputs):
        if x.dtype.kind != "f" or x.size == 0:
            continue
        direction = generator.uniform(0.5, 1.0, x.shape) * generator.choice([-1.0, 1.0], x.shape)
        arrays, _ = moved(inputs, position, direction, COMPLEX_STEP * 1j, np.complex128)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                output = _call(f, arrays)
        except Exception:  # whatever f raises on complex numbers, it is not meant for them
            return False
        if output.dtype.kind != "c" or output.shape != base.shape:
            return False
        if not np.allclose(output.real, base, rtol=1e-10, atol=1e-10 * input_scale(base)):
            return False
        disputed = np.ones(base.shape, dtype=bool)
        for step in STEPS[4:]:  # smaller and smaller, so that no step has to cross a kink close to x
            above, _ = moved(inputs, position, direction, step * input_scale(x), np.float64)
            below, _ = moved(inputs, position, direction, -step * input_scale(x), np.float64)
            slopes = (_call(f, above) - _call(f, below)) / (2 * step * input_scale(x))
            rough = 1e-5 * (np.abs(slopes) + input_scale(slopes) * 1e-2) + 1e-14 * np.abs(base) / step
            disputed &= ~(np.abs(output.imag / COMPLEX_STEP - slopes) <= rough)
        if disputed.any():
            return False
    return True


def rounding_growth(f: Function, inputs: Sequence[Array]) -> float:
    """How many units of its precision `f` loses, measured by running it in float32 and in float64.

    At least 1, at most 1e4; 16 where f does not run in both.
    """
    narrow = [x.astype(np.float32) if x.dtype.kind == "f" else x for x in inputs]
    wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in narrow]
    try:
        rounded, exact = _call(f, narrow), _call(f, wide)
    except Exception:  # f is written for one dtype; that is its right
        return 16.0
    comparable = rounded.dtype == np.float32 and exact.dtype == np.float64 and rounded.shape == exact.shape
    if not comparable or not (np.isfinite(rounded).all() and np.isfinite(exact).all()):
        return 16.0
    lost = float(np.abs(rounded - exact).max(initial=0)) / (
        float(np.finfo(np.float32).eps) * input_scale(exact)
    )
    return min(max(lost, 1.0), 1e4)


def input_scale(x: Array) -> float:
    """The largest finite magnitude in x; 1 where there is none."""
    magnitudes = np.abs(x[np.isfinite(x)])
    return float(magnitudes.max(initial=0)) or 1.0


def unit(x: Array) -> float:
    """The change of x over which a function is taken to vary: 1, or the size of x where that is smaller."""
    return min(input_scale(x), 1.0)


def numeric_gradient(
    f: Function,
    inputs: Sequence[Array],
    position: int,
    cotangent: Array,
    indices: Iterable[int] | None = None,
    analytic: bool = False,
    growth: float = 1.0,
) -> NumericGradient:
    """The derivatives of sum(cotangent * f) by single elements of input `position`.

    Args:
        indices: the flat indices to differentiate by; all if None.
        analytic: use the complex step, otherwise central differences.
        growth: the rounding errors of f in units of its own precision.
    """
    base = None if analytic else _call(f, inputs)
    wanted = range(inputs[position].size) if indices is None else list(indices)
    derivatives = []
    for index in wanted:
        if analytic:
            derivatives.append(complex_step(f, inputs, position, int(index), cotangent))
        else:
            derivatives.append(central_differences(f, inputs, position, int(index), cotangent, base, growth))
    return NumericGradient(
        np.array(wanted, dtype=int),
        np.array([d.value for d in derivatives], dtype=np.float64),
        np.array([d.error for d in derivatives], dtype=np.float64),
        np.array([d.magnitude for d in derivatives], dtype=np.float64),
        np.array([d.low for d in derivatives], dtype=np.float64),
        np.array([d.high for d in derivatives], dtype=np.float64),
        np.array([d.kink for d in derivatives], dtype=bool),
    )


def numerical_gradient(
    fn: Function, inputs: Sequence[Array], cotangent: Any = None, method: Method = "auto", seed: int = 0
) -> list[Array]:
    """The gradient of sum(cotangent * fn(*inputs)) for each input, from values of `fn` alone.

    Args:
        fn: NumPy arrays in, one array out. inputs: its arguments, floating-point arrays.
        cotangent: weights of the output's shape, ones if None.
        method: "complex step", "central differences", or "auto" for the first where it can be trusted.
        seed: of the random directions along which that is found out.

    Returns:
        One float64 array of its input's shape per input.

    Example:
        >>> numerical_gradient(lambda x, y: x * y, [np.array([2.0, 3.0]), np.array(5.0)])
        [array([5., 5.]), array(5.)]
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; choose one of {METHODS}")
    arrays = [np.asarray(x, dtype=np.float64) for x in inputs]
    base = _call(fn, arrays)
    weights = np.ones(base.shape) if cotangent is None else np.asarray(cotangent, dtype=np.float64)
    if weights.shape != base.shape:
        raise ValueError(f"cotangent has shape {weights.shape}, fn returns shape {base.shape}")
    analytic = method == "complex step" or (
        method == "auto" and is_analytic(fn, arrays, weights, np.random.default_rng(seed))
    )
    results = [
        numeric_gradient(fn, arrays, position, weights, None, analytic) for position in range(len(arrays))
    ]
    return [result.values.reshape(x.shape) for result, x in zip(results, arrays, strict=True)]


def _call(f: Function, arrays: Sequence[Array]) -> Array:
    """f(*arrays) as an array, quietly: steps may leave the domain of f, and the caller looks for that."""
    with np.errstate(all="ignore"):
        return np.asarray(f(*arrays))

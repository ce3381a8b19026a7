"""Numerical gradients of functions of arrays, by the complex step where it can be trusted, otherwise by differences."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing.differences import (
    COMPLEX_STEP,
    SMALLEST,
    STEPS,
    Derivative,
    Function,
    call,
    central_differences,
    complex_step,
    input_scale,
    moved,
    unit,
)  # fmt: skip

METHODS = ("auto", "complex step", "central differences")

Method = Literal["auto", "complex step", "central differences"]

NEARLY = 0.02
"""How much a derivative may differ, relative to its size, from that of a point beside it."""


class ElementDerivatives:
    """Derivatives by single elements of one input: `indices` are flat, the other arrays are beside them.

    Attributes are those of `Derivative`, as arrays of shape (number of indices,); low and high are the smaller and the
    larger of the one-sided derivatives.
    """

    def __init__(self, indices: Iterable[int], derivatives: Sequence[Derivative]) -> None:
        def gathered(name: str) -> Array:
            return np.array([getattr(derivative, name) for derivative in derivatives], dtype=np.float64)

        self.indices = np.array(indices, dtype=int)
        self.values, self.errors, self.magnitudes = map(gathered, ("value", "error", "magnitude"))
        self.forwards, self.backwards = gathered("forward"), gathered("backward")
        self.lows = np.minimum(self.forwards, self.backwards)
        self.highs = np.maximum(self.forwards, self.backwards)
        self.sizes, self.reaches = gathered("size"), gathered("reach")
        self.kinks = gathered("kink").astype(bool)

    def replace(self, place: int, derivative: Derivative) -> None:
        """Put a better derivative of the element at `place` among the indices."""
        self.values[place], self.errors[place] = derivative.value, derivative.error
        self.forwards[place], self.backwards[place] = derivative.forward, derivative.backward
        self.lows[place], self.highs[place] = sorted((derivative.forward, derivative.backward))
        self.magnitudes[place] = derivative.magnitude
        self.sizes[place], self.reaches[place] = derivative.size, derivative.reach

    def widen(self, places: Array, there: ElementDerivatives) -> None:
        """Let the elements at `places` have the derivatives `there` too, where these are known."""
        values = np.where(there.kinks | ~np.isfinite(there.values), np.nan, there.values)
        slack = NEARLY * np.abs(values)
        self.lows[places] = np.fmin(self.lows[places], values - slack)
        self.highs[places] = np.fmax(self.highs[places], values + slack)


def is_analytic(f: Function, inputs: Sequence[Array], generator: np.random.Generator) -> bool:
    """Whether the complex step may be trusted for `f` around `inputs`, which are float64.

    f must accept complex arrays, return complex ones with the real part of the real evaluation, and agree
    roughly with a central difference along a random direction of every input, output by output.
    """
    base = call(f, inputs)
    for position, x in enumerate(inputs):
        if x.dtype.kind != "f" or x.size == 0:
            continue
        direction = generator.uniform(0.5, 1.0, x.shape) * generator.choice([-1.0, 1.0], x.shape)
        tiny = COMPLEX_STEP * unit(x)
        arrays, _ = moved(inputs, position, direction, tiny * 1j, np.complex128)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                output = call(f, arrays)
        except Exception:  # whatever f raises on complex numbers, it is not meant for them
            return False
        if output.dtype.kind != "c" or output.shape != base.shape:
            return False
        if not np.allclose(output.real, base, rtol=1e-10, atol=1e-10 * input_scale(base)):
            return False
        disputed = np.ones(base.shape, dtype=bool)
        for step in itertools.chain(*([h * scale for h in STEPS[4:]] for scale in {1.0, input_scale(x)})):
            # Smaller and smaller, so that no step has to cross a kink close to x.
            above, _ = moved(inputs, position, direction, step, np.float64)
            below, _ = moved(inputs, position, direction, -step, np.float64)
            both = np.ones(base.shape, dtype=bool)
            for side, sign in ((above, 1), (below, -1)):  # the complex step sees but one side of a kink
                with np.errstate(invalid="ignore"):
                    slopes = sign * (call(f, side) - base) / step
                large = np.abs(slopes) + input_scale(slopes) * 1e-2
                lost = 1e-14 * np.abs(base) / step
                agrees = np.abs(output.imag / tiny - slopes) <= 1e-5 * large + lost + 16 * SMALLEST / tiny
                both &= agrees & (lost <= 1e-2 * large)
            disputed &= ~both
            if not disputed.any():
                break
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
        rounded, exact = call(f, narrow), call(f, wide)
    except Exception:  # f is written for one dtype; that is its right
        return 16.0
    comparable = rounded.dtype == np.float32 and exact.dtype == np.float64 and rounded.shape == exact.shape
    if not comparable or not (np.isfinite(rounded).all() and np.isfinite(exact).all()):
        return 16.0
    narrowest = np.finfo(np.float32)
    errors = np.maximum(np.abs(rounded - exact) - float(narrowest.tiny), 0)  # what underflows is not rounding
    lost = float(errors.max(initial=0)) / input_scale(exact) / float(narrowest.eps)
    return min(max(lost, 1.0), 1e4)


def element_derivatives(
    f: Function,
    inputs: Sequence[Array],
    position: int,
    cotangent: Array,
    indices: Iterable[int] | None = None,
    analytic: bool = False,
    growth: float = 1.0,
) -> ElementDerivatives:
    """The derivatives of sum(cotangent * f) by single elements of input `position`.

    Args:
        indices: the flat indices to differentiate by; all if None.
        analytic: use the complex step, otherwise central differences.
        growth: the rounding errors of f in units of its own precision.
    """
    base = None if analytic else call(f, inputs)
    wanted = list(range(inputs[position].size) if indices is None else indices)
    derivatives = []
    for index in wanted:
        if analytic:
            derivatives.append(complex_step(f, inputs, position, int(index), cotangent))
        else:
            derivatives.append(central_differences(f, inputs, position, int(index), cotangent, base, growth))
    return ElementDerivatives(wanted, derivatives)


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
    base = call(fn, arrays)
    weights = np.ones(base.shape) if cotangent is None else np.asarray(cotangent, dtype=np.float64)
    if weights.shape != base.shape:
        raise ValueError(f"cotangent has shape {weights.shape}, fn returns shape {base.shape}")
    analytic = method == "complex step" or (
        method == "auto" and is_analytic(fn, arrays, np.random.default_rng(seed))
    )
    results = [
        element_derivatives(fn, arrays, position, weights, None, analytic) for position in range(len(arrays))
    ]
    return [result.values.reshape(x.shape) for result, x in zip(results, arrays, strict=True)]

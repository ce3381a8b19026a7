"""Analytic gradients beside numerical derivatives: element by element, or along random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing import numeric
from tinyllm.testing.numeric import Derivative, Function, Method
from tinyllm.testing.report import Finding, GradientError

SAFETY = 16.0
"""How many times the expected rounding error a gradient may be off."""

SAMPLE = 64
"""Elements looked at one by one where an input is too large for all of them."""

COARSE = 1e-4
"""The tolerance, relative to a gradient, above which a random direction says too little."""


@dataclass(frozen=True)
class GradcheckResult:
    """What a check that passed has found.

    Attributes:
        method: "complex step" or "central differences". max_error: the largest absolute difference
        between gradient and derivative. tolerance: what was allowed where error and tolerance came closest.
        kinks: (argument name, index) of the elements at which the function is not differentiable, and the
        gradient was only asked to lie between the one-sided derivatives. comparisons: how many derivatives
        were compared. complete: whether every element was, or random directions of large inputs.
    """

    method: str
    max_error: float
    tolerance: float
    kinks: tuple[tuple[str, tuple[int, ...]], ...]
    comparisons: int
    complete: bool


@dataclass
class Problem:
    """One function and its gradient, as functions of arrays."""

    names: list[str]
    inputs: list[Array]
    evaluate: Function
    analytic: Callable[[Array], Sequence[Any]]
    generator: np.random.Generator
    method: Method
    max_elements: int
    projections: int
    rtol: float
    atol: float


@dataclass
class Tally:
    """What a check accumulates."""

    worst_ratio: float = -1.0
    max_error: float = 0.0
    tolerance: float = 0.0
    comparisons: int = 0
    complete: bool = True

    def add(self, error: float, tolerance: float) -> None:
        """Count one comparison."""
        self.comparisons += 1
        self.max_error = max(self.max_error, error)
        ratio = error / tolerance if tolerance > 0 else 0.0
        if ratio > self.worst_ratio:
            self.worst_ratio, self.tolerance = ratio, tolerance


class Comparison:
    """The gradients of one problem beside its numerical derivatives."""

    def __init__(self, problem: Problem, output: Array, cotangent: Array, found: Sequence[Any]) -> None:
        self.problem, self.output, self.cotangent = problem, output, cotangent
        self.found = [np.asarray(g) if g is not None else np.zeros(0) for g in found]
        floating = [x.dtype for x in problem.inputs if x.dtype.kind == "f"]
        self.epsilon = max(float(np.finfo(dtype).eps) for dtype in [output.dtype, *floating])
        self.growth = numeric.rounding_growth(problem.evaluate, problem.inputs)
        self.inputs = self._widened()
        self.analytic = self._analytic()
        self.tally = Tally()
        self.kinks: list[tuple[str, tuple[int, ...]]] = []

    def _widened(self) -> list[Array]:
        """The inputs in float64 where the function computes the same there, otherwise as they are."""
        inputs = self.problem.inputs
        if all(x.dtype != np.float32 for x in inputs):
            return inputs
        wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in inputs]
        try:
            with np.errstate(all="ignore"):
                output = np.asarray(self.problem.evaluate(*wide))
        except Exception:  # the function is written for float32 alone
            return inputs
        close = SAFETY * self.growth * self.epsilon * numeric.input_scale(self.output)
        same = output.dtype == np.float64 and output.shape == self.output.shape
        return wide if same and np.allclose(output, self.output, rtol=0, atol=close) else inputs

    def _analytic(self) -> bool:
        method = self.problem.method
        if method != "auto":
            return method == "complex step"
        if any(x.dtype.kind == "f" and x.dtype != np.float64 for x in self.inputs):
            return False
        return numeric.is_analytic(self.problem.evaluate, self.inputs, self.cotangent, self.problem.generator)

    def run(self) -> GradcheckResult:
        """Compare every input; raises GradientError at the first that is wrong."""
        floating = [position for position, x in enumerate(self.inputs) if x.dtype.kind == "f"]
        total = sum(self.inputs[position].size for position in floating)
        for position in floating:
            if total <= self.problem.max_elements or self.inputs[position].size <= self.problem.projections:
                self._compare_elements(position)
            else:
                self._compare_projections(position)
        return GradcheckResult(
            "complex step" if self.analytic else "central differences",
            self.tally.max_error, self.tally.tolerance, tuple(self.kinks), self.tally.comparisons,
            self.tally.complete,
        )  # fmt: skip

    def derivatives(self, position: int, indices: Any = None) -> numeric.NumericGradient:
        """Derivatives by the elements of one input at flat `indices`, all if None."""
        return numeric.numeric_gradient(
            self.problem.evaluate, self.inputs, position, self.cotangent, indices, self.analytic, self.growth
        )

    def _compare_elements(self, position: int, indices: Any = None) -> None:
        """Compare single elements of one input, all if `indices` is None."""
        derivatives = self.derivatives(position, indices)
        self._refuse_rough(position, derivatives)
        gradient = self.found[position].reshape(-1)[derivatives.indices].astype(np.float64)
        errors, tolerances = self._errors(position, gradient, derivatives)
        for error, tolerance in zip(errors.tolist(), tolerances.tolist(), strict=True):
            self.tally.add(error, tolerance)
        shape = self.inputs[position].shape
        for flat in derivatives.indices[derivatives.kinks]:
            index = tuple(int(i) for i in np.unravel_index(flat, shape))
            self.kinks.append((self.problem.names[position], index))
        if not (errors <= tolerances).all():
            raise self._finding(position, derivatives).error()

    def _errors(
        self, position: int, gradient: Array, derivatives: numeric.NumericGradient
    ) -> tuple[Array, Array]:
        """How far each element is from its derivative (or from the one-sided ones), and how far it may be."""
        below, above = derivatives.lows - gradient, gradient - derivatives.highs
        errors = np.maximum(np.maximum(below, above), 0)
        scale = float(np.abs(derivatives.values).max(initial=0))
        # A tenth of the largest for all: small elements are often differences of large terms. And the
        # function is only known to rounding, so that its derivative is not known better than over a unit of x.
        terms = derivatives.magnitudes + 0.1 * float(derivatives.magnitudes.max(initial=0))
        size = float(np.abs(self.cotangent * self.output).max(initial=0))
        terms += size / numeric.unit(self.inputs[position])
        rounding = self.epsilon * self.growth * SAFETY * terms
        return errors, derivatives.errors + rounding + self.problem.rtol * scale + self.problem.atol

    def _refuse_rough(self, position: int, derivatives: numeric.NumericGradient) -> None:
        """Raise where differences settle nowhere: a check against them would say nothing."""
        scale = float(np.nan_to_num(derivatives.magnitudes).max(initial=0))
        rough = ~np.isfinite(derivatives.values) | (derivatives.errors > 0.05 * scale)
        if rough.sum() > 0.5 * max(rough.size, 1):
            raise GradientError(
                "no numerical derivative: the function is too rough, or not finite, around these inputs",
                self.problem.names[position], position,
            )  # fmt: skip

    def _compare_projections(self, position: int) -> None:
        """Compare along random directions. Where one disagrees, or the differences along it are too coarse
        (it may cross many kinks at once), single elements decide: a random sample and the suspect."""
        self.tally.complete = False
        x = self.inputs[position]
        for _ in range(self.problem.projections):
            direction = self.problem.generator.standard_normal(x.shape)
            error, tolerance = self._projected(position, direction)
            if error <= tolerance <= COARSE * self._projected_size(position, direction):
                self.tally.add(error, tolerance)
                continue
            indices = self.problem.generator.choice(x.size, min(SAMPLE, x.size), replace=False)
            if not error <= tolerance:
                indices = np.unique(np.append(indices, self._locate(position, direction)))
            self._compare_elements(position, indices)

    def _along(self, position: int, direction: Array) -> Derivative:
        f = self.problem.evaluate
        if self.analytic:
            return numeric.complex_step(f, self.inputs, position, direction, self.cotangent)
        return numeric.central_differences(
            f, self.inputs, position, direction, self.cotangent, growth=self.growth
        )

    def _projected_size(self, position: int, direction: Array) -> float:
        """What the rounding errors of a gradient add up to along a random direction, in units of epsilon:
        they are independent of it, so that they add as squares."""
        return float(np.linalg.norm((self.found[position].astype(np.float64) * direction).reshape(-1)))

    def _projected(self, position: int, direction: Array) -> tuple[float, float]:
        """The error of the gradient along a direction, and the error allowed."""
        derivative = self._along(position, direction)
        value = float((self.found[position].astype(np.float64) * direction).sum())
        error = max(derivative.low - value, value - derivative.high, 0.0)
        if math.isnan(derivative.value):
            error = math.nan
        size = self._projected_size(position, direction)
        size += float(np.linalg.norm((self.cotangent * self.output).reshape(-1))) / numeric.unit(
            self.inputs[position]
        )
        tolerance = derivative.error + self.epsilon * self.growth * SAFETY * size
        return error, float(tolerance) + self.problem.rtol * size + self.problem.atol

    def _locate(self, position: int, direction: Array) -> int:
        """The flat index of a wrong element, by halving the part of the direction that disagrees."""
        first, last = 0, direction.size
        while last - first > 1:
            middle = (first + last) // 2
            misses = []
            for start, stop in ((first, middle), (middle, last)):
                part = np.zeros_like(direction)
                part.reshape(-1)[start:stop] = direction.reshape(-1)[start:stop]
                error, tolerance = self._projected(position, part)
                misses.append(error / tolerance if tolerance > 0 else error)
            first, last = (first, middle) if misses[0] >= misses[1] else (middle, last)
        return first

    def _finding(self, position: int, derivatives: numeric.NumericGradient) -> Finding:
        gradient = self.found[position].reshape(-1)[derivatives.indices].astype(np.float64)
        errors, tolerances = self._errors(position, gradient, derivatives)
        worst = int(np.argmax(errors - tolerances))
        scale = float(np.abs(derivatives.values).max(initial=0)) or 1.0
        closeness = min(10 * float(tolerances.max()) / scale, 1e-2)
        # Two gradients count as equal well below the error that failed.
        closeness = min(closeness, 0.3 * float(errors.max()) / scale) if errors.max() > 0 else closeness
        return Finding(
            self.problem.inputs, self.problem.names, position, self.found, derivatives,
            lambda other, indices: self.derivatives(other, indices).values,
            lambda shape: self._expanded(position, shape),
            self.output.shape, int(derivatives.indices[worst]), float(tolerances[worst]), closeness,
        )  # fmt: skip

    def _expanded(self, position: int, shape: tuple[int, ...]) -> Array | None:
        """The derivatives by an input broadcast to `shape`, None where the function does not take it so."""
        inputs = list(self.inputs)
        inputs[position] = np.array(np.broadcast_to(inputs[position], shape))
        try:
            if np.asarray(self.problem.evaluate(*inputs)).shape != self.output.shape:
                return None
        except Exception:  # a function may insist on the shape that it was given
            return None
        found = numeric.numeric_gradient(
            self.problem.evaluate, inputs, position, self.cotangent, None, self.analytic, self.growth
        )
        return found.values.reshape(shape)

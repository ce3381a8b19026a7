"""Analytic gradients beside numerical derivatives: element by element, or along random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing import differences, numeric
from tinyllm.testing.differences import Derivative, Function
from tinyllm.testing.explanations import Finding
from tinyllm.testing.kinks import Kink, apart, shared_kink
from tinyllm.testing.numeric import Method
from tinyllm.testing.report import GradientError, report

SAFETY = 16.0
"""How many times the expected rounding error a gradient may be off."""

SAMPLE = 64
"""Elements looked at one by one where an input is too large for all of them."""

NARROW = (np.float16, np.float32)
"""Dtypes whose functions are differentiated in float64."""

MATERIAL = 1e-3
"""The tolerance, for a cotangent near 1, from which on a check that could not have failed is an error."""

TINY = 1e-3
"""The largest magnitude of an input below which the complex step is not trusted."""

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
        were compared. complete: whether every element was, or random directions of large inputs. unjudged: (argument
        name, index) of the elements whose tolerance is above the gradient itself: nothing is known of them.
    """

    method: str
    max_error: float
    tolerance: float
    kinks: tuple[tuple[str, tuple[int, ...]], ...]
    comparisons: int
    complete: bool
    unjudged: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Problem:
    """One function and its gradient, as functions of arrays: `analytic(cotangent, *inputs)`."""

    names: list[str]
    inputs: list[Array]
    evaluate: Function
    analytic: Callable[..., Sequence[Any]]
    generator: np.random.Generator
    method: Method
    max_elements: int
    projections: int
    rtol: float
    atol: float
    nearby: bool


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
    """The gradients of one problem beside its numerical derivatives.

    A float32 function is differentiated in float64 where it runs there, and so is its backward run: what that says is
    compared with the derivative, to the rounding of float64, and the gradients in float32 to their own.
    """

    def __init__(self, problem: Problem, output: Array, cotangent: Array, found: Sequence[Any]) -> None:
        self.problem, self.output, self.cotangent = problem, output, cotangent
        self.given = [np.asarray(g) if g is not None else np.zeros(0) for g in found]
        floating = [x.dtype for x in problem.inputs if x.dtype.kind == "f"]
        self.epsilon = max(float(np.finfo(dtype).eps) for dtype in [output.dtype, *floating])
        self.growth = numeric.rounding_growth(problem.evaluate, problem.inputs)
        self.inputs = self._widened()
        self.precision = self.epsilon if self.inputs is problem.inputs else differences.EPSILON
        self.found = self._wide_gradients()
        self.scatter = self._scatter(self.given, problem.inputs, output.dtype)
        self.wide_scatter = (
            self.scatter if self.found is self.given else self._scatter(self.found, self.inputs, np.float64)
        )
        self.analytic = self._analytic()
        self.tally = Tally()
        self.kinks: list[Kink] = []
        self.unjudged: list[tuple[str, tuple[int, ...]]] = []
        self.unknown: list[GradientError] = []

    def _widened(self) -> list[Array]:
        """The inputs in float64 where the function computes the same there, otherwise as they are."""
        inputs = self.problem.inputs
        wide = [x.astype(np.float64) if x.dtype in NARROW else x for x in inputs]
        if all(x.dtype not in NARROW for x in inputs):
            return inputs
        try:
            with np.errstate(all="ignore"):
                output = np.asarray(self.problem.evaluate(*wide))
        except Exception:  # the function is written for float32 alone
            return inputs
        close = SAFETY * self.growth * self.epsilon * differences.input_scale(self.output)
        same = output.dtype == np.float64 and output.shape == self.output.shape
        return wide if same and np.allclose(output, self.output, rtol=0, atol=close) else inputs

    def _wide_gradients(self) -> list[Array]:
        """The gradients at the widened inputs, where the backward computes them; otherwise those given."""
        if self.inputs is self.problem.inputs:
            return self.given
        try:
            with np.errstate(all="ignore"):
                found = list(self.problem.analytic(self.cotangent.copy(), *[x.copy() for x in self.inputs]))
        except Exception:  # the backward is written for float32 alone
            return self.given
        wide = [np.asarray(g) if g is not None else np.zeros(0) for g in found]
        same = [(g.shape, bool(np.isfinite(g).all())) for g in wide] == [(g.shape, True) for g in self.given]
        return wide if same else self.given

    def _scatter(self, found: Sequence[Array], inputs: Sequence[Array], dtype: Any) -> list[float]:
        """How far rounding moves each gradient: what a last bit of the upstream gradient changes in any element.

        Terms may cancel in a backward that the function does not show, as the mean that a softmax of one subtracts.
        """
        scatter = [0.0 for _ in found]
        for _ in range(2):
            rounding = self.problem.generator.uniform(-2, 2, self.cotangent.shape) * np.finfo(dtype).eps
            cotangent = (self.cotangent * (1 + rounding)).astype(dtype)
            again = self.problem.analytic(cotangent, *[x.copy() for x in inputs])
            for position, (before, after) in enumerate(zip(found, again, strict=True)):
                if before.size and after is not None and np.shape(after) == before.shape:
                    change = float(np.abs(np.asarray(after, np.float64) - before).max())
                    scatter[position] = max(scatter[position], change)
        return scatter

    def _analytic(self) -> bool:
        method = self.problem.method
        if method != "auto":
            return method == "complex step"
        floating = [x for x in self.inputs if x.dtype.kind == "f"]
        if any(x.dtype != np.float64 or differences.input_scale(x) < TINY for x in floating):
            return False  # a term that is not analytic may not show at tiny inputs
        return numeric.is_analytic(self.problem.evaluate, self.inputs, self.problem.generator)

    def run(self) -> GradcheckResult:
        """Compare every input; raises GradientError at the first that is wrong."""
        __tracebackhide__ = True
        floating = [position for position, x in enumerate(self.inputs) if x.dtype.kind == "f"]
        total = sum(self.inputs[position].size for position in floating)
        for position in floating:
            if total <= self.problem.max_elements or self.inputs[position].size <= self.problem.projections:
                self._compare_elements(position)
            else:
                self._compare_projections(position)
        self._compare_kinks_together()
        return GradcheckResult(
            "complex step" if self.analytic else "central differences",
            self.tally.max_error, self.tally.tolerance,
            tuple((self.problem.names[kink.position], self._index(kink.position, kink.flat)) for kink in self.kinks),
            self.tally.comparisons, self.tally.complete, tuple(self.unjudged),
        )  # fmt: skip

    def _index(self, position: int, flat: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(flat, self.inputs[position].shape))

    def derivatives(self, position: int, indices: Any = None) -> numeric.ElementDerivatives:
        """Derivatives by the elements of one input at flat `indices`, all if None."""
        return numeric.element_derivatives(
            self.problem.evaluate, self.inputs, position, self.cotangent, indices, self.analytic, self.growth
        )

    def _compare_elements(self, position: int, indices: Any = None) -> None:
        """Compare single elements of one input, all if `indices` is None."""
        __tracebackhide__ = True
        derivatives = self.derivatives(position, indices)
        for found in (self.found, self.given) if self.found is not self.given else (self.found,):
            self._compare_gradients(position, derivatives, found)
        for place in np.flatnonzero(derivatives.kinks & np.isfinite(derivatives.errors)):
            sides = float(derivatives.forwards[place]), float(derivatives.backwards[place])
            self.kinks.append(Kink(position, int(derivatives.indices[place]), *sides))

    def _compare_gradients(
        self, position: int, derivatives: numeric.ElementDerivatives, found: Sequence[Array]
    ) -> None:
        """Compare with the gradients in float64, or with those in the dtype of the inputs."""
        __tracebackhide__ = True
        gradient = found[position].reshape(-1)[derivatives.indices].astype(np.float64)
        errors, tolerances = self._errors(position, derivatives, found)
        for place in np.flatnonzero((errors > tolerances) | (derivatives.sizes == 0))[:SAMPLE]:
            # An output may depend on x, and not show it over the steps that were taken.
            away = differences.sizes_far_away(
                self.problem.evaluate, self.inputs, position, int(derivatives.indices[place]), self.cotangent
            )
            if away == 0 and gradient[place]:  # or not over any step
                away = float(np.abs(self.cotangent * self.output).max(initial=0))
            derivatives.sizes[place] = max(derivatives.sizes[place], away)
        errors, tolerances = self._errors(position, derivatives, found)
        sizes = np.maximum(np.abs(gradient), np.abs(derivatives.values))
        doubtful = np.flatnonzero((tolerances > 0.1 * sizes) & (tolerances > differences.EPSILON))
        doubtful = doubtful[~derivatives.kinks[doubtful]]  # a staircase is straight from far away
        for place in doubtful[np.argsort(-sizes[doubtful])][: SAMPLE // 4]:
            self._look_further(position, derivatives, int(place))
        errors, tolerances = self._errors(position, derivatives, found)
        beyond = np.flatnonzero((errors > tolerances) & derivatives.kinks)[:SAMPLE]
        if beyond.size:
            self._look_beside(position, derivatives, beyond)
            errors, tolerances = self._errors(position, derivatives, found)
        known = np.isfinite(derivatives.values)
        for error, tolerance in zip(errors[known].tolist(), tolerances[known].tolist(), strict=True):
            self.tally.add(error, tolerance)
        if not (errors <= tolerances)[known].all():
            raise report(self._finding(position, derivatives, found))
        if found is self.found:
            self._note_unjudged(position, derivatives, sizes, tolerances)

    def _look_further(self, position: int, derivatives: numeric.ElementDerivatives, place: int) -> None:
        """Where rounding hides a derivative over a unit of x, it may show over a longer way: of what is added, say."""
        far = differences.straight_difference(
            self.problem.evaluate,
            self.inputs,
            position,
            int(derivatives.indices[place]),
            self.cotangent,
            self.growth,
        )
        error, reach = derivatives.errors[place], derivatives.reaches[place]
        hidden = error + self.precision * self.growth * SAFETY * derivatives.sizes[place] / reach
        if far.reach > reach and abs(far.value - derivatives.values[place]) <= hidden + far.error < math.inf:
            derivatives.replace(place, far)

    def _look_beside(self, position: int, derivatives: numeric.ElementDerivatives, places: Array) -> None:
        """At a kink a gradient may also be that of a point beside it: of equal elements to be sorted, in one order."""
        for inputs in apart(self.inputs):
            there = numeric.element_derivatives(
                self.problem.evaluate,
                inputs,
                position,
                self.cotangent,
                derivatives.indices[places],
                False,
                self.growth,
            )
            derivatives.widen(places, there)

    def _note_unjudged(
        self, position: int, derivatives: numeric.ElementDerivatives, sizes: Array, tolerances: Array
    ) -> None:
        """Say of which elements nothing is known: their tolerance is above the gradient itself."""
        name = self.problem.names[position]
        hopeless = ~(tolerances <= sizes) & ~((sizes == 0) & (tolerances < MATERIAL))
        self.unjudged += [(name, self._index(position, int(flat))) for flat in derivatives.indices[hopeless]]
        if hopeless.size and (hopeless & ~(tolerances < MATERIAL)).all():
            worst = int(np.argmax(np.nan_to_num(tolerances, nan=np.inf)))
            if np.isfinite(derivatives.values).any():
                cause = (
                    f"cannot be judged: rounding allows an error of {tolerances[worst]:.3g}, and the gradient is "
                    f"{sizes[worst]:.3g}; the function is too rough here, or too large for its dtype: check it on "
                    "smaller values, in float64, or without the large term"
                )
            else:
                cause = "cannot be judged: the function is not finite around these inputs: no numerical derivative"
            self.unknown.append(GradientError(cause, name, position))

    def _errors(
        self, position: int, derivatives: numeric.ElementDerivatives, found: Sequence[Array]
    ) -> tuple[Array, Array]:
        """How far each element is from its derivative (or from the one-sided ones), and how far it may be."""
        gradient = found[position].reshape(-1)[derivatives.indices].astype(np.float64)
        dtype = found[position].dtype
        below, above = derivatives.lows - gradient, gradient - derivatives.highs
        errors = np.maximum(np.maximum(below, above), 0)
        scale = float(np.abs(np.nan_to_num(derivatives.values)).max(initial=0))
        # A sum is known to the rounding of its terms. And the function is only known to rounding, so that its
        # derivative is not known better than over the way on which it is straight.
        terms = derivatives.magnitudes + derivatives.sizes / derivatives.reaches
        rounding = float(np.finfo(dtype).eps) * self.growth * SAFETY * terms
        rounding += SAFETY * (self.wide_scatter if found is self.found else self.scatter)[position]
        rounding += SAFETY * float(np.finfo(dtype).smallest_subnormal)
        tolerances = derivatives.errors + rounding + self.problem.rtol * scale + self.problem.atol
        return errors, np.nan_to_num(tolerances, nan=np.inf, posinf=np.inf)

    def _compare_kinks_together(self) -> None:
        __tracebackhide__ = True
        f, inputs = self.problem.evaluate, self.inputs
        found = shared_kink(self.kinks, f, inputs, self.cotangent, self.found, self.growth)
        if found is not None:
            first = self.kinks[0]
            raise GradientError(
                f"shared kink counted more than once: the gradients of {len(self.kinks)} elements at it, such as equal "
                f"maxima, add up to {found[0]:.6g}, and moved together they change the function by {found[1]:.6g}; "
                "give it to one of them, or to each its share",
                self.problem.names[first.position], first.position, self._index(first.position, first.flat), *found,
            )  # fmt: skip

    def _compare_projections(self, position: int) -> None:
        """Compare along random directions. Where one disagrees, or the differences along it are too coarse
        (it may cross many kinks at once), single elements decide: a random sample and the suspect."""
        __tracebackhide__ = True
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
        self._compare_dtypes(position)

    def _compare_dtypes(self, position: int) -> None:
        """The gradient in the dtype of the inputs beside that in float64, of a large input."""
        __tracebackhide__ = True
        if self.found is self.given:
            return
        wide, own = self.found[position].astype(np.float64), self.given[position]
        size = float(np.abs(self.cotangent * self.output).max(initial=0)) / differences.unit(
            self.inputs[position]
        )
        terms = np.abs(wide) + 0.1 * float(np.abs(wide).max(initial=0)) + size
        errors = np.abs(own - wide)
        tolerances = (
            self.epsilon * self.growth * SAFETY * terms + self.problem.rtol * terms + self.problem.atol
        )
        if not (errors <= tolerances).all():
            flat = int(np.argmax(errors - tolerances))
            raise GradientError(
                f"wrong in {own.dtype} alone: the backward gives another gradient in float64, which is right",
                self.problem.names[position], position, self._index(position, flat),
                float(own.reshape(-1)[flat]), float(wide.reshape(-1)[flat]),
            )  # fmt: skip

    def _along(self, position: int, direction: Array) -> Derivative:
        f = self.problem.evaluate
        if self.analytic:
            return differences.complex_step(f, self.inputs, position, direction, self.cotangent)
        return differences.central_differences(
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
        low, high = sorted((derivative.forward, derivative.backward))
        error = max(low - value, value - high, 0.0)
        if math.isnan(derivative.value):
            error = math.nan
        size = self._projected_size(position, direction)
        size += float(np.linalg.norm((self.cotangent * self.output).reshape(-1))) / differences.unit(
            self.inputs[position]
        )
        epsilon = float(np.finfo(self.found[position].dtype).eps)
        tolerance = derivative.error + epsilon * self.growth * SAFETY * size
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

    def _finding(
        self, position: int, derivatives: numeric.ElementDerivatives, found: Sequence[Array]
    ) -> Finding:
        errors, tolerances = self._errors(position, derivatives, found)
        errors = np.where(np.isfinite(derivatives.values), errors, 0)
        worst = int(np.argmax(errors - tolerances))
        scale = float(np.abs(np.nan_to_num(derivatives.values)).max(initial=0)) or 1.0
        closeness = min(max(10 * float(tolerances.max()) / scale, 1e-6), 1e-2)
        # Two gradients count as equal well below the error that failed.
        closeness = min(closeness, 0.3 * float(errors.max()) / scale) if errors.max() > 0 else closeness
        return Finding(
            self.problem.names, self.inputs, position, found, self.problem.evaluate, self.problem.analytic,
            self.output, self.cotangent.astype(self.inputs[position].dtype), derivatives, self.derivatives_with,
            int(derivatives.indices[worst]), float(tolerances[worst]), closeness, int((errors > tolerances).sum()),
        )  # fmt: skip

    def derivatives_with(
        self, position: int, changed: dict[int, Array], indices: Any = None
    ) -> numeric.ElementDerivatives | None:
        """Derivatives with other values for some inputs; None where the function does not take them."""
        inputs = [changed.get(place, x) for place, x in enumerate(self.inputs)]
        try:
            with np.errstate(all="ignore"):
                output = np.asarray(self.problem.evaluate(*inputs))
        except Exception:  # a function may insist on the shape that it was given
            return None
        if output.shape != self.output.shape or not np.isfinite(output).all():
            return None
        return numeric.element_derivatives(
            self.problem.evaluate, inputs, position, self.cotangent, indices, self.analytic, self.growth
        )

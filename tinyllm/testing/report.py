"""What is wrong with a gradient, in words: the error that the checks raise, and the causes it can tell apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing.numeric import NumericGradient

Differentiate = Callable[[int, Array], Array]
"""The numeric derivatives by the elements of input `position` at flat `indices`."""

EXPAND_LIMIT = 512
"""Most elements to differentiate by when a missing sum over a broadcast axis is looked for."""


class GradientError(AssertionError):
    """A gradient that is not the derivative of its function.

    Attributes:
        argument: the name of the argument. position: its place. index: the worst element, None where the
        whole gradient is wrong (its shape, say). analytic, numeric: both values there. cause: the likely
        cause in words.
    """

    def __init__(
        self,
        cause: str,
        argument: str = "",
        position: int = -1,
        index: tuple[int, ...] | None = None,
        analytic: float = math.nan,
        numeric: float = math.nan,
        details: str = "",
    ) -> None:
        self.cause, self.argument, self.position, self.index = cause, argument, position, index
        self.analytic, self.numeric = analytic, numeric
        where = f"argument {position} ({argument})" if argument else "the function"
        super().__init__(f"gradient of {where}: {cause}" + (f"\n{details}" if details else ""))


@dataclass(frozen=True)
class Finding:
    """A gradient that failed, and what is needed to find out why.

    Attributes:
        inputs: the arrays. names: their names. position: whose gradient failed. gradients: the analytic
        gradients of all. numeric: derivatives by some elements or all. differentiate: more derivatives.
        expanded: derivatives by the elements of this input broadcast to a shape, or None where f does not
        take it so. output_shape: of the function. worst: flat index. tolerance: at the worst element.
        closeness: relative difference below which two gradients count as equal.
    """

    inputs: Sequence[Array]
    names: Sequence[str]
    position: int
    gradients: Sequence[Array]
    numeric: NumericGradient
    differentiate: Differentiate
    expanded: Callable[[tuple[int, ...]], Array | None]
    output_shape: tuple[int, ...]
    worst: int
    tolerance: float
    closeness: float

    def error(self) -> GradientError:
        """The error that reports this finding."""
        gradient = self.gradients[self.position]
        index = tuple(int(i) for i in np.unravel_index(self.worst, gradient.shape))
        beside = int(np.flatnonzero(self.numeric.indices == self.worst)[0])
        analytic, numeric = float(gradient.reshape(-1)[self.worst]), float(self.numeric.values[beside])
        ratio = f"{analytic / numeric:.9g}" if numeric else "undefined (numeric is 0)"
        known = gradient.reshape(-1)[self.numeric.indices]
        scale = float(np.abs(self.numeric.values).max()) or 1.0
        relative = float(np.abs(known - self.numeric.values).max()) / scale
        details = (
            f"  worst element: index {index} of shape {gradient.shape}\n"
            f"  analytic {analytic:.12g}, numeric {numeric:.12g}, ratio {ratio}\n"
            f"  largest error relative to the largest element: {relative:.3g}; "
            f"tolerance at the worst element: {self.tolerance:.3g}"
        )
        name = self.names[self.position]
        return GradientError(self.cause(), name, self.position, index, analytic, numeric, details)

    def cause(self) -> str:
        """The likely cause, the most specific first."""
        guesses = (
            self._factor, self._reordered, self._accumulated, self._exchanged,
            self._slice, self._mean_left, self._partly,
        )  # fmt: skip
        for guess in guesses:
            cause = guess()
            if cause is not None:
                return cause
        return "values differ in no simple way; compare the formula with the derivative of each term"

    def _close(self, candidate: Array, numeric: Array) -> bool:
        scale = float(np.abs(numeric).max(initial=0))
        return scale > 0 and bool((np.abs(candidate - numeric) <= self.closeness * scale).all())

    def _known(self, gradient: Array) -> Array:
        """The elements of `gradient` whose numeric derivative is known, as float64."""
        return gradient.reshape(-1)[self.numeric.indices].astype(np.float64)

    def _factor(self) -> str | None:
        numeric, gradient = self.numeric.values, self._known(self.gradients[self.position])
        if not gradient.any():
            return "zero gradient: the backward returns zeros, or the input was detached from the graph"
        square = float((numeric * numeric).sum())
        if square == 0:
            return None
        factor = float((gradient * numeric).sum()) / square
        if factor == 0 or not self._close(gradient / factor, numeric):
            return None
        if abs(factor + 1) <= self.closeness:
            return "sign flipped"
        sign = "sign flipped and a constant factor" if factor < 0 else "constant factor"
        return f"{sign}: the gradient is {_number(abs(factor))} times the derivative{self._hint(factor)}"

    def _hint(self, factor: float) -> str:
        """What a constant factor may mean."""
        shape = self.inputs[self.position].shape
        lengths = {*shape, *self.output_shape, math.prod(shape), math.prod(self.output_shape)} - {0, 1}
        for n in sorted(lengths):
            if abs(factor * n - 1) <= self.closeness * n:
                hint = f" (1/{n}: a mean where a sum belongs, over {n} elements"
                return hint + ("; or one of the two uses of this input is not counted)" if n == 2 else ")")
            if abs(factor / n - 1) <= self.closeness and n != 2:
                return f" ({n}: the 1/{n} of a mean over {n} elements is missing)"
        if abs(factor - 0.5) <= self.closeness:
            return " (typical of an input that is used twice when only one use is counted)"
        return ""

    def _reordered(self) -> str | None:
        gradient, numeric = self.gradients[self.position], self.numeric.values
        shape = gradient.shape
        if numeric.size < 2:
            return None
        for order in itertools.islice(itertools.permutations(range(len(shape))), 1, 24):
            turned = gradient.transpose(order)
            if turned.shape == shape and self._close(self._known(turned), numeric):
                return f"transposed: the gradient is right with its axes in the order {order}"
            rearranged = gradient.reshape(tuple(shape[axis] for axis in order)).transpose(np.argsort(order))
            if self._close(self._known(rearranged), numeric):
                return f"transposed: reshaped where axes had to be exchanged (order {order})"
        for axis in range(len(shape)):
            if self._close(self._known(np.flip(gradient, axis)), numeric):
                return f"reversed along axis {axis}"
            for shift in range(1, min(shape[axis], 9)):
                if self._close(self._known(np.roll(gradient, -shift, axis)), numeric):
                    return f"shifted by {shift} along axis {axis}"
        return None

    def _accumulated(self) -> str | None:
        """Whether a running sum goes the wrong way: what came last must be added up first."""
        gradient = self.gradients[self.position].astype(np.float64)
        for axis in range(gradient.ndim):
            steps = np.diff(gradient, axis=axis, prepend=0)
            turned = np.flip(np.cumsum(np.flip(steps, axis), axis=axis), axis)
            if gradient.shape[axis] > 1 and self._close(self._known(turned), self.numeric.values):
                return f"accumulated from the wrong end along axis {axis}: flip, add up, and flip back"
        return None

    def _partly(self) -> str | None:
        """Whether whole rows are right and others wrong, such as those that an index names twice."""
        gradient = self.gradients[self.position]
        if self.numeric.indices.size != gradient.size or gradient.ndim == 0:
            return None
        numeric = self.numeric.values.reshape(gradient.shape)
        off = np.abs(gradient - numeric) > self.closeness * float(np.abs(numeric).max(initial=0))
        wrong = [int(row) for row in np.flatnonzero(off.reshape(len(off), -1).any(axis=1))]
        if not 0 < len(wrong) < len(off):
            return None
        text = (
            f"right but for {'row' if len(wrong) == 1 else 'rows'} {', '.join(map(str, wrong))} of {len(off)}"
        )
        for position, indices in enumerate(self.inputs):
            if indices.dtype.kind in "iu" and indices.size:
                rows, counts = np.unique(indices % len(off), return_counts=True)
                if wrong == [int(row) for row in rows[counts > 1]]:
                    return (
                        f"{text}, exactly those that argument {position} ({self.names[position]}) names more "
                        "than once: repeated rows overwrite each other; add them up, as np.add.at does"
                    )
        return text

    def _exchanged(self) -> str | None:
        gradient = self.gradients[self.position]
        for other, x in enumerate(self.inputs):
            if other == self.position or x.shape != gradient.shape or x.dtype.kind != "f":
                continue
            if self._close(self._known(gradient), self.differentiate(other, self.numeric.indices)):
                return f"this is the gradient of argument {other} ({self.names[other]}): two are exchanged"
        return None

    def _slice(self) -> str | None:
        """Whether the gradient misses the sum over an axis along which the input was broadcast."""
        x, shape = self.inputs[self.position], self.output_shape
        complete = self.numeric.indices.size == x.size
        fits = len(x.shape) <= len(shape) and all(
            n in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False)
        )
        if not complete or not fits or shape == x.shape or not 0 < math.prod(shape) <= EXPAND_LIMIT:
            return None
        full = self.expanded(shape)
        if full is None:
            return None
        lengths = (1,) * (len(shape) - x.ndim) + x.shape
        axes = tuple(axis for axis, n in enumerate(lengths) if n != shape[axis])
        gradient = self.gradients[self.position].reshape(lengths)
        for axis in axes:
            others = tuple(a for a in axes if a != axis)
            partial = full.sum(axis=others, keepdims=True)
            for i in range(shape[axis]):
                if self._close(gradient, np.take(partial, [i], axis=axis)):
                    return f"not summed over broadcast axis {axis} of the output: it holds only slice {i}"
        return None

    def _mean_left(self) -> str | None:
        """Whether the derivative sums to zero along an axis and the gradient does not, as in a softmax."""
        gradient = self.gradients[self.position]
        if self.numeric.indices.size != gradient.size:
            return None
        numeric = self.numeric.values.reshape(gradient.shape)
        for axis in reversed(range(gradient.ndim)):
            if gradient.shape[axis] < 3:
                continue
            total = np.abs(numeric).sum(axis=axis)
            if (np.abs(numeric.sum(axis=axis)) <= self.closeness * total).all() and (
                np.abs(gradient.sum(axis=axis)) > 1e-3 * total
            ).any():
                return (
                    f"mean not subtracted: the derivative sums to zero along axis {axis}, as that of a softmax "
                    "or of a centred function does, and the gradient does not"
                )
        return None


def shape_cause(gradient: Array, x: Array) -> str:
    """What a gradient of the wrong shape suggests."""
    text = f"wrong shape: the gradient has shape {gradient.shape}, the input {x.shape}"
    extra = gradient.ndim - x.ndim
    if extra >= 0:
        lengths = (1,) * extra + x.shape
        if all(n in (1, m) for n, m in zip(lengths, gradient.shape, strict=True)):
            axes = tuple(a for a, n in enumerate(lengths) if a < extra or n != gradient.shape[a])
            return f"{text}; not summed over broadcast axes: sum it over {axes}"
    if sorted(gradient.shape) == sorted(x.shape):
        return f"{text}; transposed"
    if gradient.size == x.size:
        return f"{text}; it needs a reshape"
    return text


def _number(value: float) -> str:
    rounded = round(value, 6)
    return str(rounded) if math.isclose(rounded, value, rel_tol=1e-9) else f"{value:.9g}"

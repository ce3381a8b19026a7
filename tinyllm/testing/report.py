"""The error that the checks raise: which gradient is wrong, where, by how much, and most likely why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing.explanations import Finding, cause


class GradientError(AssertionError):
    """A gradient that is not the derivative of its function.

    Attributes:
        argument: the name of the argument. position: its place. index: the worst element, None where the
        whole gradient is wrong (its shape, say). analytic, numeric: both values there. cause: the likely
        cause in words. details: where and by how much.
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
        self.analytic, self.numeric, self.details = analytic, numeric, details
        where = f"argument {position} ({argument})" if argument else "the function"
        super().__init__(f"gradient of {where}: {cause}" + (f"\n{details}" if details else ""))

    def at(self, inputs: Sequence[Array]) -> GradientError:
        """The same error, found at other inputs than the ones given."""
        place = "\n".join(np.array2string(x, prefix="    ", threshold=20) for x in inputs)
        details = (
            f"{self.details}\n  found near the given inputs, where zeros or equal elements hide it "
            f"(nearby=False checks these alone), at\n    {place}"
        )
        return GradientError(
            self.cause, self.argument, self.position, self.index, self.analytic, self.numeric, details
        )


def report(finding: Finding) -> GradientError:
    """The error for a gradient that failed."""
    gradient = finding.gradients[finding.position]
    index = tuple(int(i) for i in np.unravel_index(finding.worst, gradient.shape))
    values = finding.numeric.values
    beside = int(np.flatnonzero(finding.numeric.indices == finding.worst)[0])
    analytic, numeric = float(gradient.reshape(-1)[finding.worst]), float(values[beside])
    with np.errstate(all="ignore"):
        ratio = f"{np.float64(analytic) / numeric:.9g}" if numeric else "undefined (numeric is 0)"
    scale = float(np.nanmax(np.abs(values))) or 1.0
    relative = float(np.nanmax(np.abs(finding.known(gradient) - values))) / scale
    details = (
        f"  {finding.wrong} of {values.size} elements are wrong; the worst: index {index} of shape {gradient.shape}\n"
        f"  analytic {analytic:.12g}, numeric {numeric:.12g}, ratio {ratio}\n"
        f"  largest error relative to the largest element: {relative:.3g}; "
        f"tolerance at the worst element: {finding.tolerance:.3g}"
    )
    name = finding.names[finding.position]
    return GradientError(cause(finding), name, finding.position, index, analytic, numeric, details)


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

"""A watch on training: which steps are too far from the last ones to be made.

The watch compares the loss and the gradient norm of a step with their medians over the last accepted steps, in units
of their spread from step to step. Both are medians (of values, and of absolute deviations, which in a normal
distribution are 1/1.4826 of the standard deviation), so they hardly move when a few values are wild; values that are
rejected never enter them.
Source: Hampel, "The influence curve and its role in robust estimation", 1974.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.training.events import Limits

MAD_TO_DEVIATION = 1.4826
WARM_UP = 32
"""So many accepted steps come before the first that can be a spike, or the whole window if that is shorter."""
SMALLEST_LOSS_SPREAD = 0.02
"""In nats: losses that hardly differ make no spike of one that differs a little."""
SMALLEST_NORM_SPREAD = 0.1
"""As a part of the median: norms have no unit of their own."""


class Recent:
    """Median and spread of the last `window` values."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.load(())

    def load(self, values: Iterable[float]) -> None:
        """Forget all values and take these, oldest first."""
        self.values: deque[float] = deque(values, maxlen=self.window)
        self._sorted = sorted(self.values)
        self._differences = deque(after - before for before, after in itertools.pairwise(self.values))
        self._sorted_differences = sorted(self._differences)

    def add(self, value: float) -> None:
        """Take one more value, and forget the oldest if the window is full."""
        if len(self.values) == self.window:
            _remove(self._sorted, self.values[0])
            if self._differences:
                _remove(self._sorted_differences, self._differences.popleft())
        if self.window > 1 and self.values:
            difference = value - self.values[-1]
            self._differences.append(difference)
            insort(self._sorted_differences, difference)
        self.values.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        """The median of the values; there must be one."""
        return _middle(self._sorted)

    @property
    def spread(self) -> float:
        """The standard deviation of normal noise whose changes from value to value have the same median deviation.

        Changes, because a loss that falls fast is not a noisy one. 0 for a single value.
        """
        if not self._differences:
            return 0.0
        median = _middle(self._sorted_differences)
        # Falling and then rising: two runs, which sorting merges in linear time.
        deviations = sorted(abs(difference - median) for difference in self._sorted_differences)
        return MAD_TO_DEVIATION * _middle(deviations) / math.sqrt(2)


@dataclass(frozen=True)
class Verdict:
    """What the watch says of a step.

    reason: in plain words why it is rejected; None where it is accepted.
    loss_score, norm_score: how many spreads above the median; NaN where they are not finite or too few came before.
    """

    reason: str | None
    loss_score: float = math.nan
    norm_score: float = math.nan


class Watch:
    """Judges steps by their loss and gradient norm.

    Values that are not finite are always rejected. Others are rejected when they lie more than a threshold above the
    median, in units of the spread: a loss that falls is never a spike, nor is a norm that does.

    Args:
        window: how many accepted steps are compared with. loss_threshold, norm_threshold: infinity: never a spike.

    Example:
        >>> watch = Watch(window=64, loss_threshold=10.0, norm_threshold=300.0)
        >>> for step in range(64):
        ...     watch.accept(2.0 - step / 1000, 0.5)
        >>> watch.judge(1.9, 0.6).reason is None
        True
        >>> watch.judge(9.0, 0.6).reason
        'the loss is 9, and the median of the last 64 steps is 1.969: a spike'
    """

    def __init__(self, window: int, loss_threshold: float, norm_threshold: float) -> None:
        self.loss_threshold, self.norm_threshold = loss_threshold, norm_threshold
        self.losses, self.norms = Recent(window), Recent(window)
        self.warm_up = min(window, WARM_UP)

    @property
    def active(self) -> bool:
        """Whether enough steps were accepted for a spike to be told."""
        return len(self.losses.values) >= self.warm_up

    @property
    def usual_norm(self) -> float:
        """The median of the gradient norms; infinity until the watch is active."""
        return self.norms.median if self.active else math.inf

    @property
    def limits(self) -> Limits:
        """What an engine compares the loss and the gradient norm of a step with.

        float32 can hold them, so that a device, which compares in float32, decides as `judge` does.
        """
        if not self.active:
            return Limits(math.inf, math.inf)
        loss = self.losses.median + self.loss_threshold * self._loss_spread
        norm = self.norms.median + self.norm_threshold * self._norm_spread
        return Limits(_up_to_float32(loss), _up_to_float32(norm))

    @property
    def _loss_spread(self) -> float:
        return max(self.losses.spread, SMALLEST_LOSS_SPREAD)

    @property
    def _norm_spread(self) -> float:
        # Among norms of zero there is no scale to compare with.
        return max(self.norms.spread, SMALLEST_NORM_SPREAD * self.norms.median) or math.inf

    def judge(self, loss: float, norm: float) -> Verdict:
        """Whether a step of this loss and gradient norm can be made; changes nothing."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return Verdict(f"the {name} is {value}")
        if not self.active:
            return Verdict(None)
        limits = self.limits
        reasons = [
            f"the {name} is {value:.4g}, and the median of the last {len(seen.values)} steps is {seen.median:.4g}"
            for name, value, seen, limit in (
                ("loss", loss, self.losses, limits.loss),
                ("gradient norm", norm, self.norms, limits.norm),
            )
            if value > limit
        ]
        return Verdict(
            f"{'; '.join(reasons)}: a spike" if reasons else None,
            (loss - self.losses.median) / self._loss_spread,
            (norm - self.norms.median) / self._norm_spread,
        )

    def accept(self, loss: float, norm: float) -> None:
        """A step of this loss and gradient norm was made."""
        self.losses.add(loss)
        self.norms.add(norm)

    def state_dict(self) -> dict[str, Any]:
        """The accepted values of the window; JSON can hold them."""
        return {"losses": list(self.losses.values), "norms": list(self.norms.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved values; raises ValueError, TypeError or KeyError, with nothing changed, for damaged ones."""
        losses, norms = ([float(value) for value in state[name]] for name in ("losses", "norms"))
        if len(losses) != len(norms) or not all(map(math.isfinite, losses + norms)):
            raise ValueError("losses and norms of the watch must be finite, and as many of each")
        self.losses.load(losses)
        self.norms.load(norms)


def _remove(values: list[float], value: float) -> None:
    """Take one value out of sorted ones."""
    del values[bisect_left(values, value)]


def _up_to_float32(value: float) -> float:
    """The smallest number of float32 that is not below this one, so that a median is within its own limit."""
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))


def _middle(values: list[float]) -> float:
    """The median of sorted values."""
    count = len(values)
    upper = values[count // 2]
    return upper if count % 2 else (values[count // 2 - 1] + upper) / 2

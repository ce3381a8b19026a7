"""Elements at a kink: each gradient may lie between its one-sided derivatives, and together they are bound further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import Array
from tinyllm.testing.differences import Function, central_differences, unit

DIFFERENT = 1e-3
"""The difference of two derivatives, relative to their size, from which on they are different."""


@dataclass(frozen=True)
class Kink:
    """One element at which a function is not differentiable: position of the input, flat index, both derivatives."""

    position: int
    flat: int
    forward: float
    backward: float

    @property
    def way(self) -> int:
        """The side to which the function changes more with the sign of its mean slope."""
        return -1 if self.forward + self.backward < 0 else 1

    @property
    def slope(self) -> float:
        """The derivative to that side."""
        return self.forward if self.way > 0 else -self.backward


APART = 1e-2
"""How far the first and the last element are moved apart, relative to the unit of an input."""


def apart(inputs: Sequence[Array]) -> Iterator[list[Array]]:
    """The inputs with equal elements moved apart, so that they ascend, and so that they descend."""
    for reach in (APART, -APART):
        ramps = [np.linspace(-reach / 2, reach / 2, x.size).reshape(x.shape) for x in inputs]
        yield [
            (x + ramp * unit(x)).astype(x.dtype) if x.dtype.kind == "f" else x
            for x, ramp in zip(inputs, ramps, strict=True)
        ]


def shared_kink(
    kinks: Sequence[Kink],
    f: Function,
    inputs: Sequence[Array],
    cotangent: Array,
    gradients: Sequence[Array],
    growth: float,
) -> tuple[float, float] | None:
    """What the gradients of several elements add up to, and what they should, where it is not the same.

    Several equal maxima are at one kink: moved together they change the maximum smoothly, and their gradients must
    add up to that. None where the elements are not at one kink (moved together, they do what each does by itself), or
    are at a kink together too.
    """
    if len(kinks) < 2:
        return None
    ways = [np.zeros(x.shape) for x in inputs]
    for kink in kinks:
        ways[kink.position].reshape(-1)[kink.flat] = kink.way

    def together(t: Array) -> Array:
        return np.asarray(f(*[x + t * way if way.any() else x for x, way in zip(inputs, ways, strict=True)]))

    joint = central_differences(together, [np.zeros((), cotangent.dtype)], 0, 0, cotangent, growth=growth)
    room = DIFFERENT * (sum(abs(kink.slope) for kink in kinks) + joint.magnitude) + joint.error
    if joint.kink or not abs(sum(kink.slope for kink in kinks) - joint.value) > room:
        return None
    total = sum(kink.way * float(gradients[kink.position].reshape(-1)[kink.flat]) for kink in kinks)
    return None if abs(total - joint.value) <= room else (total, joint.value)

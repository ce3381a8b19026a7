"""The global norm of gradients, and scaling them down to a largest one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current
from tinyllm.nn.utils import gradient_arrays


class NonFiniteNormError(ArithmeticError):
    """A gradient norm that is infinite or not a number, as `norm` says: the step must not be made."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"the global gradient norm is {norm}")
        self.norm = norm


def squared_norm(array: Array) -> float:
    """The sum of squares, infinite where float32 overflows."""
    flat = array.reshape(-1)
    with backend.ignore_overflow():
        return float(backend.read(current.xp.dot(flat, flat)))


def global_norm(arrays: Sequence[Array], squares: Iterable[float] | None = None) -> float:
    """The Euclidean norm of all arrays together.

    squares: the `squared_norm` of each, where it is known. Raises NonFiniteNormError when the norm is not finite.
    """
    total = sum(map(squared_norm, arrays) if squares is None else squares)
    if math.isinf(total):
        # The squares may overflow where the norm does not.
        total = sum(float(backend.read((array.astype("float64") ** 2).sum())) for array in arrays)
    norm = math.sqrt(total) if total >= 0 else math.nan
    if not math.isfinite(norm):
        raise NonFiniteNormError(norm)
    return norm


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied with, so that their norm is at most `max_norm`."""
    return max_norm / norm if norm > max_norm else 1.0


def clip_grad_norm(gradients: Iterable[Array | Tensor], max_norm: float) -> float:
    """Scale gradients in place so that their global Euclidean norm is at most `max_norm`; returns the norm before.

    gradients: arrays, or parameters whose `.grad` is meant; those without one are passed over.

    Raises:
        NonFiniteNormError: the norm is not finite; nothing is changed.
        TypeError: what could not be clipped in place, such as a gradient that is a Tensor.
        ValueError: parameters of which none has a gradient.
    """
    given, arrays = gradient_arrays(gradients)
    if given and not arrays:
        raise ValueError("none of the parameters has a gradient; call backward() first")
    norm = global_norm(arrays)
    scale = clip_scale(norm, max_norm)
    if scale != 1:
        for array in arrays:
            array *= scale
    return norm

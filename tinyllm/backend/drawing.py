"""The generator that random numbers come from where none is given."""

from __future__ import annotations

import numpy as np

_generator: np.random.Generator | None = None


def manual_seed(seed: int) -> np.random.Generator:
    """Begin the generator anew that initial weights, dropout and `randn` draw from where none is given; returns it.

    It draws other numbers than torch's from the same seed.
    """
    global _generator
    _generator = np.random.default_rng(seed)
    return _generator


def default_generator() -> np.random.Generator:
    """That generator; before `manual_seed` it is the one of the seed 0, so that a program repeats its numbers."""
    return manual_seed(0) if _generator is None else _generator

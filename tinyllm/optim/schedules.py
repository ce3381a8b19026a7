"""Factors of the learning rate by step: a linear warm-up, then a fall."""

import math


def cosine_schedule(step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> float:
    """The factor of the learning rate in step `step` (from 0): a linear warm-up, then half a cosine.

    It rises to 1 over `warmup_steps` and falls to `final_factor` in the last of `total_steps`.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    cosine = math.cos(math.pi * _progress(step, total_steps, warmup_steps))
    return final_factor + (1 - final_factor) * (1 + cosine) / 2


def linear_schedule(step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> float:
    """As `cosine_schedule`, with a straight line down."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return 1 + (final_factor - 1) * _progress(step, total_steps, warmup_steps)


def _warmup(step: int, warmup_steps: int) -> float:
    # The first step is made at a rate above 0, or it would be lost.
    return (step + 1) / (warmup_steps + 1)


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """From 0 in the first step after the warm-up to 1 in the last step."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))

"""Factors of the learning rate by step."""

import math


def cosine_schedule(step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> float:
    """The factor of the learning rate in step `step` (from 0): a linear warm-up, then half a cosine.

    It rises to 1 over `warmup_steps` and falls to `final_factor` in the last of `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2


def linear_schedule(step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> float:
    """As `cosine_schedule`, with a straight line down, which reaches `final_factor` one step after the last.

    With a final factor of 0, no step is so made at the rate 0. `torch.optim.lr_scheduler.LinearLR` ends like this too.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 + (final_factor - 1) * progress

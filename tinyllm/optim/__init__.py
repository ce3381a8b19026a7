"""Optimizers, schedules of the learning rate, and gradient clipping.

Gradients come in by name, parameters are changed in place, and the state that a checkpoint keeps goes out by name.
"""

from tinyllm.optim.optimizers import (
    OPTIMIZERS,
    SGD,
    AdamW,
    Muon,
    NamedParameters,
    NonFiniteNormError,
    Optimizer,
    OptimizerGroup,
    OptimizerSettings,
    clip_grad_norm,
    clip_scale,
    cosine_schedule,
    global_norm,
    linear_schedule,
    orthogonalise,
    squared_norm,
)

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "Muon",
    "NamedParameters",
    "NonFiniteNormError",
    "Optimizer",
    "OptimizerGroup",
    "OptimizerSettings",
    "clip_grad_norm",
    "clip_scale",
    "cosine_schedule",
    "global_norm",
    "linear_schedule",
    "orthogonalise",
    "squared_norm",
]

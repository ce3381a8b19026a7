"""Optimizers, schedules of the learning rate, and clipping of gradients.

Optimizers are called as torch's. In training, gradients come in by name, parameters are changed in place, and what a
checkpoint keeps goes out by name: `clipping` finds the norm and the scale of the gradients, `schedules` the factor of
the rate, and an `optimizer` (`sgd`, `adamw`, `muon`, or several in an `OptimizerGroup`) makes the step. In a
loop of one's own, `lr_scheduler` sets the rates.
"""

from tinyllm.optim import lr_scheduler
from tinyllm.optim.adamw import Adam, AdamW
from tinyllm.optim.clipping import NonFiniteNormError, clip_grad_norm, clip_scale, global_norm, squared_norm
from tinyllm.optim.muon import Muon, orthogonalise
from tinyllm.optim.optimizer import (
    NamedParameters,
    Optimizer,
    OptimizerGroup,
    OptimizerSettings,
    Step,
    matrices_decayed,
)
from tinyllm.optim.schedules import cosine_schedule, linear_schedule
from tinyllm.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon, "sgd": SGD}
"""The optimizers that `TrainConfig.optimizer` names."""

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "Muon",
    "NamedParameters",
    "NonFiniteNormError",
    "Optimizer",
    "OptimizerGroup",
    "OptimizerSettings",
    "Step",
    "clip_grad_norm",
    "clip_scale",
    "cosine_schedule",
    "global_norm",
    "linear_schedule",
    "lr_scheduler",
    "matrices_decayed",
    "orthogonalise",
    "squared_norm",
]

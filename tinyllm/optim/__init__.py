"""Optimizers, schedules of the learning rate, and clipping of gradients.

Gradients come in by name, parameters are changed in place, and the state that a checkpoint keeps goes out by name. In a
training step: `clipping` finds the norm and the scale of the gradients, `schedules` the factor of the rate, and an
`optimizer` (`sgd`, `adamw`, `muon`, or several in an `OptimizerGroup`) makes the step.
"""

from tinyllm.optim.adamw import AdamW
from tinyllm.optim.clipping import NonFiniteNormError, clip_grad_norm, clip_scale, global_norm, squared_norm
from tinyllm.optim.muon import Muon, orthogonalise
from tinyllm.optim.optimizer import NamedParameters, Optimizer, OptimizerGroup, OptimizerSettings
from tinyllm.optim.schedules import cosine_schedule, linear_schedule
from tinyllm.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon, "sgd": SGD}
"""The optimizers that `TrainConfig.optimizer` names."""

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

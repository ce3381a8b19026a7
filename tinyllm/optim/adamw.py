"""Adam, with decoupled weight decay and without."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinyllm import backend
from tinyllm.backend import Array, current
from tinyllm.optim.optimizer import (
    NamedParameters,
    Optimizer,
    OptimizerSettings,
    Params,
    Step,
    matrices_decayed,
)


class AdamW(Optimizer):
    """Adam with decoupled weight decay, of every parameter of a group; arguments as torch's.

    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    theta -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """

    state_names = ("m", "v")

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        groups = matrices_decayed(parameters, settings.weight_decay)
        return cls(groups, settings.learning_rate, (settings.beta1, settings.beta2))

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        decoupled_weight_decay: bool = True,
    ) -> None:
        super().__init__(
            params, lr, weight_decay, decoupled_weight_decay=decoupled_weight_decay, betas=betas, eps=eps
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']}; both must be at least 0 and below 1")

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], step: Step) -> None:
        beta1, beta2 = step.group["betas"]
        # sqrt(v / c2) + eps = (sqrt(v) + eps sqrt(c2)) / sqrt(c2), which saves a pass over v.
        root_c2 = math.sqrt(1 - beta2**step.number)
        step_size = step.rate * root_c2 / (1 - beta1**step.number)
        for part in backend.cache_parts(theta, gradient, state["m"], state["v"]):
            _adamw(*part, beta1, beta2, step_size, step.group["eps"] * root_c2)


class Adam(AdamW):
    """Adam, with weight decay in the gradient (Kingma and Ba, "Adam", 2015, algorithm 1); arguments as torch's."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled_weight_decay)


@backend.elementwise
def _adamw(
    theta: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, step_size: float, eps: float
) -> None:
    xp = current.xp
    scratch = g * (1 - beta1)
    m *= beta1
    m += scratch
    xp.multiply(g, g, out=scratch)
    scratch *= 1 - beta2
    v *= beta2
    v += scratch
    xp.sqrt(v, out=scratch)
    scratch += eps
    xp.divide(m, scratch, out=scratch)
    scratch *= step_size
    theta -= scratch

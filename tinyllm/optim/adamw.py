"""Adam with decoupled weight decay."""

from __future__ import annotations

import math

from tinyllm import backend
from tinyllm.backend import Array, current
from tinyllm.optim.optimizer import NamedParameters, Optimizer, OptimizerSettings


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    theta -= rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """

    state_names = ("m", "v")

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        betas = (settings.beta1, settings.beta2)
        return cls(parameters, settings.learning_rate, betas, weight_decay=settings.weight_decay)

    def __init__(
        self,
        parameters: NamedParameters,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; both must be at least 0 and below 1")
        self.betas = betas
        self.eps = eps

    def decays(self, theta: Array) -> bool:
        """Matrices alone: the vectors are the weights of norms, whose scale is meant to be free."""
        return theta.ndim >= 2

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], rate: float) -> None:
        beta1, beta2 = self.betas
        # sqrt(v / c2) + eps = (sqrt(v) + eps sqrt(c2)) / sqrt(c2), which saves a pass over v.
        root_c2 = math.sqrt(1 - beta2**self.steps)
        step_size = rate * root_c2 / (1 - beta1**self.steps)
        for part in backend.cache_parts(theta, gradient, state["m"], state["v"]):
            _adamw(*part, beta1, beta2, step_size, self.eps * root_c2)


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

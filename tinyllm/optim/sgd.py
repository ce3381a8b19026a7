"""Gradient descent with momentum."""

from __future__ import annotations

from tinyllm import backend
from tinyllm.backend import Array
from tinyllm.optim.optimizer import NamedParameters, Optimizer


class SGD(Optimizer):
    """theta -= rate v, v = momentum v + g."""

    state_names = ("velocity",)

    def __init__(
        self,
        parameters: NamedParameters,
        learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        self.momentum = momentum

    def decays(self, theta: Array) -> bool:
        """Matrices alone: the vectors are the weights of norms, whose scale is meant to be free."""
        return theta.ndim >= 2

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], rate: float) -> None:
        _sgd(theta, gradient, state["velocity"], self.momentum, rate)


@backend.elementwise
def _sgd(theta: Array, g: Array, velocity: Array, momentum: float, rate: float) -> None:
    velocity *= momentum
    velocity += g
    theta -= rate * velocity

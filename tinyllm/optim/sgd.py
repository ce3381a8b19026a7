"""Gradient descent with momentum."""

from __future__ import annotations

from tinyllm import backend
from tinyllm.backend import Array
from tinyllm.optim.optimizer import (
    NamedParameters,
    Optimizer,
    OptimizerSettings,
    Params,
    Step,
    matrices_decayed,
)


class SGD(Optimizer):
    """v = momentum v + (1 - dampening) g, from v = g on; theta -= lr v, or lr (g + momentum v) with `nesterov`.

    Arguments as torch's: weight decay is a part of g, unless it is decoupled.
    """

    state_names = ("velocity",)

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        groups = matrices_decayed(parameters, settings.weight_decay)
        return cls(groups, settings.learning_rate, momentum=0.9, decoupled_weight_decay=True)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
    ) -> None:
        if nesterov and (dampening or not momentum):
            raise ValueError("nesterov needs momentum, and no dampening")
        super().__init__(
            params,
            lr,
            weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
        )

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], step: Step) -> None:
        mu, dampening = step.group["momentum"], step.group["dampening"]
        if dampening and mu and step.number > 1:
            gradient = gradient * (1 - dampening)
        if step.group["nesterov"]:
            _nesterov(theta, gradient, state["velocity"], mu, step.rate)
        else:
            _sgd(theta, gradient, state["velocity"], mu, step.rate)


@backend.elementwise
def _sgd(theta: Array, g: Array, velocity: Array, momentum: float, rate: float) -> None:
    velocity *= momentum
    velocity += g
    theta -= rate * velocity


@backend.elementwise
def _nesterov(theta: Array, g: Array, velocity: Array, momentum: float, rate: float) -> None:
    velocity *= momentum
    velocity += g
    theta -= rate * (g + momentum * velocity)

"""Muon: momentum whose matrices are made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinyllm import backend
from tinyllm.backend import Array, current
from tinyllm.optim.optimizer import NamedParameters, Optimizer, OptimizerSettings, Params, Step


class Muon(Optimizer):
    """Momentum whose matrices are replaced by the nearest orthogonal ones; for the matrices inside blocks.

    M = mu M + (1 - mu) G; N = (1 - mu) G + mu M (Nesterov);
    theta -= lr sqrt(max(1, rows/columns)) orthogonalise(N). Arguments as torch's.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    state_names = ("momentum",)
    matrices_only = True

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        return cls(
            parameters, settings.muon_learning_rate, settings.muon_weight_decay, settings.muon_momentum
        )

    def __init__(
        self, params: Params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, lr, weight_decay, decoupled_weight_decay=True, momentum=momentum)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.ndim != 2:
                raise ValueError(f"Muon changes matrices; parameter {name!r} has shape {parameter.shape}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']}; it must be at least 0 and below 1")

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], step: Step) -> None:
        mu = step.group["momentum"]
        scaled = gradient * (1 - mu)
        _muon_momentum(state["momentum"], scaled, mu)
        rows, columns = theta.shape
        _muon_step(theta, orthogonalise(scaled), step.rate * math.sqrt(max(1.0, rows / columns)))


@backend.elementwise
def _muon_momentum(momentum: Array, scaled: Array, mu: float) -> None:
    momentum *= mu
    momentum += scaled
    scaled += mu * momentum


@backend.elementwise
def _muon_step(theta: Array, direction: Array, factor: float) -> None:
    theta -= direction * factor


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al., 2024: they raise small singular values fast, to within 0.7 to 1.2 of 1."""


def orthogonalise(G: Array, steps: int = 5) -> Array:
    """About U V^T of the singular value decomposition G = U S V^T, by Newton-Schulz iteration.

    G: (n, m) -> (n, m). X = a X + (b A + c A^2) X with A = X X^T, from X = G / |G|.
    """
    a, b, c = NEWTON_SCHULZ
    rows, columns = G.shape
    X = G.T if rows > columns else G
    X = X / (current.xp.sqrt((X * X).sum()) + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        B = A @ A
        B *= c
        B += b * A
        X = a * X + B @ X
    return X.T if rows > columns else X

"""Normalisation over the last axis: RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm.autograd.operands import floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current


@register
class RootMeanSquareNorm(Op):
    """y = x_hat weight, x_hat = x / sqrt(mean(x^2) + eps). Shapes: x: (..., D), weight: (D,) -> (..., D).

    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019, equation 4.
    """

    name = "rms_norm"
    cases = (
        Case(((2, 3, 4), (4,)), {"eps": 1e-6}),
        Case(((4,), (4,)), {"eps": 0.1}),
        Case(((3, 1), (1,)), {"eps": 1e-3}),
        Case(((0, 4), (4,)), {"eps": 1e-6}),
    )

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def forward(self, x: Array, weight: Array) -> Array:
        self.weight = weight
        self.inv_rms = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)  # (..., 1)
        self.x_hat = x * self.inv_rms
        return self.x_hat * weight

    def backward(self, gradient: Array) -> Any:
        """With r = 1/rms, dr/dx_j = -r^3 x_j / D, so dx_hat_i/dx_j = r (1[i = j] - x_hat_i x_hat_j / D).

        dL/dx = r (g w - x_hat mean(g w x_hat)), and dL/dw = g x_hat, summed over rows by the engine.
        """
        gradient_x_hat = gradient * self.weight
        projection = (gradient_x_hat * self.x_hat).mean(axis=-1, keepdims=True)  # (..., 1)
        gradient_x = self.inv_rms * (gradient_x_hat - self.x_hat * projection)
        return gradient_x, gradient * self.x_hat


@register
class Standardisation(Op):
    """y = x_hat weight + bias, x_hat = (x - mean(x)) / sqrt(var(x) + eps).

    Shapes: x: (..., D), weight: (D,), bias: (D,) -> (..., D).
    Source: Ba, Kiros, Hinton, "Layer normalization", 2016, equation 4.
    """

    name = "layer_norm"
    cases = (
        Case(((2, 3, 4), (4,), (4,)), {"eps": 1e-5}),
        Case(((4,), (4,), (4,)), {"eps": 0.1}),
        Case(((3, 1), (1,), (1,)), {"eps": 1e-3}),
        Case(((0, 4), (4,), (4,)), {"eps": 1e-5}),
    )

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        self.weight = weight
        deviation = x - x.mean(axis=-1, keepdims=True)
        variance = (deviation * deviation).mean(axis=-1, keepdims=True)  # (..., 1)
        self.inv_std = 1 / np.sqrt(variance + self.eps)
        self.x_hat = deviation * self.inv_std
        return self.x_hat * weight + bias

    def backward(self, gradient: Array) -> Any:
        """As in RMSNorm, with s = 1/std; that the mean is subtracted takes away the mean of the gradient.

        dL/dx = s (g w - mean(g w) - x_hat mean(g w x_hat)).
        """
        gradient_x_hat = gradient * self.weight
        mean = gradient_x_hat.mean(axis=-1, keepdims=True)
        projection = (gradient_x_hat * self.x_hat).mean(axis=-1, keepdims=True)
        gradient_x = self.inv_std * (gradient_x_hat - mean - self.x_hat * projection)
        return gradient_x, gradient * self.x_hat, gradient


def rms_norm(x: Any, weight: Any = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., D), weight: (D,), ones if None."""
    x, weight = floating(*operands(x, _constant_of(1, x) if weight is None else weight))
    _check_features("rms_norm", x, weight)
    return RootMeanSquareNorm(float(eps))(x, weight)


def layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis.

    x: (..., D), weight: (D,), ones if None, bias: (D,), zeros if None.
    """
    weight = _constant_of(1, x) if weight is None else weight
    x, weight, bias = floating(*operands(x, weight, _constant_of(0, x) if bias is None else bias))
    _check_features("layer_norm", x, weight, bias)
    return Standardisation(float(eps))(x, weight, bias)


def _constant_of(value: int, x: Any) -> Any:
    """A parameter for each feature of x that is `value` throughout."""
    return current.xp.full(np.shape(x)[-1:], value)


def _check_features(name: str, x: Tensor, *parameters: Tensor) -> None:
    if x.shape[-1:] == (0,):
        raise ValueError(f"{name}: x has shape {x.shape}, without a feature to normalise")
    for parameter in parameters:
        if x.ndim == 0 or parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: x has shape {x.shape}, so its parameters need shape {x.shape[-1:]}; got {parameter.shape}"
            )

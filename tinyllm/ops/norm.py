"""Normalisation over the last axis: RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

from tinyllm import backend
from tinyllm.ops.elementwise import rsqrt
from tinyllm.ops.matrix import column_sum, row_sum, rows
from tinyllm.ops.reduce import mean
from tinyllm.tensor import Case, FusedOp, Tensor, operands, register


@register
class RMSNorm(FusedOp):
    """y = x / sqrt(mean(x^2) + eps) * weight. Shapes: x: (..., D), weight: (D,) -> (..., D).

    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019, equation 4.
    """

    cases = (
        Case(((2, 3, 4), (4,)), {"eps": 1e-6}),
        Case(((4,), (4,)), {"eps": 0.1}),
        Case(((3, 1), (1,)), {"eps": 1e-3}),
        Case(((0, 4), (4,)), {"eps": 1e-6}),
    )

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def forward(self, x: Any, weight: Any) -> Any:
        self.x, self.weight = x, weight
        y = x * x
        mean_square = row_sum(y) / x.shape[-1]
        self.inv_rms = 1 / backend.xp.sqrt(mean_square + self.eps)  # (..., 1)
        # Into the memory of the squares, which is in cache.
        backend.xp.multiply(x, self.inv_rms, out=y)
        y *= weight
        return y

    def backward(self, gradient: Any) -> Any:
        # With x_hat = x inv_rms: dx = inv_rms (g w - x_hat mean(g w x_hat)) and dw = sum g x_hat over rows. inv_rms
        # is one number a row, so it is left out of the products of whole arrays and put into their sums.
        D = self.x.shape[-1]
        product = gradient * self.x
        gradient_weight = self.inv_rms.reshape(-1) @ rows(product)
        projection = row_sum(product, self.weight) * self.inv_rms / D
        gradient_x = gradient * self.weight
        gradient_x -= backend.xp.multiply(self.x, projection * self.inv_rms, out=product)
        gradient_x *= self.inv_rms
        return gradient_x, gradient_weight

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * rsqrt(mean(x * x, -1, keepdims=True) + self.eps) * weight


@register
class LayerNorm(FusedOp):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Shapes: x: (..., D), weight: (D,), bias: (D,) -> (..., D).
    Source: Ba, Kiros, Hinton, "Layer normalization", 2016, equation 4.
    """

    cases = (
        Case(((2, 3, 4), (4,), (4,)), {"eps": 1e-5}),
        Case(((4,), (4,), (4,)), {"eps": 0.1}),
        Case(((3, 1), (1,), (1,)), {"eps": 1e-3}),
        Case(((0, 4), (4,), (4,)), {"eps": 1e-5}),
    )

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def forward(self, x: Any, weight: Any, bias: Any) -> Any:
        self.weight = weight
        D = x.shape[-1]
        deviation = x - row_sum(x) / D
        variance = row_sum(deviation * deviation) / D
        self.inv_std = 1 / backend.xp.sqrt(variance + self.eps)
        self.x_hat = deviation * self.inv_std
        return self.x_hat * weight + bias

    def backward(self, gradient: Any) -> Any:
        D = self.x_hat.shape[-1]
        gradient_weight = column_sum(gradient * self.x_hat)
        gradient_x_hat = gradient * self.weight
        projection = row_sum(gradient_x_hat * self.x_hat) / D
        gradient_x_hat -= row_sum(gradient_x_hat) / D
        gradient_x_hat -= self.x_hat * projection
        gradient_x_hat *= self.inv_std
        return gradient_x_hat, gradient_weight, column_sum(gradient)

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        deviation = x - mean(x, -1, keepdims=True)
        variance = mean(deviation * deviation, -1, keepdims=True)
        return deviation * rsqrt(variance + self.eps) * weight + bias


def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., D), weight: (D,)."""
    x, weight = operands(x, weight)
    _check_features("rms_norm", x, weight)
    return RMSNorm(eps)(x, weight)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x: (..., D), weight and bias: (D,)."""
    x, weight, bias = operands(x, weight, bias)
    _check_features("layer_norm", x, weight, bias)
    return LayerNorm(eps)(x, weight, bias)


def _check_features(name: str, x: Tensor, *parameters: Tensor) -> None:
    for parameter in parameters:
        if x.ndim == 0 or parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: x has shape {x.shape}, so its parameters need shape {x.shape[-1:]}; got {parameter.shape}"
            )

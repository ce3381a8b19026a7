"""Normalisation over the last axis: RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

from tinyllm import backend
from tinyllm.autograd.tensor import Case, FusedOp, Tensor, operands, register
from tinyllm.backend import current
from tinyllm.ops.elementwise import rsqrt
from tinyllm.ops.matrix import column_sum, row_sum, rows
from tinyllm.ops.reduce import mean


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
        self.inv_rms = inverse_root(row_sum(y), x.shape[-1], self.eps)  # (..., 1)
        # Into the memory of the squares, which is in cache.
        _normalise(y, x, self.inv_rms, weight)
        return y

    def backward(self, gradient: Any) -> Any:
        # With x_hat = x inv_rms: dx = inv_rms (g w - x_hat mean(g w x_hat)) and dw = sum g x_hat over rows. inv_rms
        # is one number a row, so it is left out of the products of whole arrays and put into their sums.
        D = self.x.shape[-1]
        product = gradient * self.x
        gradient_weight = self.inv_rms.reshape(-1) @ rows(product)
        projection = _projection(row_sum(product, self.weight), self.inv_rms, D)
        return _rms_backward(
            gradient, self.x, self.weight, self.inv_rms, projection, product
        ), gradient_weight

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * rsqrt(mean(x * x, -1, keepdims=True) + self.eps) * weight


@backend.elementwise
def inverse_root(sum_of_squares: Any, D: int, eps: float) -> Any:
    """1 / sqrt(mean square + eps)."""
    return 1 / current.xp.sqrt(sum_of_squares / D + eps)


@backend.elementwise
def _normalise(y: Any, x: Any, inv_rms: Any, weight: Any) -> None:
    current.xp.multiply(x, inv_rms, out=y)
    y *= weight


@backend.elementwise
def _projection(row_sums: Any, inv_rms: Any, D: int) -> Any:
    """mean(g w x_hat) inv_rms of each row, from the sums of g w x."""
    return row_sums * inv_rms / D * inv_rms


@backend.elementwise
def _rms_backward(gradient: Any, x: Any, weight: Any, inv_rms: Any, projection: Any, scratch: Any) -> Any:
    gradient_x = gradient * weight
    gradient_x -= current.xp.multiply(x, projection, out=scratch)
    gradient_x *= inv_rms
    return gradient_x


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
        self.inv_std = inverse_root(row_sum(deviation * deviation), D, self.eps)
        y, self.x_hat = _standardise(deviation, self.inv_std, weight, bias)
        return y

    def backward(self, gradient: Any) -> Any:
        D = self.x_hat.shape[-1]
        gradient_weight = column_sum(gradient * self.x_hat)
        gradient_x_hat = gradient * self.weight
        projection = row_sum(gradient_x_hat * self.x_hat)
        _standardise_backward(
            gradient_x_hat, row_sum(gradient_x_hat), self.x_hat, projection, self.inv_std, D
        )
        return gradient_x_hat, gradient_weight, column_sum(gradient)

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        deviation = x - mean(x, -1, keepdims=True)
        variance = mean(deviation * deviation, -1, keepdims=True)
        return deviation * rsqrt(variance + self.eps) * weight + bias


@backend.elementwise
def _standardise(deviation: Any, inv_std: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    x_hat = deviation * inv_std
    return x_hat * weight + bias, x_hat


@backend.elementwise
def _standardise_backward(
    gradient: Any, sums: Any, x_hat: Any, projection: Any, inv_std: Any, D: int
) -> None:
    gradient -= sums / D
    gradient -= x_hat * (projection / D)
    gradient *= inv_std


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

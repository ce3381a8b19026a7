"""Activations: SiLU, GELU in both forms, SwiGLU, and relatives of ReLU."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from tinyllm.autograd.operands import floating, operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.ops.choice import relu, where
from tinyllm.ops.elementwise import Erf, Sigmoid, expm1, square, unary_cases


@register
class Silu(Op):
    """y = x sigmoid(x). Shapes: x: (...) -> (...).

    Source: Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", 2018, equation 1.
    """

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.x, self.sigmoid = x, Sigmoid()(x)
        return x * self.sigmoid

    def backward(self, gradient: Array) -> Any:
        """s' = s (1 - s), so d(x s)/dx = s (1 + x (1 - s))."""
        return gradient * self.sigmoid * (1 + self.x * (1 - self.sigmoid))


@register
class Gelu(Op):
    """y = x Phi(x), Phi the normal distribution function: (1 + erf(x / sqrt 2)) / 2. Shapes: x: (...) -> (...).

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2.
    """

    cases = unary_cases()

    def forward(self, x: Array) -> Array:
        self.x = x
        self.phi = (1 + Erf()(x * math.sqrt(0.5))) / 2
        return x * self.phi

    def backward(self, gradient: Array) -> Any:
        density = np.exp(self.x * self.x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return gradient * (self.phi + self.x * density)


@register
class GeluTanh(Op):
    """y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2. Shapes: x: (...) -> (...).

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2; the form that GPT-2 uses.
    """

    cases = unary_cases()
    scale = math.sqrt(2 / math.pi)
    cubic = 0.044715
    saturation = 10.0
    """From here on the tanh is 1 to the last bit, and x^3 might be infinite."""

    def forward(self, x: Array) -> Array:
        self.x, self.z = x, np.clip(x, -self.saturation, self.saturation)
        self.tanh = np.tanh(self.scale * (self.z + self.cubic * self.z * self.z * self.z))
        return x * (1 + self.tanh) / 2

    def backward(self, gradient: Array) -> Any:
        slope = self.scale * (1 + 3 * self.cubic * self.z * self.z)
        return gradient * (1 + self.tanh + self.x * (1 - self.tanh * self.tanh) * slope) / 2


@register
class Swiglu(Op):
    """y = silu(gate) up. Shapes: gate: (...), up: (...) -> (...).

    Source: Shazeer, "GLU variants improve Transformer", 2020, equation 6.
    """

    cases = (
        Case(((2, 3, 4), (2, 3, 4))),
        Case(((), ())),
        Case(((0, 3), (0, 3))),
        Case(((1, 1), (1, 1))),
    )

    def forward(self, gate: Array, up: Array) -> Array:
        self.gate, self.up, self.sigmoid = gate, up, Sigmoid()(gate)
        return gate * self.sigmoid * up

    def backward(self, gradient: Array) -> Any:
        """silu(z) = z s(z) and s' = s (1 - s), so silu' = s (1 + z (1 - s))."""
        slope = self.sigmoid * (1 + self.gate * (1 - self.sigmoid))  # silu'
        return gradient * self.up * slope, gradient * self.gate * self.sigmoid


def silu(x: Any) -> Tensor:
    """x sigmoid(x)."""
    return Silu()(*floating(x))


def gelu(x: Any, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """x Phi(x) by the error function, or by the tanh formula with `approximate="tanh"`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate={approximate!r}; choose 'none' or 'tanh'")
    return (GeluTanh() if approximate == "tanh" else Gelu())(*floating(x))


def leaky_relu(x: Any, slope: float = 0.01) -> Tensor:
    """x where x > 0, elsewhere slope x (Maas, Hannun, Ng, "Rectifier nonlinearities", 2013, section 2)."""
    (x,) = floating(x)
    return x * current.xp.where(x.data > 0, 1, slope)


def elu(x: Any, alpha: float = 1.0) -> Tensor:
    """x where x > 0, elsewhere alpha (e^x - 1) (Clevert, Unterthiner, Hochreiter, "ELU", 2016, equation 15)."""
    (x,) = floating(x)
    return where(x > 0, x, expm1(where(x > 0, 0, x)) * alpha)


def squared_relu(x: Any) -> Tensor:
    """max(x, 0)^2 (So et al., "Primer", 2021, section 4.1)."""
    return square(relu(x))


def swiglu(gate: Any, up: Any) -> Tensor:
    """silu(gate) * up, two tensors of one shape."""
    gate, up = floating(*operands(gate, up))
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate has shape {gate.shape} and up {up.shape}; they must be equal")
    return Swiglu()(gate, up)

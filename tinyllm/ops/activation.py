"""Activations with hand-written backwards: SiLU, GELU in both forms, SwiGLU."""

from __future__ import annotations

import math
from typing import Any, Literal

from tinyllm import backend
from tinyllm.ops.elementwise import erf, sigmoid, tanh, unary_cases
from tinyllm.ops.error_function import erf as erf_of_array
from tinyllm.tensor import Case, FusedOp, Tensor, as_tensor, operands, register


def logistic(x: Any) -> Any:
    """1 / (1 + e^-x) on arrays, in one fresh array."""
    xp = backend.xp
    y = xp.asarray(xp.negative(x))
    with backend.ignore_overflow():
        xp.exp(y, out=y)
    y += 1
    return xp.reciprocal(y, out=y)


@register
class Silu(FusedOp):
    """y = x sigmoid(x). Shapes: x: (...) -> (...).

    Source: Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", 2018, equation 1.
    """

    cases = unary_cases()

    def forward(self, x: Any) -> Any:
        self.x = x
        self.sigmoid = logistic(x)
        return x * self.sigmoid

    def backward(self, gradient: Any) -> Any:
        return gradient * self.sigmoid * (1 + self.x * (1 - self.sigmoid))

    def reference(self, x: Tensor) -> Tensor:
        return x * sigmoid(x)


@register
class Gelu(FusedOp):
    """y = x Phi(x), Phi the normal distribution function: (1 + erf(x / sqrt 2)) / 2. Shapes: x: (...) -> (...).

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2.
    """

    cases = unary_cases()

    def forward(self, x: Any) -> Any:
        self.x = x
        self.phi = (1 + erf_of_array(x * math.sqrt(0.5))) / 2
        return x * self.phi

    def backward(self, gradient: Any) -> Any:
        density = backend.xp.exp(self.x * self.x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return gradient * (self.phi + self.x * density)

    def reference(self, x: Tensor) -> Tensor:
        return x * (1 + erf(x * math.sqrt(0.5))) / 2


@register
class GeluTanh(FusedOp):
    """y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2. Shapes: x: (...) -> (...).

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2; the form that GPT-2 uses.
    """

    cases = unary_cases()
    scale = math.sqrt(2 / math.pi)
    cubic = 0.044715

    def forward(self, x: Any) -> Any:
        self.x = x
        self.tanh = backend.xp.tanh(self.scale * (x + self.cubic * x * x * x))
        return x * (1 + self.tanh) / 2

    def backward(self, gradient: Any) -> Any:
        slope = self.scale * (1 + 3 * self.cubic * self.x * self.x)
        return gradient * (1 + self.tanh + self.x * (1 - self.tanh * self.tanh) * slope) / 2

    def reference(self, x: Tensor) -> Tensor:
        return x * (1 + tanh(self.scale * (x + self.cubic * x * x * x))) / 2


@register
class Swiglu(FusedOp):
    """y = silu(gate) up. Shapes: gate: (...), up: (...) -> (...).

    Source: Shazeer, "GLU variants improve Transformer", 2020, equation 6.
    """

    cases = (
        Case(((2, 3, 4), (2, 3, 4))),
        Case(((), ())),
        Case(((0, 3), (0, 3))),
        Case(((1, 1), (1, 1))),
    )

    def forward(self, gate: Any, up: Any) -> Any:
        self.gate, self.up = gate, up
        self.sigmoid = logistic(gate)
        y = gate * self.sigmoid
        y *= up
        return y

    def backward(self, gradient: Any) -> Any:
        silu = self.gate * self.sigmoid
        slope = 1 - self.sigmoid  # silu' = sigmoid + silu (1 - sigmoid)
        slope *= silu
        slope += self.sigmoid
        slope *= self.up
        slope *= gradient
        silu *= gradient  # now the gradient of up
        return slope, silu

    def reference(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * sigmoid(gate) * up


def silu(x: Any) -> Tensor:
    """x sigmoid(x)."""
    return Silu()(as_tensor(x))


def gelu(x: Any, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """x Phi(x) by the error function, or by the tanh formula with `approximate="tanh"`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate={approximate!r}; choose 'none' or 'tanh'")
    return (GeluTanh() if approximate == "tanh" else Gelu())(as_tensor(x))


def swiglu(gate: Any, up: Any) -> Tensor:
    """silu(gate) * up, two tensors of one shape."""
    gate, up = operands(gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate has shape {gate.shape} and up {up.shape}; they must be equal")
    return Swiglu()(gate, up)

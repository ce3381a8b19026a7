"""Activations with hand-written backwards: SiLU, GELU in both forms, SwiGLU."""

from __future__ import annotations

import math
from typing import Any, Literal

from tinyllm import backend
from tinyllm.autograd.tensor import Case, FusedOp, Tensor, as_tensor, operands, register
from tinyllm.backend import current
from tinyllm.ops.elementwise import erf, sigmoid, tanh, unary_cases
from tinyllm.ops.error_function import erf as erf_of_array


def logistic(x: Any) -> Any:
    """1 / (1 + e^-x) on arrays, in one fresh array."""
    xp = current.xp
    y = xp.negative(x, out=xp.empty_like(x))
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
        y, self.sigmoid = _silu(x)
        return y

    def backward(self, gradient: Any) -> Any:
        return _silu_backward(gradient, self.x, self.sigmoid)

    def reference(self, x: Tensor) -> Tensor:
        return x * sigmoid(x)


@backend.elementwise
def _silu(x: Any) -> tuple[Any, Any]:
    sigmoid = logistic(x)
    return x * sigmoid, sigmoid


@backend.elementwise
def _silu_backward(gradient: Any, x: Any, sigmoid: Any) -> Any:
    return gradient * sigmoid * (1 + x * (1 - sigmoid))


@register
class Gelu(FusedOp):
    """y = x Phi(x), Phi the normal distribution function: (1 + erf(x / sqrt 2)) / 2. Shapes: x: (...) -> (...).

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2.
    """

    cases = unary_cases()

    def forward(self, x: Any) -> Any:
        self.x = x
        y, self.phi = _gelu(x)
        return y

    def backward(self, gradient: Any) -> Any:
        return _gelu_backward(gradient, self.x, self.phi)

    def reference(self, x: Tensor) -> Tensor:
        return x * (1 + erf(x * math.sqrt(0.5))) / 2


@backend.elementwise
def _gelu(x: Any) -> tuple[Any, Any]:
    phi = (1 + erf_of_array(x * math.sqrt(0.5))) / 2
    return x * phi, phi


@backend.elementwise
def _gelu_backward(gradient: Any, x: Any, phi: Any) -> Any:
    density = current.xp.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return gradient * (phi + x * density)


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
        y, self.tanh = _gelu_tanh(x, self.scale, self.cubic)
        return y

    def backward(self, gradient: Any) -> Any:
        return _gelu_tanh_backward(gradient, self.x, self.tanh, self.scale, self.cubic)

    def reference(self, x: Tensor) -> Tensor:
        return x * (1 + tanh(self.scale * (x + self.cubic * x * x * x))) / 2


@backend.elementwise
def _gelu_tanh(x: Any, scale: float, cubic: float) -> tuple[Any, Any]:
    tanh = current.xp.tanh(scale * (x + cubic * x * x * x))
    return x * (1 + tanh) / 2, tanh


@backend.elementwise
def _gelu_tanh_backward(gradient: Any, x: Any, tanh: Any, scale: float, cubic: float) -> Any:
    slope = scale * (1 + 3 * cubic * x * x)
    return gradient * (1 + tanh + x * (1 - tanh * tanh) * slope) / 2


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
        y, self.sigmoid = _swiglu(gate, up)
        return y

    def backward(self, gradient: Any) -> Any:
        return _swiglu_backward(gradient, self.gate, self.up, self.sigmoid)

    def reference(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * sigmoid(gate) * up


@backend.elementwise
def _swiglu(gate: Any, up: Any) -> tuple[Any, Any]:
    sigmoid = logistic(gate)
    y = gate * sigmoid
    y *= up
    return y, sigmoid


@backend.elementwise
def _swiglu_backward(gradient: Any, gate: Any, up: Any, sigmoid: Any) -> tuple[Any, Any]:
    silu = gate * sigmoid
    slope = 1 - sigmoid  # silu' = sigmoid + silu (1 - sigmoid)
    slope *= silu
    slope += sigmoid
    slope *= up
    slope *= gradient
    silu *= gradient  # now the gradient of up
    return slope, silu


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

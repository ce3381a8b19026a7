"""Fast forms of the activations: few fresh arrays on a CPU, one kernel forward and one backward on a device."""

from __future__ import annotations

import math
from typing import Any

from tinyllm import backend
from tinyllm.autograd.registry import fast_form_of
from tinyllm.backend import Array, current
from tinyllm.ops.activation import Gelu, GeluTanh, Silu, Swiglu
from tinyllm.ops.error_function import erf as erf_of_array


def logistic(x: Any) -> Any:
    """1 / (1 + e^-x) on arrays, in one fresh array."""
    xp = current.xp
    y = xp.negative(x, out=xp.empty_like(x))
    with backend.ignore_overflow():
        xp.exp(y, out=y)
    y += 1
    return xp.reciprocal(y, out=y)


@fast_form_of(Silu)
class FastSilu(Silu):
    """SiLU in two kernels."""

    def forward(self, x: Array) -> Array:
        self.x = x
        y, self.sigmoid = _silu(x)
        return y

    def backward(self, gradient: Array) -> Any:
        return _silu_backward(gradient, self.x, self.sigmoid)


@backend.elementwise
def _silu(x: Any) -> tuple[Any, Any]:
    sigmoid = logistic(x)
    return x * sigmoid, sigmoid


@backend.elementwise
def _silu_backward(gradient: Any, x: Any, sigmoid: Any) -> Any:
    return gradient * sigmoid * (1 + x * (1 - sigmoid))


@fast_form_of(Gelu)
class FastGelu(Gelu):
    """GELU in two kernels."""

    def forward(self, x: Array) -> Array:
        self.x = x
        y, self.phi = _gelu(x)
        return y

    def backward(self, gradient: Array) -> Any:
        return _gelu_backward(gradient, self.x, self.phi)


@backend.elementwise
def _gelu(x: Any) -> tuple[Any, Any]:
    phi = (1 + erf_of_array(x * math.sqrt(0.5))) / 2
    return x * phi, phi


@backend.elementwise
def _gelu_backward(gradient: Any, x: Any, phi: Any) -> Any:
    density = current.xp.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return gradient * (phi + x * density)


@fast_form_of(GeluTanh)
class FastGeluTanh(GeluTanh):
    """The tanh form of GELU in two kernels."""

    def forward(self, x: Array) -> Array:
        self.x = x
        y, self.tanh = _gelu_tanh(x, self.scale, self.cubic, self.saturation)
        return y

    def backward(self, gradient: Array) -> Any:
        return _gelu_tanh_backward(gradient, self.x, self.tanh, self.scale, self.cubic, self.saturation)


@backend.elementwise
def _gelu_tanh(x: Any, scale: float, cubic: float, saturation: float) -> tuple[Any, Any]:
    z = current.xp.clip(x, -saturation, saturation)
    tanh = current.xp.tanh(scale * (z + cubic * z * z * z))
    return x * (1 + tanh) / 2, tanh


@backend.elementwise
def _gelu_tanh_backward(
    gradient: Any, x: Any, tanh: Any, scale: float, cubic: float, saturation: float
) -> Any:
    z = current.xp.clip(x, -saturation, saturation)
    slope = scale * (1 + 3 * cubic * z * z)
    return gradient * (1 + tanh + x * (1 - tanh * tanh) * slope) / 2


@fast_form_of(Swiglu)
class FastSwiglu(Swiglu):
    """SwiGLU with the sigmoid in one fresh array, and both gradients made in place."""

    def forward(self, gate: Array, up: Array) -> Array:
        self.gate, self.up = gate, up
        y, self.sigmoid = _swiglu(gate, up)
        return y

    def backward(self, gradient: Array) -> Any:
        return _swiglu_backward(gradient, self.gate, self.up, self.sigmoid)


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

"""Gradient checks for your own functions: of Tensors (`gradcheck`), or in plain NumPy (`check_vjp`)."""

from tinyllm.testing.compare import GradcheckResult
from tinyllm.testing.gradient_check import check_vjp, gradcheck, gradient_function
from tinyllm.testing.numeric import numerical_gradient
from tinyllm.testing.report import GradientError

__all__ = [
    "GradcheckResult",
    "GradientError",
    "check_vjp",
    "gradcheck",
    "gradient_function",
    "numerical_gradient",
]

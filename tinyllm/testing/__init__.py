"""Gradient checks for your own functions: of Tensors (`gradcheck`), or in plain NumPy (`check_vjp`).

`differences` gives derivatives with error bounds, by steps of every size or a complex step, and `numeric` gradients;
`compare` holds a backward against them (`kinks` where several share one), and `report` says what is wrong:
`explanations` is its table of causes.
`strategies` draws arrays and models for hypothesis, `invariants` and `learning` are checks of whole models, `mutants`
plants bugs in this package to see which check finds each.
"""

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

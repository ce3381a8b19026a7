"""Reverse-mode differentiation: `tensor` has Tensor and Op, `registry` the ops and their fast forms.

An op is called on Tensors, computes an array, and stays behind its output; `backward_pass` walks the ops back from a
loss. `mode` says how ops behave in the current context, `transforms` makes functions of derivatives.
"""

from tinyllm.autograd.mode import no_grad, use_formulas
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.autograd.transforms import grad, hessian, hvp, jvp, vjp

__all__ = ["Tensor", "grad", "gradients", "hessian", "hvp", "jvp", "no_grad", "use_formulas", "vjp"]

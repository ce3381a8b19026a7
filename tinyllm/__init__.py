"""A language-model stack on a hand-written autograd tensor in NumPy."""

from tinyllm import data, nn, ops, optim, tokenizer
from tinyllm.backend import use_backend
from tinyllm.checkpoint import load
from tinyllm.errors import InputError
from tinyllm.generate import generate, generate_text
from tinyllm.mode import no_grad, use_reference
from tinyllm.tensor import Tensor, gradients
from tinyllm.transforms import grad, hessian, hvp, jvp, vjp

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Tensor",
    "data",
    "generate",
    "generate_text",
    "grad",
    "gradients",
    "hessian",
    "hvp",
    "jvp",
    "load",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "tokenizer",
    "use_backend",
    "use_reference",
    "vjp",
]

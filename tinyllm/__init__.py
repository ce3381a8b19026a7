"""A language-model stack on a hand-written autograd tensor in NumPy."""

import importlib
from typing import TYPE_CHECKING, Any

# The operators of Tensor are attached by ops, so whatever is used, that is imported.
from tinyllm import ops
from tinyllm.errors import InputError
from tinyllm.generate import generate, generate_text
from tinyllm.mode import no_grad, use_reference
from tinyllm.tensor import Tensor, gradients

if TYPE_CHECKING:
    from tinyllm import data, nn, optim, tokenizer
    from tinyllm.backend import use_backend
    from tinyllm.checkpoint import load
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

# What is imported when it is first used, so that a program pays for what it uses: name -> module.
_LATER = {
    **{name: f"tinyllm.{name}" for name in ("data", "nn", "optim", "tokenizer")},
    "use_backend": "tinyllm.backend",
    "load": "tinyllm.checkpoint",
    **dict.fromkeys(("grad", "hessian", "hvp", "jvp", "vjp"), "tinyllm.transforms"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tinyllm' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    value = module if _LATER[name] == f"tinyllm.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})

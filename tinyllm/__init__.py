"""A language-model stack on a hand-written autograd tensor in NumPy."""

import importlib
from typing import TYPE_CHECKING, Any

# The operators of Tensor are attached by ops, so whatever is used, that is imported.
from tinyllm import ops
from tinyllm.autograd import Tensor, gradients, no_grad, use_formulas
from tinyllm.system.errors import InputError

if TYPE_CHECKING:
    from tinyllm import data, debug, nn, optim, testing, tokenizer
    from tinyllm.autograd import grad, hessian, hvp, jvp, vjp
    from tinyllm.backend import use_backend
    from tinyllm.models import ModelConfig, TransformerLM
    from tinyllm.models.generation.sampling import generate, generate_text
    from tinyllm.training.checkpoints.keeping import load
    from tinyllm.training.config import TrainConfig
    from tinyllm.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "ModelConfig",
    "Tensor",
    "TrainConfig",
    "Trainer",
    "TransformerLM",
    "data",
    "debug",
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
    "testing",
    "tokenizer",
    "use_backend",
    "use_formulas",
    "vjp",
]

# What is imported when it is first used, so that a program pays for what it uses: name -> module.
_LATER = {
    **{name: f"tinyllm.{name}" for name in ("data", "debug", "nn", "optim", "testing", "tokenizer")},
    **dict.fromkeys(("grad", "hessian", "hvp", "jvp", "vjp"), "tinyllm.autograd"),
    "use_backend": "tinyllm.backend",
    **dict.fromkeys(("ModelConfig", "TransformerLM"), "tinyllm.models"),
    **dict.fromkeys(("generate", "generate_text"), "tinyllm.models.generation.sampling"),
    "load": "tinyllm.training.checkpoints.keeping",
    "TrainConfig": "tinyllm.training.config",
    "Trainer": "tinyllm.training.trainer",
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

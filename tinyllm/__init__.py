"""A language-model stack on a hand-written autograd tensor in NumPy."""

import importlib
from typing import TYPE_CHECKING, Any

# The operators of Tensor are attached by ops, so whatever is used, that is imported.
from tinyllm import ops
from tinyllm.autograd import Tensor, gradients, no_grad, use_formulas
from tinyllm.system.errors import InputError

if TYPE_CHECKING:
    from builtins import str as device

    from numpy import bool_ as bool
    from numpy import float16, float32, float64, int32, int64
    from numpy import float32 as float

    from tinyllm import data, debug, nn, optim, testing, tokenizer
    from tinyllm.autograd import grad, hessian, hvp, jvp, vjp
    from tinyllm.autograd.creation import (
        arange,
        eye,
        from_numpy,
        full,
        linspace,
        long,
        multinomial,
        ones,
        ones_like,
        rand,
        randint,
        randn,
        randperm,
        tensor,
        zeros,
        zeros_like,
    )
    from tinyllm.backend import cuda, manual_seed, use_backend
    from tinyllm.models import ModelConfig, TransformerLM
    from tinyllm.models.formats.state_file import save
    from tinyllm.models.generation.sampling import generate, generate_text
    from tinyllm.ops import absolute as abs
    from tinyllm.ops import (
        allclose,
        argmax,
        argmin,
        argsort,
        chunk,
        cos,
        cumsum,
        einsum,
        exp,
        flatten,
        gather,
        isfinite,
        isnan,
        log,
        log_softmax,
        masked_fill,
        matmul,
        maximum,
        mean,
        minimum,
        outer,
        prod,
        relu,
        sigmoid,
        sin,
        softmax,
        sqrt,
        square,
        squeeze,
        stack,
        sum,
        tanh,
        topk,
        tril,
        triu,
        where,
    )
    from tinyllm.ops import clip as clamp
    from tinyllm.ops import concatenate as cat
    from tinyllm.ops import expand_dims as unsqueeze
    from tinyllm.ops.by_dim import max, min, sort, split, std, var
    from tinyllm.training.checkpoints.keeping import load_any as load
    from tinyllm.training.config import TrainConfig
    from tinyllm.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "InputError", "ModelConfig", "Tensor", "TrainConfig", "Trainer", "TransformerLM", "abs", "allclose", "arange",
    "argmax", "argmin", "argsort", "bool", "cat", "chunk", "clamp", "cos", "cuda", "cumsum", "data", "debug",
    "device", "einsum", "exp", "eye", "flatten", "float", "float16", "float32", "float64", "from_numpy", "full",
    "gather", "generate", "generate_text", "grad", "gradients", "hessian", "hvp", "int32", "int64", "isfinite",
    "isnan", "jvp", "linspace", "load", "log", "log_softmax", "long", "manual_seed", "masked_fill", "matmul", "max",
    "maximum", "mean", "min", "minimum", "multinomial", "nn", "no_grad", "ones", "ones_like", "ops", "optim", "outer",
    "prod", "rand", "randint", "randn", "randperm", "relu", "save", "sigmoid", "sin", "softmax", "sort", "split",
    "sqrt", "square", "squeeze", "stack", "std", "sum", "tanh", "tensor", "testing", "tokenizer", "topk", "tril",
    "triu", "unsqueeze", "use_backend", "use_formulas", "var", "vjp", "where", "zeros", "zeros_like",
]  # fmt: skip

# What is imported when it is first used, so that a program pays for what it uses: name -> module, or module:name there.
_LATER = {
    **{name: f"tinyllm.{name}" for name in ("data", "debug", "nn", "optim", "testing", "tokenizer")},
    **dict.fromkeys(("grad", "hessian", "hvp", "jvp", "vjp"), "tinyllm.autograd"),
    **dict.fromkeys(("manual_seed", "use_backend"), "tinyllm.backend"),
    **dict.fromkeys(("ModelConfig", "TransformerLM"), "tinyllm.models"),
    **dict.fromkeys(("generate", "generate_text"), "tinyllm.models.generation.sampling"),
    "save": "tinyllm.models.formats.state_file",
    "load": "tinyllm.training.checkpoints.keeping:load_any",
    "TrainConfig": "tinyllm.training.config",
    "Trainer": "tinyllm.training.trainer",
    # What a program for torch calls its library for.
    **dict.fromkeys(
        (
            "arange", "eye", "full", "linspace", "long", "multinomial", "ones", "ones_like", "rand", "randint", "randn",
            "randperm", "tensor", "zeros", "zeros_like", "from_numpy",
        ),
        "tinyllm.autograd.creation",
    ),
    **dict.fromkeys(
        (
            "abs", "allclose", "argmax", "argmin", "argsort", "chunk", "clamp", "cos", "cumsum", "einsum", "exp",
            "flatten", "gather", "isfinite", "isnan", "log", "log_softmax", "masked_fill", "matmul", "maximum",
            "mean", "minimum", "outer", "prod", "relu", "sigmoid", "sin", "softmax", "sqrt", "square", "squeeze",
            "stack", "sum", "tanh", "topk", "tril", "triu", "unsqueeze", "where",
        ),
        "tinyllm.ops",
    ),
    **dict.fromkeys(("max", "min", "sort", "split", "std", "var"), "tinyllm.ops.by_dim"),
    "cat": "tinyllm.ops:concatenate",
    "cuda": "tinyllm.backend:cuda",
    "device": "builtins:str",
    **dict.fromkeys(("float16", "float32", "float64", "int32", "int64"), "numpy"),
    "bool": "numpy:bool_",
    "float": "numpy:float32",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tinyllm' has no attribute {name!r}")
    path, _, other = _LATER[name].partition(":")
    module = importlib.import_module(path)
    value = module if path == f"tinyllm.{name}" else getattr(module, other or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})

"""Differentiable functions of Tensors. Importing this package puts the operators on Tensor."""

import sys

from tinyllm.autograd import operators
from tinyllm.ops.activation import elu, gelu, leaky_relu, silu, squared_relu, swiglu
from tinyllm.ops.attention import scaled_dot_product_attention
from tinyllm.ops.criteria import (
    binary_cross_entropy_with_logits,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)
from tinyllm.ops.elementwise import (
    absolute,
    add,
    astype,
    clip,
    cos,
    divide,
    erf,
    exp,
    expm1,
    log,
    log1p,
    maximum,
    minimum,
    multiply,
    negative,
    power,
    relu,
    rsqrt,
    sigmoid,
    sin,
    sqrt,
    square,
    subtract,
    tan,
    tanh,
    where,
)
from tinyllm.ops.heads import merge_heads, rotary_heads, split_heads
from tinyllm.ops.index import gather, getitem, take_along_axis, tril, triu
from tinyllm.ops.logarithms import log2, log10, log_sigmoid, logaddexp, softplus
from tinyllm.ops.lookup import dropout, embedding, one_hot, scatter_add
from tinyllm.ops.loss import cross_entropy
from tinyllm.ops.matrix import einsum, linear, matmul
from tinyllm.ops.norm import layer_norm, rms_norm
from tinyllm.ops.numpy_functions import apply_function, apply_ufunc  # noqa: F401 (called by Operators)
from tinyllm.ops.reduce import cumsum, max, mean, min, prod, std, sum, var
from tinyllm.ops.rotary import rope
from tinyllm.ops.running import cumprod
from tinyllm.ops.shape import (
    broadcast_to,
    concatenate,
    expand_dims,
    flip,
    pad,
    reshape,
    split,
    squeeze,
    stack,
    swapaxes,
    transpose,
)
from tinyllm.ops.softmaxes import log_softmax, logsumexp, softmax

operators.ops = sys.modules[__name__]

from tinyllm.ops import fast  # noqa: E402, F401 (puts the fast forms in place)

__all__ = [
    "absolute", "add", "astype", "binary_cross_entropy_with_logits", "broadcast_to", "clip",
    "concatenate", "cos", "cross_entropy", "cumprod", "cumsum", "divide", "dropout", "einsum", "elu",
    "embedding", "erf", "exp", "expand_dims", "expm1", "flip", "gather", "gelu", "getitem",
    "huber_loss", "kl_div", "l1_loss", "layer_norm", "leaky_relu", "linear", "log", "log1p", "log2",
    "log10", "log_sigmoid", "log_softmax", "logaddexp", "logsumexp", "matmul", "max", "maximum", "mean",
    "merge_heads", "min", "minimum", "mse_loss", "multiply", "negative", "nll_loss", "one_hot", "pad",
    "power", "prod", "relu", "reshape", "rms_norm", "rope", "rotary_heads", "rsqrt",
    "scaled_dot_product_attention", "scatter_add", "sigmoid", "silu", "sin", "smooth_l1_loss",
    "softmax", "softplus", "split", "split_heads", "sqrt", "square", "squared_relu", "squeeze", "stack",
    "std", "subtract", "sum", "swapaxes", "swiglu", "take_along_axis", "tan", "tanh", "transpose",
    "tril", "triu", "var", "where",
]  # fmt: skip

"""Differentiable functions of Tensors. Importing this package puts the operators and methods on Tensor.

Names and meanings are NumPy's, and NumPy's own functions take Tensors (`numpy_functions`). torch's names are accepted
for functions and arguments (`synonyms`), with these meanings: `var` and `std` divide by n unless told otherwise, `max`,
`min` and `sort` return values alone, `split` takes a number of parts, but called with `dim=` they are torch's
(`by_dim`); `repeat` repeats elements (torch's is `tile`); `transpose` orders all axes, or exchanges two of more.
Where a call could be meant either way, it raises.

**The rule of promotion.** Nothing becomes float64 that no float64 array or Tensor has asked for:

- A floating-point Tensor gives its dtype to the numbers, arrays, integers and booleans beside it. Two Tensors of
  different floating-point dtypes are refused.
- Integers and booleans among themselves are what NumPy makes of them (a Python number takes the dtype beside it), but
  booleans under `**`, `//`, `%`, `clip`, `relu` and rounding are int64. Beside a floating-point number: float32.
- Sums and products of them (`sum`, `prod`, `cumsum`, `trace`) are int64.
- What has no integer value is float32: division, `mean`, `var`, `std`, `norm`, roots, powers with a floating-point
  exponent, exponentials, logarithms, trigonometry, softmax, normalisations, losses, attention.
- Comparisons and tests are booleans, positions are int64.
"""

import sys

from tinyllm.autograd import operators
from tinyllm.ops import numpy_functions, synonyms
from tinyllm.ops.activation import elu, gelu, leaky_relu, silu, squared_relu, swiglu
from tinyllm.ops.arrangement import (
    chunk,
    contiguous,
    copy,
    expand,
    flatten,
    hstack,
    moveaxis,
    repeat,
    roll,
    tile,
    vstack,
)
from tinyllm.ops.attention import scaled_dot_product_attention
from tinyllm.ops.choice import absolute, clip, masked_fill, maximum, minimum, relu, where
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
    add,
    astype,
    cos,
    divide,
    erf,
    exp,
    expm1,
    floor_divide,
    multiply,
    negative,
    power,
    remainder,
    rsqrt,
    sigmoid,
    sin,
    sqrt,
    square,
    subtract,
    tan,
    tanh,
)
from tinyllm.ops.heads import merge_heads, rotary_heads, split_heads
from tinyllm.ops.index import gather, getitem, take_along_axis, tril, triu
from tinyllm.ops.linear_algebra import diagonal, dot, inner, outer, tensordot, trace, vector_norm
from tinyllm.ops.logarithms import log, log1p, log2, log10, log_sigmoid, logaddexp, softplus
from tinyllm.ops.lookup import dropout, embedding, one_hot, scatter_add
from tinyllm.ops.loss import cross_entropy
from tinyllm.ops.matrix import einsum, linear, matmul
from tinyllm.ops.norm import layer_norm, rms_norm
from tinyllm.ops.numpy_functions import apply_function, apply_ufunc  # noqa: F401 (called by Operators)
from tinyllm.ops.ordering import argsort, sort, topk
from tinyllm.ops.reduce import max, mean, min, prod, std, sum, var
from tinyllm.ops.rotary import rope
from tinyllm.ops.running import cumprod, cumsum
from tinyllm.ops.shape import (
    broadcast_to,
    concatenate,
    expand_dims,
    flip,
    pad,
    permute,
    reshape,
    split,
    squeeze,
    stack,
    swapaxes,
    transpose,
)
from tinyllm.ops.softmaxes import log_softmax, logsumexp, softmax
from tinyllm.ops.without_gradient import (
    all,
    allclose,
    any,
    argmax,
    argmin,
    array_equal,
    ceil,
    floor,
    isclose,
    isfinite,
    isinf,
    isnan,
    round,
    sign,
)

operators.ops = sys.modules[__name__]

from tinyllm.ops import fast  # noqa: E402, F401 (puts the fast forms in place)

__all__ = [
    "absolute",
    "add",
    "all",
    "allclose",
    "any",
    "argmax",
    "argmin",
    "argsort",
    "array_equal",
    "astype",
    "binary_cross_entropy_with_logits",
    "broadcast_to",
    "ceil",
    "chunk",
    "clip",
    "concatenate",
    "contiguous",
    "copy",
    "cos",
    "cross_entropy",
    "cumprod",
    "cumsum",
    "diagonal",
    "divide",
    "dot",
    "dropout",
    "einsum",
    "elu",
    "embedding",
    "erf",
    "exp",
    "expand",
    "expand_dims",
    "expm1",
    "flatten",
    "flip",
    "floor",
    "floor_divide",
    "gather",
    "gelu",
    "getitem",
    "hstack",
    "huber_loss",
    "inner",
    "isclose",
    "isfinite",
    "isinf",
    "isnan",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log",
    "log1p",
    "log2",
    "log10",
    "log_sigmoid",
    "log_softmax",
    "logaddexp",
    "logsumexp",
    "masked_fill",
    "matmul",
    "max",
    "maximum",
    "mean",
    "merge_heads",
    "min",
    "minimum",
    "moveaxis",
    "mse_loss",
    "multiply",
    "negative",
    "nll_loss",
    "one_hot",
    "outer",
    "pad",
    "permute",
    "power",
    "prod",
    "relu",
    "remainder",
    "repeat",
    "reshape",
    "rms_norm",
    "roll",
    "rope",
    "rotary_heads",
    "round",
    "rsqrt",
    "scaled_dot_product_attention",
    "scatter_add",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "smooth_l1_loss",
    "softmax",
    "softplus",
    "sort",
    "split",
    "split_heads",
    "sqrt",
    "square",
    "squared_relu",
    "squeeze",
    "stack",
    "std",
    "subtract",
    "sum",
    "swapaxes",
    "swiglu",
    "take_along_axis",
    "tan",
    "tanh",
    "tensordot",
    "tile",
    "topk",
    "trace",
    "transpose",
    "tril",
    "triu",
    "var",
    "vector_norm",
    "vstack",
    "where",
]  # fmt: skip

# Each function takes the other words for its arguments, has its other names, and is a method and NumPy's function.
_offered = {name: globals()[name] for name in __all__}
_offered |= {name: _offered[own] for name, own in synonyms.FUNCTIONS.items()}
_offered = {name: synonyms.with_synonyms(name, function) for name, function in _offered.items()}
globals().update(_offered)
# `ops.norm` is the module of layers' norms.
operators.install_methods(_offered | {"norm": _offered["vector_norm"]})
numpy_functions.install(_offered)

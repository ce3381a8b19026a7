"""torch.nn.functional's functions under its names, with its arguments and their meaning, as compositions of `ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.backend.philox import Key
from tinyllm.ops import linear, sigmoid, tanh
from tinyllm.ops.criteria import Reduce

__all__ = [
    "cross_entropy", "dropout", "embedding", "gelu", "layer_norm", "linear", "log_softmax", "mse_loss", "one_hot",
    "relu", "rms_norm", "scaled_dot_product_attention", "sigmoid", "silu", "softmax", "tanh",
]  # fmt: skip


def relu(input: Any, inplace: bool = False) -> Tensor:
    """max(x, 0); nothing is changed in place."""
    return ops.relu(input)


def silu(input: Any, inplace: bool = False) -> Tensor:
    """x sigmoid(x); nothing is changed in place."""
    return ops.silu(input)


def gelu(input: Any, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """x Phi(x), Phi the normal distribution function, or its tanh formula."""
    return ops.gelu(input, approximate)


def softmax(input: Any, dim: int) -> Tensor:
    """e^(x_i) / sum_j e^(x_j) along `dim`."""
    return ops.softmax(input, dim)


def log_softmax(input: Any, dim: int) -> Tensor:
    """The logarithm of softmax along `dim`."""
    return ops.log_softmax(input, dim)


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In training, each element zero with probability p, otherwise divided by 1 - p.

    The mask is drawn from the generator of `tinyllm.manual_seed`. Nothing is changed in place.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p={p}; it is a probability, from 0 to 1")
    return dropped(as_tensor(input), p, fresh_key()) if training and p else as_tensor(input)


def dropped(x: Tensor, p: float, key: Key) -> Tensor:
    """Each element zero with probability p in [0, 1], otherwise divided by 1 - p; `key` fixes the mask."""
    return ops.dropout(x, p, key) if p < 1 else ops.where(current.xp.zeros(x.shape, dtype=bool), x, 0.0)


def fresh_key() -> Key:
    """The key of one random mask, drawn from the generator of `tinyllm.manual_seed`."""
    return Key(int(backend.default_generator().integers(2**63)))


def embedding(input: Any, weight: Any, padding_idx: int | None = None) -> Tensor:
    """Rows of `weight` by the integers `input`; the row `padding_idx` gets no gradient."""
    weight = as_tensor(weight)
    rows = ops.embedding(weight, input)
    if padding_idx is None:
        return rows
    indices = input.data if isinstance(input, Tensor) else backend.asarray(input)
    return ops.where((indices == padding_idx % weight.shape[0])[..., None], rows.detach(), rows)


def layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    input = as_tensor(input)
    D = (norm_width(normalized_shape),)
    weight = current.xp.ones(D, dtype=input.dtype) if weight is None else weight
    bias = current.xp.zeros(D, dtype=input.dtype) if bias is None else bias
    return ops.layer_norm(input, weight, bias, eps)


def rms_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; eps None: the spacing of floating-point numbers at 1."""
    input = as_tensor(input)
    D = (norm_width(normalized_shape),)
    weight = current.xp.ones(D, dtype=input.dtype) if weight is None else weight
    return ops.rms_norm(input, weight, float(np.finfo(input.dtype).eps) if eps is None else eps)


def norm_width(normalized_shape: int | Sequence[int]) -> int:
    """The number of features that a norm is over; raises ValueError for a norm over several axes."""
    lengths = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if len(lengths) != 1:
        raise ValueError(
            f"normalized_shape={normalized_shape}; norms here are over the last axis alone: give its length"
        )
    return int(lengths[0])


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    *,
    ignore_index: int = -100,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-ln softmax(input)[target], the classes along the second axis. input: (V,), (N, V) or (N, V, ...).

    target: integers, () or (N, ...), or probabilities of the shape of input. weight: (V,), of each class.
    `ops.cross_entropy` takes the classes last, (N, ..., V).
    """
    input, target = as_tensor(input), as_tensor(target)
    if input.ndim > 2:
        wanted = (input.shape[0], *input.shape[2:])
        if target.shape not in (wanted, input.shape):
            raise ValueError(
                f"cross_entropy: input has shape {input.shape} with the classes second, so target needs {wanted}; got "
                f"{target.shape}. Classes last are for ops.cross_entropy, or reshape to (N, V) and (N,)"
            )
        order = (0, *range(2, input.ndim), 1)
        if target.shape == input.shape:
            target = ops.transpose(target, order)
        input = ops.transpose(input, order)
    return ops.cross_entropy(
        input, target, ignore_index, reduction, weight=weight, label_smoothing=label_smoothing
    )


def mse_loss(input: Any, target: Any, *, reduction: Reduce = "mean") -> Tensor:
    """(input - target)^2, two of one shape: the mean, the sum, or each."""
    return ops.mse_loss(input, target, reduction)


def one_hot(tensor: Any, num_classes: int = -1) -> Tensor:
    """1 at each index and 0 elsewhere, as integers; num_classes -1: one more than the largest. (...) -> (..., V)."""
    return ops.one_hot(tensor, None if num_classes == -1 else num_classes)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(Q K^T scale + mask) V. query: (..., T, K), key: (..., S, K), value: (..., S, K_v) -> (..., T, K_v).

    attn_mask: booleans, True where a query may look, or numbers that are added to the scores. is_causal: query t sees
    the keys up to t, also where S is not T.
    """
    query, key, value = as_tensor(query), as_tensor(key), as_tensor(value)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
        attn_mask = current.xp.tri(query.shape[-2], key.shape[-2], dtype=bool)
    key_of_mask = fresh_key() if dropout_p else None
    return ops.scaled_dot_product_attention(
        query, key, value, mask=attn_mask, scale=scale, dropout_p=dropout_p, dropout_key=key_of_mask
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """dropout(softmax(Q K^T / sqrt(K) + mask)) V, and the probabilities (..., T, S)."""
    scores = q * q.shape[-1] ** -0.5 @ k.swapaxes(-1, -2)  # (..., T, S)
    if mask is not None:
        scores = scores + mask
    p = dropout(ops.softmax(scores), dropout_p)
    return p @ v, p


def combined_mask(dtype: Any, *masks: tuple[Any, tuple[int, ...]]) -> Tensor | None:
    """The sum of torch's masks, each with the shape that it takes; booleans are True where nobody may look."""
    sum_of_all: Tensor | None = None
    for mask, shape in masks:
        if mask is None:
            continue
        mask = ops.reshape(as_tensor(mask), shape)
        if mask.dtype == bool:
            mask = Tensor(current.xp.where(mask.data, -math.inf, 0.0).astype(dtype))
        sum_of_all = mask if sum_of_all is None else sum_of_all + mask
    return sum_of_all

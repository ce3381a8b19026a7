"""Scaled dot-product attention with causal, boolean and additive masks, grouped-query heads and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllm.autograd.operands import as_tensor, floating, operands
from tinyllm.autograd.registry import composite, register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.backend.philox import Key
from tinyllm.ops.lookup import dropout
from tinyllm.ops.shape import broadcast_to
from tinyllm.ops.softmaxes import Softmax


@register
class Scores(Op):
    """S = Q K^T scale: how well each query fits each key.

    Shapes: q: (B, H, T, K), k: (B, G, S, K) -> (B, H, T, S). H is a multiple of G: query head h looks at key head
    h // (H / G).
    Source: Vaswani et al., "Attention is all you need", 2017, equation 1; grouped heads: Ainslie et al., "GQA", 2023,
    section 2.
    """

    cases = (
        Case(((2, 2, 3, 4), (2, 2, 3, 4)), {"scale": 0.5}),
        Case(((1, 4, 3, 2), (1, 2, 5, 2)), {"scale": 0.3}),
        Case(((1, 1, 1, 1), (1, 1, 1, 1)), {"scale": 1.0}),
        Case(((0, 1, 2, 2), (0, 1, 2, 2)), {"scale": 1.0}),
    )

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, q: Array, k: Array) -> Array:
        self.G = k.shape[1]
        self.q, self.k = q, for_each_head(k, q.shape[1])  # (B, H, T, K), (B, H, S, K)
        return self.q @ self.k.swapaxes(-1, -2) * self.scale

    def backward(self, gradient: Array) -> Any:
        """S is a product, so dQ = dS K scale and dK = dS^T Q scale, summed over the heads that share a key."""
        gradient_q = gradient @ self.k * self.scale
        gradient_k = gradient.swapaxes(-1, -2) @ self.q * self.scale
        return gradient_q, sum_over_groups(gradient_k, self.G)

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return 2 * math.prod(output) * shapes[0][-1]


@register
class Attention(Op):
    """O = P V: for each query the mean of the values, weighted by its probabilities.

    Shapes: p: (B, H, T, S), v: (B, G, S, K) -> (B, H, T, K).
    Source: Vaswani et al., "Attention is all you need", 2017, equation 1.
    """

    cases = (
        Case(((2, 2, 3, 4), (2, 2, 4, 3))),
        Case(((1, 4, 3, 2), (1, 2, 2, 5))),
        Case(((1, 1, 1, 1), (1, 1, 1, 1))),
        Case(((0, 1, 2, 2), (0, 1, 2, 2))),
    )

    def forward(self, p: Array, v: Array) -> Array:
        self.G = v.shape[1]
        self.p, self.v = p, for_each_head(v, p.shape[1])  # (B, H, T, S), (B, H, S, K)
        return self.p @ self.v

    def backward(self, gradient: Array) -> Any:
        """O is a product, so dP = dO V^T and dV = P^T dO, summed over the heads that share a value."""
        gradient_p = gradient @ self.v.swapaxes(-1, -2)
        gradient_v = self.p.swapaxes(-1, -2) @ gradient
        return gradient_p, sum_over_groups(gradient_v, self.G)

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return 2 * math.prod(output) * shapes[0][-1]


def for_each_head(x: Any, H: int) -> Any:
    """The key head of each query head. x: (B, G, S, K) -> (B, H, S, K)."""
    G = x.shape[1]
    return x if G == H else x[:, current.xp.arange(H) // (H // G)]


def sum_over_groups(x: Any, G: int) -> Any:
    """The sum over the query heads of each key head. x: (B, H, S, K) -> (B, G, S, K)."""
    B, H, S, K = x.shape
    return x if G == H else x.reshape((B, G, H // G, S, K)).sum(axis=2)


@composite("scaled_dot_product_attention")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_key: Key | None = None,
) -> Tensor:
    """O = dropout(softmax(Q K^T / sqrt(K) + M)) V, M = 0 where a query may look and -infinity elsewhere.

    A bias is added to M: it broadcasts to (B, H, T, S).
    """
    scores = Scores(1 / math.sqrt(q.shape[-1]) if scale is None else scale)(q, k)  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    p = Softmax(-1, visible(q.shape[2], k.shape[2], causal, mask))(scores)
    if dropout_p > 0:
        assert dropout_key is not None
        p = dropout(p, dropout_p, dropout_key)
    return Attention()(p, v)


def visible(T: int, S: int, causal: bool, mask: Any) -> Any:
    """Where a query may look: booleans that broadcast to (B, H, T, S), or True for everywhere."""
    if not causal:
        return True if mask is None else mask
    lower = current.xp.tri(T, S, S - T, dtype=bool)
    return lower if mask is None else lower & mask


def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool = False,
    mask: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_key: Key | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask) v for each head.

    Args:
        q: (B, H, T, K). k: (B, G, S, K). v: (B, G, S, K_v). H is a multiple of G (grouped-query attention). In
            the place of B there may be any axes, which broadcast, or none; (T, K) is one head.
        causal: query t sees the keys up to t + S - T; the last query sees every key.
        mask: broadcasts to (B, H, T, S): booleans, True where a query may look, or floating-point numbers that are
            added to the scores.
        scale: the factor of the scores, 1/sqrt(K) if None.
        dropout_p, dropout_key: dropout of the probabilities, and the key that fixes its mask.

    Returns:
        (B, H, T, K_v). A query that sees no key gets zeros.

    Raises:
        ValueError: the shapes do not fit together, or dropout has no key. TypeError: the mask is of integers.
    """
    q, k, v = floating(*operands(q, k, v))
    axes = max(q.ndim, k.ndim, v.ndim)
    B = q.shape[:-3]
    if not q.ndim == k.ndim == v.ndim == 4 or not B == k.shape[:-3] == v.shape[:-3]:
        B, (q, k, v) = _with_four_axes(q, k, v)
    if q.shape[3] != k.shape[3] or k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            "attention: needs q (B, H, T, K), k (B, G, S, K), v (B, G, S, K_v); "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    H, G = q.shape[1], k.shape[1]
    if H == 0 or 0 in k.shape[1:]:
        raise ValueError(
            f"attention: of heads, keys and their elements none may be 0; got {q.shape}, {k.shape}"
        )
    if H % G:
        raise ValueError(f"attention: {H} query heads do not divide among {G} key heads")
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"attention: causal is True or False; got {type(causal).__name__}; a mask is mask=")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p={dropout_p}; it needs 0 <= dropout_p < 1")
    if dropout_p > 0 and dropout_key is None:
        raise ValueError("attention: dropout_p > 0 needs dropout_key, which fixes the mask")
    mask, bias = (
        (None, None) if mask is None else _mask_and_bias(mask, (*B, H, q.shape[2], k.shape[2]), q.dtype)
    )
    arguments: Any = {"causal": bool(causal), "dropout_p": float(dropout_p), "dropout_key": dropout_key}
    arguments["scale"] = None if scale is None else float(scale)
    if bias is None:
        out = attend(q, k, v, mask=mask, **arguments)
    else:
        out = attend.function(*operands(q, k, v, bias), mask=None, **arguments)
    return out if len(B) == 1 and axes == 4 else out.reshape((*B, *out.shape[1:])[-axes:])


def _with_four_axes(*tensors: Tensor) -> tuple[tuple[int, ...], list[Tensor]]:
    """The axes before the last three, broadcast, and the tensors with those as one axis: (B, H, T, K)."""
    if min(x.ndim for x in tensors) < 2:
        raise ValueError(
            f"attention: q, k, v need at least the axes (T, K); got shapes {', '.join(str(x.shape) for x in tensors)}"
        )
    tensors = tuple([x if x.ndim > 2 else x.reshape((1, *x.shape)) for x in tensors])
    try:
        B = np.broadcast_shapes(*[x.shape[:-3] for x in tensors])
    except ValueError:
        raise ValueError(
            "attention: the axes of q, k, v before the last three do not broadcast; "
            f"got shapes {', '.join(str(x.shape) for x in tensors)}"
        ) from None
    whole = [x if x.shape[:-3] == B else broadcast_to(x, B + x.shape[-3:]) for x in tensors]
    return B, [x.reshape((math.prod(B), *x.shape[-3:])) for x in whole]


def _mask_and_bias(mask: Any, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """A boolean mask as an array, or what is added to scores of `shape` (..., H, T, S), for batch axes made one."""
    mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
    kind = mask.dtype.kind
    if kind not in "bf":
        raise TypeError(
            "attention: the mask is boolean, True where a query may look, or of floating-point numbers that are added "
            f"to the scores; got dtype {mask.dtype}"
        )
    tensor = as_tensor(mask, dtype if kind == "f" else None)
    try:
        fits = np.broadcast_shapes(tensor.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"attention: the mask has shape {tensor.shape}; it needs to broadcast to {shape}")
    if len(shape) > 4 and tensor.ndim > 3:
        whole = broadcast_to(tensor, shape[:-3] + tensor.shape[-3:])
        tensor = whole.reshape((math.prod(shape[:-3]), *tensor.shape[-3:]))
    return (tensor.data, None) if kind == "b" else (None, tensor)

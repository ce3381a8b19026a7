"""Scaled dot-product attention with causal and custom masks, grouped-query heads and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinyllm import backend
from tinyllm.autograd.tensor import Case, Op, Tensor, composite, floating, operands, register
from tinyllm.backend import Array, current
from tinyllm.backend.philox import Key
from tinyllm.ops.lookup import dropout
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
    *,
    causal: bool = False,
    mask: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_key: Key | None = None,
) -> Tensor:
    """O = dropout(softmax(Q K^T / sqrt(K) + M)) V, M = 0 where a query may look and -infinity elsewhere."""
    scores = Scores(1 / math.sqrt(q.shape[-1]) if scale is None else scale)(q, k)  # (B, H, T, S)
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
        q: (B, H, T, K). k: (B, G, S, K). v: (B, G, S, K_v). H is a multiple of G (grouped-query attention).
        causal: query t sees the keys up to t + S - T; the last query sees every key.
        mask: booleans that broadcast to (B, H, T, S), True where a query may look.
        scale: the factor of the scores, 1/sqrt(K) if None.
        dropout_p, dropout_key: dropout of the probabilities, and the key that fixes its mask.

    Returns:
        (B, H, T, K_v).

    Raises:
        ValueError: the shapes do not fit together, or dropout has no key. TypeError: the mask is not boolean.
    """
    q, k, v = floating(*operands(q, k, v))
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"attention: q, k, v need 4 axes; got shapes {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "attention: needs q (B, H, T, K), k (B, G, S, K), v (B, G, S, K_v); "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[1] == 0 or 0 in k.shape[1:]:
        raise ValueError(
            f"attention: of heads, keys and their elements none may be 0; got {q.shape}, {k.shape}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads do not divide among {k.shape[1]} key heads")
    if mask is not None:
        mask = mask.data if isinstance(mask, Tensor) else backend.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(
                f"attention: the mask is boolean, True where a query may look; got dtype {mask.dtype}"
            )
        of_scores = (*q.shape[:3], k.shape[2])
        if len(mask.shape) > 4 or any(
            n not in (1, m) for n, m in zip(mask.shape[::-1], of_scores[::-1], strict=False)
        ):
            raise ValueError(
                f"attention: the mask has shape {mask.shape}, which does not broadcast to {of_scores}"
            )
    if dropout_p > 0 and dropout_key is None:
        raise ValueError("attention: dropout_p > 0 needs dropout_key, which fixes the mask")
    scale = None if scale is None else float(scale)
    return attend(
        q, k, v, causal=causal, mask=mask, scale=scale, dropout_p=float(dropout_p), dropout_key=dropout_key
    )

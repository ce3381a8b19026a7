"""Scaled dot-product attention with causal and custom masks, grouped-query heads and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.ops.attention_blocks import BlockedAttention, additive, causal_scores
from tinyllm.ops.elementwise import exp, where
from tinyllm.ops.embedding import dropout
from tinyllm.ops.matrix import matmul, row_sum
from tinyllm.ops.reduce import sum as sum_over
from tinyllm.ops.softmax import shifted
from tinyllm.philox import Key, keep_mask
from tinyllm.tensor import Case, FusedOp, Tensor, operands, register

KEPT_SCORES = 1 << 22
"""With more scores than this, and without dropout, attention runs in blocks and keeps no probabilities."""

_MASK = np.array([[True, False, True], [True, True, True]])
_UNSEEN = np.array([[True, True, False], [False, False, False]])


@register
class ScaledDotProductAttention(FusedOp):
    """O = softmax(Q K^T / sqrt(d) + M) V, M = 0 where a query may look and -infinity elsewhere.

    Shapes: q: (B, H, T, K), k: (B, G, S, K), v: (B, G, S, K_v) -> (B, H, T, K_v), H a multiple of G: query
    head h looks at key head h // (H / G). With `causal`, query t sees the keys up to t + S - T, so that the
    last query sees every key. A query that sees no key gives zeros. Long sequences run in blocks of queries, so that
    memory grows with their length; dropout needs its mask whole, so with it they do not.
    Source: Vaswani et al., "Attention is all you need", 2017, equation 1; grouped heads: Ainslie et al.,
    "GQA", 2023, section 2.
    """

    cases = (
        Case(((2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4)), {"causal": True}),
        Case(((1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 5)), {"causal": True}),
        Case(((2, 2, 2, 4), (2, 1, 3, 4), (2, 1, 3, 4)), {"mask": _MASK}),
        Case(((1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"mask": _UNSEEN, "scale": 0.3}),
        Case(((1, 2, 4, 2), (1, 1, 2, 2), (1, 1, 2, 3)), {"causal": True}),
        Case(
            ((1, 1, 2, 2), (1, 1, 4, 2), (1, 1, 4, 2)),
            {"causal": True, "dropout_p": 0.3, "dropout_key": Key(5)},
        ),
        Case(((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))),
        Case(((0, 1, 2, 2), (0, 1, 2, 2), (0, 1, 2, 2))),
    )

    def __init__(
        self,
        causal: bool = False,
        mask: Any = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_key: Key | None = None,
    ) -> None:
        self.causal, self.mask, self.scale = causal, mask, scale
        self.dropout_p, self.dropout_key = dropout_p, dropout_key

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        xp = backend.xp
        B, H, T, K = q.shape
        G, S = k.shape[1], k.shape[2]
        self.k, self.v = k, v
        self.factor = 1 / math.sqrt(K) if self.scale is None else self.scale
        self.blocked: BlockedAttention | None = None
        if B * H * T * S > KEPT_SCORES and self.dropout_p == 0:
            self.blocked = BlockedAttention(q, k, v, self.factor, self.causal, self.mask)
            return self.blocked.forward()
        self.q = _grouped(q * self.factor, G)  # (B, G, H/G T, K)
        p = self.q @ k.swapaxes(-1, -2)  # (B, G, H/G T, S)
        scores = p.reshape((B, H, T, S))
        if self.causal:
            scores += causal_scores(T, S, scores.dtype.name, xp)
        if self.mask is not None:
            scores += additive(self.mask, scores.dtype)
        maximum = p.max(axis=-1, keepdims=True)
        may_see_nothing = self.mask is not None or (self.causal and T > S)
        if may_see_nothing:
            maximum = xp.where(xp.isfinite(maximum), maximum, 0)
        p -= maximum
        xp.exp(p, out=p)
        total = row_sum(p)
        if may_see_nothing:
            total = xp.where(total == 0, 1, total)
        p /= total
        self.p = p
        self.dropped = p
        if self.dropout_p > 0:
            assert self.dropout_key is not None
            keep = keep_mask((B, H, T, S), self.dropout_p, self.dropout_key)
            self.keep = keep.reshape(p.shape) * xp.asarray(1 / (1 - self.dropout_p), dtype=p.real.dtype)
            self.dropped = p * self.keep
        if G != H:
            return (self.dropped @ v).reshape((B, H, T, v.shape[-1]))
        return xp.matmul(self.dropped, v, out=_tokens_first((B, H, T, v.shape[-1]), p.dtype))

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        B, H, T, K = shapes[0]
        return 2 * B * H * T * shapes[1][2] * (K + output[-1])

    def backward(self, gradient: Any) -> Any:
        if self.blocked is not None:
            return self.blocked.backward(gradient)
        B, H, T, _ = gradient.shape
        G = self.k.shape[1]
        gradient = _grouped(gradient, G)  # (B, G, H/G T, K_v)
        xp = backend.xp
        gradient_v = xp.matmul(
            self.dropped.swapaxes(-1, -2), gradient, out=_tokens_first(self.v.shape, gradient.dtype)
        )
        gradient_p = gradient @ self.v.swapaxes(-1, -2)
        if self.dropout_p > 0:
            gradient_p *= self.keep
        # softmax: dS = P (dP - sum_s P dP)
        gradient_p -= row_sum(self.p * gradient_p)
        gradient_p *= self.p
        K = self.k.shape[-1]
        if G == H:
            gradient_q = xp.matmul(gradient_p, self.k, out=_tokens_first((B, H, T, K), gradient.dtype))
        else:
            gradient_q = (gradient_p @ self.k).reshape((B, H, T, K))
        gradient_q *= self.factor
        gradient_k = xp.matmul(
            gradient_p.swapaxes(-1, -2), self.q, out=_tokens_first(self.k.shape, gradient.dtype)
        )
        return gradient_q, gradient_k, gradient_v

    def allowed(self, T: int, S: int) -> Any:
        """Where a query may look: booleans that broadcast to (B, H, T, S), or None for everywhere."""
        if not self.causal:
            return self.mask
        causal = backend.xp.tri(T, S, S - T, dtype=bool)
        return causal if self.mask is None else causal & self.mask

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, H, T, K = q.shape
        G, S = k.shape[1], k.shape[2]
        factor = 1 / math.sqrt(K) if self.scale is None else self.scale
        if G != H:
            heads = np.repeat(np.arange(G), H // G)
            k, v = k[:, heads], v[:, heads]
        scores = matmul(q, k.swapaxes(-1, -2)) * factor  # (B, H, T, S)
        allowed = self.allowed(T, S)
        if allowed is None:
            exponentials = exp(shifted(scores, -1)[0])
            p = exponentials / sum_over(exponentials, -1, keepdims=True)
        else:
            # A finite stand-in for -infinity keeps gradients of gradients free of infinity times zero.
            seen = backend.xp.broadcast_to(allowed, scores.shape)
            visible = where(seen, scores, float(scores.data.min(initial=0)))
            exponentials = where(seen, exp(shifted(visible, -1)[0]), 0)
            total = sum_over(exponentials, -1, keepdims=True)
            p = exponentials / where(total.data == 0, 1, total)
        if self.dropout_p > 0:
            assert self.dropout_key is not None
            p = dropout(p, self.dropout_p, self.dropout_key)
        return matmul(p, v)


def _grouped(x: Any, G: int) -> Any:
    """The query heads of each key head as more rows. x: (B, H, T, K) -> (B, G, H/G T, K)."""
    B, H, T, K = x.shape
    return x if G == H else x.reshape((B, G, H // G * T, K))


def _tokens_first(shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty array (B, H, T, K) whose memory runs as (B, T, H, K), so that joining the heads again is free."""
    B, H, T, K = shape
    return backend.xp.empty((B, T, H, K), dtype=dtype).transpose(0, 2, 1, 3)


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
    q, k, v = operands(q, k, v)
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"attention: q, k, v need 4 axes; got shapes {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "attention: needs q (B, H, T, K), k (B, G, S, K), v (B, G, S, K_v); "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads do not divide among {k.shape[1]} key heads")
    if mask is not None:
        mask = mask.data if isinstance(mask, Tensor) else backend.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(
                f"attention: the mask is boolean, True where a query may look; got dtype {mask.dtype}"
            )
    if dropout_p > 0 and dropout_key is None:
        raise ValueError("attention: dropout_p > 0 needs dropout_key, which fixes the mask")
    return ScaledDotProductAttention(causal, mask, scale, dropout_p, dropout_key)(q, k, v)

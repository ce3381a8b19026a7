"""Attention a block of queries at a time, in memory that grows with the length and not with its square.

No block keeps its probabilities: backward computes them again from the logarithm of their sum.
Source: Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021; Dao et al., "FlashAttention", 2022,
section 3.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinyllm import backend
from tinyllm.ops.matrix import row_sum

# Scores in a block: with fewer, the products with keys and values become thin and slow.
_SCORES = 1 << 20
_FEWEST_ROWS = 16


def additive(allowed: Any, dtype: Any) -> Any:
    """What is added to scores: 0 where `allowed`, -infinity elsewhere."""
    return backend.xp.where(allowed, 0, -math.inf).astype(dtype)


@functools.lru_cache(maxsize=16)
def causal_scores(T: int, S: int, dtype: str, xp: Any) -> Any:
    """What is added to causal scores (T, S): 0 up to key t + S - T, -infinity beyond."""
    return additive(xp.tri(T, S, S - T, dtype=bool), dtype)


@dataclass
class BlockedAttention:
    """softmax(factor Q K^T + M) V and its gradients; shapes as in ScaledDotProductAttention, without dropout.

    A block is the queries of some positions in all heads that share a key head.
    """

    q: Any
    k: Any
    v: Any
    factor: float
    causal: bool
    mask: Any = None

    def _blocks(self) -> Iterator[tuple[tuple[Any, ...], tuple[int, int], int]]:
        """(the index of the queries, (batch, key head), how many keys they see at most)."""
        B, H, T, _ = self.q.shape
        G, S = self.k.shape[1], self.k.shape[2]
        heads = H // G
        rows = max(_FEWEST_ROWS, _SCORES // max(1, heads * S))
        for b in range(B):
            for g in range(G):
                for start in range(0, T, rows):
                    end = min(start + rows, T)
                    seen = max(0, end + S - T) if self.causal else S
                    yield (b, slice(g * heads, (g + 1) * heads), slice(start, end)), (b, g), seen

    def _scores(self, block: tuple[Any, ...], group: tuple[int, int], seen: int) -> tuple[Any, Any]:
        """(the scaled queries (h R, K), their scores (h R, seen)) of a block of h heads and R positions."""
        xp = backend.xp
        q = self.q[block] * self.factor  # (h, R, K)
        h, R, K = q.shape
        q = q.reshape(h * R, K)
        scores = q @ self.k[group][:seen].T
        by_head = scores.reshape(h, R, seen)
        if self.causal:
            # All but the last R keys are seen by every query of the block.
            last = min(R, seen)
            by_head[..., seen - last :] += causal_scores(R, last, scores.dtype.name, xp)
        if self.mask is not None:
            B, H, T, _ = self.q.shape
            whole = xp.broadcast_to(self.mask, (B, H, T, self.k.shape[2]))
            by_head += additive(whole[block][..., :seen], scores.dtype)
        return q, scores

    def forward(self) -> Any:
        """The attended values (B, H, T, K_v), laid out in memory as (B, T, H, K_v)."""
        xp = backend.xp
        B, H, T, _ = self.q.shape
        self.out = xp.zeros((B, T, H, self.v.shape[-1]), dtype=self.q.dtype).transpose(0, 2, 1, 3)
        self.log_total = xp.zeros((B, H, T, 1), dtype=self.q.dtype)
        for block, group, seen in self._blocks():
            if seen == 0:
                continue
            _, p = self._scores(block, group, seen)
            maximum = p.max(axis=-1, keepdims=True)
            maximum = xp.where(xp.isfinite(maximum), maximum, 0)  # a query may see no key
            p -= maximum
            xp.exp(p, out=p)
            total = row_sum(p)
            total = xp.where(total == 0, 1, total)
            shape = self.out[block].shape
            self.out[block] = (p @ self.v[group][:seen] / total).reshape(shape)
            self.log_total[block] = (maximum + xp.log(total)).reshape((*shape[:-1], 1))
        return self.out

    def backward(self, gradient: Any) -> tuple[Any, Any, Any]:
        """The gradients of q, k and v."""
        xp = backend.xp
        gradient_q = xp.zeros(self.q.shape, dtype=self.q.dtype)
        gradient_k, gradient_v = xp.zeros_like(self.k), xp.zeros_like(self.v)
        # sum_s P dP = dO . O, so that no block needs the others.
        delta = row_sum(gradient * self.out)  # (B, H, T, 1)
        for block, group, seen in self._blocks():
            if seen == 0:
                continue
            q, p = self._scores(block, group, seen)
            keys, values = self.k[group][:seen], self.v[group][:seen]
            p -= self.log_total[block].reshape(-1, 1)
            xp.exp(p, out=p)
            gradient_out = gradient[block].reshape(len(q), values.shape[-1])
            gradient_v[group][:seen] += p.T @ gradient_out
            # softmax: dS = P (dP - sum_s P dP)
            gradient_scores = gradient_out @ values.T
            gradient_scores -= delta[block].reshape(-1, 1)
            gradient_scores *= p
            gradient_q[block] = (gradient_scores @ keys * self.factor).reshape(gradient_q[block].shape)
            gradient_k[group][:seen] += gradient_scores.T @ q
        return gradient_q, gradient_k, gradient_v

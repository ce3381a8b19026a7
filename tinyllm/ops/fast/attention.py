"""Fast form of scaled dot-product attention: in blocks of queries, or, for long sequences, in tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinyllm import backend
from tinyllm.autograd.registry import FusedOp, fast_form_of
from tinyllm.autograd.tensor import Case
from tinyllm.backend import Array, current
from tinyllm.backend.philox import Key, keep_mask
from tinyllm.ops.attention import attend
from tinyllm.ops.fast.products import row_sum
from tinyllm.ops.fast.tiled_attention import Heads, add_to, additive, causal_scores, shifted_exponential
from tinyllm.system.cores import each_on_a_core

KEPT_SCORES = 1 << 22
"""With more scores than this, and without dropout, no probabilities are kept: backward computes them again."""
# Queries of a block under a causal mask: fewer compute fewer scores in vain, in thinner products.
CAUSAL_ROWS = 64

_MASK = np.array([[True, False, True], [True, True, True]])
_UNSEEN = np.array([[True, True, False], [False, False, False]])

Index = tuple[int | slice, int | slice]
"""Of one head of one sequence (b, h), or of several."""


class Block(NamedTuple):
    """Scores that are computed together: of the queries in `rows` with the keys in `columns`, for all heads."""

    rows: slice
    columns: slice


@fast_form_of(attend)
class ScaledDotProductAttention(FusedOp):
    """O = softmax(Q K^T / sqrt(d) + M) V, M = 0 where a query may look and -infinity elsewhere.

    Shapes: q: (B, H, T, K), k: (B, G, S, K), v: (B, G, S, K_v) -> (B, H, T, K_v), H a multiple of G: query
    head h looks at key head h // (H / G). With `causal`, query t sees the keys up to t + S - T, so that the
    last query sees every key. A query that sees no key gives zeros.

    It runs in blocks of queries, and a block leaves out the keys that none of them sees. Probabilities are kept
    for backward unless the sequence is long; then attention runs in tiles (`Heads`), and memory grows with the length
    and not with its square. Dropout needs its mask whole, so with it they are always kept.

    Source: Vaswani et al., "Attention is all you need", 2017, equation 1; grouped heads: Ainslie et al., "GQA", 2023,
    section 2.
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
        self.causal, self.scale = causal, scale
        self.mask = None if mask is None else current.xp.array(mask)  # a copy: backward needs it as it is now
        self.dropout_p, self.dropout_key = dropout_p, dropout_key

    def forward(self, q: Array, k: Array, v: Array) -> Array:
        xp = current.xp
        B, H, T, K = q.shape
        S, K_v = v.shape[2:]
        self.k, self.v = k, v
        self.factor = 1 / math.sqrt(K) if self.scale is None else self.scale
        self.q = q * self.factor
        self.out = _tokens_first((B, H, T, K_v), q.dtype)
        self.keeps = B * H * T * S <= KEPT_SCORES or self.dropout_p > 0
        self.kept: dict[int, Any] = {}
        """The probabilities P of each block, (B, G, H/G R, columns), by its first row."""
        self.log_total: Any = None
        """ln sum_s e^(score), (B, H, T, 1), from which backward computes P again where none are kept."""
        if not self.keeps:
            self.log_total = xp.zeros((B, H, T, 1), dtype=q.dtype)
            self._each_head(lambda at, _, heads: heads.forward(self.out[at], self.log_total[at]))
            return self.out
        self.keep: Any = None
        """The dropout mask times 1 / (1 - p), (B, H, T, S)."""
        if self.dropout_p > 0:
            assert self.dropout_key is not None
            mask = keep_mask((B, H, T, S), self.dropout_p, self.dropout_key)
            self.keep = mask.astype(q.dtype) * (1 / (1 - self.dropout_p))
        self._forward_blocks()
        return self.out

    def _each_head(self, function: Callable[[Index, Index, Heads], None]) -> None:
        """`function` of every query head, those with a key head in common in turn.

        It takes the index of query heads, that of their key heads, and the Heads: one on a CPU, and on a device all
        that share no key head.
        """
        B, H, T, _ = self.q.shape
        G, S = self.k.shape[1:3]
        mask = None if self.mask is None else current.xp.broadcast_to(self.mask, (B, H, T, S))

        def call(at: Index, key: Index) -> None:
            of_heads = None if mask is None else mask[at]
            function(at, key, Heads(self.q[at], self.k[key], self.v[key], self.causal, of_heads))

        def of_key_head(key: tuple[int, int]) -> None:
            b, g = key
            for h in range(g * (H // G), (g + 1) * (H // G)):
                call((b, h), key)

        if backend.choose(False, on_device=True):
            for h in range(H // G):
                call((slice(None), slice(h, None, H // G)), (slice(None), slice(None)))
        else:
            each_on_a_core(of_key_head, list(itertools.product(range(B), range(G))))

    def _grouped(self, x: Any) -> Any:
        """The query heads of each key head together. x: (B, H, T, ...) -> (B, G, H/G, T, ...)."""
        B, H, T, width = x.shape
        G = self.k.shape[1]
        return x.reshape((B, G, H // G, T, width))

    def _blocks(self) -> list[Block]:
        """The blocks whose probabilities are kept, without those that hold no key that a query sees."""
        T, S = self.q.shape[2], self.k.shape[2]
        step = backend.choose(CAUSAL_ROWS, on_device=max(T, 1)) if self.causal else max(T, 1)
        blocks = []
        for start in range(0, T, step):
            end = min(start + step, T)
            seen = max(0, end + S - T) if self.causal else S
            if seen:
                blocks.append(Block(slice(start, end), slice(0, seen)))
        return blocks

    def _leaves_out(self) -> bool:
        """Whether some query, and so perhaps some key, is in no block."""
        T, S = self.q.shape[2], self.k.shape[2]
        return not self.blocks or (self.causal and T > S)

    def _forward_blocks(self) -> None:
        xp = current.xp
        may_see_nothing = self.mask is not None or (self.causal and self.q.shape[2] > self.k.shape[2])
        self.blocks = self._blocks()
        out = self._grouped(self.out)
        if self._leaves_out():
            out[...] = 0
        for block in self.blocks:
            p = self._scores(block)
            maximum = p.max(axis=-1, keepdims=True)
            if may_see_nothing:
                maximum = xp.where(xp.isfinite(maximum), maximum, 0)
            shifted_exponential(p, maximum)
            total = row_sum(p)
            if may_see_nothing:
                total = xp.where(total == 0, 1, total)
            p /= total
            self.kept[block.rows.start] = p
            _write_product(out[:, :, :, block.rows], self._dropped(p, block), self.v[:, :, block.columns])

    def _scores(self, block: Block) -> Any:
        """factor Q K^T + M of a block, (B, G, H/G R, columns)."""
        q = self._grouped(self.q)[:, :, :, block.rows]  # (B, G, H/G, R, K)
        scores = _together(q) @ self.k[:, :, block.columns].swapaxes(-1, -2)
        by_head = _by_head(scores, q.shape[2])  # (B, G, H/G, R, columns)
        T, S = self.q.shape[2], self.k.shape[2]
        if self.causal:
            # Row r sees the columns up to r + last; those up to `last` are seen by every row.
            last = block.rows.start + S - T
            R, columns = by_head.shape[3:]
            hidden = max(0, last + 1)
            if hidden < columns:
                add_to(
                    by_head[..., hidden:],
                    causal_scores(R, columns - hidden, last - hidden, scores.dtype, current.xp),
                )
        if self.mask is not None:
            by_head += additive(self._mask_of(block), scores.dtype)
        return scores

    def _mask_of(self, block: Block) -> Any:
        """The mask of a block in as few numbers as it came in: it broadcasts to (B, G, H/G, R, columns)."""
        mask: Any = self.mask
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        B, heads, rows, columns = mask.shape
        G = min(heads, self.k.shape[1])  # 1 where all heads have one mask
        mask = mask.reshape((B, G, heads // G, rows, columns))
        if rows > 1:
            mask = mask[:, :, :, block.rows]
        return mask[..., block.columns] if columns > 1 else mask

    def _dropped(self, values: Any, block: Block) -> Any:
        """`values` (B, G, H/G R, columns) times the dropout mask."""
        if self.keep is None:
            return values
        return values * _together(self._grouped(self.keep)[:, :, :, block.rows, block.columns])

    @property
    def p(self) -> Any:
        """P = softmax(factor Q K^T + M) as a whole, before dropout: (B, H, T, S)."""
        xp = current.xp
        p = xp.zeros((*self.q.shape[:3], self.k.shape[2]), dtype=self.q.dtype)
        if self.keeps:
            grouped = self._grouped(p)
            for block in self.blocks:
                part = grouped[:, :, :, block.rows, block.columns]
                part[...] = _by_head(self.kept[block.rows.start], part.shape[2])
            return p

        def fill(at: Index, _: Index, heads: Heads) -> None:
            p[at] = heads.probabilities(self.log_total[at])

        self._each_head(fill)
        return p

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        B, H, T, K = shapes[0]
        S = shapes[1][2]
        hidden = T - min(T, S)  # queries before the first key, if causal
        seen = (T - hidden) * (S + 1 - (T - hidden)) + (T - hidden) * (T - hidden - 1) // 2
        return 2 * B * H * (seen if self.causal else T * S) * (K + output[-1])

    def backward(self, gradient: Array) -> Any:
        B, H, T, _ = gradient.shape
        K = self.k.shape[3]
        gradient_q = _tokens_first((B, H, T, K), gradient.dtype)
        gradient_k = _tokens_first(self.k.shape, gradient.dtype)
        gradient_v = _tokens_first(self.v.shape, gradient.dtype)
        if not self.keeps or self._leaves_out():
            gradient_q[...] = gradient_k[...] = gradient_v[...] = 0
        if self.keeps:
            self._backward_blocks(gradient, gradient_q, gradient_k, gradient_v)
        else:
            self._each_head(
                lambda at, key, heads: heads.backward(
                    self.out[at], self.log_total[at], gradient[at], gradient_q[at], gradient_k[key], gradient_v[key],
                )
            )  # fmt: skip
        gradient_q *= self.factor
        return gradient_q, gradient_k, gradient_v

    def _backward_blocks(self, gradient: Any, gradient_q: Any, gradient_k: Any, gradient_v: Any) -> None:
        # sum_s P dP = O . dO, so that no block needs the others.
        products = (gradient * self.out).transpose(0, 2, 1, 3)
        delta = self._grouped(row_sum(products).transpose(0, 2, 1, 3))
        q, out, by_head = self._grouped(self.q), self._grouped(gradient), self._grouped(gradient_q)
        for number, (rows, columns) in enumerate(reversed(self.blocks)):
            # The last block sees every key, so that its gradients need nothing to be added to.
            first = number == 0
            p = self.kept[rows.start]
            gradient_rows = _together(out[:, :, :, rows])
            block = Block(rows, columns)
            _add_transposed_product(gradient_v[:, :, columns], self._dropped(p, block), gradient_rows, first)
            # softmax: dS = P (dP - sum_s P dP)
            gradient_scores = self._dropped(gradient_rows @ self.v[:, :, columns].swapaxes(-1, -2), block)
            _softmax_backward(gradient_scores, p, _together(delta[:, :, :, rows]))
            _write_product(by_head[:, :, :, rows], gradient_scores, self.k[:, :, columns])
            _add_transposed_product(
                gradient_k[:, :, columns], gradient_scores, _together(q[:, :, :, rows]), first
            )


@backend.elementwise
def _softmax_backward(gradient: Any, p: Any, mean: Any) -> None:
    gradient -= mean
    gradient *= p


def _together(x: Any) -> Any:
    """The heads that share a key head as more rows. x: (b, g, h, R, K) -> (b, g, h R, K)."""
    b, g, h, R, K = x.shape
    return x.reshape((b, g, h * R, K))


def _by_head(x: Any, heads: int) -> Any:
    """`_together` undone. x: (b, g, h R, K), h = heads -> (b, g, h, R, K)."""
    b, g, rows, K = x.shape
    return x.reshape((b, g, heads, rows // heads, K))


def _write_product(target: Any, a: Any, b: Any) -> None:
    """target = a b. target: (B, G, h, R, K), a: (B, G, h R, n), b: (B, G, n, K)."""
    if target.shape[2] == 1:
        current.xp.matmul(a, b, out=target[:, :, 0])
    else:
        target[...] = (a @ b).reshape(target.shape)


def _add_transposed_product(target: Any, a: Any, b: Any, first: bool) -> None:
    """target = a^T b if this is the first term, otherwise target += a^T b."""
    if first:
        current.xp.matmul(a.swapaxes(-1, -2), b, out=target)
    else:
        target += a.swapaxes(-1, -2) @ b


def _tokens_first(shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty array (B, H, T, K) whose memory runs as (B, T, H, K), so that joining the heads again is free."""
    B, H, T, K = shape
    return current.xp.empty((B, T, H, K), dtype=dtype).transpose(0, 2, 1, 3)

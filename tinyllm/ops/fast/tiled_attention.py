"""Attention over a long sequence in tiles: probabilities are never kept, and backward makes them again.

Memory grows with the length of the sequence and not with its square. On a CPU this is done head by head: every product
is of two plain matrices in one thread, so that several heads can run at once. On a device it is done for all of them.

Source: Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021; Dao et al., "FlashAttention", 2022, section
3.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tinyllm import backend
from tinyllm.backend import current
from tinyllm.ops.fast.products import row_sum

# Of a tile: keys, and scores. Smaller tiles would fit into the cache of a core, but their thinner products and more
# calls cost more than that gains.
_COLUMNS = 1024
_ELEMENTS = 1 << 18
# Scores up to this size need no maximum subtracted: e^32 is 8e13, and float32 goes to 3e38.
_SAFE_SCORE = 32


@dataclass(frozen=True)
class Heads:
    """What the scores of a head are made of, or of several.

    q: (..., T, K), scaled already; k: (..., S, K); v: (..., S, K_v). mask: (..., T, S), True where a query may look, or
    None. With `causal`, query t sees the keys up to t + S - T.
    """

    q: Any
    k: Any
    v: Any
    causal: bool
    mask: Any

    @property
    def lengths(self) -> tuple[int, int]:
        """T and S, the numbers of queries and keys."""
        return self.q.shape[-2], self.k.shape[-2]

    def row_slices(self) -> Iterator[slice]:
        """The queries of each row of tiles."""
        elements = backend.choose(_ELEMENTS, on_device=1 << 26)
        heads = math.prod(self.q.shape[:-2])
        return _slices(self.lengths[0], max(1, elements // (max(heads, 1) * _COLUMNS)))

    def column_slices(self, rows: slice) -> Iterator[slice]:
        """The keys of each tile for these queries: those that one of them sees."""
        T, S = self.lengths
        return _slices(max(0, rows.stop + S - T) if self.causal else S, _COLUMNS)

    def scratch(self) -> Any:
        """Flat memory for a tile."""
        _T, S = self.lengths
        rows = next(self.row_slices(), slice(0, 0)).stop
        return current.xp.empty(math.prod(self.q.shape[:-2]) * rows * min(S, _COLUMNS), dtype=self.q.dtype)

    def scores(self, rows: slice, columns: slice, scratch: Any) -> Any:
        """Q K^T + M of these queries and keys, in the memory of the flat array `scratch`: (..., rows, columns)."""
        T, S = self.lengths
        scores = _product(self.q[..., rows, :], self.k[..., columns, :], scratch)
        if self.causal:
            # Row r sees the columns up to r + last; those up to `last` are seen by every row.
            last = rows.start + S - T - columns.start
            hidden = max(0, last + 1)
            R, C = scores.shape[-2:]
            if hidden < C:
                add_to(
                    scores[..., hidden:],
                    causal_scores(R, C - hidden, last - hidden, scores.dtype, current.xp),
                )
        if self.mask is not None:
            scores += additive(self.mask[..., rows, columns], scores.dtype)
        return scores

    def scores_are_safe(self) -> bool:
        """Whether no score can be larger than _SAFE_SCORE, because |q . k| <= |q| |k|.

        This saves a CPU a tenth of the time of `forward`. A device would have to be waited for, and float16 overflows
        early.
        """
        if backend.is_asynchronous() or self.q.dtype not in ("float32", "float64"):
            return False
        squares = (float(row_sum(x * x).max()) for x in (self.q, self.k))
        return math.prod(squares) <= _SAFE_SCORE**2

    def forward(self, out: Any, log_total: Any) -> None:
        """Writes softmax(scores) V to `out` (..., T, K_v), and ln sum_s e^(score) to `log_total` (..., T, 1).

        A query that sees no key gets zeros. Softmax goes over the keys in tiles: Milakov and Gimelshein, "Online
        normalizer calculation for softmax", 2018, algorithm 3.
        """
        xp = current.xp
        scratch = self.scratch()
        safe = self.scores_are_safe()
        for rows in self.row_slices():
            values = xp.zeros_like(out[..., rows, :])
            total = xp.zeros_like(log_total[..., rows, :])  # of e^(score - maximum), as in `values`
            maximum = xp.full_like(total, 0 if safe else -math.inf)
            for columns in self.column_slices(rows):
                p = self.scores(rows, columns, scratch)
                if safe:
                    shrunk: Any = 1
                    xp.exp(p, out=p)
                else:
                    finite, shrunk = _next_maximum(maximum, p.max(axis=-1, keepdims=True))
                    shifted_exponential(p, finite)
                _scale_and_add(total, shrunk, row_sum(p))
                _scale_and_add(values, shrunk, p @ self.v[..., columns, :])
            _finish(log_total[..., rows, :], total, maximum)
            xp.divide(values, total, out=out[..., rows, :])

    def backward(
        self, out: Any, log_total: Any, gradient: Any, gradient_q: Any, gradient_k: Any, gradient_v: Any
    ) -> None:
        """Adds the gradients of q, k and v, from the gradient of `out` and what forward wrote."""
        # sum_s P dP = O . dO, so that no tile needs the others. What is subtracted from each row of a product is a
        # column more of its factors, which saves a pass over the tile.
        gradient_less = backend.concatenate_last(gradient, -row_sum(gradient * out))  # (..., T, K_v + 1)
        v_and_one = backend.concatenate_last(self.v, current.xp.ones_like(self.v[..., :1]))
        scratch = self.scratch(), self.scratch()
        less_total = self._less(log_total)
        for rows in self.row_slices():
            for columns in self.column_slices(rows):
                scores = less_total.scores(rows, columns, scratch[0])
                p = current.xp.exp(scores, out=scores)
                add_to(gradient_v[..., columns, :], p.swapaxes(-1, -2) @ gradient[..., rows, :])
                # softmax: dS = P (dP - sum_s P dP)
                gradient_scores = _product(
                    gradient_less[..., rows, :], v_and_one[..., columns, :], scratch[1]
                )
                gradient_scores *= p
                add_to(gradient_q[..., rows, :], gradient_scores @ self.k[..., columns, :])
                add_to(gradient_k[..., columns, :], gradient_scores.swapaxes(-1, -2) @ self.q[..., rows, :])

    def probabilities(self, log_total: Any) -> Any:
        """P as a whole, (..., T, S)."""
        T, S = self.lengths
        scratch = current.xp.empty(math.prod(self.q.shape[:-2]) * T * S, dtype=self.q.dtype)
        return current.xp.exp(self._less(log_total).scores(slice(0, T), slice(0, S), scratch))

    def _less(self, log_total: Any) -> Heads:
        """The heads whose scores are these less `log_total` (..., T, 1), so that e^(score) is P."""
        ones = current.xp.ones_like(self.k[..., :1])
        return replace(
            self, q=backend.concatenate_last(self.q, -log_total), k=backend.concatenate_last(self.k, ones)
        )


@backend.elementwise
def _next_maximum(maximum: Any, of_tile: Any) -> tuple[Any, Any]:
    """The maximum that includes this tile's, in place of `maximum`; it, or 0 for -infinity; e^(old - new)."""
    xp = current.xp
    highest = xp.maximum(maximum, of_tile)
    finite = xp.where(xp.isfinite(highest), highest, 0)
    shrunk = xp.exp(maximum - finite)
    xp.copyto(maximum, highest)
    return finite, shrunk


@backend.elementwise
def shifted_exponential(scores: Any, maximum: Any) -> None:
    """scores = e^(scores - maximum)."""
    scores -= maximum
    current.xp.exp(scores, out=scores)


@backend.elementwise
def _scale_and_add(total: Any, factor: Any, term: Any) -> None:
    total *= factor
    total += term


@backend.elementwise
def _finish(log_total: Any, total: Any, maximum: Any) -> None:
    """ln sum_s e^(score), where nothing is seen 0, and there a total that can be divided by."""
    xp = current.xp
    unseen = total == 0
    total += unseen
    xp.add(xp.where(unseen, 0, maximum), xp.log(total), out=log_total)


def add_to(part: Any, term: Any) -> None:
    """part += term, where `part` is a view; `x[index] += term` writes it into x once more, which costs a kernel."""
    part += term


def additive(allowed: Any, dtype: Any) -> Any:
    """What is added to scores: 0 where `allowed`, -infinity elsewhere."""
    # Numbers of this dtype, so that nothing is made in double precision first.
    return current.xp.where(allowed, dtype.type(0), dtype.type(-math.inf))


@functools.lru_cache(maxsize=16)
def causal_scores(T: int, S: int, last: int, dtype: Any, xp: Any) -> Any:
    """What is added to causal scores (T, S): 0 up to key t + last, -infinity beyond."""
    return additive(xp.tri(T, S, last, dtype=bool), dtype)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _product(a: Any, b: Any, scratch: Any) -> Any:
    """a b^T, in the memory of `scratch`. a: (..., R, K), b: (..., C, K) -> (..., R, C)."""
    shape = (*a.shape[:-1], b.shape[-2])
    return current.xp.matmul(a, b.swapaxes(-1, -2), out=scratch[: math.prod(shape)].reshape(shape))

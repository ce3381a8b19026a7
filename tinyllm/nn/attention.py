"""Multi-head attention with grouped-query heads, optional QK-norm, and a cache for decoding."""

from __future__ import annotations

import copy
from typing import NamedTuple, Self

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current
from tinyllm.nn.cache import LayerCache
from tinyllm.nn.layers import Dropout, Linear, RMSNorm, infer_side_by_side, packed_side_by_side
from tinyllm.nn.module import Module
from tinyllm.nn.positional import PositionEncoding
from tinyllm.ops.fast.norm import inverse_root
from tinyllm.ops.fast.products import row_sum
from tinyllm.ops.fast.tiled_attention import causal_scores

# Queries whose scores are computed together: more of them compute more in vain, and take more memory.
_QUERIES = 256


class HeadNorm(RMSNorm):
    """QK-norm: RMSNorm of each head of the queries or keys, before their position. x: (B, T, H K) -> (B, H, T, K)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, position: PositionEncoding, offset: int | Array
    ) -> Tensor:
        return position.heads(x, self.weight.size, offset, self.weight, self.eps)

    infer = RMSNorm.infer  # of heads that are cut already: (..., K) -> (..., K)


class Documents(NamedTuple):
    """The documents of the tokens in a batch, each of which attends to tokens of its own document alone.

    together: (B, 1, T, T), whether two tokens are of the same document. positions: (B, T) integers, of each token in
    its document, counted from the first token of it that is in the batch.
    """

    together: Array
    positions: Array

    @classmethod
    def of(cls, numbers: Array) -> Documents:
        """From the number of each token's document, (B, T) integers; a document's tokens stand side by side."""
        together = numbers[:, :, None] == numbers[:, None, :]  # (B, T, T)
        before = current.xp.tri(numbers.shape[1], dtype=bool)
        return cls(together[:, None], (together & before).sum(axis=-1) - 1)


class MultiHeadAttention(Module):
    """softmax(Q K^T / sqrt(K)) V over heads, causal, then an output projection. x: (B, T, D) -> (B, T, D).

    The number of heads follows from the rows of the weights, so that a slice of the heads is a smaller
    module of the same class.

    Args:
        hidden_size: D. num_heads: H, of queries. num_kv_heads: G, of keys and values; it divides H. head_dim: K.
        rng: draws the initial weights; None: the generator of `tinyllm.manual_seed`.
        position: puts positions into queries and keys; None: no positions.
        qk_norm: RMSNorm on the queries and keys of each head, with norm_eps.
        dropout: of the probabilities; None: none.
        init_scale, output_init_scale: of the initial weights, and of those of the output projection (see `Linear`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rng: np.random.Generator | None = None,
        position: PositionEncoding | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: Dropout | None = None,
        init_scale: float = 1.0,
        output_init_scale: float = 1.0,
    ) -> None:
        D, H, G, K = hidden_size, num_heads, num_kv_heads, head_dim
        self.head_dim = K
        self.position = position or PositionEncoding()
        rng = rng or backend.default_generator()
        self.query = Linear(D, H * K, False, rng=rng, init_scale=init_scale)
        self.key = Linear(D, G * K, False, rng=rng, init_scale=init_scale)
        self.value = Linear(D, G * K, False, rng=rng, init_scale=init_scale)
        self.output = Linear(H * K, D, False, rng=rng, init_scale=output_init_scale)
        self.query_norm = HeadNorm(K, norm_eps) if qk_norm else None
        self.key_norm = HeadNorm(K, norm_eps) if qk_norm else None
        self.dropout = dropout or Dropout(0.0)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None
    ) -> Tensor:
        offset: int | Array = 0 if cache is None else cache.length
        if documents is not None:
            offset = documents.positions
        q = self.heads(self.query(x), self.query_norm, offset)  # (B, H, T, K)
        k = self.heads(self.key(x), self.key_norm, offset)  # (B, G, T, K)
        v = ops.split_heads(self.value(x), self.head_dim)  # (B, G, T, K)
        if cache is not None:
            all_keys, all_values = cache.append(k.data, v.data)
            k, v = Tensor(all_keys), Tensor(all_values)
        drop = self.dropout.active
        attended = ops.scaled_dot_product_attention(
            q,
            k,
            v,
            causal=True,
            mask=None if documents is None else documents.together,
            dropout_p=self.dropout.p if drop else 0.0,
            dropout_key=self.dropout.key() if drop else None,
        )  # (B, H, T, K)
        return self.output(ops.merge_heads(attended))

    def heads(self, x: Tensor, norm: HeadNorm | None, offset: int | Array) -> Tensor:
        """The heads of queries or keys, normalised if there is a norm, and with their positions (see PositionEncoding).

        x: (B, T, H K) -> (B, H, T, K).
        """
        if norm is None:
            return self.position.heads(x, self.head_dim, offset)
        return norm(x, self.position, offset)

    def infer(self, x: Array, cache: LayerCache | None = None, newest: bool = False) -> Array:
        if not self._parts_are_known():
            return super().infer(x, cache, newest=newest)
        B, K = x.shape[0], self.head_dim
        H, G = self.query.weight.shape[0] // K, self.key.weight.shape[0] // K
        offset = 0 if cache is None else cache.length
        projected = infer_side_by_side(x, self.query, self.key, self.value)
        projected = projected.reshape((*x.shape[:2], H + 2 * G, K))
        heads = projected[:, :, : H + G]
        if self.query_norm is not None and self.key_norm is not None:
            heads = heads * inverse_root(row_sum(heads * heads), K, self.query_norm.eps)
            queries, keys = heads[:, :, :H], heads[:, :, H:]
            queries *= self.query_norm.weight.data
            keys *= self.key_norm.weight.data
        heads = self.position.infer(heads, offset)
        q = heads[:, -1:, :H] if newest else heads[:, :, :H]
        k, v = heads[:, :, H:].swapaxes(1, 2), projected[:, :, H + G :].swapaxes(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, K)
        T = q.shape[1]
        q = q.reshape((B, T, G, H // G, K)).transpose((0, 2, 3, 1, 4))  # (B, G, H/G, T, K)
        attended = infer_attention(q, k, v).transpose((0, 3, 1, 2, 4))  # (B, T, G, H/G, K)
        return self.output.infer(attended.reshape((B, T, H * K)))

    def _parts_are_known(self) -> bool:
        """Whether `infer` knows what the parts compute that it takes together: projections, norms, positions."""
        query, key = self.query_norm, self.key_norm
        return (
            (query is key is None or (type(query) is type(key) is HeadNorm and query.eps == key.eps))
            and isinstance(self.query, Linear)
            and isinstance(self.key, Linear)
            and isinstance(self.value, Linear)
            and self.position.has_own_infer
        )

    def packed(self) -> Self:
        packed = copy.copy(self)
        packed.query, packed.key, packed.value = packed_side_by_side(self.query, self.key, self.value)
        packed.output = self.output.packed()
        return packed


def infer_attention(q: Array, keys: Array, values: Array) -> Array:
    """softmax(Q K^T / sqrt(K)) V of the newest T of S tokens, each of which sees those before and itself.

    q: (B, G, H/G, T, K), keys and values: (B, G, S, K) -> (B, G, H/G, T, K).
    """
    xp = current.xp
    B, G, h, T, K = q.shape
    S = keys.shape[2]
    if T > _QUERIES:
        attended = xp.empty_like(q)
        for start in range(0, T, _QUERIES):
            end = min(start + _QUERIES, T)
            seen = slice(0, S - T + end)
            attended[..., start:end, :] = infer_attention(
                q[..., start:end, :], keys[:, :, seen], values[:, :, seen]
            )
        return attended
    p = (q * K**-0.5).reshape((B, G, h * T, K)) @ keys.swapaxes(-1, -2)  # (B, G, h T, S)
    if T > 1:
        p.reshape((B, G, h, T, S))[..., S - T :] += causal_scores(T, T, 0, p.dtype, xp)
    p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    attended = p @ values
    attended /= row_sum(p)
    return attended.reshape(q.shape)

"""Multi-head attention with grouped-query heads, optional QK-norm, and a cache for decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.nn.layers import Dropout, Linear, RMSNorm
from tinyllm.nn.module import Module
from tinyllm.nn.positional import PositionEncoding

if TYPE_CHECKING:
    from tinyllm.models.transformer import ModelConfig


class LayerCache(Protocol):
    """The keys and values of the tokens that one layer has seen; it lives outside the model."""

    @property
    def length(self) -> int:
        """How many tokens it holds."""

    def append(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Add arrays (B, G, T, K) and return all keys and values so far, each (B, G, length, K)."""


class HeadNorm(RMSNorm):
    """QK-norm: RMSNorm of each head of the queries or keys, before their position. x: (B, T, H K) -> (B, H, T, K)."""

    def forward(self, x: Tensor, position: PositionEncoding, offset: int) -> Tensor:  # type: ignore[override]
        return position.heads(x, self.weight.size, offset, self.weight, self.eps)


class MultiHeadAttention(Module):
    """softmax(Q K^T / sqrt(K)) V over heads, causal, then an output projection. x: (B, T, D) -> (B, T, D).

    The number of heads follows from the rows of the weights, so that a slice of the heads is a smaller
    module of the same class.
    """

    def __init__(
        self, config: ModelConfig, position: PositionEncoding, rng: np.random.Generator, dropout: Dropout
    ) -> None:
        D, K = config.hidden_size, config.head_dim
        self.head_dim = K
        self.position = position
        self.query = Linear(D, config.num_heads * K, rng, config.init_scale)
        self.key = Linear(D, config.num_kv_heads * K, rng, config.init_scale)
        self.value = Linear(D, config.num_kv_heads * K, rng, config.init_scale)
        self.output = Linear(config.num_heads * K, D, rng, config.residual_init_scale)
        self.query_norm = HeadNorm(K, config.norm_eps) if config.qk_norm else None
        self.key_norm = HeadNorm(K, config.norm_eps) if config.qk_norm else None
        self.dropout = dropout

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        offset = 0 if cache is None else cache.length
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
            dropout_p=self.dropout.p if drop else 0.0,
            dropout_key=self.dropout.key() if drop else None,
        )  # (B, H, T, K)
        return self.output(ops.merge_heads(attended))

    def heads(self, x: Tensor, norm: HeadNorm | None, offset: int) -> Tensor:
        """The heads of queries or keys, normalised if there is a norm, and with their positions.

        x: (B, T, H K), the first at position `offset` -> (B, H, T, K).
        """
        if norm is None:
            return self.position.heads(x, self.head_dim, offset)
        return norm(x, self.position, offset)

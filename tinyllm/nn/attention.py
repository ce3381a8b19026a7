"""Multi-head attention with grouped-query heads, optional QK-norm, and a cache for decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinyllm import ops
from tinyllm.nn.layers import Dropout, Linear, RMSNorm
from tinyllm.nn.module import Module
from tinyllm.nn.positional import PositionEncoding
from tinyllm.tensor import Tensor

if TYPE_CHECKING:
    from tinyllm.nn.transformer import ModelConfig


class LayerCache(Protocol):
    """The keys and values of the tokens that one layer has seen; it lives outside the model."""

    @property
    def length(self) -> int:
        """How many tokens it holds."""

    def append(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Add arrays (B, G, T, K) and return all keys and values so far, each (B, G, length, K)."""


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
        self.query_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.dropout = dropout

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        offset = 0 if cache is None else cache.length
        q = self.heads(self.query(x), self.query_norm)  # (B, T, H, K)
        k = self.heads(self.key(x), self.key_norm)  # (B, T, G, K)
        v = self.heads(self.value(x), None)  # (B, T, G, K)
        q = self.position.rotate(q, offset).transpose(0, 2, 1, 3)  # (B, H, T, K)
        k = self.position.rotate(k, offset).transpose(0, 2, 1, 3)  # (B, G, T, K)
        v = v.transpose(0, 2, 1, 3)  # (B, G, T, K)
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
        H, K = attended.shape[1], attended.shape[3]
        return self.output(attended.transpose(0, 2, 1, 3).reshape(B, T, H * K))

    def heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """The last axis cut into heads, each normalised. x: (B, T, H K) -> (B, T, H, K)."""
        B, T, width = x.shape
        x = x.reshape(B, T, width // self.head_dim, self.head_dim)
        return x if norm is None else norm(x)

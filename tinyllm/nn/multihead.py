"""Multi-head attention with torch's arguments, weights and results."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.nn import functional
from tinyllm.nn.layers import Linear, uniform_parameter
from tinyllm.nn.module import Module, Parameter


class MultiheadAttention(Module):
    """softmax(Q K^T / sqrt(K) + masks) V over heads, with projections, as torch.nn.MultiheadAttention.

    `MultiHeadAttention` is the one that the package's models use: grouped queries, positions and a cache.

    Args:
        embed_dim: D. num_heads: H, which divides it. dropout: of the probabilities, in training.
        bias: of the projections. batch_first: whether inputs are (B, T, D) instead of (T, B, D).
        rng: draws the initial weights; None: the generator of `tinyllm.manual_seed`.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ("in_proj_weight", "in_proj_bias")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        rng: np.random.Generator | None = None,
    ) -> None:
        D = embed_dim
        if D % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={D}")
        rng = rng or backend.default_generator()
        self.embed_dim, self.num_heads, self.head_dim = D, num_heads, D // num_heads
        self.dropout, self.batch_first = dropout, batch_first
        # Glorot and Bengio, 2010, equation 16, for a matrix (3 D, D).
        self.in_proj_weight = uniform_parameter(rng, (3 * D, D), math.sqrt(6 / (4 * D)))
        self.in_proj_bias = Parameter(current.xp.zeros(3 * D, dtype=np.float32)) if bias else None
        self.out_proj = Linear(D, D, bias, rng=rng)
        if self.out_proj.bias is not None:
            self.out_proj.bias.data[...] = 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the probabilities if `need_weights`.

        Args:
            query: (T, B, D), (B, T, D) if batch_first, or (T, D). key, value: the same with S for T.
            key_padding_mask: (B, S), or (S,); attn_mask: (T, S) or (B H, T, S). Booleans are True where nobody may
                look, the other way round than in `ops.scaled_dot_product_attention`; numbers are added to the scores.
            average_attn_weights: whether the probabilities are their mean over heads, (B, T, S), or (B, H, T, S).
            is_causal: says that attn_mask is the causal one; it makes none.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is the causal one; give attn_mask too")
        query, key, value = as_tensor(query), as_tensor(key), as_tensor(value)
        self._require_shapes(query, key, value)
        batched = query.ndim == 3
        q, k, v = self._heads(query, key, value)  # (B, H, T, K), (B, H, S, K)
        (B, H, T, _), S = q.shape, k.shape[2]
        mask = functional.combined_mask(
            q.dtype,
            (attn_mask, (B, H, T, S) if attn_mask is not None and len(attn_mask.shape) == 3 else (T, S)),
            (key_padding_mask, (B, 1, 1, S)),
        )
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            attended, weights = functional.attention(q, k, v, mask, dropout_p)
            weights = weights.mean(axis=1) if average_attn_weights else weights
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        output = self.out_proj(ops.merge_heads(attended))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.swapaxes(0, 1), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The heads of queries, keys and values, (B, H, T, K), (B, H, S, K) and (B, H, S, K)."""
        D, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if query is key is value:
            projected = ops.split(ops.linear(query, weight, bias), 3, axis=-1)
        else:
            parts = [slice(i * D, (i + 1) * D) for i in range(3)]
            projected = [
                ops.linear(x, weight[part], None if bias is None else bias[part])
                for x, part in zip((query, key, value), parts, strict=True)
            ]
        if query.ndim == 2:
            projected = [x.expand_dims(0) for x in projected]
        elif not self.batch_first:
            projected = [x.swapaxes(0, 1) for x in projected]
        return [ops.split_heads(x, self.head_dim) for x in projected]

    def _require_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        batch = 0 if self.batch_first else 1
        same = {query.ndim, key.ndim, value.ndim} in ({2}, {3}) and key.shape == value.shape
        if not same or key.shape[-1] != self.embed_dim or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query, key and value need (T, B, D), or (B, T, D) with batch_first, with D={self.embed_dim}; got "
                f"{query.shape}, {key.shape}, {value.shape}"
            )
        if query.ndim == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"query {query.shape} and key {key.shape} differ in the batch, axis {batch} with "
                f"batch_first={self.batch_first}"
            )

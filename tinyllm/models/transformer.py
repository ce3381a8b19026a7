"""The language model: token embedding, pre-norm transformer blocks, final norm, head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyllm.autograd.tensor import Tensor
from tinyllm.nn.attention import LayerCache, MultiHeadAttention
from tinyllm.nn.feed_forward import FeedForward
from tinyllm.nn.layers import Dropout, Embedding, Linear, RMSNorm
from tinyllm.nn.module import Module
from tinyllm.nn.positional import POSITION_ENCODINGS, PositionEncoding
from tinyllm.system.errors import InputError
from tinyllm.system.settings import field
from tinyllm.system.wording import require_known, shown


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a TransformerLM. Fields left out are filled in when the config is made.

    Raises InputError when the numbers cannot make a model.
    """

    vocab_size: int = field(0, "tokens in the vocabulary; 0: as many as the tokenizer has")
    context_length: int = field(64, "tokens that a window holds")
    num_layers: int = field(4, "transformer blocks")
    num_heads: int = field(4, "query heads")
    num_kv_heads: int = field(0, "key and value heads; 0: as many as num_heads")
    hidden_size: int = field(128, "width of the residual stream")
    intermediate_size: int = field(
        0, "width inside the feed-forward; 0: 8/3 hidden_size, up to a multiple of 8"
    )
    head_dim: int = field(0, "width of a head; 0: hidden_size / num_heads")
    position_encoding: str = field("rope", f"how positions are told apart: {', '.join(POSITION_ENCODINGS)}")
    rope_theta: float = field(10000.0, "base of the RoPE frequencies")
    norm_eps: float = field(1e-6, "added to the mean square in RMSNorm")
    qk_norm: bool = field(True, "RMSNorm on the queries and keys of each head")
    tie_embeddings: bool = field(False, "use the token embedding as the head too")
    dropout: float = field(0.0, "probability of dropout on embeddings, attention and residual branches")
    init_scale: float = field(
        1.0,
        "initial weights have standard deviation init_scale / sqrt(inputs), residual ones / sqrt(2 num_layers) too",
    )
    embedding_std: float = field(1.0, "standard deviation of the initial token embedding, if it is not tied")
    head_scale: float = field(
        0.25, "as init_scale, for the head: small, so that the first loss is about log V"
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # which JSON cannot write: `vocab_size=tokens.max() + 1`
                object.__setattr__(self, name, value.item())
        for name in ("context_length", "num_layers", "num_heads", "hidden_size"):
            self._require(name, 1 <= getattr(self, name) < 2**31, "from 1 to 2147483647")
        for name in ("vocab_size", "num_kv_heads", "intermediate_size", "head_dim"):
            self._require(name, 0 <= getattr(self, name) < 2**31, "from 0 to 2147483647")
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise InputError(
                    f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                    "change one of them, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.intermediate_size == 0:
            object.__setattr__(self, "intermediate_size", math.ceil(self.hidden_size / 3) * 8)
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        require_known("position_encoding", self.position_encoding, POSITION_ENCODINGS)
        even = self.position_encoding != "rope" or self.head_dim % 2 == 0
        self._require("head_dim", even, "even for RoPE")
        self._require("rope_theta", 0 < self.rope_theta < math.inf, "above 0 and finite")
        for name in ("norm_eps", "init_scale", "embedding_std", "head_scale"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name}={shown(getattr(self, name))}; it must be {expected}")

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights of a model of this shape hold."""
        D, F, K = self.hidden_size, self.intermediate_size, self.head_dim
        attention = 2 * D * K * (self.num_heads + self.num_kv_heads) + 2 * K * self.qk_norm
        block = attention + 3 * D * F + 2 * D
        return self.vocab_size * D * (1 if self.tie_embeddings else 2) + self.num_layers * block + D

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of a model of this config, by name."""
        D, F, K, V = self.hidden_size, self.intermediate_size, self.head_dim, self.vocab_size
        queries, keys = self.num_heads * K, self.num_kv_heads * K
        block: dict[str, tuple[int, ...]] = {
            "attention_norm.weight": (D,),
            "attention.query.weight": (queries, D),
            "attention.key.weight": (keys, D),
            "attention.value.weight": (keys, D),
            "attention.output.weight": (D, queries),
            **(
                {"attention.query_norm.weight": (K,), "attention.key_norm.weight": (K,)}
                if self.qk_norm
                else {}
            ),
            "feed_forward_norm.weight": (D,),
            "feed_forward.gate.weight": (F, D),
            "feed_forward.up.weight": (F, D),
            "feed_forward.down.weight": (D, F),
        }
        return {
            "embedding.weight": (V, D),
            **{f"blocks.{i}.{name}": shape for i in range(self.num_layers) for name, shape in block.items()},
            "norm.weight": (D,),
            **({} if self.tie_embeddings else {"head.weight": (V, D)}),
        }

    @property
    def residual_init_scale(self) -> float:
        """The init scale of projections into the residual stream: init_scale / sqrt(2 num_layers)."""
        return self.init_scale / math.sqrt(2 * self.num_layers)


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). x: (B, T, D) -> (B, T, D)."""

    def __init__(
        self, config: ModelConfig, position: PositionEncoding, rng: np.random.Generator, layer: int
    ) -> None:
        D, eps, p = config.hidden_size, config.norm_eps, config.dropout
        self.attention_norm = RMSNorm(D, eps)
        self.attention = MultiHeadAttention(config, position, rng, Dropout(p, 3 * layer + 1))
        self.attention_dropout = Dropout(p, 3 * layer + 2)
        self.feed_forward_norm = RMSNorm(D, eps)
        self.feed_forward = FeedForward(config, rng)
        self.feed_forward_dropout = Dropout(p, 3 * layer + 3)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), cache))
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))


class TransformerLM(Module):
    """A decoder-only language model: tokens (B, T) -> logits (B, T, V).

    With QK-norm this is the architecture of Qwen3, without it that of Llama.

    Args:
        config: the shape; its vocab_size must be set.
        seed: of the initial weights, or a generator to draw them from.

    Example:
        >>> model = TransformerLM(ModelConfig(vocab_size=65), seed=1)
        >>> model(np.zeros((2, 16), dtype=int)).shape
        (2, 16, 65)
    """

    def __init__(self, config: ModelConfig, seed: int | np.random.Generator = 0) -> None:
        if config.vocab_size < 1:
            raise InputError("vocab_size=0; set it to the number of tokens that the tokenizer has")
        rng = np.random.default_rng(seed)
        self.config = config
        D, V, tied = config.hidden_size, config.vocab_size, config.tie_embeddings
        # A tied matrix begins as a head does, because its rows are dot products with hidden states too.
        embedding_std = config.head_scale / math.sqrt(D) if tied else config.embedding_std
        self.embedding = Embedding(V, D, rng, embedding_std)
        self.embedding_dropout = Dropout(config.dropout, 0)
        self.position = POSITION_ENCODINGS[config.position_encoding](config)
        self.blocks = [
            TransformerBlock(config, self.position, rng, layer) for layer in range(config.num_layers)
        ]
        self.norm = RMSNorm(D, config.norm_eps)
        self.head = Linear(D, V, rng, config.head_scale)
        if tied:
            self.head.weight = self.embedding.weight

    @property
    def current_config(self) -> ModelConfig:
        """The config of the model as it is: assigning `head.weight` may have tied it to the embedding, or untied it."""
        tied = getattr(self.head, "weight", None) is self.embedding.weight
        return replace(self.config, tie_embeddings=tied)

    def forward(self, tokens: Any, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Logits for the token after each. tokens: (B, T) integers -> (B, T, V).

        With a cache, `tokens` continue those that the cache has seen, and it is extended.
        """
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: Any, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """What the head sees: tokens (B, T) -> (B, T, D)."""
        if len(tokens.shape) != 2:
            raise ValueError(f"tokens have shape {tokens.shape}; the model takes (B, T)")
        offset = cache[0].length if cache else 0
        x = self.position.embed(self.embedding(tokens), offset)
        x = self.embedding_dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        return self.norm(x)

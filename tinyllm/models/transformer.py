"""The language model: token embedding, pre-norm transformer blocks, final norm, head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.models.config import POSITION_ENCODINGS, ModelConfig
from tinyllm.nn.attention import Documents, MultiHeadAttention
from tinyllm.nn.cache import KeyValueCache, LayerCache
from tinyllm.nn.feed_forward import FeedForward
from tinyllm.nn.layers import Dropout, Embedding, Linear, RMSNorm
from tinyllm.nn.module import Module
from tinyllm.nn.positional import PositionEncoding
from tinyllm.nn.recomputation import recompute
from tinyllm.system.errors import InputError


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). x: (B, T, D) -> (B, T, D).

    Args:
        config: of the model. position: its encoding of positions. rng: draws the initial weights.
        layer: the number of the block, from 0, which tells its dropout apart from that of others.
    """

    def __init__(
        self, config: ModelConfig, position: PositionEncoding, rng: np.random.Generator, layer: int
    ) -> None:
        D, eps, p = config.hidden_size, config.norm_eps, config.dropout
        self.attention_norm = RMSNorm(D, eps)
        self.attention = MultiHeadAttention(
            D,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            rng,
            position,
            config.qk_norm,
            eps,
            Dropout(p, stream=3 * layer + 1),
            config.init_scale,
            config.residual_init_scale,
        )
        self.attention_dropout = Dropout(p, stream=3 * layer + 2)
        self.feed_forward_norm = RMSNorm(D, eps)
        self.feed_forward = FeedForward(
            D, config.intermediate_size, rng, config.init_scale, config.residual_init_scale
        )
        self.feed_forward_dropout = Dropout(p, stream=3 * layer + 3)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None
    ) -> Tensor:
        apart = () if documents is None else (documents,)
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), cache, *apart))
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))

    def infer(self, x: Array, cache: LayerCache | None = None, newest: bool = False) -> Array:
        attended = self.attention.infer(self.attention_norm.infer(x), cache, newest=newest)
        x = (x[:, -1:] if newest else x) + self.attention_dropout.infer(attended)
        fed = self.feed_forward.infer(self.feed_forward_norm.infer(x))
        return x + self.feed_forward_dropout.infer(fed)


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
        self.recompute = False
        """Whether blocks keep nothing for backward, which runs them once more: less memory, a third more time."""
        D, V, tied = config.hidden_size, config.vocab_size, config.tie_embeddings
        # A tied matrix begins as a head does, because its rows are dot products with hidden states too.
        embedding_std = config.head_scale / math.sqrt(D) if tied else config.embedding_std
        self.embedding = Embedding(V, D, rng=rng, std=embedding_std)
        self.embedding_dropout = Dropout(config.dropout, stream=0)
        self.position = POSITION_ENCODINGS[config.position_encoding](config)
        self.blocks = [
            TransformerBlock(config, self.position, rng, layer) for layer in range(config.num_layers)
        ]
        self.norm = RMSNorm(D, config.norm_eps)
        self.head = Linear(D, V, False, rng=rng, init_scale=config.head_scale)
        if tied:
            self.head.weight = self.embedding.weight

    @property
    def current_config(self) -> ModelConfig:
        """The config of the model as it is: assigning `head.weight` may have tied it to the embedding, or untied it."""
        tied = getattr(self.head, "weight", None) is self.embedding.weight
        return replace(self.config, tie_embeddings=tied)

    def forward(
        self, tokens: Any, cache: Sequence[LayerCache] | None = None, documents: Any = None
    ) -> Tensor:
        """Logits for the token after each. tokens: (B, T) integers, an array, Tensor or lists -> (B, T, V).

        With a cache, `tokens` continue those that the cache has seen, and it is extended. documents: the number of each
        token's document, (B, T) integers; then a token sees those of its own document alone, and its position counts
        from the first of them. Raises ValueError for more than `context_length` tokens, and for documents of another
        shape or with a cache.
        """
        return self.head(self.hidden(tokens, cache, documents))

    def hidden(self, tokens: Any, cache: Sequence[LayerCache] | None = None, documents: Any = None) -> Tensor:
        """What the head sees: tokens (B, T) -> (B, T, D)."""
        tokens, offset = self._taken(tokens, cache)
        apart = () if documents is None else (_kept_apart(documents, tokens.shape, cache),)
        x = self.position.embed(self.embedding(tokens), apart[0].positions if apart else offset)
        x = self.embedding_dropout(x)
        for i, block in enumerate(self.blocks):
            if cache is None and self.recompute:
                x = recompute(block, x, None, *apart)
            else:
                x = block(x, cache[i] if cache else None, *apart)
        return self.norm(x)

    def _taken(self, tokens: Any, cache: Sequence[LayerCache] | None) -> tuple[Array, int]:
        """The tokens as an array (B, T), and the position of the first; raises ValueError for what cannot be one."""
        if isinstance(tokens, Tensor):
            tokens = tokens.data
        elif not backend.is_array(tokens):
            lengths = (
                {len(row) for row in tokens if isinstance(row, Sequence)}
                if isinstance(tokens, Sequence)
                else ()
            )
            if len(lengths) > 1:
                raise ValueError(
                    f"tokens are rows of {sorted(lengths)} ids; the model takes (B, T), all of one length"
                )
            tokens = np.asarray(tokens)
        if len(tokens.shape) != 2:
            raise ValueError(f"tokens have shape {tokens.shape}; the model takes (B, T)")
        T, context_length = tokens.shape[1], self.config.context_length
        if not cache and context_length < T:  # a cache has room for so many as it was made for
            raise ValueError(
                f"{T} tokens are more than context_length={context_length}, beyond which the model was not trained; "
                f"give the last ones, tokens[:, -{context_length}:], or to go on all the same, set model.config = "
                f"dataclasses.replace(model.config, context_length={T})"
            )
        return tokens, cache[0].length if cache else 0

    def new_cache(self, capacity: int | None = None) -> list[KeyValueCache]:
        """An empty cache for each block, with room for `capacity` tokens; None: context_length."""
        capacity = self.config.context_length if capacity is None else capacity
        return [KeyValueCache(capacity) for _ in self.blocks]

    def infer(self, tokens: Any, cache: Sequence[LayerCache] | None = None, newest: bool = False) -> Array:
        return self.head.infer(self.infer_hidden(tokens, cache, newest))

    def infer_hidden(
        self, tokens: Any, cache: Sequence[LayerCache] | None = None, newest: bool = False
    ) -> Array:
        """`hidden` on arrays: (B, T) -> (B, T, D), or with `newest`, for the last token alone: (B, 1, D)."""
        tokens, offset = self._taken(tokens, cache)
        x = self.position.embed(Tensor(self.embedding.infer(tokens)), offset).data
        x = self.embedding_dropout.infer(x)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            # Nothing looks at what the last block makes of the other tokens.
            x = block.infer(x, cache[i] if cache else None, newest=newest and i == last)
        return self.norm.infer(x)


def _kept_apart(documents: Any, shape: tuple[int, ...], cache: Sequence[LayerCache] | None) -> Documents:
    """What attention has to know of documents, (B, T) integers; raises ValueError for what cannot be those."""
    if cache:
        raise ValueError(
            "documents came with a cache, in which they cannot be kept apart; give one of the two"
        )
    numbers = backend.asarray(documents.data if isinstance(documents, Tensor) else documents)
    if numbers.shape != shape or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"documents are {numbers.dtype} of shape {numbers.shape}; they are integers of the shape of tokens, {shape}"
        )
    if (numbers[:, 1:] < numbers[:, :-1]).any():
        raise ValueError("documents fall along a row; number them as they come, such as 0, 0, 1, 1, 1, 2")
    return Documents.of(numbers)

"""The shape of a TransformerLM, and the position encodings that it names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllm.nn.positional import PositionEncoding, RotaryEmbedding
from tinyllm.system.errors import InputError
from tinyllm.system.settings import field
from tinyllm.system.wording import require_known, shown

POSITION_ENCODINGS: dict[str, Callable[[ModelConfig], PositionEncoding]] = {
    "rope": lambda config: RotaryEmbedding(config.rope_theta),
    "none": lambda config: PositionEncoding(),
}
"""The encodings that `ModelConfig.position_encoding` names, and how a config makes them."""


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

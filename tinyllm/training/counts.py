"""Parameters and FLOPs of transformer language models, counted from their sizes alone.

Of models of other people too, whose layers are not all in this package: GPT-2 has biases and learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyllm.models import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder-only transformer.

    gated: the feed-forward layer has a gate beside its two matrices (SwiGLU). biases: of projections and of norms
    (LayerNorm). tied: the head is the token embedding. qk_norm: norms of queries and keys of each head. positions:
    rows of a learned position embedding, which is not counted in `parameters`.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool = True
    biases: bool = False
    tied: bool = False
    qk_norm: bool = False
    positions: int = 0

    @property
    def block_weights(self) -> int:
        """The entries of the matrices of one block."""
        D, K, F = self.hidden_size, self.head_dim, self.intermediate_size
        return 2 * D * K * (self.num_heads + self.num_kv_heads) + (3 if self.gated else 2) * D * F

    @property
    def weights_in_products(self) -> int:
        """N of C = 6 N D: the weights that each token is multiplied with: the blocks' matrices and the head."""
        return self.num_layers * self.block_weights + self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters but those of learned positions."""
        D, K, F = self.hidden_size, self.head_dim, self.intermediate_size
        norms = 2 * D + 2 * K * self.qk_norm
        biases = 0
        if self.biases:
            queries_keys_values = K * (self.num_heads + 2 * self.num_kv_heads)
            biases = queries_keys_values + D + (2 * F if self.gated else F) + D
            norms *= 2
        last_norm = D * (1 + self.biases)
        embeddings = self.vocab_size * D * (1 if self.tied else 2)
        return embeddings + self.num_layers * (self.block_weights + norms + biases) + last_norm

    def forward_flops(self, length: int) -> int:
        """Of the matrix products of a forward pass over one window of `length` tokens.

        Attention counts the scores of all pairs, also those that the causal mask leaves out, as is usual. Norms,
        softmax and activations are left out; they are about a percent.
        """
        attention = 4 * length * length * self.num_heads * self.head_dim
        return 2 * length * self.weights_in_products + self.num_layers * attention

    def training_flops(self, length: int) -> int:
        """Of forward and backward, which is twice the forward, over one window."""
        return 3 * self.forward_flops(length)


def architecture_of(config: ModelConfig) -> Architecture:
    """The sizes of a model of this package."""
    return Architecture(
        config.vocab_size,
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        tied=config.tie_embeddings,
        qk_norm=config.qk_norm,
    )


KNOWN = {
    "GPT-2 124M": Architecture(
        50257, 12, 768, 12, 12, 64, 3072, gated=False, biases=True, tied=True, positions=1024
    ),
    "Llama 7B": Architecture(32000, 32, 4096, 32, 32, 128, 11008),
    "Llama 13B": Architecture(32000, 40, 5120, 40, 40, 128, 13824),
    "Llama 33B": Architecture(32000, 60, 6656, 52, 52, 128, 17920),
    "Llama 65B": Architecture(32000, 80, 8192, 64, 64, 128, 22016),
    "Llama 2 70B": Architecture(32000, 80, 8192, 64, 8, 128, 28672),
    "Llama 3 8B": Architecture(128256, 32, 4096, 32, 8, 128, 14336),
}
"""Radford et al., 2019; Touvron et al., 2023; Grattafiori et al., 2024."""

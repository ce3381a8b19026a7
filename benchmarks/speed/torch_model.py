"""The same model in PyTorch, as the peer that is measured against. Run only by benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllm import backend
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.formats.hugging_face import to_external


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        self.head_dim, self.groups = K, config.num_heads // config.num_kv_heads
        self.q_proj = nn.Linear(D, config.num_heads * K, bias=False)
        self.k_proj = nn.Linear(D, config.num_kv_heads * K, bias=False)
        self.v_proj = nn.Linear(D, config.num_kv_heads * K, bias=False)
        self.o_proj = nn.Linear(config.num_heads * K, D, bias=False)
        self.q_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, K)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_1, x_2 = x.chunk(2, dim=-1)
    return torch.cat([x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin], dim=-1)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchLM(nn.Module):
    """The architecture of TransformerLM with transformers' parameter names, so that weights carry over."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.model.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        K = config.head_dim
        frequencies = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        angles = torch.arange(config.context_length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.lm_head(self.model.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def copy_of(model: TransformerLM) -> TorchLM:
    """A TorchLM with the weights of `model`."""
    peer = TorchLM(model.config)
    weights = {
        to_external(name, model.config): torch.from_numpy(backend.to_numpy(array).copy())
        for name, array in model.state_dict().items()
    }
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights)
    return peer

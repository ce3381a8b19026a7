"""Llama: RMSNorm, rotary positions in half rotation, SwiGLU, grouped queries; no biases, no QK-norm.

Source: Touvron et al., "LLaMA: Open and efficient foundation language models", 2023, section 2.2.
"""

from __future__ import annotations

from tinyllm.models.family import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    structure={"position_encoding": "rope", "qk_norm": False},
    config_keys={
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "head_dim": "head_dim",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "use_sliding_window": False,
    },
    written=("hidden_act", "attention_bias"),
    tensor_names={
        "embedding.weight": "model.embed_tokens.weight",
        "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "blocks.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
        "blocks.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
        "blocks.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
        "blocks.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
        "blocks.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "blocks.{}.feed_forward.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
        "blocks.{}.feed_forward.up.weight": "model.layers.{}.mlp.up_proj.weight",
        "blocks.{}.feed_forward.down.weight": "model.layers.{}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
)

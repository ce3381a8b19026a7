"""Qwen3: Llama with RMSNorm on the queries and keys of each head.

Source: Yang et al., "Qwen3 technical report", 2025, section 2.
"""

from __future__ import annotations

from dataclasses import replace

from tinyllm.models.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    structure={"position_encoding": "rope", "qk_norm": True},
    tensor_names={
        **LLAMA.tensor_names,
        "blocks.{}.attention.query_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
        "blocks.{}.attention.key_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    },
)

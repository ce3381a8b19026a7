"""Llama and Qwen3 as transformers names them: the native format of a checkpoint.

With QK-norm a TransformerLM is a Qwen3, without it a Llama; both use half-rotation RoPE, so no weight changes
its layout. A model that transformers cannot express says "model_type": "tinyllm".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tinyllm.models import ModelConfig
from tinyllm.system.errors import InputError
from tinyllm.system.settings import from_mapping
from tinyllm.system.wording import shown

TENSOR_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention.query_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.key_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.feed_forward.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.feed_forward.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.feed_forward.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our parameter names and those of transformers; {} is the number of the layer."""

CONFIG_KEYS = {
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
}
"""Our config fields and the keys of transformers."""

MODEL_TYPES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

# What these architectures can have and TransformerLM has not; any other value than these is refused.
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_sliding_window": False,
}

_NUMBER = re.compile(r"\.(\d+)\.")


def to_external(name: str) -> str:
    """The transformers name of one of our parameters."""
    return _renamed(name, TENSOR_NAMES)


def to_internal(name: str) -> str:
    """Our name of a transformers tensor; raises InputError for one that these architectures do not have."""
    return _renamed(name, {theirs: ours for ours, theirs in TENSOR_NAMES.items()})


def _renamed(name: str, table: Mapping[str, str]) -> str:
    number = _NUMBER.search(name)
    pattern = _NUMBER.sub(".{}.", name, count=1)
    if pattern not in table:
        raise InputError(f"unknown tensor name {shown(name)}")
    return table[pattern].format(number.group(1)) if number else table[pattern]


def config_to_json(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """config.json of transformers for a model of this shape, whose weights are of `dtype`."""
    expressible = config.position_encoding == "rope"
    model_type = ("qwen3" if config.qk_norm else "llama") if expressible else "tinyllm"
    content: dict[str, Any] = {"model_type": model_type}
    if expressible:
        content["architectures"] = [MODEL_TYPES[model_type]]
    content.update({theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()})
    content.update(
        hidden_act="silu",
        attention_bias=False,
        torch_dtype=dtype,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tinyllm={
            "position_encoding": config.position_encoding,
            "qk_norm": config.qk_norm,
            "dropout": config.dropout,
            "init_scale": config.init_scale,
            "embedding_std": config.embedding_std,
            "head_scale": config.head_scale,
        },
    )
    return content


def config_from_json(content: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json describes.

    Raises InputError for another architecture, or for a feature that TransformerLM does not have.
    """
    model_type = content.get("model_type")
    if model_type not in (*MODEL_TYPES, "tinyllm"):
        raise InputError(
            f"config.json: model_type is {shown(model_type)}; supported: {', '.join(MODEL_TYPES)}, tinyllm"
        )
    for key, value in FIXED.items():
        if content.get(key, value) != value:
            raise InputError(f"config.json: {key} is {shown(content[key])}; only {value!r} is supported")
    own = content.get("tinyllm", {})
    if not isinstance(own, dict):
        raise InputError(f"config.json: tinyllm must be an object, got {shown(own)}")
    values = {ours: content[theirs] for ours, theirs in CONFIG_KEYS.items() if theirs in content}
    rope = content.get("rope_parameters")
    if isinstance(rope, dict):
        if rope.get("rope_type", "default") != "default":
            raise InputError(
                f"config.json: rope_type is {shown(rope['rope_type'])}; only 'default' is supported"
            )
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    values["qk_norm"] = model_type == "qwen3"
    if model_type in MODEL_TYPES and own.get("qk_norm", values["qk_norm"]) != values["qk_norm"]:
        raise InputError(
            f"config.json: tinyllm.qk_norm is {shown(own['qk_norm'])}, model_type {model_type!r} says otherwise"
        )
    values.update(own)
    return from_mapping(ModelConfig, values, "config.json")

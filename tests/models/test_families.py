"""Families of architectures: what config.json and tensor names say of a model, and what they may not say."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest

from tinyllm import InputError
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.families import FAMILIES, family_of
from tinyllm.models.formats.hugging_face import config_from_json, config_to_json, to_external, to_internal

QWEN3 = ModelConfig(
    vocab_size=11, num_layers=12, num_heads=4, num_kv_heads=2, hidden_size=16, rope_theta=50.0
)
CONFIGS = {
    "qwen3": QWEN3,
    "llama": replace(QWEN3, qk_norm=False, tie_embeddings=True),
    "tinyllm": replace(QWEN3, position_encoding="none", dropout=0.25),
    "tinyllm without QK-norm": replace(QWEN3, position_encoding="none", qk_norm=False),
}
configs = pytest.mark.parametrize(("name", "config"), CONFIGS.items(), ids=CONFIGS.keys())
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@configs
def test_a_config_comes_back_from_json(name: str, config: ModelConfig) -> None:
    content = config_to_json(config)
    assert content["model_type"] == name.partition(" ")[0]
    assert config_from_json(content) == config


@configs
def test_every_parameter_has_a_name_elsewhere_and_gets_it_back(name: str, config: ModelConfig) -> None:
    names = list(TransformerLM(config).state_dict())
    external = [to_external(ours, config) for ours in names]
    assert len(set(external)) == len(names)
    assert [to_internal(theirs, config) for theirs in external] == names
    assert "model.layers.11.self_attn.q_proj.weight" in external


def test_names_of_transformers() -> None:
    """The names that its documentation and every published checkpoint of these models have."""
    pairs = {
        "embedding.weight": "model.embed_tokens.weight",
        "blocks.3.attention.query_norm.weight": "model.layers.3.self_attn.q_norm.weight",
        "blocks.10.feed_forward_norm.weight": "model.layers.10.post_attention_layernorm.weight",
        "head.weight": "lm_head.weight",
    }
    for ours, theirs in pairs.items():
        assert to_external(ours, QWEN3) == theirs


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIGS["llama"], "model.layers.0.self_attn.q_norm.weight"),
        (QWEN3, "model.layers.0.self_attn.q_proj.bias"),
        (QWEN3, "model.layers.x.self_attn.q_proj.weight"),
        (QWEN3, "transformer.wte.weight"),
    ],
)
def test_a_tensor_that_the_family_does_not_have_is_refused(config: ModelConfig, name: str) -> None:
    with pytest.raises(InputError, match=f"unknown tensor name '{re.escape(name)}'"):
        to_internal(name, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: qwen3, llama, tinyllm"),
        ({"model_type": ["qwen3"]}, r"model_type is \['qwen3'\]"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"tinyllm": {"qk_norm": False}}, "tinyllm.qk_norm is False, model_type 'qwen3' says otherwise"),
        (
            {"tinyllm": {"position_encoding": "none"}},
            "tinyllm.position_encoding is 'none', model_type 'qwen3'",
        ),
        ({"tinyllm": [1]}, "tinyllm must be an object"),
    ],
)
def test_what_the_family_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        config_from_json({**config_to_json(QWEN3), **change})
    assert "\n" not in str(error.value)


@families
def test_a_family_says_everything_about_its_models_once(family: Any) -> None:
    assert FAMILIES[family.model_type] is family
    ours = {field.name for field in fields(ModelConfig)}
    assert set(family.config_keys) | set(family.structure) <= ours
    assert not set(family.config_keys) & set(family.structure)
    assert set(family.written) <= set(family.fixed)
    assert not set(family.fixed) & set(family.config_keys.values())
    for mapping in (family.config_keys, family.tensor_names):
        assert len(set(mapping.values())) == len(mapping)
    config = replace(QWEN3, **family.structure)
    names = {re.sub(r"\.\d+\.", ".{}.", name) for name in TransformerLM(config).state_dict()}
    assert names == set(family.tensor_names)
    if family.structure:
        assert family_of(config) is family

"""The native format of a checkpoint: config.json and tensor names as transformers has them for a family of models.

No weight changes its layout: our RoPE is in half rotation, as theirs is. A model that transformers cannot express says
"model_type": "tinyllm".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tinyllm.models.config import ModelConfig
from tinyllm.models.families import FAMILIES, family_of
from tinyllm.system.errors import InputError
from tinyllm.system.settings import from_mapping
from tinyllm.system.wording import shown

_NUMBER = re.compile(r"\.(\d+)\.")


def to_external(name: str, config: ModelConfig) -> str:
    """The transformers name of a parameter of a model of this config."""
    return _renamed(name, family_of(config).tensor_names)


def to_internal(name: str, config: ModelConfig) -> str:
    """Our name of a transformers tensor; raises InputError for one that models of this family do not have."""
    return _renamed(name, {theirs: ours for ours, theirs in family_of(config).tensor_names.items()})


def _renamed(name: str, table: Mapping[str, str]) -> str:
    number = _NUMBER.search(name)
    pattern = _NUMBER.sub(".{}.", name, count=1)
    if pattern not in table:
        raise InputError(f"unknown tensor name {shown(name)}")
    return table[pattern].format(number.group(1)) if number else table[pattern]


def config_to_json(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """config.json of transformers for a model of this shape, whose weights are of `dtype`."""
    family = family_of(config)
    content: dict[str, Any] = {"model_type": family.model_type}
    if family.architecture is not None:
        content["architectures"] = [family.architecture]
    content.update({theirs: getattr(config, ours) for ours, theirs in family.config_keys.items()})
    content.update({key: family.fixed[key] for key in family.written}, torch_dtype=dtype)
    if "rope_theta" in family.config_keys:
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    own = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in family.config_keys]
    content["tinyllm"] = {name: getattr(config, name) for name in own}
    return content


def config_from_json(content: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json describes.

    Raises InputError for another family, or for a feature that TransformerLM does not have.
    """
    model_type = content.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(f"config.json: model_type is {shown(model_type)}; supported: {', '.join(FAMILIES)}")
    for key, value in family.fixed.items():
        if content.get(key, value) != value:
            raise InputError(f"config.json: {key} is {shown(content[key])}; only {value!r} is supported")
    own = content.get("tinyllm", {})
    if not isinstance(own, dict):
        raise InputError(f"config.json: tinyllm must be an object, got {shown(own)}")
    for name, value in family.structure.items():
        if own.get(name, value) != value:
            raise InputError(
                f"config.json: tinyllm.{name} is {shown(own[name])}, model_type {model_type!r} says otherwise"
            )
    values = {ours: content[theirs] for ours, theirs in family.config_keys.items() if theirs in content}
    rope = content.get("rope_parameters")
    if isinstance(rope, dict):
        if rope.get("rope_type", "default") != "default":
            raise InputError(
                f"config.json: rope_type is {shown(rope['rope_type'])}; only 'default' is supported"
            )
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    return from_mapping(ModelConfig, {**values, **family.structure, **own}, "config.json")

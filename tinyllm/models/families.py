"""The families of architectures that config.json may name. A new one is a file with its Family, and an entry here."""

from __future__ import annotations

from dataclasses import replace

from tinyllm.models.config import ModelConfig
from tinyllm.models.family import Family
from tinyllm.models.llama import LLAMA
from tinyllm.models.qwen3 import QWEN3

TINYLLM = replace(QWEN3, model_type="tinyllm", architecture=None, structure={})
"""Any TransformerLM: the family of those that no other library knows."""

FAMILIES = {family.model_type: family for family in (QWEN3, LLAMA, TINYLLM)}
"""All families by their `model_type`."""


def family_of(config: ModelConfig) -> Family:
    """The family of a model of this config: the first that has it."""
    return next(family for family in FAMILIES.values() if family.has(config))

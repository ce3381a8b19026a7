"""What a family of architectures is: a structure that a TransformerLM can have, and what others call its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllm.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """Models of one structure, as their config.json and their tensors are named in other libraries.

    Attributes:
        model_type: names the family in config.json. architecture: the class of transformers that runs it, or None.
        structure: the fields of ModelConfig that all models of the family share, with their values.
        config_keys: our other fields, and their keys in config.json.
        fixed: further keys that may stand there, each with the one value that a TransformerLM can have.
        written: those of `fixed` that we write.
        tensor_names: our parameter names and theirs; {} is the number of the layer.
    """

    model_type: str
    architecture: str | None
    structure: Mapping[str, Any]
    config_keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    written: tuple[str, ...]
    tensor_names: Mapping[str, str]

    def has(self, config: ModelConfig) -> bool:
        """Whether a model of this config is one of the family."""
        return all(getattr(config, name) == value for name, value in self.structure.items())

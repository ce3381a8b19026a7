"""The language model: its config, the families of architectures that it can be, and presets.

`transformer` builds blocks and model of a ModelConfig from the layers of `nn`: token ids go through embedding, blocks,
norm and head to logits. A file for each family (`llama`, `qwen3`) says what other libraries call its config and its
tensors, which `formats` reads and writes. `generation` takes tokens from logits one by one.
"""

from tinyllm.models.config import POSITION_ENCODINGS, ModelConfig
from tinyllm.models.transformer import TransformerBlock, TransformerLM

__all__ = ["POSITION_ENCODINGS", "ModelConfig", "TransformerBlock", "TransformerLM"]

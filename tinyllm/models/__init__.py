"""The language model, its config and presets; what other libraries call its parts (formats), and generation.

Token ids go through embedding, blocks, norm and head to logits; `generation` takes tokens from those one by one.
"""

from tinyllm.models.config import POSITION_ENCODINGS, ModelConfig
from tinyllm.models.transformer import TransformerBlock, TransformerLM

__all__ = ["POSITION_ENCODINGS", "ModelConfig", "TransformerBlock", "TransformerLM"]

"""Modules: layers, attention, feed-forward, position encodings, and the language model."""

from tinyllm.nn.attention import MultiHeadAttention
from tinyllm.nn.feedforward import FeedForward
from tinyllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm, dropout_position
from tinyllm.nn.module import Module, Parameter
from tinyllm.nn.positional import POSITION_ENCODINGS, PositionEncoding, RotaryEmbedding
from tinyllm.nn.transformer import ModelConfig, TransformerBlock, TransformerLM

__all__ = [
    "POSITION_ENCODINGS",
    "Dropout",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "ModelConfig",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "PositionEncoding",
    "RMSNorm",
    "RotaryEmbedding",
    "TransformerBlock",
    "TransformerLM",
    "dropout_position",
]

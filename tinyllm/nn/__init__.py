"""Modules: layers, attention, feed-forward and position encodings."""

from tinyllm.nn.attention import MultiHeadAttention
from tinyllm.nn.feed_forward import FeedForward
from tinyllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm, dropout_position
from tinyllm.nn.module import Module, Parameter
from tinyllm.nn.positional import POSITION_ENCODINGS, PositionEncoding, RotaryEmbedding

__all__ = [
    "POSITION_ENCODINGS",
    "Dropout",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "PositionEncoding",
    "RMSNorm",
    "RotaryEmbedding",
    "dropout_position",
]

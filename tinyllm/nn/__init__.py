"""Modules, which take sizes and no config: layers, attention, feed-forward and position encodings.

`Module` finds parameters by walking attributes. `forward` takes Tensors through ops, for training and for whoever
looks; `infer`, beside it, takes arrays, with a `KeyValueCache` for each layer of attention, for decoding.
"""

from tinyllm.nn.attention import MultiHeadAttention
from tinyllm.nn.cache import KeyValueCache, LayerCache
from tinyllm.nn.feed_forward import FeedForward
from tinyllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm, dropout_position
from tinyllm.nn.module import Module, Parameter
from tinyllm.nn.positional import PositionEncoding, RotaryEmbedding

__all__ = [
    "Dropout",
    "Embedding",
    "FeedForward",
    "KeyValueCache",
    "LayerCache",
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

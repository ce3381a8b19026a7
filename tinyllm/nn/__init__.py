"""Modules, which take sizes and no config: layers, attention, feed-forward and position encodings.

`Module` finds parameters by walking attributes. `forward` takes Tensors through ops, for training and for whoever
looks; `infer`, beside it, takes arrays, with a `KeyValueCache` for each layer of attention, for decoding.

What torch.nn has too is called as there, `functional`, `init` and `utils` included; `rng=` says who draws initial
weights. The models here use `MultiHeadAttention` and `FeedForward`, and choose how their weights begin.
"""

from tinyllm.nn import functional, init, utils
from tinyllm.nn.activations import (
    GELU,
    CrossEntropyLoss,
    Identity,
    MSELoss,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from tinyllm.nn.attention import MultiHeadAttention
from tinyllm.nn.cache import KeyValueCache, LayerCache
from tinyllm.nn.containers import ModuleDict, ModuleList, Sequential
from tinyllm.nn.feed_forward import FeedForward
from tinyllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm, dropout_position
from tinyllm.nn.module import Module, Parameter
from tinyllm.nn.multihead import MultiheadAttention
from tinyllm.nn.positional import PositionEncoding, RotaryEmbedding

__all__ = [
    "GELU", "CrossEntropyLoss", "Dropout", "Embedding", "FeedForward", "Identity", "KeyValueCache", "LayerCache",
    "LayerNorm", "Linear", "MSELoss", "Module", "ModuleDict", "ModuleList", "MultiHeadAttention", "MultiheadAttention",
    "Parameter", "PositionEncoding", "RMSNorm", "ReLU", "RotaryEmbedding", "Sequential", "SiLU", "Sigmoid", "Softmax",
    "Tanh", "dropout_position", "functional", "init", "utils",
]  # fmt: skip

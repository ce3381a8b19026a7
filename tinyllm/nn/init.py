"""Numbers that parameters begin with, put into them in place, as torch.nn.init; drawn from the generator given, or from
that of `tinyllm.manual_seed`. Each returns its Tensor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import HostArray


def constant_(tensor: Tensor, val: float) -> Tensor:
    """One number everywhere."""
    tensor.data[...] = val
    return tensor


def zeros_(tensor: Tensor) -> Tensor:
    """Zeros."""
    return constant_(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """Ones."""
    return constant_(tensor, 1.0)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
    """Normal numbers."""
    return _put(tensor, _of(generator).normal(mean, std, tensor.shape))


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Any = None) -> Tensor:
    """Numbers from [a, b)."""
    return _put(tensor, _of(generator).uniform(a, b, tensor.shape))


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
    """Uniformly within gain sqrt(6 / (inputs + outputs)) of zero (Glorot and Bengio, 2010, equation 16)."""
    bound = gain * math.sqrt(6 / _fans(tensor))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
    """Normal, with standard deviation gain sqrt(2 / (inputs + outputs)) (Glorot and Bengio, 2010, equation 12)."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / _fans(tensor)), generator)


def _fans(tensor: Tensor) -> int:
    if tensor.ndim != 2:
        raise ValueError(f"inputs and outputs are those of a matrix; got shape {tensor.shape}")
    return sum(tensor.shape)


def _of(generator: Any) -> np.random.Generator:
    found: np.random.Generator = generator or backend.default_generator()
    return found


def _put(tensor: Tensor, values: HostArray) -> Tensor:
    tensor.data[...] = backend.asarray(values, tensor.dtype)
    return tensor

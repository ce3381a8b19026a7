"""Tensors made of a shape, of numbers or at random, under torch's names; float32 unless a dtype is given, as there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.backend.cuda import require_here

long = np.dtype("int64")
"""What torch calls the dtype of tokens."""


def _on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make` with torch's `device=`, which must be where all arrays lie (see `Tensor.to`)."""

    @functools.wraps(make)
    def made(*arguments: Any, device: str | None = None, **keywords: Any) -> Tensor:
        require_here(device)
        return make(*arguments, **keywords)

    return made


@_on_device
def tensor(data: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """A Tensor with a copy of `data`: numbers, lists of them, an array (which keeps its dtype) or a Tensor."""
    made = Tensor(data, dtype=dtype)
    return Tensor(current.xp.array(made.data), requires_grad=requires_grad)


def from_numpy(ndarray: Any) -> Tensor:
    """A Tensor of an array's dtype, which shares its memory."""
    return Tensor(ndarray)


@_on_device
def zeros(*size: Any, dtype: Any = "float32", requires_grad: bool = False) -> Tensor:
    """Zeros: `zeros(2, 3)` or `zeros((2, 3))`."""
    return Tensor(current.xp.zeros(_shape(size), dtype=dtype), requires_grad=requires_grad)


@_on_device
def ones(*size: Any, dtype: Any = "float32", requires_grad: bool = False) -> Tensor:
    """Ones: `ones(2, 3)` or `ones((2, 3))`."""
    return Tensor(current.xp.ones(_shape(size), dtype=dtype), requires_grad=requires_grad)


@_on_device
def full(size: Any, fill_value: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """One number everywhere; without a dtype, an integer makes integers."""
    value = Tensor(fill_value, dtype=dtype)
    return Tensor(current.xp.full(_shape((size,)), value.data), requires_grad=requires_grad)


@_on_device
def zeros_like(input: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """Zeros of the shape and dtype of another Tensor."""
    return Tensor(current.xp.zeros(input.shape, dtype=dtype or input.dtype), requires_grad=requires_grad)


@_on_device
def ones_like(input: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """Ones of the shape and dtype of another Tensor."""
    return Tensor(current.xp.ones(input.shape, dtype=dtype or input.dtype), requires_grad=requires_grad)


@_on_device
def eye(n: int, m: int | None = None, dtype: Any = "float32") -> Tensor:
    """Ones on the diagonal of an (n, m) matrix of zeros."""
    return Tensor(current.xp.eye(n, m, dtype=dtype))


@_on_device
def arange(
    start: Any, end: Any = None, step: Any = 1, dtype: Any = None, requires_grad: bool = False
) -> Tensor:
    """The numbers from start (0 if one number is given) up to but not with end; integers if all three are."""
    start, end = (0, start) if end is None else (start, end)
    values = np.arange(start, end, step)
    kind = "float32" if values.dtype.kind == "f" else "int64"
    return Tensor(backend.asarray(values, dtype or kind), requires_grad=requires_grad)


@_on_device
def linspace(start: float, end: float, steps: int, dtype: Any = "float32") -> Tensor:
    """`steps` numbers from start to end, both included."""
    return Tensor(backend.asarray(np.linspace(start, end, steps), dtype))


@_on_device
def rand(*size: Any, generator: Any = None, dtype: Any = "float32", requires_grad: bool = False) -> Tensor:
    """Numbers from [0, 1), of `generator` or of the one of `manual_seed`."""
    drawn = _generator(generator).random(_shape(size), dtype=_drawn_in(dtype))
    return Tensor(backend.asarray(drawn, dtype), requires_grad=requires_grad)


@_on_device
def randn(*size: Any, generator: Any = None, dtype: Any = "float32", requires_grad: bool = False) -> Tensor:
    """Normal numbers, mean 0 and standard deviation 1, of `generator` or of the one of `manual_seed`."""
    drawn = _generator(generator).standard_normal(_shape(size), dtype=_drawn_in(dtype))
    return Tensor(backend.asarray(drawn, dtype), requires_grad=requires_grad)


@_on_device
def randint(low: int, high: Any, size: Any = None, *, generator: Any = None, dtype: Any = long) -> Tensor:
    """Integers from [low, high), or with two arguments `randint(high, size)` from [0, high)."""
    low, high, size = (0, low, high) if size is None else (low, high, size)
    return Tensor(backend.asarray(_generator(generator).integers(low, high, _shape((size,))), dtype))


@_on_device
def randperm(n: int, *, generator: Any = None, dtype: Any = long) -> Tensor:
    """The integers from 0 to n - 1 in a random order."""
    return Tensor(backend.asarray(_generator(generator).permutation(n), dtype))


def multinomial(input: Any, num_samples: int, replacement: bool = False, *, generator: Any = None) -> Tensor:
    """Positions drawn with the probabilities that `input` is proportional to. input: (V,) or (B, V) -> (..., n)."""
    weights = backend.to_numpy(input.data if isinstance(input, Tensor) else backend.asarray(input)).astype(
        "float64"
    )
    rows = weights.reshape(-1, weights.shape[-1])
    if rows.min() < 0 or not (np.isfinite(rows).all() and (rows.sum(axis=-1) > 0).all()):
        raise ValueError("multinomial: probabilities are finite, at least 0, and not all 0")
    rng, V = _generator(generator), weights.shape[-1]
    drawn = [rng.choice(V, num_samples, replacement, row / row.sum()) for row in rows]
    return Tensor(backend.asarray(np.reshape(drawn, (*weights.shape[:-1], num_samples)), long))


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    lengths = size[0] if len(size) == 1 and isinstance(size[0], Iterable) else size
    return tuple(int(length) for length in lengths)


def _drawn_in(dtype: Any) -> Any:
    """The dtype in which random numbers are drawn that are to be of `dtype`."""
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def _generator(generator: Any) -> np.random.Generator:
    """A generator of NumPy's: the one given, or the one of `manual_seed`."""
    found: np.random.Generator = generator or backend.default_generator()
    return found

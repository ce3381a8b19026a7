"""What the checks of `invariants` share: models as functions from tokens to logits, and comparing logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.nn import Module

Model = Callable[[Array], Any]
"""Tokens (B, T) -> logits (B, T, V)."""

ROUNDING = 2048.0
"""Errors allowed where sums may be formed in another order, in units of the dtype's precision."""


class InvariantError(AssertionError):
    """A property that must hold of every model does not hold of this one."""


def draw_tokens(vocab_size: int, batch: int, length: int, seed: int) -> Array:
    """Random tokens (batch, length)."""
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size}: with one token, nothing can be told apart")
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length))


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off in a Module; afterwards each of its parts is in the mode that it was in."""
    modules = [module for _, module in model.named_modules()] if isinstance(model, Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def to_array(value: Any) -> Array:
    """The values of a Tensor, an array of either backend, or a number."""
    return backend.to_numpy(value.data if isinstance(value, Tensor) else backend.asarray(value))


def logits_of(model: Model, tokens: Array) -> Array:
    """The logits (B, T, V) as an array of their own; raises InvariantError for another shape."""
    with no_grad():
        logits = np.array(to_array(model(backend.asarray(tokens))))
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise InvariantError(
            f"the logits have shape {logits.shape}; expected {(*tokens.shape, 'V')} for tokens {tokens.shape}"
        )
    return logits


def worst_index(difference: Array) -> tuple[int, ...]:
    """The index of the largest element by magnitude; NaN counts as larger than any."""
    magnitudes = np.nan_to_num(np.abs(difference), nan=np.inf)
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(magnitudes)), difference.shape))


def difference(after: Array, before: Array) -> str:
    """The largest difference, for a message."""
    return f"{float(np.abs(after.astype(np.float64) - before.astype(np.float64)).max()):.3g}"


def expect_close(found: Array, expected: Array, what: str) -> None:
    """Raise InvariantError where logits differ by more than rounding."""
    epsilon = float(np.finfo(expected.dtype).eps) if expected.dtype.kind == "f" else 0.0
    finite = np.abs(expected[np.isfinite(expected)])
    tolerance = ROUNDING * epsilon * max(1.0, float(finite.max(initial=0)))
    if found.shape != expected.shape or not np.allclose(
        found, expected, rtol=0, atol=tolerance, equal_nan=True
    ):
        if found.shape != expected.shape:
            raise InvariantError(f"{what} the logits have shape {found.shape}; expected {expected.shape}")
        b, t, v = worst_index(found - expected)
        raise InvariantError(
            f"{what} the logit of token {v} at batch {b}, position {t} is {found[b, t, v]:.9g}; "
            f"expected {expected[b, t, v]:.9g} to within {tolerance:.1g}"
        )

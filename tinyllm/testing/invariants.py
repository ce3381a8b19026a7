"""What must hold of a language model, as checks: for ours, and for any function from tokens to logits.

A model here is any callable that takes tokens, an int array (B, T), and returns logits (B, T, V), an array or a
Tensor. Checks that look at parameters take a `Module` of ours. Each check draws its own random tokens from a seed,
leaves the model as it was, and raises `InvariantError` with what was seen, what was expected, and where.

Example:
    >>> from tinyllm.models import ModelConfig
    >>> model = TransformerLM(ModelConfig(vocab_size=11, num_layers=1, hidden_size=16))
    >>> check_causality(model, vocab_size=11)
    >>> check_model(model)  # all of them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.backend import Array
from tinyllm.models import TransformerLM
from tinyllm.testing.learning import (
    check_every_parameter_learns,
    check_forward_mode,
    check_model_forward_mode,
    check_overfits_one_batch,
)
from tinyllm.testing.model_functions import (
    InvariantError,
    Model,
    difference,
    draw_tokens,
    evaluating,
    expect_close,
    logits_of,
    to_array,
    worst_index,
)

__all__ = [
    "InvariantError",
    "Model",
    "check_batch_permutation",
    "check_cached_decoding",
    "check_causality",
    "check_every_parameter_learns",
    "check_forward_mode",
    "check_ignore_index",
    "check_initial_loss",
    "check_model",
    "check_model_forward_mode",
    "check_overfits_one_batch",
    "check_padding",
    "check_rope_shift",
    "check_sees_the_past",
]


def check_causality(model: Model, vocab_size: int, batch: int = 2, length: int = 8, seed: int = 0) -> None:
    """Changing a token changes no earlier logit, in any bit.

    Raises InvariantError naming the token that was changed and the earlier position that saw it.
    Source: the mask of Vaswani et al., "Attention is all you need", 2017, section 3.2.3.

    Example:
        >>> check_causality(lambda tokens: np.cumsum(np.eye(5)[tokens], axis=1), vocab_size=5)
    """
    tokens = draw_tokens(vocab_size, batch, length, seed)
    with evaluating(model):
        before = logits_of(model, tokens)
        for t in range(1, length):
            other = tokens.copy()
            other[:, t] = (other[:, t] + 1) % vocab_size
            after = logits_of(model, other)
            if not np.array_equal(after[:, :t], before[:, :t], equal_nan=True):
                b, position, _ = worst_index(after[:, :t] - before[:, :t])
                raise InvariantError(
                    f"not causal: changing the token at position {t} changed the logits at batch {b}, position "
                    f"{position} by {difference(after[b, position], before[b, position])}; expected no change in any "
                    "bit, because a position may see itself and what came before"
                )


def check_sees_the_past(
    model: Model, vocab_size: int, batch: int = 2, length: int = 8, seed: int = 0
) -> None:
    """The logits at the last position depend on the token there, and on all tokens before it.

    Do not use it on a model whose window is shorter than `length`, or whose initial weights are zeros.

    Raises InvariantError naming the token that makes no difference.

    Example:
        >>> check_sees_the_past(lambda tokens: np.cumsum(np.eye(5)[tokens], axis=1), vocab_size=5)
    """
    tokens = draw_tokens(vocab_size, batch, length, seed)
    with evaluating(model):
        before = logits_of(model, tokens)[:, -1]
        for t in range(length):
            other = tokens.copy()
            other[:, t] = (other[:, t] + 1) % vocab_size
            same = (logits_of(model, other)[:, -1] == before).all(axis=-1)
            if same.any():
                raise InvariantError(
                    f"blind: changing the token at position {t} left the logits of the last position ({length - 1}) "
                    f"of batch {int(np.argmax(same))} as they were; expected a change, because it may see all before it"
                )


def check_batch_permutation(
    model: Model, vocab_size: int, batch: int = 4, length: int = 8, seed: int = 0
) -> None:
    """The rows of a batch do not see each other: in another order, or alone, each has the same logits.

    Raises InvariantError naming the row.

    Example:
        >>> check_batch_permutation(lambda tokens: np.eye(5)[tokens], vocab_size=5)
    """
    tokens = draw_tokens(vocab_size, batch, length, seed)
    with evaluating(model):
        together = logits_of(model, tokens)
        order = np.roll(np.arange(batch), 1)
        permuted = logits_of(model, tokens[order])
        expect_close(permuted, together[order], "with the rows of the batch in another order")
        for b in range(batch):
            what = f"for row {b} of the batch alone"
            expect_close(logits_of(model, tokens[b : b + 1]), together[b : b + 1], what)


def check_padding(model: Model, vocab_size: int, batch: int = 2, length: int = 8, seed: int = 0) -> None:
    """A text filled up to a longer one, with any token, has the logits that it has by itself.

    Raises InvariantError naming the length and the position.

    Example:
        >>> check_padding(lambda tokens: np.cumsum(np.eye(5)[tokens], axis=1), vocab_size=5)
    """
    tokens = draw_tokens(vocab_size, batch, length, seed)
    with evaluating(model):
        for n in range(1, length):
            alone = logits_of(model, tokens[:, :n])
            for filling in (0, vocab_size - 1):
                padded = tokens.copy()
                padded[:, n:] = filling
                what = f"for {n} tokens filled up to {length} with token {filling}"
                expect_close(logits_of(model, padded)[:, :n], alone, what)


def check_cached_decoding(
    model: Model,
    vocab_size: int,
    start: Callable[[], Model] | None = None,
    batch: int = 2,
    length: int = 8,
    seed: int = 0,
) -> None:
    """Logits computed piece by piece with a cache of keys and values equal those of the whole text at once.

    Args:
        start: begins with an empty cache: returns a function that takes the next tokens (B, t), and returns their
            logits (B, t, V). May be left out for a TransformerLM.

    Raises InvariantError naming the pieces and the position.

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
        >>> check_cached_decoding(TransformerLM(ModelConfig(vocab_size=11)), vocab_size=11)
    """
    if start is None:
        if not isinstance(model, TransformerLM):
            raise TypeError("check_cached_decoding needs start= for a model that is no TransformerLM")
        start = _cached(model, length)
    tokens = draw_tokens(vocab_size, batch, length, seed)
    half = max(1, length // 2)
    with evaluating(model):
        whole = logits_of(model, tokens)
        for pieces in ([1] * length, [half] + [1] * (length - half), [1, half, length - half - 1], [length]):
            step, position, found = start(), 0, []
            for n in pieces:
                if n > 0:
                    found.append(logits_of(step, tokens[:, position : position + n]))
                    position += n
            what = f"with a cache, in pieces of {pieces} tokens,"
            expect_close(np.concatenate(found, axis=1), whole, what)


def _cached(model: TransformerLM, capacity: int) -> Callable[[], Model]:
    def start() -> Model:
        cache = model.new_cache(capacity)
        return lambda tokens: model(tokens, cache)

    return start


def check_initial_loss(
    model: Model, vocab_size: int, batch: int = 8, length: int = 8, seed: int = 0, tolerance: float = 0.3
) -> None:
    """The loss of a model that has learned nothing is near log V, that of guessing uniformly.

    A larger one comes from weights that begin too large: the model is sure of itself without a reason.

    Raises InvariantError with the loss, and the position where it is largest.
    Source: Karpathy, "A recipe for training neural networks", 2019, "verify loss @ init".

    Example:
        >>> check_initial_loss(lambda tokens: np.zeros((*tokens.shape, 5)), vocab_size=5)
    """
    tokens = draw_tokens(vocab_size, batch, length + 1, seed)
    with evaluating(model):
        logits = logits_of(model, tokens[:, :-1]).astype(np.float64)
    losses = ops.cross_entropy(Tensor(logits), tokens[:, 1:], reduction="none").data
    expected = math.log(vocab_size)
    if not abs(float(losses.mean()) - expected) <= tolerance:
        b, t = np.unravel_index(int(np.argmax(np.nan_to_num(losses, nan=np.inf))), losses.shape)
        raise InvariantError(
            f"the initial loss is {float(losses.mean()):.4f}; expected log({vocab_size}) = {expected:.4f} to within "
            f"{tolerance}; it is largest at batch {b}, position {t}: {float(losses[b, t]):.4f}"
        )


# ---- Position and loss -------------------------------------------------------------------------


def check_rope_shift(
    rotate: Callable[[Any, int], Any] = ops.rope,
    width: int = 8,
    length: int = 6,
    axis: int = -2,
    seed: int = 0,
) -> None:
    """Scores of rotated queries and keys depend on their distance, and on nothing else of their positions.

    Args:
        rotate: takes x with four axes, the last of them K, and the position of the first token; returns x rotated.
        width: K. axis: the axis of x along which positions stand.

    Raises InvariantError when lengths change, when scores change with a shift of both positions, or do not change
    with the distance.
    Source: Su et al., "RoFormer", 2021, equation 11.

    Example:
        >>> check_rope_shift(lambda x, offset: ops.rope(x, offset, theta=500.0))
    """
    rng = np.random.default_rng(seed)
    shape = [1, 1, 1, width]
    shape[axis] = length
    q, k = (np.broadcast_to(rng.standard_normal(width), shape) for _ in range(2))

    def turned(x: Array, offset: int) -> Array:
        return to_array(rotate(Tensor(x.copy()), offset)).reshape(length, width)

    def scores(offset: int) -> Array:
        found: Array = turned(q, offset) @ turned(k, offset).T
        return found

    first = scores(0)
    scale = float(np.linalg.norm(q[0, 0, 0]) * np.linalg.norm(k[0, 0, 0]))
    lengths = np.linalg.norm(turned(q, 3), axis=-1) / np.linalg.norm(q[0, 0, 0]) - 1
    if not np.abs(lengths).max() < 1e-10:
        raise InvariantError(
            f"rotation changed the length of a query at position {3 + int(np.abs(lengths).argmax())} by "
            f"{float(np.abs(lengths).max()):.3g} of itself; expected no change"
        )
    for offset in (1, 7, 100):
        shifted = scores(offset) - first
        if not np.abs(shifted).max() < 1e-10 * scale:
            t, s = np.unravel_index(int(np.abs(shifted).argmax()), shifted.shape)
            raise InvariantError(
                f"the score of a query at {t} and a key at {s} is {first[t, s]:.6g}, and {scores(offset)[t, s]:.6g} "
                f"with both moved on by {offset}; expected the same, because their distance is"
            )
    for distance in range(1, length):
        along = np.diagonal(first, -distance)
        if np.abs(along - along[0]).max() > 1e-10 * scale:
            raise InvariantError(
                f"scores at distance {distance} differ: {along}; expected one score a distance"
            )
        if abs(along[0] - first[0, 0]) < 1e-10 * scale:
            raise InvariantError(
                f"the score at distance {distance} is that at distance 0, {first[0, 0]:.6g}; "
                "expected another, because otherwise the order of tokens is not seen"
            )


def check_ignore_index(
    loss: Callable[[Tensor, Array], Any] = ops.cross_entropy, ignore_index: int = -100, seed: int = 0
) -> None:
    """Targets that are `ignore_index` count for nothing: not in the mean loss, its divisor, or its gradient.

    Args:
        loss: takes logits (B, T, V) and targets (B, T), and returns the mean loss: ours, or any other. Where it
            returns a Tensor with a graph, its gradient is looked at too.

    Raises InvariantError with both losses, or the position whose gradient is wrong.

    Example:
        >>> check_ignore_index(ops.cross_entropy)
    """
    rng = np.random.default_rng(seed)
    values, targets = rng.standard_normal((2, 4, 5)), rng.integers(0, 5, (2, 4))
    ignored = np.zeros((2, 4), dtype=bool)
    ignored[0, 3] = ignored[1, 1:3] = True
    marked = np.where(ignored, ignore_index, targets)
    logits = Tensor(values, requires_grad=True)
    found = loss(logits, marked)
    # The mean over the targets that count, by the definition.
    log_p = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    expected = float(-np.take_along_axis(log_p, targets[..., None], -1)[..., 0][~ignored].mean())
    if not abs(float(to_array(found)) - expected) <= 1e-9:
        raise InvariantError(
            f"the loss is {float(to_array(found)):.9g} with {int(ignored.sum())} of {ignored.size} targets ignored; "
            f"expected {expected:.9g}, the mean over the others"
        )
    if not isinstance(found, Tensor) or not found.requires_grad:
        return
    (gradient,) = gradients(found, [logits])
    slope = (np.exp(log_p) - np.eye(5)[targets]) * ~ignored[..., None] / (~ignored).sum()
    if not np.abs(gradient - slope).max() <= 1e-9:
        b, t, v = worst_index(gradient - slope)
        raise InvariantError(
            f"the gradient at batch {b}, position {t}, token {v} is {gradient[b, t, v]:.6g}; expected "
            f"{slope[b, t, v]:.6g}" + (", because that target is ignored" if ignored[b, t] else "")
        )


# ---- All of them -------------------------------------------------------------------------------


def check_model(model: TransformerLM, seed: int = 0) -> None:
    """Every check of this module that makes sense for `model`, which should be untrained, and small for speed.

    Raises InvariantError at the first that fails.

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
        >>> check_model(TransformerLM(ModelConfig(vocab_size=11, num_layers=1, hidden_size=16)))
    """
    V, length = model.config.vocab_size, min(model.config.context_length, 8)
    if V < 2 or length < 4:
        raise ValueError(
            f"vocab_size={V}, context_length={model.config.context_length}: too small to tell anything"
        )
    for check in (check_causality, check_sees_the_past, check_batch_permutation, check_padding,
                  check_initial_loss):  # fmt: skip
        check(model, V, length=length, seed=seed)
    check_cached_decoding(model, V, length=length, seed=seed)
    if model.config.position_encoding == "rope":
        K = model.config.head_dim
        check_rope_shift(lambda x, offset: model.position.heads(x.reshape(1, -1, K), K, offset), K)
    check_ignore_index()
    check_every_parameter_learns(model, V, length=length, seed=seed)
    check_model_forward_mode(model, V, length=length, seed=seed)
    check_overfits_one_batch(model, V, length=min(length, 6), seed=seed)

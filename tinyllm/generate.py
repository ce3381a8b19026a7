"""Sampling from a language model, with a cache of keys and values that lives outside the model."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllm import backend
from tinyllm.backend import Array
from tinyllm.errors import InputError
from tinyllm.memory import keep_freed_memory
from tinyllm.mode import no_grad
from tinyllm.tensor import Tensor

if TYPE_CHECKING:
    from tinyllm.nn import TransformerLM
    from tinyllm.tokenizer import Tokenizer


_WORTH_A_COPY = 32
"""From so many new tokens on, the matrices are copied into the layout that decoding reads fastest."""


class KeyValues:
    """The keys and values of one layer, in arrays with room for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Any = None
        self.values: Any = None

    def append(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Add arrays (B, G, T, K); returns views of all so far, each (B, G, length, K)."""
        B, G, T, K = keys.shape
        if self.keys is None:
            self.keys = backend.xp.empty((B, G, self.capacity, K), dtype=keys.dtype)
            self.values = backend.xp.empty((B, G, self.capacity, values.shape[-1]), dtype=values.dtype)
        if self.length + T > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens; got {self.length + T}")
        new = slice(self.length, self.length + T)
        self.keys[:, :, new] = keys
        self.values[:, :, new] = values
        self.length += T
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def new_cache(model: TransformerLM, capacity: int | None = None) -> list[KeyValues]:
    """An empty cache for `model`: pass it as `model(tokens, cache)`. Capacity: context_length tokens if None."""
    capacity = model.config.context_length if capacity is None else capacity
    return [KeyValues(capacity) for _ in model.blocks]


def next_token(
    logits: Array,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Draw a token from logits (V,).

    temperature divides the logits (0: the most likely token); top_k keeps the k most likely; top_p keeps the
    fewest tokens whose probabilities reach p (nucleus sampling, Holtzman et al., 2020, section 3.1).

    Raises InputError when the largest logit is not a number or infinite.
    """
    if not np.isfinite(logits.max()):
        raise InputError(
            f"the model's largest logit is {logits.max()}; its weights are unusable, so take another checkpoint"
        )
    if temperature == 0:
        return int(logits.argmax())
    # The largest logit is moved to 0 first, so that no temperature is too small.
    with backend.ignore_overflow():
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k is not None:
        order = order[:top_k]
    p = np.exp(scaled[order])
    p /= p.sum()
    if top_p is not None:
        # A token is kept when those before it have not reached top_p, so that the first always is.
        kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(p), rng.random())), len(order) - 1)])


def generate(
    model: TransformerLM,
    tokens: Sequence[int] | Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue `tokens`, yielding each new token as soon as it is drawn.

    The model sees at most `context_length` tokens. When they are used up, it goes on from the newest half of
    them. It must not be changed between tokens.

    Args:
        tokens: the prompt, at least one id. max_new_tokens: how many to draw.
        temperature, top_k, top_p: see `next_token`. seed: the same seed gives the same tokens.
        use_cache: keep keys and values between tokens; without it every token is computed from all before.
        vocab_size: draw among the first so many ids alone, where a model has more than its tokenizer.

    Raises:
        InputError: an empty prompt, or a setting out of range.

    Example:
        >>> from tinyllm.nn import ModelConfig
        >>> model = TransformerLM(ModelConfig(vocab_size=10), seed=1)
        >>> tokens = list(generate(model, [1, 2, 3], max_new_tokens=5, seed=7))
        >>> tokens == list(generate(model, [1, 2, 3], max_new_tokens=5, seed=7, use_cache=False))
        True
        >>> len(tokens)
        5
    """
    seen = [int(token) for token in tokens]
    if not seen:
        raise InputError("the prompt is empty; generation needs at least one token to go on from")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}; it must be at least 0")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}; it must be at least 0 (0: the most likely token)")
    if seed < 0:
        raise InputError(f"seed={seed}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}; it must be above 0 and at most 1")
    rng = np.random.default_rng(seed)

    def draw(logits: Array) -> int:
        return next_token(logits[:vocab_size], rng, temperature, top_k, top_p)

    return _continue(model, seen, max_new_tokens, draw, use_cache)


def _continue(
    model: TransformerLM,
    seen: list[int],
    max_new_tokens: int,
    draw: Callable[[Array], int],
    use_cache: bool,
) -> Iterator[int]:
    keep_freed_memory()
    context_length = model.config.context_length
    window = seen[-context_length:]
    cache = new_cache(model) if use_cache else None
    fresh = window  # the tokens that the cache has not seen
    layout = _by_input(model) if use_cache and max_new_tokens >= _WORTH_A_COPY else {}
    for i in range(max_new_tokens):
        with evaluating(model), _laid_out(layout if len(fresh) == 1 else {}):
            logits = _last_logits(model, fresh if use_cache else window, cache)
        token = draw(logits)
        yield token
        if i + 1 == max_new_tokens:
            return
        window.append(token)
        fresh = [token]
        if len(window) > context_length:
            window = window[-max(1, context_length // 2) :]
            cache = new_cache(model) if use_cache else None
            fresh = window


def _by_input(model: TransformerLM) -> dict[Tensor, Array]:
    """Copies of the matrices of linear layers that lie in memory input by input.

    The product of a matrix with the single vector of a new token reads such a copy 1.5 times as fast.
    """
    from tinyllm.nn import Linear  # only here, so that importing tinyllm stays fast

    modules = [module for _, module in model.named_modules()]
    weights = [module.weight for module in modules if isinstance(module, Linear)]
    return {weight: backend.xp.asfortranarray(weight.data) for weight in weights}


@contextlib.contextmanager
def _laid_out(layout: Mapping[Tensor, Array]) -> Iterator[None]:
    """Within this context the Tensors have these arrays, of the same values."""
    originals = [tensor.data for tensor in layout]
    for tensor, array in layout.items():
        tensor.data = array
    try:
        yield
    finally:
        for tensor, array in zip(layout, originals, strict=True):
            tensor.data = array


@contextlib.contextmanager
def evaluating(model: TransformerLM) -> Iterator[None]:
    """Within this context the model is in evaluation, without a graph."""
    training = model.training
    if training:
        model.eval()
    try:
        with no_grad():
            yield
    finally:
        if training:
            model.train()


def _last_logits(model: TransformerLM, tokens: list[int], cache: list[KeyValues] | None) -> Array:
    """The logits (V,) after the last of `tokens`."""
    hidden = model.hidden(backend.asarray([tokens]), cache)
    return backend.to_numpy(model.head(hidden[:, -1:]).data[0, 0])


def generate_text(
    model: TransformerLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **settings: Any
) -> Iterator[str]:
    """Continue the text `prompt`, yielding new text as it comes; `settings` as for `generate`."""
    settings.setdefault("vocab_size", tokenizer.vocab_size)
    return _decoded(tokenizer, generate(model, tokenizer.encode(prompt), max_new_tokens, **settings))


def _decoded(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of each token. A character may end in a later token than it begins in; then it comes with that."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)

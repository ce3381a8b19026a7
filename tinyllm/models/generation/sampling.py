"""Sampling from a language model, with a cache of keys and values that lives outside the model."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.backend import Array
from tinyllm.models.generation.decoder import Decoder, agrees, is_watched
from tinyllm.models.transformer import TransformerLM
from tinyllm.nn.cache import EndlessCache, KeyValueCache
from tinyllm.system.allocator import keep_freed_memory
from tinyllm.system.errors import InputError

if TYPE_CHECKING:
    from tinyllm.tokenizer import Tokenizer


Window = Literal["restart", "slide", "all"]
"""What a new token sees once the context is full; see `generate`."""

_WORTH_A_COPY = 32
"""From so many new tokens on, the matrices are copied into the layout that single tokens are fastest with."""


_COMPARED = 3
"""Tokens of the prompt after which a way to compute logits must give the model's before it is used."""


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
    window: Window = "restart",
) -> Iterator[int]:
    """Continue `tokens`, yielding each new token as soon as it is drawn. The model must not be changed between tokens.

    Args:
        tokens: the prompt, at least one id. max_new_tokens: how many to draw.
        temperature, top_k, top_p: see `next_token`. seed: the same seed gives the same tokens.
        use_cache: keep keys and values between tokens; without it every token is computed from all before. With it,
            `forward` of the modules is called for the first few tokens, and for the others only if someone watches: a
            hook, an observer, a debugger. Otherwise a `Decoder` runs their `infer`, if its logits are the same.
            A model whose logits with a cache are not those without decodes without.
        vocab_size: draw among the first so many ids alone, where a model has more than its tokenizer.
        window: what a token sees beyond `context_length` of them. restart: the model goes on from the newest half of
            them; slide: from the keys and values of the newest `context_length`, at positions that go on, as a
            `sliding_window` of that size in transformers; all: from all, as transformers does, though the model was
            trained on no such positions. A prompt is cut to its newest `context_length`, but for `all`.

    Raises:
        InputError: an empty prompt, or a setting out of range; `slide` of a model that cannot decode with a cache.

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
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
    if window not in get_args(Window):
        raise InputError(f"window={window!r}; it must be one of {', '.join(get_args(Window))}")
    if window == "slide" and not use_cache:
        raise InputError("window='slide' is of what the cache holds; it needs use_cache=True")
    rng = np.random.default_rng(seed)

    def draw(logits: Array) -> int:
        return next_token(logits[:vocab_size], rng, temperature, top_k, top_p)

    return _continue(model, seen, max_new_tokens, draw, use_cache, window)


def _continue(
    model: TransformerLM,
    seen: list[int],
    max_new_tokens: int,
    draw: Callable[[Array], int],
    use_cache: bool,
    kind: Window,
) -> Iterator[int]:
    keep_freed_memory()
    context_length = model.config.context_length
    window = seen if kind == "all" else seen[-context_length:]
    caches = None
    if kind != "restart":
        sliding = context_length if kind == "slide" else None
        caches = [EndlessCache(2 * max(context_length, len(window)), sliding) for _ in model.blocks]
    with evaluating(model):
        next_logits = _next_logits(model, window[:_COMPARED], max_new_tokens, use_cache, caches)
    fresh = window  # the tokens of the window that were not seen yet
    for i in range(max_new_tokens):
        with evaluating(model):
            logits = next_logits(window, fresh)
        token = draw(logits)
        yield token
        if i + 1 == max_new_tokens:
            return
        window.append(token)
        fresh = [token]
        if kind == "restart" and len(window) > context_length:
            fresh = window = window[-max(1, context_length // 2) :]


def _next_logits(
    model: TransformerLM,
    first: list[int],
    max_new_tokens: int,
    use_cache: bool,
    caches: list[EndlessCache] | None,
) -> Callable[[list[int], list[int]], Array]:
    """A function of a window of tokens, and of those that are new in it, to the logits (V,) after the last.

    first: the tokens that the prompt begins with. caches: what is kept of a window that never begins anew.
    """

    def uncached(window: list[int], fresh: list[int]) -> Array:
        config = model.config
        model.config = replace(config, context_length=max(config.context_length, len(window)))
        try:
            return _last_logits(model, window, None)
        finally:
            model.config = config

    if not use_cache:
        return uncached
    if max_new_tokens == 0 or backend.is_asynchronous() or is_watched(model):
        return _cached(model, caches)
    if model.has_own_infer and agrees(model, first, Decoder(model, len(first))):
        return _decoded(model, max_new_tokens >= _WORTH_A_COPY, caches)
    cache = model.new_cache(len(first))
    if agrees(model, first, lambda tokens: _last_logits(model, tokens, cache)):
        return _cached(model, caches)
    if caches is not None and caches[0].window is not None:
        raise InputError(
            "this model decodes without a cache, which window='slide' needs; take another window"
        )
    return uncached


def _decoded(
    model: TransformerLM, pack: bool, caches: list[EndlessCache] | None
) -> Callable[[list[int], list[int]], Array]:
    """Logits as `_next_logits` says, by a Decoder; packed for single tokens if `pack`."""
    decoder = Decoder(model, None if caches is None else sys.maxsize, caches)

    def next_logits(window: list[int], fresh: list[int]) -> Array:
        if fresh is window:
            decoder.length = 0
        elif pack and not decoder.is_packed:
            decoder.pack()
        return backend.to_numpy(decoder(fresh))

    return next_logits


def _cached(
    model: TransformerLM, caches: list[EndlessCache] | None
) -> Callable[[list[int], list[int]], Array]:
    """Logits as `_next_logits` says, by calling the modules with a cache."""
    cache: list[KeyValueCache] = model.new_cache() if caches is None else [*caches]

    def next_logits(window: list[int], fresh: list[int]) -> Array:
        if fresh is window and caches is None:
            cache[:] = model.new_cache()
        return _last_logits(model, fresh, cache)

    return next_logits


def _last_logits(model: TransformerLM, tokens: Sequence[int], cache: list[KeyValueCache] | None) -> Array:
    """The logits (V,) after the last of `tokens`."""
    ids = backend.asarray([tokens])
    if type(model).forward is not TransformerLM.forward:
        return backend.to_numpy(model(ids, cache).data[0, -1])
    hidden = model.hidden(ids, cache)
    return backend.to_numpy(model.head(hidden[:, -1:]).data[0, 0])


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


def generate_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    special_tokens: bool = True,
    **settings: Any,
) -> Iterator[str]:
    """Continue the text `prompt`, yielding what each new token adds to it, and last what the end leaves.

    Args:
        special_tokens: those of the tokenizer in the prompt become their ids; without it they are text.
        settings: as for `generate`.
    """
    settings.setdefault("vocab_size", tokenizer.vocab_size)
    seen = tokenizer.encode_document(prompt, special_tokens).tolist()
    new = generate(model, seen, max_new_tokens, **settings)
    return itertools.islice(tokenizer.decode_stream(itertools.chain(seen, new)), len(seen), None)


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The text of `pieces` up to the first `stop`, which may begin in one and end in another."""
    held = ""
    for piece in pieces:
        held += piece
        end = held.find(stop)
        if end >= 0:
            yield held[:end]
            return
        # The longest end of it that `stop` may begin with waits for the next piece.
        kept = next(
            i for i in range(max(0, len(held) - len(stop) + 1), len(held) + 1) if stop.startswith(held[i:])
        )
        yield held[:kept]
        held = held[kept:]
    yield held

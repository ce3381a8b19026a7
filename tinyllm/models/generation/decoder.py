"""Decoding: what computes the logits after the newest token of a growing sequence, for `generate`.

The modules compute; a Decoder decides which tokens they are given, in how many threads, and with which caches.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tinyllm import backend
from tinyllm.autograd.mode import current_mode, no_grad
from tinyllm.backend import Array
from tinyllm.models.transformer import TransformerLM
from tinyllm.nn.cache import KeyValueCache
from tinyllm.system.cores import cores_allowed, each_on_a_core, threads_allowed

# Tokens of a prompt that are read together: more compute more scores in vain, and fewer make thin products.
_FEWEST, _MOST = 100, 256


class Decoder:
    """The logits after the newest token of one sequence, which grows from call to call.

    It computes what the model computes in evaluation, by `infer` of its modules: a single new token takes a few large
    products and many small array operations, and outside a graph the small ones cost half. The weights must not change
    while it is used.

    Args:
        model: one with an `infer` of its own. capacity: tokens that there is room for; None: context_length.
        caches: for each block, instead of new ones.

    Example:
        >>> model = tinyllm.TransformerLM(tinyllm.ModelConfig(vocab_size=10), seed=1)
        >>> decoder = Decoder(model)
        >>> decoder([1, 2, 3]).shape, decoder([4]).shape, decoder.length
        ((10,), (10,), 4)
    """

    def __init__(
        self, model: TransformerLM, capacity: int | None = None, caches: Sequence[KeyValueCache] | None = None
    ) -> None:
        self.model = model
        self.is_packed = False
        self.capacity = model.config.context_length if capacity is None else capacity
        self.length = 0
        """How many tokens it has seen; set it to 0 to begin anew."""
        self.caches = model.new_cache(self.capacity) if caches is None else list(caches)

    def pack(self) -> None:
        """Copy the matrices into the layout that single tokens are fastest with, worth it from some 30 of them on."""
        self.model, self.is_packed = self.model.packed(), True

    def __call__(self, tokens: Sequence[int]) -> Any:
        """The logits (V,) after the last of `tokens`, which follow those of the calls before.

        A long prompt is read in parts, several at once where there are several cores.

        Raises ValueError when there is no room for them, IndexError for an id that is not in the vocabulary.
        """
        end = self.length + len(tokens)
        if end > self.capacity:
            raise ValueError(f"there is room for {self.capacity} tokens; got {end}")
        ids = backend.asarray(tokens)[None]  # (1, T)
        parts = self._parts(end)

        def read(part: _Part) -> None:
            with part.ended():
                rows = slice(part.here.start - self.length, part.here.stop - self.length)
                hidden = self.model.infer_hidden(ids[:, rows], part.caches, newest=True)  # (1, 1, D)
                if part.is_last:
                    part.logits = self.model.head.infer(hidden)

        each_on_a_core(read, parts)
        self.length = end
        return parts[-1].logits[0, -1]

    def _parts(self, end: int) -> list[_Part]:
        """The new tokens, up to the position `end`, in parts of about the same length, for each core as many."""
        start, cores = self.length, cores_allowed()
        T = end - start
        count = max(1, min(T // _FEWEST, cores * math.ceil(T / (cores * _MOST))))
        if count > 1 and not all(module.has_own_infer for _, module in self.model.named_modules()):
            count = 1  # what infers by `forward` need not stand several threads
        parts: list[_Part] = []
        for number in range(count):
            here = slice(start + T * number // count, start + T * (number + 1) // count)
            parts.append(_Part(here, self.caches, parts[-1] if parts else None, number == count - 1))
        return parts


class _Part:
    """Tokens of a prompt that are read together. They look at those of the parts before, layer by layer.

    here: where the tokens are in the sequence. caches: of the sequence. before: the part before, None for the first.
    """

    def __init__(
        self, here: slice, caches: Sequence[KeyValueCache], before: _Part | None, is_last: bool
    ) -> None:
        self.here, self.is_last = here, is_last
        self.logits: Any = None
        """After the last token of the prompt, (1, 1, V)."""
        self.caches: list[_CacheOfPart] = [
            _CacheOfPart(cache, here.start, before.caches[number] if before else None, is_last)
            for number, cache in enumerate(caches)
        ]

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """After this nobody waits for this part, whether it was read or failed."""
        try:
            yield
        finally:
            for cache in self.caches:
                cache.let_others_read()


class _CacheOfPart:
    """The cache of a layer, as the tokens of one part see it: with those of the parts before, for which it waits."""

    def __init__(self, cache: KeyValueCache, start: int, before: _CacheOfPart | None, is_last: bool) -> None:
        self.cache, self.length = cache, start
        self._written: threading.Event | None = None if is_last else threading.Event()
        self._written_before = None if before is None else before._written

    def append(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Keep those of this part, (1, G, T, K), and return all up to here once those of the parts before are there."""
        self.cache.write(self.length, keys, values)
        self.length += keys.shape[2]
        if self._written_before is not None:
            self._written_before.wait()
        if self._written is not None:
            self._written.set()
        return self.cache.first(self.length)

    def let_others_read(self) -> None:
        """Nobody waits any more for this part to write."""
        if self._written is not None:
            self._written.set()


def is_watched(model: TransformerLM) -> bool:
    """Whether somebody wants to see the modules run: hooks, observers, formula mode, a debugger."""
    hooked = any(module._forward_hooks or module._backward_hooks for _, module in model.named_modules())
    mode = current_mode.get()
    return bool(hooked or mode.observers or mode.formulas or _debugged())


def agrees(model: TransformerLM, tokens: Sequence[int], step: Callable[[Sequence[int]], Any]) -> bool:
    """Whether `step`, from new tokens to the logits (V,) after them, gives the model's after these tokens, to rounding.

    It does not where someone has changed what a module computes, or where a module looks at earlier tokens and keeps no
    cache of them.
    """
    # In one thread: others would stay awake for a while, and be in the way of those that read the prompt.
    with threads_allowed(1), no_grad():
        for token in tokens:
            mine = step([token])
        logits = model(backend.asarray([list(tokens)])).data[0, -1]
    difference, largest = abs(mine - logits).max(), abs(logits).max()
    return bool(difference <= 1e-3 * largest)


def _debugged() -> bool:
    """Whether a debugger follows this thread."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return sys.gettrace() is not None or (
        monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None
    )

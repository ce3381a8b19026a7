"""What one layer of attention remembers of the tokens that it has seen; it lives outside the model."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from tinyllm.backend import Array, current


class LayerCache(Protocol):
    """The keys and values of the tokens before those that a layer is called with."""

    @property
    def length(self) -> int:
        """How many tokens there are: the position of the next one."""

    def append(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Add arrays (B, G, T, K) and return all keys and values so far, each (B, G, length, K)."""


class KeyValueCache:
    """The keys and values of one layer, in arrays with room for `capacity` tokens: (B, G, capacity, K) each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Any = None
        self.values: Any = None
        self._allocating = threading.Lock()

    def append(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Add arrays (B, G, T, K); returns views of all so far, each (B, G, length, K).

        Raises ValueError when there is no room for them.
        """
        self.write(self.length, keys, values)
        self.length += keys.shape[2]
        return self.first(self.length)

    def write(self, start: int, keys: Array, values: Array) -> None:
        """Keep arrays (B, G, T, K) as those of the tokens from `start` on; threads may write different tokens."""
        B, G, T, K = keys.shape
        if start + T > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens; got {start + T}")
        if self.keys is None:
            with self._allocating:
                if self.keys is None:
                    room = (B, G, self.capacity)
                    # The keys last, because they say to other threads that there is room.
                    self.values = current.xp.empty((*room, values.shape[-1]), dtype=values.dtype)
                    self.keys = current.xp.empty((*room, K), dtype=keys.dtype)
        self.keys[:, :, start : start + T] = keys
        self.values[:, :, start : start + T] = values

    def first(self, count: int) -> tuple[Any, Any]:
        """Views of the keys and values of the first `count` tokens, each (B, G, count, K)."""
        return self.keys[:, :, :count], self.values[:, :, :count]


class EndlessCache(KeyValueCache):
    """The keys and values of a sequence of any length, of which a single new token sees the newest `window`; None: all.

    Positions go on, so the keys stay as they were rotated. capacity: room to begin with, for the prompt at least, which
    may have `window` tokens at most.
    """

    def __init__(self, capacity: int, window: int | None = None) -> None:
        super().__init__(capacity)
        self.window = window
        self.forgotten = 0
        """How many tokens came before those in the arrays."""

    def write(self, start: int, keys: Array, values: Array) -> None:
        here = start - self.forgotten
        if here + keys.shape[2] > self.capacity:
            kept = slice(0 if self.window is None else max(0, here - self.window + 1), here)
            before = self.keys[:, :, kept], self.values[:, :, kept]
            self.forgotten += kept.start
            here -= kept.start
            self.capacity = 2 * here + keys.shape[2]
            self.keys = None
            super().write(0, *before)
        super().write(here, keys, values)

    def first(self, count: int) -> tuple[Any, Any]:
        """As those of KeyValueCache, without the tokens that the newest of them does not see."""
        end = count - self.forgotten
        seen = slice(0 if self.window is None else max(0, end - self.window), end)
        return self.keys[:, :, seen], self.values[:, :, seen]

"""Applying learned merges to pieces: the earliest merge first, from the left, until none applies.

Three ways to the same tokens, each for the pieces that it is fastest at: one piece at a time in plain Python
(`merge_one`), many short ones side by side (`_merge_matrix`), and long ones merge by merge (`_merge_long`).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.tokenizer.bpe.symbols import Symbols

Integers = npt.NDArray[np.int64]
Pair = tuple[int, int]

NUM_BYTES = 256
# The rank of a pair that is not a merge.
NO_MERGE = np.iinfo(np.int32).max

# Pieces of more bytes are merged by `_merge_long`: side by side, their cost grows with the square of the length.
_LONGEST_SIDE_BY_SIDE = 128
# Fewer bytes in all are merged one piece at a time: array work has to be worth its calls.
_FEWEST_FOR_ARRAYS = 400


class Merges:
    """The merges of a vocabulary, ready to be applied.

    A symbol is a token inside this class; 0 to 255 are the bytes. Merge r joins the two symbols pairs[r] to the
    symbol results[r]; the earlier of two merges goes first.

    Args:
        lengths: the number of bytes of each symbol.
    """

    def __init__(self, pairs: Sequence[Pair], results: Sequence[int], lengths: Sequence[int]) -> None:
        self.pairs = list(pairs)
        self.results = list(results)
        self.lengths = list(lengths)
        self.num_symbols = len(self.lengths)
        self._results = np.array(self.results, dtype=np.int64)
        # The rank after which a symbol is made no more.
        made_until = dict(zip(self.results, range(len(self.pairs)), strict=True))
        # Whether no merge joins what is only made later: true of what training makes.
        self.in_order = all(
            made_until.get(left, -1) < rank and made_until.get(right, -1) < rank
            for rank, (left, right) in enumerate(self.pairs)
        )
        self._rank_of = {pair: rank for rank, pair in enumerate(self.pairs)}
        self._build_table()

    def _build_table(self) -> None:
        """A hash table from pairs to ranks, with open addressing; pairs of bytes have a plain table besides."""
        bits = max(10, (4 * len(self.pairs)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        # Key and rank of each slot beside each other, so that a look-up is one access to memory; -1 is no key.
        self._slots = np.full((1 << bits, 2), [-1, NO_MERGE], dtype=np.int64)
        self._byte_ranks = np.full(NUM_BYTES * NUM_BYTES, NO_MERGE, dtype=np.int32)
        if not self.pairs:
            return
        distinct = np.array(list(self._rank_of), dtype=np.int64)
        ranks = np.array(list(self._rank_of.values()), dtype=np.int32)
        of_bytes = (distinct < NUM_BYTES).all(axis=1)
        self._byte_ranks[distinct[of_bytes] @ [NUM_BYTES, 1]] = ranks[of_bytes]
        keys = self._key(distinct[:, 0], distinct[:, 1])
        slots = self._home(keys)
        while keys.size:
            free = np.flatnonzero(self._slots[slots, 0] == -1)
            won = free[np.unique(slots[free], return_index=True)[1]]
            self._slots[slots[won], 0] = keys[won]
            self._slots[slots[won], 1] = ranks[won]
            left = np.ones(len(keys), dtype=np.bool_)
            left[won] = False
            keys, ranks, slots = keys[left], ranks[left], (slots[left] + 1) & self._mask

    def _key(self, left: Integers, right: Integers) -> Integers:
        return left * self.num_symbols + right

    def _home(self, keys: Integers) -> Integers:
        # Multiplicative hashing (Knuth, volume 3, section 6.4); a view is no conversion.
        return ((keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> self._shift).view(np.int64)

    def ranks(self, left: Integers, right: Integers) -> Integers:
        """The rank of each pair of symbols, NO_MERGE where there is none; all (n,)."""
        keys = self._key(left, right)
        at = self._home(keys)
        slots = self._slots[at]
        found, ranks = slots[:, 0], slots[:, 1]
        # An empty slot has the rank NO_MERGE; only where another key sits must be looked further.
        taken = found != keys
        taken &= found != -1
        rest = taken.nonzero()[0]
        ranks[rest] = NO_MERGE
        at = at[rest]
        while rest.size:
            at = (at + 1) & self._mask
            slots = self._slots[at]
            same = slots[:, 0] == keys[rest]
            ranks[rest[same]] = slots[same, 1]
            go_on = (~same & (slots[:, 0] != -1)).nonzero()[0]
            rest, at = rest[go_on], at[go_on]
        return ranks

    def byte_pair_ranks(self, left: Integers, right: Integers) -> npt.NDArray[np.int32]:
        """`ranks` for symbols that are bytes."""
        return self._byte_ranks[left * NUM_BYTES + right]

    def merge_one(self, piece: bytes) -> list[int]:
        """The symbols of one piece."""
        if len(piece) == 2:  # the commonest case of those that are not trivial
            rank = self._rank_of.get((piece[0], piece[1]))
            return list(piece) if rank is None else [self.results[rank]]
        symbols: list[int] = list(piece)
        n = len(symbols)
        rank_of = self._rank_of
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        heap = []
        for i in range(n - 1):
            rank = rank_of.get((symbols[i], symbols[i + 1]))
            if rank is not None:
                heap.append((rank, i))
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            # An entry is out of date when one of its two symbols has been merged since.
            if j >= n or (symbols[i], symbols[j]) != self.pairs[rank]:
                continue
            symbols[i], symbols[j] = self.results[rank], -1
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                new = rank_of.get((symbols[i], symbols[k]))
                if new is not None:
                    heapq.heappush(heap, (new, i))
            h = before[i]
            if h >= 0:
                new = rank_of.get((symbols[h], symbols[i]))
                if new is not None:
                    heapq.heappush(heap, (new, h))
        return [symbol for symbol in symbols if symbol >= 0]

    def merge_all(self, buffer: npt.NDArray[np.uint8], starts: Integers, lengths: Integers) -> Merged:
        """The symbols of the pieces buffer[starts[i] : starts[i] + lengths[i]]."""
        if int(lengths.sum()) < _FEWEST_FOR_ARRAYS or (
            not self.in_order and lengths.max() > _LONGEST_SIDE_BY_SIDE
        ):
            data = [
                buffer[s : s + n].tobytes() for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
            lists = [self.merge_one(piece) for piece in data]
            counts = np.fromiter(map(len, lists), np.int64, len(lists))
            return Merged(
                np.fromiter((s for symbols in lists for s in symbols), np.int32),
                np.cumsum(counts) - counts,
                counts,
            )
        parts: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
        counts = np.zeros(len(starts), dtype=np.int64)
        places = np.zeros(len(starts), dtype=np.int64)
        made = 0
        # Pieces of like length side by side, a few thousand at a time, so that the cache holds them.
        bounds = [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, _LONGEST_SIDE_BY_SIDE]
        group = np.searchsorted(bounds, lengths)
        for i in np.unique(group).tolist():
            members = np.flatnonzero(group == i)
            step = len(members) if i == len(bounds) else max(1, (1 << 17) // bounds[i])
            for begin in range(0, len(members), step):
                some = members[begin : begin + step]
                merge = self._merge_long if i == len(bounds) else self._merge_matrix
                symbols, numbers = merge(buffer, starts[some], lengths[some])
                parts.append(symbols)
                counts[some] = numbers
                places[some] = made + np.cumsum(numbers) - numbers
                made += len(symbols)
        return Merged(np.concatenate(parts), places, counts)

    def _merge_matrix(
        self, buffer: npt.NDArray[np.uint8], starts: Integers, lengths: Integers
    ) -> tuple[npt.NDArray[np.int32], Integers]:
        """Pieces side by side, one merge of each a round: (symbols end to end, how many each piece has)."""
        n, width = len(starts), int(lengths.max())
        inside = np.arange(width) < lengths[:, None]
        at = np.minimum(starts[:, None] + np.arange(width), len(buffer) - 1)
        symbols = buffer[at].astype(np.int64)  # (n, width)
        rank = np.full((n, width), NO_MERGE, dtype=np.int32)  # of each symbol with the one after it
        rank[:, :-1] = self.byte_pair_ranks(symbols[:, :-1], symbols[:, 1:])
        rank[:, :-1][~inside[:, 1:]] = NO_MERGE
        # From here on symbols are found by their place in the flat arrays; what ends a row on either side is -1.
        alive = inside.copy()
        place = np.arange(n * width).reshape(n, width)
        after = np.where(np.arange(width) + 1 < lengths[:, None], place + 1, -1).ravel()
        before = np.where(np.arange(width) > 0, place - 1, -1).ravel()
        flat_symbols, flat_alive, flat_rank = symbols.ravel(), alive.ravel(), rank.ravel()
        rows = np.arange(n)
        while True:
            i = rank[rows].argmin(axis=1) + rows * width
            best = flat_rank[i]
            going = (best != NO_MERGE).nonzero()[0]
            if not going.size:
                break
            rows, i, best = rows[going], i[going], best[going]
            j = after[i]
            symbol = self._results[best]
            flat_symbols[i] = symbol
            flat_alive[j] = False
            flat_rank[j] = NO_MERGE
            k = after[j]
            after[i] = k
            flat_rank[i] = NO_MERGE
            h = before[i]
            has_after, has_before = (k >= 0).nonzero()[0], (h >= 0).nonzero()[0]
            k, h = k[has_after], h[has_before]
            new = i[has_after]
            before[k] = new
            # The new symbol with the one after it, and the one before with it.
            left = np.concatenate((symbol[has_after], flat_symbols[h]))
            right = np.concatenate((flat_symbols[k], symbol[has_before]))
            flat_rank[np.concatenate((new, h))] = self.ranks(left, right)
        return symbols[alive].astype(np.int32), alive.sum(axis=1)

    def _merge_long(
        self, buffer: npt.NDArray[np.uint8], starts: Integers, lengths: Integers
    ) -> tuple[npt.NDArray[np.int32], Integers]:
        """Pieces end to end, all places of one merge at a time: (symbols end to end, how many each piece has)."""
        border = self.num_symbols
        ends = np.cumsum(lengths + 1)
        begins = ends - lengths
        tokens = np.full(int(ends[-1]) + 1, border, dtype=np.int32)
        for begin, start, length in zip(begins.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            tokens[begin : begin + length] = buffer[start : start + length]
        symbols = Symbols(tokens, border, self.lengths)
        waiting: defaultdict[int, list[Any]] = defaultdict(list)  # rank -> positions of its pair
        heap: list[int] = []

        def add(ranks: npt.NDArray[Any], at: Integers) -> None:
            found = np.flatnonzero(ranks != NO_MERGE)
            if not found.size:
                return
            ranks, at = ranks[found], at[found]
            order = np.argsort(ranks, kind="stable")
            ranks, at = ranks[order], at[order]
            change = np.flatnonzero(ranks[1:] != ranks[:-1]) + 1
            firsts = ranks[np.concatenate(([0], change))].tolist()
            for rank, part in zip(firsts, np.split(at, change), strict=True):
                if rank not in waiting:
                    heapq.heappush(heap, rank)
                waiting[rank].append(part)

        at = np.flatnonzero((tokens[:-1] != border) & (tokens[1:] != border))
        add(self.byte_pair_ranks(tokens[at].astype(np.int64), tokens[at + 1].astype(np.int64)), at)
        while heap:
            rank = heapq.heappop(heap)
            left, right = self.pairs[rank]
            parts = waiting.pop(rank)
            at = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
            at = symbols.still(at, left, right)
            if not at.size:
                continue
            merged = self.results[rank]
            at = symbols.merge(at, left, right, merged)
            before, after = symbols.before(at), symbols.after(at, merged)
            some = np.flatnonzero((before != border) & (before != merged))
            before = before[some].astype(np.int64)
            add(self.ranks(before, np.full_like(before, merged)), symbols.step_back(at[some], before))
            some = np.flatnonzero(after != border)
            after = after[some].astype(np.int64)
            add(self.ranks(np.full_like(after, merged), after), at[some])
        left_over = np.flatnonzero(symbols.first != border)
        counts = np.searchsorted(left_over, ends) - np.searchsorted(left_over, begins)
        return symbols.first[left_over], counts


@dataclass(frozen=True)
class Merged:
    """The symbols of pieces: piece i has symbols[places[i] : places[i] + counts[i]]."""

    symbols: npt.NDArray[np.int32]
    places: Integers
    counts: Integers

"""Learning the merges of byte-pair encoding (Sennrich et al., 2016, algorithm 1) with array work.

First the text is counted: each distinct piece once, with the number of times that it occurs. Then the pair of
neighbouring tokens with the highest count becomes a token, again and again. Two facts make that fast:

- All places of a pair come into being at once, when the younger of its two tokens does; after that its count can
  only fall. So counts of old pairs are not kept up to date: the pair with the highest recorded count is counted
  anew, and goes back if it has fallen below the next.
- Of the pairs that a merge makes, only the most frequent need be in the heap; the next follows when that one
  leaves it.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.system.processes import ordered_map
from tinyllm.tokenizer.bpe.pieces import (
    LONGEST_KEYED,
    Integers,
    Keys,
    Pieces,
    key_bytes,
    key_lengths,
    split_texts,
)
from tinyllm.tokenizer.bpe.symbols import Symbols
from tinyllm.tokenizer.patterns import Pattern

NUM_BYTES = 256
# How many of the pairs that lose occurrences by a merge are told so.
_LOSSES = 48
# Lists of texts that one process counts at a time.
_TOGETHER = 8
Pair = tuple[int, int]


def _totals(first: Keys, second: Keys, counts: Integers) -> tuple[Keys, Keys, Integers]:
    """The counts of equal pairs of keys added up."""
    if second.any():
        # Sorted by a mixture: equal pairs become neighbours. Should two others share it, a pair may stay twice.
        order = np.argsort(first ^ (second * np.uint64(0x9E3779B97F4A7C15)), kind="stable")
    else:
        order = np.argsort(first)
    first, second, counts = first[order], second[order], counts[order]
    new = np.ones(len(first), dtype=np.bool_)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    begins = np.flatnonzero(new)
    sums = np.add.reduceat(counts, begins) if begins.size else counts
    return first[begins], second[begins], sums


@dataclass(frozen=True)
class Counted:
    """The distinct pieces of one chunk."""

    keyed: list[tuple[Keys, Keys, Integers]]
    others: Counter[bytes]
    characters: int


class PieceCounts:
    """How often each distinct piece occurs in all texts added so far."""

    # Keys held before those that are equal are added up.
    _PENDING = 1 << 22

    def __init__(self) -> None:
        self._parts: list[tuple[Keys, Keys, Integers]] = []
        self._pending = 0
        self.others: Counter[bytes] = Counter()

    def join(self, counted: Counted) -> None:
        """Add what was counted elsewhere."""
        self.others.update(counted.others)
        self._parts += counted.keyed
        self._pending += sum(len(first) for first, _, _ in counted.keyed)
        if self._pending > self._PENDING:
            self._add_up()
            self._pending = 0

    def _add_up(self) -> None:
        # Pieces of up to eight bytes apart from the others: theirs are sorted by one key.
        short: list[tuple[Keys, Keys, Integers]] = []
        long: list[tuple[Keys, Keys, Integers]] = []
        for part in self._parts:
            (long if part[1].any() else short).append(part)
        self._parts = [
            _totals(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            for parts in (short, long)
            if parts
        ]

    def table(self) -> tuple[list[tuple[Keys, Keys, Integers]], Counter[bytes]]:
        """The pieces with keys, as (first keys, second keys, counts), and those without."""
        self._add_up()
        return self._parts, self.others

    def num_bytes(self) -> int:
        """The bytes of all distinct pieces."""
        keyed, others = self.table()
        return sum(int(key_lengths(first, second).sum()) for first, second, _ in keyed) + sum(
            map(len, others)
        )

    def as_dict(self) -> dict[bytes, int]:
        """Every piece and its count; what the reference is trained on."""
        result: Counter[bytes] = Counter(self.others)
        for first, second, counts in self.table()[0]:
            data = key_bytes(first, second).tobytes()
            lengths = key_lengths(first, second)
            for i, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
                result[data[16 * i : 16 * i + length]] += count
        return dict(result)


def _count(texts: Sequence[str], pattern: Pattern) -> Counted:
    characters = sum(map(len, texts))
    if not characters:
        return Counted([], Counter(), 0)
    pieces: Pieces = split_texts(texts, pattern)
    keyed = pieces.keyed
    others = Counter(pieces.bytes_of(np.flatnonzero(~keyed)))
    first, second = pieces.keys()
    short, long = keyed & (pieces.lengths <= 8), keyed & (pieces.lengths > 8)
    parts = []
    if short.any():
        keys, counts = np.unique(first[short], return_counts=True)
        parts.append((keys, np.zeros_like(keys), counts))
    if long.any():
        ones = np.ones(int(long.sum()), dtype=np.int64)
        parts.append(_totals(first[long], second[long], ones))
    return Counted(parts, others, characters)


def count_pieces(
    parts: Iterable[Sequence[str]],
    pattern: Pattern,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> PieceCounts:
    """Count the pieces of all texts, each on its own, with so many processes.

    `parts` are the texts in lists, each to be worked on at once; `progress` is told the number of characters after
    each list.
    """
    counts = PieceCounts()
    lists = iter(parts)
    batches = iter(lambda: list(itertools.islice(lists, _TOGETHER)), [])
    for counted in ordered_map(partial(_count_batch, pattern=pattern), batches, workers):
        counts.join(counted)
        if progress:
            progress(counted.characters)
    return counts


def _count_batch(batch: list[Sequence[str]], pattern: Pattern) -> Counted:
    """The pieces of several lists together, which are fewer numbers than those of each."""
    counts = PieceCounts()
    characters = 0
    for texts in batch:
        counted = _count(texts, pattern)
        characters += counted.characters
        counts.join(counted)
    keyed, others = counts.table()
    return Counted(keyed, others, characters)


def _lay_out(counts: PieceCounts, border: int, dtype: npt.DTypeLike) -> tuple[Any, Any]:
    """All distinct pieces end to end with borders between: (tokens, the count of the piece at each byte)."""
    keyed, others = counts.table()
    token_parts, count_parts = [np.array([border], dtype)], [np.zeros(1, np.int64)]
    for first, second, piece_counts in keyed:
        lengths = key_lengths(first, second)
        width = int(lengths.max()) + 1
        rows = np.zeros((len(first), LONGEST_KEYED + 1), dtype)
        rows[:, :LONGEST_KEYED] = key_bytes(first, second)
        rows[np.arange(len(first)), lengths] = border
        used = np.arange(width) <= lengths[:, None]
        token_parts.append(rows[:, :width][used])
        count_parts.append(np.repeat(piece_counts, lengths + 1))
    if others:
        lengths = np.fromiter(map(len, others), np.int64, len(others))
        data = np.frombuffer(b"\0".join([*others, b""]), np.uint8).astype(dtype)
        data[np.cumsum(lengths + 1) - 1] = border
        token_parts.append(data)
        count_parts.append(np.repeat(np.fromiter(others.values(), np.int64, len(others)), lengths + 1))
    weights = np.concatenate(count_parts)
    if weights.size and weights.max() < 1 << 32:
        weights = weights.astype(np.uint32)
    return np.concatenate(token_parts), weights


@dataclass
class _Group:
    """The pairs of one token with its neighbours, in the order in which they are to be merged as far as is known.

    keys[i] is x for the pair (x, token) and V + y for the pair (token, y); it is at positions[begins[i] : ends[i]].
    Lists, since they are read one number at a time.
    """

    token: int
    keys: list[int]
    counts: list[int]
    begins: list[int]
    ends: list[int]
    positions: npt.NDArray[np.int32]


class _Merger:
    """Learns merges one at a time from pieces laid end to end."""

    def __init__(self, symbols: Symbols, weights: Any, min_frequency: int, vocab_size: int) -> None:
        self.symbols = symbols
        self.weights = weights
        self.min_frequency = min_frequency
        self.vocab_size = vocab_size
        # (-count, left, right, positions, group, index in it). The group is what follows in the heap when this
        # pair leaves it. A pair is in the heap once, so no two entries compare beyond it.
        self.heap: list[tuple[int, int, int, Any, _Group | None, int]] = []
        # By how much the count of a pair has fallen since it was recorded, as far as that was noted.
        self.lost: dict[Pair, int] = {}
        # What each token stands for. A vocabulary maps strings to ids, so no two tokens may be the same string.
        self.strings = [bytes([i]) for i in range(NUM_BYTES)]
        self.known = set(self.strings)
        # Radix sort, which NumPy has for 16 bits, sorts large keys fastest.
        self._key_dtype = np.uint16 if 2 * vocab_size <= 1 << 16 else np.int32
        self._add_byte_pairs()

    def _add_byte_pairs(self) -> None:
        tokens, border = self.symbols.first, self.symbols.border
        at = np.flatnonzero((tokens[:-1] != border) & (tokens[1:] != border)).astype(np.int32)
        lefts = tokens[at].astype(np.uint16)
        keys = lefts * NUM_BYTES + tokens[at + 1].astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        keys, at = keys[order], at[order]
        borders = np.searchsorted(keys, np.arange(0, (NUM_BYTES + 1) * NUM_BYTES, NUM_BYTES))
        for left in range(NUM_BYTES):
            of_left = slice(int(borders[left]), int(borders[left + 1]))
            if of_left.start < of_left.stop:
                self._add(left, keys[of_left] % NUM_BYTES + np.int32(self.vocab_size), at[of_left])

    def _add(self, token: int, keys: Any, at: Any) -> _Group:
        """Record the pairs of `token`, given the sorted keys of _Group for all their positions."""
        change = (keys[1:] != keys[:-1]).nonzero()[0]
        begins = np.zeros(len(change) + 1, dtype=np.int64)
        np.add(change, 1, out=begins[1:])
        counts = np.add.reduceat(self.weights[at], begins, dtype=np.int64)
        order = (-counts).argsort(kind="stable")
        if counts[order[-1]] < self.min_frequency:
            order = order[counts[order] >= self.min_frequency]
        ends = np.full_like(begins, len(keys))
        ends[:-1] = begins[1:]
        group = _Group(
            token,
            keys[begins][order].tolist(),
            counts[order].tolist(),
            begins[order].tolist(),
            ends[order].tolist(),
            at.astype(np.int32, copy=False),
        )
        self._push(group, 0)
        return group

    def _record_losses(self, group: _Group, left: int, right: int) -> None:
        """What the merge of (left, right) to the token of `group` took from other pairs.

        Where (x, token) is now, (x, left) was; where (token, y) is, (right, y) was. The largest losses are enough:
        they save most counting, and a count without the others is still no lower than the truth.
        """
        for key, count in zip(group.keys[:_LOSSES], group.counts, strict=False):
            if key < self.vocab_size:
                pair = (key, left)
            else:
                after = key - self.vocab_size
                pair = (right, left if after == group.token else after)
            self.lost[pair] = self.lost.get(pair, 0) + count

    def _push(self, group: _Group, i: int) -> None:
        if i < len(group.counts):
            key = group.keys[i]
            on_right = key >= self.vocab_size
            left, right = (group.token, key - self.vocab_size) if on_right else (key, group.token)
            at = group.positions[group.begins[i] : group.ends[i]]
            heapq.heappush(self.heap, (-group.counts[i], left, right, at, group, i))

    def _pop(self) -> tuple[int, int, Integers] | None:
        """The most frequent pair and its positions; None when no pair reaches min_frequency."""
        while self.heap:
            negative, left, right, at, group, i = heapq.heappop(self.heap)
            if group is not None:
                self._push(group, i + 1)
            if self.strings[left] + self.strings[right] in self.known:
                continue
            lost = self.lost.pop((left, right), 0)
            if lost:
                if -negative - lost >= self.min_frequency:
                    heapq.heappush(self.heap, (negative + lost, left, right, at, None, 0))
                continue
            at = self.symbols.still(at.astype(np.int64), left, right)
            count = int(self.weights[at].sum())
            if count == -negative:
                return left, right, at
            if count >= self.min_frequency:
                heapq.heappush(self.heap, (-count, left, right, at, None, 0))
        return None

    def next_merge(self, token: int) -> Pair | None:
        """Merge the most frequent pair into `token`; None when no pair is frequent enough."""
        found = self._pop()
        if found is None:
            return None
        left, right, at = found
        self.strings.append(self.strings[left] + self.strings[right])
        self.known.add(self.strings[token])
        symbols, border = self.symbols, self.symbols.border
        symbols.set_length(token, left, right)
        at = symbols.merge(at, left, right, token)
        before = symbols.before(at)
        n = len(at)
        keys: Any = np.concatenate(
            (before, symbols.after(at, token)), dtype=self._key_dtype, casting="unsafe"
        )
        is_pair = keys != border
        # A pair of two new tokens is seen from both; it counts as one after the first.
        is_pair[:n] &= before != token
        # Pairs with a token before come first and are sorted by it: the order of the keys is the order of the
        # pairs, since no token is above the newest.
        keys[n:] += self._key_dtype(self.vocab_size)
        positions = np.concatenate((symbols.step_back(at, before), at))
        keep = is_pair.nonzero()[0]
        if keep.size:
            keys = keys[keep]
            order = keys.argsort(kind="stable")
            group = self._add(token, keys[order], positions[keep[order]])
            self._record_losses(group, left, right)
        return left, right


def learn_merges(
    counts: PieceCounts, num_merges: int, min_frequency: int, progress: Callable[[int], None] | None = None
) -> list[Pair]:
    """The merges of reference.train on the same pieces, in the same order; merge r makes token 256 + r.

    `progress` is told 1 after each merge.
    """
    # No merge leaves as many tokens as there were, so that memory is that of the text, whatever is asked for.
    vocab_size = NUM_BYTES + min(num_merges, counts.num_bytes())
    border = vocab_size
    dtype = np.uint16 if vocab_size < 1 << 16 else np.int32
    tokens, weights = _lay_out(counts, border, dtype)
    merges: list[Pair] = []
    with _collection_paused():
        merger = _Merger(Symbols(tokens, border, [1] * vocab_size), weights, min_frequency, vocab_size)
        for token in range(NUM_BYTES, vocab_size):
            pair = merger.next_merge(token)
            if pair is None:
                break
            merges.append(pair)
            if progress:
                progress(1)
    return merges


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Merging makes many tuples and no cycles, which the collector would look through in vain: a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""Encoding long texts as array work: each distinct piece is merged once, and found by its key from then on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.tokenizer.bpe.merging import Merged, Merges
from tinyllm.tokenizer.bpe.pieces import (
    LONGEST_KEYED,
    Integers,
    Keys,
    PieceTable,
    key_bytes,
    key_lengths,
    split_texts,
)
from tinyllm.tokenizer.patterns import Pattern

Ids = npt.NDArray[np.int32]

# The most slots of the table of known pieces, 2^21 of 32 bytes, and the most bytes of pieces without keys. When half
# of the slots or all of the bytes are used, all of it begins anew.
_LARGEST_TABLE = 1 << 21
_MOST_OTHER_BYTES = 1 << 25


class _KnownPieces:
    """The ids of all pieces met so far: a table from keys, and a dict from bytes, into a pool of ids.

    Table and pool grow into new arrays, in which all old places stay valid.
    """

    def __init__(self) -> None:
        self.table = PieceTable()
        self.others: dict[bytes, tuple[int, int]] = {}
        self.pool: Ids = np.empty(1 << 14, dtype=np.int32)
        self._used = 0
        self._other_bytes = 0
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        return 2 * self.table.size >= _LARGEST_TABLE or self._other_bytes >= _MOST_OTHER_BYTES

    def add(self, first: Keys, second: Keys, others: list[bytes], merged: Merged) -> None:
        """Add distinct pieces, those with keys before the others; another thread may have added some by now."""
        with self._lock:
            needed = self._used + len(merged.symbols)
            if needed > len(self.pool):
                self.pool = np.concatenate([self.pool[: self._used], np.empty(needed, dtype=np.int32)])
            self.pool[self._used : needed] = merged.symbols
            places = merged.places + self._used
            self._used = needed

            n = len(first)
            new = np.flatnonzero(self.table.find(first, second)[1] == 0)
            table = self.table
            while 2 * (table.size + len(new)) > table.capacity:
                table = table.grown(4)
            table.insert(first[new], second[new], places[:n][new], merged.counts[:n][new])
            self.table = table
            self.others.update(
                zip(others, zip(places[n:].tolist(), merged.counts[n:].tolist(), strict=True), strict=True)
            )
            self._other_bytes += sum(map(len, others))


@dataclass
class _Chunk:
    """A chunk of text on the way to its ids."""

    keyed: Any  # the indices of the pieces that have keys
    others: Integers  # and of the rest
    first: Keys
    second: Keys
    places: Integers
    counts: Integers
    missing: Integers  # those of `keyed` that are not known
    other_bytes: list[bytes]


class BulkEncoder:
    """Encodes long texts; several threads may do so at once.

    Args:
        whole: the tokens of pieces that are not what the merges make of them, as in tokenizers that look a piece up
            before they merge it.
    """

    def __init__(
        self,
        merges: Merges,
        id_of_symbol: npt.NDArray[np.int32],
        pattern: Pattern,
        whole: Mapping[bytes, int],
    ) -> None:
        self._merges = merges
        self._id_of_symbol = id_of_symbol
        self._pattern = pattern
        self._whole = whole
        self._known = _KnownPieces()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each of the `texts`, none of them empty; what is new in all of them is merged at once."""
        known = self._known
        if known.full:
            known = self._known = _KnownPieces()
        chunks = [self._look_up(known, text) for text in texts]
        first = np.concatenate([chunk.first[chunk.missing] for chunk in chunks])
        second = np.concatenate([chunk.second[chunk.missing] for chunk in chunks])
        distinct = _distinct(first, second)
        first, second = first[distinct], second[distinct]
        others = [*{piece for chunk in chunks for piece in chunk.other_bytes} - known.others.keys()]
        if len(first) or others:
            known.add(first, second, others, self._merge(first, second, others))
        return [self._assemble(known, chunk) for chunk in chunks]

    def _look_up(self, known: _KnownPieces, text: str) -> _Chunk:
        pieces = split_texts([text], self._pattern)
        has_keys = pieces.keyed
        first, second = pieces.keys()
        keyed: Any = slice(None)
        others = np.flatnonzero(~has_keys)
        if others.size:
            keyed = np.flatnonzero(has_keys)
            first, second = first[keyed], second[keyed]
        places, counts = known.table.find(first, second)
        missing = np.flatnonzero(counts == 0)
        return _Chunk(keyed, others, first, second, places, counts, missing, pieces.bytes_of(others))

    def _merge(self, first: Keys, second: Keys, others: list[bytes]) -> Merged:
        """The ids of distinct pieces, given by keys and as bytes."""
        n = len(first)
        data = key_bytes(first, second).tobytes() + b"".join(others)
        other_lengths = np.fromiter(map(len, others), np.int64, len(others))
        lengths = np.concatenate([key_lengths(first, second), other_lengths])
        other_starts = LONGEST_KEYED * n + np.cumsum(other_lengths) - other_lengths
        starts = np.concatenate([LONGEST_KEYED * np.arange(n), other_starts])
        merged = self._merges.merge_all(np.frombuffer(data, np.uint8), starts, lengths)
        ids = self._id_of_symbol[merged.symbols]
        places, counts = merged.places, merged.counts
        if self._whole:
            for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
                id = self._whole.get(data[start : start + length])
                if id is not None:
                    ids[places[i]], counts[i] = id, 1
        return Merged(ids, places, counts)

    def _assemble(self, known: _KnownPieces, chunk: _Chunk) -> Ids:
        missing = chunk.missing
        if missing.size:
            found = known.table.find(chunk.first[missing], chunk.second[missing])
            chunk.places[missing], chunk.counts[missing] = found
        places, counts = chunk.places, chunk.counts
        if chunk.others.size:
            of_others = [known.others[piece] for piece in chunk.other_bytes]
            n = len(counts) + len(of_others)
            all_places, all_counts = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
            all_places[chunk.keyed], all_counts[chunk.keyed] = places, counts
            all_places[chunk.others], all_counts[chunk.others] = np.array(of_others, dtype=np.int64).T
            places, counts = all_places, all_counts
        return _gathered(known.pool, places, counts)


def _distinct(first: Keys, second: Keys) -> Integers:
    """Indices of one of each of the pairs of keys, now and then of two."""
    # Sorted by a mixture, equal pairs are neighbours; should two different pairs share it, one may come twice.
    order = np.argsort(first ^ (second * np.uint64(0x9E3779B97F4A7C15)))
    first, second = first[order], second[order]
    new = np.ones(len(first), dtype=np.bool_)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return order[new]


def _gathered(pool: Ids, places: Integers, counts: Integers) -> Ids:
    """pool[places[i] : places[i] + counts[i]] for all i, end to end."""
    ends = np.cumsum(counts)
    begins = ends - counts
    out = np.empty(int(ends[-1]), dtype=np.int32)
    out[begins] = pool[places]
    more = np.flatnonzero(counts > 1)
    if more.size:
        begins, counts, places = begins[more], counts[more] - 1, places[more]
        within = np.arange(1, int(counts.sum()) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
        out[np.repeat(begins, counts) + within] = pool[np.repeat(places, counts) + within]
    return out

"""Encoding long texts as array work: each distinct piece is merged once, and found by its key from then on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.tokenizer.merging import Merged, Merges
from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pieces import (
    LONGEST_KEYED,
    Integers,
    Keys,
    PieceTable,
    key_bytes,
    key_lengths,
    split_texts,
)

Ids = npt.NDArray[np.int32]

# The most slots of the table of known pieces: 2^21 of 32 bytes. When half are used, it begins anew.
_LARGEST_TABLE = 1 << 21


class _KnownPieces:
    """The ids of all pieces met so far: a table from keys into a pool of ids.

    Table and pool grow into new arrays, in which all old places stay valid.
    """

    def __init__(self) -> None:
        self.table = PieceTable()
        self.pool: Ids = np.empty(1 << 14, dtype=np.int32)
        self._used = 0
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        return 2 * self.table.size >= _LARGEST_TABLE

    def add(self, first: Keys, second: Keys, merged: Merged) -> None:
        """Add distinct pieces, of which another thread may have added some by now."""
        with self._lock:
            new = np.flatnonzero(self.table.find(first, second)[1] == 0)
            table = self.table
            while 2 * (table.size + len(new)) > table.capacity:
                table = table.grown(4)
            needed = self._used + len(merged.symbols)
            if needed > len(self.pool):
                self.pool = np.concatenate([self.pool[: self._used], np.empty(needed, dtype=np.int32)])
            self.pool[self._used : needed] = merged.symbols
            table.insert(first[new], second[new], merged.places[new] + self._used, merged.counts[new])
            self._used = needed
            self.table = table


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
        numbers: dict[bytes, int] = {}
        for chunk in chunks:
            for piece in chunk.other_bytes:
                numbers.setdefault(piece, len(numbers))
        keyed, others = self._merge(first, second, list(numbers))
        known.add(first, second, keyed)
        return [self._assemble(known, chunk, others, numbers) for chunk in chunks]

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

    def _merge(self, first: Keys, second: Keys, others: list[bytes]) -> tuple[Merged, Merged]:
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
        return Merged(ids, places[:n], counts[:n]), Merged(ids, places[n:], counts[n:])

    def _assemble(self, known: _KnownPieces, chunk: _Chunk, others: Merged, numbers: dict[bytes, int]) -> Ids:
        missing = chunk.missing
        if missing.size:
            found = known.table.find(chunk.first[missing], chunk.second[missing])
            chunk.places[missing], chunk.counts[missing] = found
        if not chunk.others.size:
            counts = chunk.counts
        else:
            index = [numbers[piece] for piece in chunk.other_bytes]
            other_places, other_counts = others.places[index], others.counts[index]
            counts = np.empty(len(chunk.counts) + len(index), dtype=np.int64)
            counts[chunk.keyed], counts[chunk.others] = chunk.counts, other_counts
        ends = np.cumsum(counts)
        out = np.empty(int(ends[-1]), dtype=np.int32)
        begins = ends - counts
        _fill(out, begins[chunk.keyed], chunk.counts, known.pool, chunk.places)
        if chunk.others.size:
            _fill(out, begins[chunk.others], other_counts, others.symbols, other_places)
        return out


def _distinct(first: Keys, second: Keys) -> Integers:
    """Indices of one of each of the pairs of keys, now and then of two."""
    # Sorted by a mixture, equal pairs are neighbours; should two different pairs share it, one may come twice.
    order = np.argsort(first ^ (second * np.uint64(0x9E3779B97F4A7C15)))
    first, second = first[order], second[order]
    new = np.ones(len(first), dtype=np.bool_)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return order[new]


def _fill(out: Ids, begins: Integers, counts: Integers, pool: Ids, places: Integers) -> None:
    """out[begins[i] : begins[i] + counts[i]] = pool[places[i] : places[i] + counts[i]] for all i."""
    out[begins] = pool[places]
    more = np.flatnonzero(counts > 1)
    if not more.size:
        return
    begins, counts, places = begins[more], counts[more] - 1, places[more]
    within = np.arange(1, int(counts.sum()) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
    out[np.repeat(begins, counts) + within] = pool[np.repeat(places, counts) + within]

"""Encoding long texts as array work: each distinct piece is merged once, and found by its key from then on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
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
from tinyllm.tokenizer.patterns import END_CHARACTER, Pattern
from tinyllm.tokenizer.pretokenize import CHUNK, chunks

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

    starts: Integers  # where in the bytes of the text each piece begins
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
        known = self._known_pieces()
        looked_up = [self._look_up(known, [text]) for text in texts]
        self._learn(known, looked_up)
        return [_gathered(known.pool, *self._places(known, chunk)) for chunk in looked_up]

    def encode_short(self, texts: Sequence[str]) -> Iterator[Ids]:
        """The ids of each of many `texts`, none of them empty: like encode, but made for a thousand short ones."""
        known = self._known_pieces()
        looked_up: list[tuple[Sequence[str], list[_Chunk]]] = []
        for group in _groups(texts):
            parts = [[part] for part in chunks(group[0], self._pattern)] if len(group[0]) > CHUNK else [group]
            looked_up.append((group, [self._look_up(known, part) for part in parts]))
        self._learn(known, [chunk for _, of_group in looked_up for chunk in of_group])
        for group, (chunk, *more) in looked_up:
            places, counts = self._places(known, chunk)
            ids = _gathered(known.pool, places, counts)
            if more:
                yield np.concatenate(
                    [ids, *(_gathered(known.pool, *self._places(known, one)) for one in more)]
                )
                continue
            joint = len(END_CHARACTER.encode("utf-8", "surrogatepass"))
            ends = np.cumsum([len(text.encode()) + joint for text in group])
            pieces = np.searchsorted(chunk.starts, ends)  # so many are in the texts up to each
            tokens = np.concatenate([[0], np.cumsum(counts)])[pieces].tolist()
            yield from (ids[i:j] for i, j in itertools.pairwise([0, *tokens]))

    def _known_pieces(self) -> _KnownPieces:
        if self._known.full:
            self._known = _KnownPieces()
        return self._known

    def _learn(self, known: _KnownPieces, looked_up: list[_Chunk]) -> None:
        """Merge what is new in all of these."""
        first = np.concatenate([chunk.first[chunk.missing] for chunk in looked_up])
        second = np.concatenate([chunk.second[chunk.missing] for chunk in looked_up])
        distinct = _distinct(first, second)
        first, second = first[distinct], second[distinct]
        others = [*{piece for chunk in looked_up for piece in chunk.other_bytes} - known.others.keys()]
        if len(first) or others:
            known.add(first, second, others, self._merge(first, second, others))

    def _look_up(self, known: _KnownPieces, texts: Sequence[str]) -> _Chunk:
        pieces = split_texts(texts, self._pattern)
        has_keys = pieces.keyed
        first, second = pieces.keys()
        keyed: Any = slice(None)
        others = np.flatnonzero(~has_keys)
        if others.size:
            keyed = np.flatnonzero(has_keys)
            first, second = first[keyed], second[keyed]
        places, counts = known.table.find(first, second)
        missing = np.flatnonzero(counts == 0)
        other_bytes = pieces.bytes_of(others)
        return _Chunk(pieces.starts, keyed, others, first, second, places, counts, missing, other_bytes)

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

    def _places(self, known: _KnownPieces, chunk: _Chunk) -> tuple[Integers, Integers]:
        """Where in the pool the ids of each piece are, and how many."""
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
        return places, counts


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in groups of about a chunk of characters; one that is longer than a chunk is alone."""
    group: list[str] = []
    length = 0
    for text in texts:
        if group and length + len(text) > CHUNK:
            yield group
            group, length = [], 0
        group.append(text)
        length += len(text)
    if group:
        yield group


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

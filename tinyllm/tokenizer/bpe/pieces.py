"""Pieces of text as numbers: a piece of up to 16 bytes in two 64-bit keys, so that counting and looking up a
million of them is array work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pretokenize import joined_piece_starts

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

LONGEST_KEYED = 16

# A key is eight bytes of a piece, the first lowest. Where fewer are left, the rest is zero and the top byte tells
# their number as 0xF8 + number, since no byte of UTF-8 is above 0xF7. Without any left the key is zero.
_TAG = 0xF8
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype="<u8")
_TAGS = np.array([0, *((_TAG + n) << 56 for n in range(1, 8)), 0], dtype="<u8")


@dataclass(frozen=True)
class Pieces:
    """The pieces of a text: piece i is buffer[starts[i] : starts[i] + lengths[i]].

    The buffer has LONGEST_KEYED zero bytes behind the text; `data` is the same bytes, of which slices are made
    faster. `plain`: all of it is UTF-8 without NUL, so that its pieces have keys.
    """

    data: bytes
    buffer: Bytes
    starts: Integers
    lengths: Integers
    plain: bool

    @property
    def keyed(self) -> npt.NDArray[np.bool_]:
        """Which pieces have keys: those of at most 16 bytes, in which no key would look like another's."""
        keyed = self.lengths <= LONGEST_KEYED
        return keyed if self.plain else np.zeros_like(keyed)

    def keys(self) -> tuple[Keys, Keys]:
        """The two keys of every piece; meaningful where `keyed`."""
        words = np.ndarray((len(self.buffer) - 7,), "<u8", self.buffer, 0, (1,))
        first_lengths = np.minimum(self.lengths, 8)
        first = words[self.starts] & _MASKS[first_lengths] | _TAGS[first_lengths]
        second = np.zeros_like(first)
        long = np.flatnonzero((self.lengths > 8) & (self.lengths <= LONGEST_KEYED))
        left = self.lengths[long] - 8
        second[long] = words[self.starts[long] + 8] & _MASKS[left] | _TAGS[left]
        return first, second

    def bytes_of(self, indices: Integers) -> list[bytes]:
        """The pieces of these indices."""
        starts, ends = self.starts[indices], self.starts[indices] + self.lengths[indices]
        return [self.data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def key_lengths(first: Keys, second: Keys) -> Integers:
    """How many bytes each pair of keys stands for."""

    def of(keys: Keys) -> Integers:
        top = (keys >> np.uint64(56)).astype(np.int64)
        return np.where(top > _TAG, top - _TAG, 8)

    return np.where(second == 0, of(first), 8 + of(second))


def split_texts(texts: Sequence[str], pattern: Pattern) -> Pieces:
    """The pieces, in UTF-8, of texts each split on its own; at least one of them is not empty."""
    text, starts, are_pieces = joined_piece_starts(texts, pattern)
    data = text.encode("utf-8", "surrogatepass") + bytes(LONGEST_KEYED)
    buffer = np.frombuffer(data, dtype=np.uint8)
    num_bytes = len(data) - LONGEST_KEYED
    if num_bytes != len(text):
        starts = np.flatnonzero((buffer[:num_bytes] & 0xC0) != 0x80)[starts]
    lengths = np.diff(starts, append=num_bytes)
    if len(texts) > 1:
        starts, lengths = starts[are_pieces], lengths[are_pieces]
    return Pieces(data, buffer, starts, lengths, plain="\0" not in text)


def key_bytes(first: Keys, second: Keys) -> Bytes:
    """(n, 16) the bytes that pairs of keys stand for; what lies behind the length of a piece is no part of it."""
    return np.stack([first, second], axis=1).astype("<u8").view(np.uint8)


class PieceTable:
    """From the keys of pieces to where their tokens lie in a pool: a hash table in an array.

    Open addressing with linear probing, at most half full. Readers need no lock: what a slot holds is written
    before the key that makes it found. Writers need one among themselves.
    """

    def __init__(self, capacity: int = 1 << 14) -> None:
        """`capacity`: the number of slots, a power of two."""
        self.capacity = capacity
        self.size = 0
        self._shift = np.uint64(64 - (capacity.bit_length() - 1))
        # first key, second key, place, count: beside each other, so that a look-up is one access to memory.
        self._slots = np.zeros((capacity, 4), dtype=np.uint64)

    def _home(self, first: Keys, second: Keys) -> Integers:
        # Multiplicative hashing (Knuth, volume 3, section 6.4) by odd constants near 2^64 over the golden ratio.
        mixed = (first ^ (second * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> self._shift).astype(np.int64)

    def find(self, first: Keys, second: Keys) -> tuple[Integers, Integers]:
        """(place, count) of the tokens of each piece; count is 0 where the table does not have it."""
        at = self._home(first, second)
        slots = self._slots[at]
        # As signed numbers, which need no conversion.
        places, counts = slots.view(np.int64)[:, 2:].T
        rest = np.flatnonzero((slots[:, 0] != first) | (slots[:, 1] != second))
        counts[rest] = 0
        collided = slots[rest, 0] != 0
        rest, at = rest[collided], at[rest[collided]]
        while rest.size:
            at = (at + 1) & (self.capacity - 1)
            slots = self._slots[at]
            same = (slots[:, 0] == first[rest]) & (slots[:, 1] == second[rest])
            places[rest[same]], counts[rest[same]] = slots[same, 2], slots[same, 3]
            go_on = ~same & (slots[:, 0] != 0)
            rest, at = rest[go_on], at[go_on]
        return places, counts

    def insert(self, first: Keys, second: Keys, places: Integers, counts: Integers) -> None:
        """Add pieces that are not in the table, each once; at most half of the capacity in all."""
        self.size += len(first)
        at = self._home(first, second)
        while first.size:
            free = np.flatnonzero(self._slots[at, 0] == 0)
            # Of several that want one slot, the first takes it.
            _, winners = np.unique(at[free], return_index=True)
            won = free[winners]
            self._slots[at[won], 1], self._slots[at[won], 2] = second[won], places[won]
            self._slots[at[won], 3] = counts[won]
            self._slots[at[won], 0] = first[won]
            left = np.ones(len(first), dtype=np.bool_)
            left[won] = False
            first, second, places, counts = first[left], second[left], places[left], counts[left]
            at = (at[left] + 1) & (self.capacity - 1)

    def grown(self, factor: int) -> PieceTable:
        """A table with the same content and `factor` times the slots."""
        table = PieceTable(self.capacity * factor)
        first, second, places, counts = self._slots[self._slots[:, 0] != 0].T
        table.insert(first, second, places.astype(np.int64), counts.astype(np.int64))
        return table

"""Pieces of text as numbers: a piece of up to 16 bytes in two 64-bit keys, so that counting and looking up a
million of them is array work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pretokenize import piece_starts

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

    The buffer has LONGEST_KEYED zero bytes behind the text. `plain`: all bytes of it are UTF-8, so it has keys.
    """

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

    def bytes_of(self, i: int) -> bytes:
        """Piece i."""
        start = int(self.starts[i])
        return self.buffer[start : start + int(self.lengths[i])].tobytes()


def key_lengths(first: Keys, second: Keys) -> Integers:
    """How many bytes each pair of keys stands for."""

    def of(keys: Keys) -> Integers:
        top = (keys >> np.uint64(56)).astype(np.int64)
        return np.where(top > _TAG, top - _TAG, 8)

    return np.where(second == 0, of(first), 8 + of(second))


def split_text(text: str, pattern: Pattern) -> Pieces:
    """The pieces of a text that is not empty, in UTF-8."""
    starts = piece_starts(text, pattern)
    data = text.encode()
    buffer = np.frombuffer(data + bytes(LONGEST_KEYED), dtype=np.uint8)
    if len(data) != len(text):
        starts = np.flatnonzero((buffer[: len(data)] & 0xC0) != 0x80)[starts]
    lengths = np.diff(starts, append=len(data))
    # NUL is a byte like others, but eight of them would be the empty key.
    return Pieces(buffer, starts, lengths, plain="\0" not in text)


class PieceTable:
    """From the keys of pieces to where their tokens lie in a pool: a hash table in arrays.

    Open addressing with linear probing, at most half full. Readers need no lock: what a slot holds is written
    before the key that makes it found. Writers need one among themselves.
    """

    def __init__(self, capacity: int = 1 << 14) -> None:
        """`capacity`: the number of slots, a power of two."""
        self._capacity = capacity
        self._shift = np.uint64(64 - (capacity.bit_length() - 1))
        self._first = np.zeros(capacity, dtype=np.uint64)
        self._second = np.zeros(capacity, dtype=np.uint64)
        self._place = np.zeros(capacity, dtype=np.int32)
        self._count = np.zeros(capacity, dtype=np.int32)
        self.size = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    def _home(self, first: Keys, second: Keys) -> Integers:
        # Multiplicative hashing (Knuth, volume 3, section 6.4) by odd constants near 2^64 over the golden ratio.
        mixed = (first ^ (second * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> self._shift).astype(np.int64)

    def find(self, first: Keys, second: Keys) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(place, count) of the tokens of each piece; count is 0 where the table does not have it."""
        slots = self._home(first, second)
        known = (self._first[slots] == first) & (self._second[slots] == second)
        place, count = self._place[slots], self._count[slots]
        count[~known] = 0
        rest = np.flatnonzero(~known)
        slots = slots[rest]
        while rest.size:
            collided = self._first[slots] != 0
            rest, slots = rest[collided], (slots[collided] + 1) & (self._capacity - 1)
            known = (self._first[slots] == first[rest]) & (self._second[slots] == second[rest])
            place[rest[known]] = self._place[slots[known]]
            count[rest[known]] = self._count[slots[known]]
            rest, slots = rest[~known], slots[~known]
        return place, count

    def insert(
        self, first: Keys, second: Keys, place: npt.NDArray[np.int32], count: npt.NDArray[np.int32]
    ) -> None:
        """Add pieces that are not in the table, each once; at most half of the capacity in all."""
        self.size += len(first)
        slots = self._home(first, second)
        while first.size:
            free = np.flatnonzero(self._first[slots] == 0)
            # Of several that want one slot, the first takes it.
            _, winners = np.unique(slots[free], return_index=True)
            won = free[winners]
            at = slots[won]
            self._place[at], self._count[at], self._second[at] = place[won], count[won], second[won]
            self._first[at] = first[won]
            left = np.ones(len(first), dtype=np.bool_)
            left[won] = False
            first, second, place, count = first[left], second[left], place[left], count[left]
            slots = (slots[left] + 1) & (self._capacity - 1)

    def grown(self, factor: int) -> PieceTable:
        """A table with the same content and `factor` times the slots."""
        table = PieceTable(self._capacity * factor)
        full = np.flatnonzero(self._first)
        table.insert(self._first[full], self._second[full], self._place[full], self._count[full])
        return table

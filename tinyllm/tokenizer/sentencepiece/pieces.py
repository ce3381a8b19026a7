"""The pieces of a SentencePiece vocabulary: their kinds, what they stand for, and joining text to them by score."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown

SPACE = "\u2581"  # stands for a space in pieces
UNKNOWN_SURFACE = " \u2047 "

S = TypeVar("S", str, bytes)

BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")


class Kind(IntEnum):
    """What a piece is, numbered as in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """An entry of the vocabulary; its id is its place. Of two merges, the one to the higher score goes first."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.NORMAL


def joined(text: S, priority: Callable[[S, S], float | None]) -> list[S]:
    """The parts of `text` when neighbours are joined, from single characters or bytes on, in O(n log n).

    Those of the least priority go first, the leftmost of them, until no two have one that is not None.
    """
    n = len(text)
    # The part that begins at i ends at ends[i], where the next one begins; 0: none begins at i any more.
    ends, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap: list[tuple[float, int, int, int]] = []

    def add(left: int, middle: int, end: int) -> None:
        found = priority(text[left:middle], text[middle:end])
        if found is not None:
            heapq.heappush(heap, (found, left, middle, end))

    for i in range(n - 1):
        add(i, i + 1, i + 2)
    while heap:
        _, left, middle, end = heapq.heappop(heap)
        # Out of date when one of the two has been joined to something else since.
        if ends[left] != middle or ends[middle] != end:
            continue
        ends[left], ends[middle] = end, 0
        if end < n:
            before[end] = left
            add(left, end, ends[end])
        if before[left] >= 0:
            add(before[left], left, end)
    return [text[start:end] for start, end in enumerate(ends) if end]


def check(pieces: Sequence[Piece], needs_unknown: bool = True) -> list[int]:
    """The id of each byte.

    Raises:
        InputError: the pieces are no vocabulary: empty, twice, without a score, or without all bytes.
    """
    byte_ids: dict[int, int] = {}
    seen: dict[str, int] = {}
    unknown = 0
    for id, (text, score, kind) in enumerate(pieces):
        if not text or text in seen or not math.isfinite(score):
            came = f"is that of piece {seen[text]} too" if text in seen else f"has the score {score}"
            raise InputError(
                f"piece {id}, {shown(text)}, {came if text else 'is empty'}; is the file damaged?"
            )
        seen[text] = id
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"piece {id}, {shown(text)}, holds half of a UTF-16 pair")
        if kind == Kind.UNUSED:
            raise InputError(f"piece {id}, {shown(text)}, is an unused one; those are not supported")
        unknown += kind == Kind.UNKNOWN
        byte = BYTE_NAME.fullmatch(text)
        if kind == Kind.BYTE and byte is None:
            raise InputError(f"piece {id}, {shown(text)}, must be a byte, such as '<0x0A>'")
        if kind == Kind.BYTE and byte is not None:
            byte_ids[int(byte[1], 16)] = id
    if len(byte_ids) < 256 or (unknown != 1 and (needs_unknown or unknown)):
        raise InputError(
            f"the {len(pieces)} pieces have {len(byte_ids)} of the 256 bytes and {unknown} unknown pieces; all "
            "bytes and one unknown piece are needed: train with byte_fallback"
        )
    return [byte_ids[byte] for byte in range(256)]


def surface(piece: Piece, unknown: str) -> bytes:
    """What a piece is decoded to."""
    if piece.kind == Kind.BYTE:
        return bytes([int(piece.text[3:5], 16)])
    if piece.kind == Kind.CONTROL:
        return b""
    return (unknown if piece.kind == Kind.UNKNOWN else piece.text.replace(SPACE, " ")).encode()

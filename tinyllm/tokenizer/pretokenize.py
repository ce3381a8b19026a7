"""Splitting text into pieces as array work: the same pieces as the regular expression, many times faster.

Each code point gets its class from a table. A piece mostly begins where the class changes; what the
expressions do besides (a space joins the word after it, three digits at a time, contractions) is put right
afterwards at the few places concerned. `cut` is a boolean array (n,): whether a piece begins at a character.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.tokenizer.patterns import (
    END,
    END_CHARACTER,
    LETTER,
    LOWER,
    MARK,
    NEWLINE,
    NUMBER,
    SPACE,
    UPPER,
    Pattern,
    code_point_classes,
)

Codes = npt.NDArray[np.uint32]
Cut = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]
Splitter = Callable[[str, Codes, Pattern], Cut]

# The classes a piece is made of. A mark counts as a letter for o200k alone.
_OTHER, _WORD, _NUMBER, _SPACE, _END = range(5)

# Characters worked on at a time: more falls out of the cache, fewer leaves NumPy's calls to be paid.
CHUNK = 1 << 18


def code_points(text: str) -> Codes:
    """(len(text),) the code points of `text`.

    Raises:
        InputError: the text holds half of a UTF-16 pair, which no bytes can stand for.
    """
    try:
        return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds U+{ord(text[error.start]):04X} at position {error.start}: half of a UTF-16 pair is "
            "no character; mend how the text was decoded, or encode its bytes"
        ) from None


def chunks(text: str, pattern: Pattern, size: int = CHUNK) -> Iterator[str]:
    """`text` in parts of about `size` characters that split on their own into the pieces of the whole.

    A part grows until it ends at a certain border (`safe_borders`). Of an expression without a name no border is
    known, so its text stays whole.
    """
    start = 0
    while start < len(text):
        end = len(text) if pattern.name is None else _safe_end(text, start, size)
        yield text[start:end]
        start = end


def _safe_end(text: str, start: int, size: int) -> int:
    """The end of the chunk from `start`: the last certain border in the window, or in ever larger ones."""
    begin, end = start, start + size
    while end < len(text):
        border = last_border(text[begin : end + 1])
        if border:
            return begin + border
        # What has been looked at has no border but perhaps where it meets the rest.
        begin, end = max(start, end - 1), end + (end - start)
    return len(text)


def last_border(text: str) -> int:
    """The last certain border in `text`; 0 if there is none."""
    for length in (1 << 10, len(text)):
        begin = max(0, len(text) - length)
        borders = safe_borders(code_point_classes()[code_points(text[begin:])])
        if borders.size:
            return begin + int(borders[-1])
    return 0


def safe_borders(classes: npt.NDArray[np.uint8]) -> Positions:
    """Where every named pattern ends a piece, whatever stands around.

    Between a letter or number and white space; between a line end that no white space stands before and a letter or
    number; and around an END.
    """
    before, here = classes[:-1], classes[1:]
    border = (before & (LETTER | NUMBER) != 0) & (here & SPACE != 0) | ((before | here) & END != 0)
    begins_line = (before & NEWLINE != 0) & (here & (LETTER | NUMBER) != 0)
    border[1:] |= begins_line[1:] & (classes[:-2] & SPACE == 0)
    return np.flatnonzero(border) + 1


def piece_starts(text: str, pattern: Pattern) -> Positions:
    """The position in `text`, in characters, where each piece begins; for a text that is not empty."""
    splitter = _SPLITTERS.get(pattern.name) if pattern.name else None
    if splitter is None:
        code_points(text)
        return np.array([start for start, _ in pattern.spans(text)], dtype=np.int64)
    return np.flatnonzero(splitter(text, code_points(text), pattern))


def joined_piece_starts(texts: Sequence[str], pattern: Pattern) -> tuple[str, Positions, Cut]:
    """Several texts joined by END_CHARACTER; where in that each piece of each text begins, and each run of joints;
    which of these are pieces.

    Raises:
        InputError: a text holds half of a UTF-16 pair.
    """
    text = END_CHARACTER.join(texts)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    if np.count_nonzero((codes >= 0xD800) & (codes <= 0xDFFF)) != len(texts) - 1:
        for one in texts:
            code_points(one)  # raises the error that says where
    splitter = _SPLITTERS.get(pattern.name) if pattern.name else None
    if splitter is not None:
        cut = splitter(text, codes, pattern)
    else:
        cut = codes == ord(END_CHARACTER)
        begin = 0
        for one in texts:
            cut[[begin + start for start, _ in pattern.spans(one)]] = True
            begin += len(one) + 1
    starts = np.flatnonzero(cut)
    return text, starts, codes[starts] != ord(END_CHARACTER)


def _cut_at_changes(kinds: npt.NDArray[np.uint8]) -> Cut:
    cut = np.empty(len(kinds), dtype=np.bool_)
    cut[0] = True
    np.not_equal(kinds[1:], kinds[:-1], out=cut[1:])
    return cut


def _kinds(flags: npt.NDArray[np.uint8], word: int) -> npt.NDArray[np.uint8]:
    """The class of piece that each character is in; `word`: the flags that count as a word."""
    of_flags = np.zeros(256, dtype=np.uint8)
    values = np.arange(256)
    of_flags[values & word != 0] = _WORD
    of_flags[values & NUMBER != 0] = _NUMBER
    of_flags[values & SPACE != 0] = _SPACE
    of_flags[values & END != 0] = _END
    return of_flags[flags]


def _contractions(codes: Codes, at: Positions, both_cases: bool) -> tuple[Positions, Positions]:
    """Those of the apostrophes `at` that begin 's 't 'm 'd 'll 've 're, and where each of these ends."""
    after = np.concatenate([codes, np.zeros(2, codes.dtype)])
    first, second = after[at + 1], after[at + 2]
    if both_cases:
        # U+017F, the long s, is an s to an expression that ignores case.
        first, second = (
            np.where(c < 128, c | 0x20, np.where(c == 0x17F, ord("s"), 0)) for c in (first, second)
        )
    one = np.isin(first, [ord(c) for c in "stmd"])
    e, ell = ord("e"), ord("l")
    two = (first == ell) & (second == ell) | ((first == ord("v")) | (first == ord("r"))) & (second == e)
    found = one | two
    return at[found], (at + np.where(one, 2, 3))[found]


def _split_contractions(cut: Cut, codes: Codes, both_cases: bool) -> None:
    """An apostrophe that begins a piece and a contraction is a piece with it, whatever letter follows."""
    at = np.flatnonzero(codes == ord("'"))
    begins, ends = _contractions(codes, at[cut[at]], both_cases)
    cut[begins + 1] = False
    cut[ends[ends < len(cut)]] = True


def _gpt2(text: str, codes: Codes, pattern: Pattern) -> Cut:
    kinds = _kinds(code_point_classes()[codes], LETTER)
    cut = _cut_at_changes(kinds)
    # \s+(?!\S) leaves the last white space of a run; a space joins what follows, others stand alone.
    after = np.flatnonzero(cut[1:] & (kinds[:-1] == _SPACE) & (kinds[1:] != _END)) + 1
    cut[after - 1] = True
    cut[after[codes[after - 1] == ord(" ")]] = False
    _split_contractions(cut, codes, both_cases=False)
    return cut


def _split_numbers(cut: Cut, kinds: npt.NDArray[np.uint8], most: int = 3) -> None:
    """\\p{N}{1,3}: a run of numbers is cut after every third, or after every `most`."""
    numbers = np.flatnonzero(kinds == _NUMBER)
    if not numbers.size:
        return
    run_starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    run_lengths = np.diff(run_starts, append=numbers.size)
    place_in_run = np.arange(numbers.size) - np.repeat(run_starts, run_lengths)
    cut[numbers[place_in_run % most == 0]] = True


def _split_spaces(
    cut: Cut, codes: Codes, flags: npt.NDArray[np.uint8], kinds: npt.NDArray[np.uint8], end_whole: bool
) -> None:
    """White space in the patterns since cl100k; `end_whole`: at the end of the text it is one piece.

    A run of it is cut after its last line end (`\\s*[\\r\\n]+`). Line ends at its beginning belong to the
    punctuation before them (`[^\\s\\p{L}\\p{N}]+[\\r\\n]*`). Its last character, unless a line end, joins a word
    after it; a space joins punctuation too.
    """
    n = len(cut)
    run_ends = np.append(np.flatnonzero(cut[1:] & (kinds[:-1] == _SPACE)) + 1, n)
    newline = flags & NEWLINE != 0
    begins = np.flatnonzero(newline & ~np.concatenate([[False], newline[:-1]]))
    ends = np.flatnonzero(newline & ~np.concatenate([newline[1:], [False]])) + 1
    run = np.searchsorted(run_ends, ends)  # the run of white space that these line ends are in
    last_in_run = np.append(run[1:] != run[:-1], True) if run.size else np.zeros(0, dtype=np.bool_)
    at_end = np.append(kinds[run_ends[:-1]] == _END, True)
    if end_whole:
        last_in_run &= ~at_end[run]
    joined = (begins > 0) & (kinds[begins - 1] == _OTHER)
    cut[begins[joined]] = False
    to_cut = ends[joined | last_in_run]
    cut[to_cut[to_cut < n]] = True

    after = run_ends[~at_end]
    after = after[~newline[after - 1]]
    cut[after - 1] = True
    joins = (kinds[after] == _WORD) | (kinds[after] == _OTHER) & (codes[after - 1] == ord(" "))
    cut[after[joins]] = False


def _join_prefix(cut: Cut, kinds: npt.NDArray[np.uint8]) -> None:
    """`[^\\r\\n\\p{L}\\p{N}]?\\p{L}+`: one other character that begins a piece joins the word after it."""
    words = np.flatnonzero(cut[1:] & cut[:-1] & (kinds[1:] == _WORD) & (kinds[:-1] == _OTHER)) + 1
    cut[words] = False


def _cl100k(text: str, codes: Codes, pattern: Pattern) -> Cut:
    """llama3; gpt4, which differs in white space at the end of the text, and qwen2, which does in numbers."""
    flags = code_point_classes()[codes]
    kinds = _kinds(flags, LETTER)
    cut = _cut_at_changes(kinds)
    _split_numbers(cut, kinds, most=1 if pattern.name == "qwen2" else 3)
    _split_spaces(cut, codes, flags, kinds, end_whole=pattern.name == "gpt4")
    _join_prefix(cut, kinds)
    _split_contractions(cut, codes, both_cases=True)
    return cut


def _o200k(text: str, codes: Codes, pattern: Pattern) -> Cut:
    """As cl100k, but marks are part of words, words end before a capital, and contractions join the word.

    Where the expression depends on more than neighbours, it is asked itself, between two certain borders.
    """
    flags = code_point_classes()[codes]
    kinds = _kinds(flags, LETTER | MARK)
    cut = _cut_at_changes(kinds)
    _split_numbers(cut, kinds)
    _split_spaces(cut, codes, flags, kinds, end_whole=False)
    _join_prefix(cut, kinds)

    before, here = flags[:-1], flags[1:]
    cut[1:] |= (here & UPPER != 0) & (before & LOWER != 0)
    # A capital after a letter without case or a mark: it depends on what comes later in the word.
    caseless = (before & (LETTER | MARK) != 0) & (before & (UPPER | LOWER) == 0)
    doubtful = [np.flatnonzero((here & UPPER != 0) & caseless) + 1]
    # Marks right after punctuation of which they may be a part.
    doubtful.append(np.flatnonzero((here & MARK != 0) & (kinds[:-1] == _OTHER) & ~cut[:-1]) + 1)
    # [\r\n/]*: a slash after a line end after punctuation.
    doubtful.append(np.flatnonzero((codes[1:] == ord("/")) & (before & NEWLINE != 0)) + 1)

    at = np.flatnonzero(codes == ord("'"))
    at = at[(at > 0) & (kinds[at - 1] == _WORD)]
    begins, ends = _contractions(codes, at, both_cases=True)
    cut[begins] = cut[begins + 1] = cut[ends - 1] = False
    cut[ends[ends < len(cut)]] = True
    doubtful.append(begins[1:][begins[1:] == ends[:-1]])
    _ask_expression(cut, text, flags, np.concatenate(doubtful), pattern)
    return cut


def _ask_expression(
    cut: Cut, text: str, flags: npt.NDArray[np.uint8], doubtful: Positions, pattern: Pattern
) -> None:
    """Let the expression itself cut what lies around the `doubtful` positions, between certain borders."""
    if not doubtful.size:
        return
    borders = np.concatenate([[0], safe_borders(flags), [len(text)]])
    zones: Any = np.unique(np.searchsorted(borders, doubtful, side="right"))
    for zone in zones.tolist():
        start, end = int(borders[zone - 1]), int(borders[zone])
        cut[start:end] = False
        cut[[start + begin for begin, _ in pattern.spans(text[start:end])]] = True


_SPLITTERS: dict[str, Splitter] = {
    "gpt2": _gpt2,
    "gpt4": _cl100k,
    "llama3": _cl100k,
    "qwen2": _cl100k,
    "o200k": _o200k,
}

"""What a tokenizer makes of a text: how long its tokens are, in which script, and which of them it never uses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import regex

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from tinyllm.tokenizer.base import TokenArray
from tinyllm.tokenizer.patterns import PATTERNS

# Scripts of living languages, by their names in Unicode; the others are counted together.
_SCRIPTS = (
    "Latin Han Cyrillic Arabic Devanagari Bengali Hiragana Katakana Hangul Thai Greek Hebrew Tamil Telugu Kannada "
    "Malayalam Gujarati Gurmukhi Oriya Sinhala Myanmar Khmer Lao Tibetan Mongolian Georgian Armenian Ethiopic "
    "Bopomofo Cherokee Canadian_Aboriginal Syriac Thaana Nko Tifinagh Yi Javanese Balinese Sundanese Braille"
)
# What all scripts share is told apart by what it is; the first that fits counts.
_GROUPS = {
    **{name.replace("_", " "): rf"\p{{Script={name}}}" for name in _SCRIPTS.split()},
    "combining marks": r"\p{Script=Inherited}",
    "white space": r"\s",
    "digits": r"\p{Nd}",
    "punctuation": r"\p{P}",
    "symbols": r"\p{Script=Common}",
    "other scripts": r"[\s\S]",
}
_NAMES = tuple(_GROUPS)

# Tokens whose bytes are looked at together.
_TOKENS_TOGETHER = 1 << 20


@dataclass(frozen=True)
class Description:
    """What a tokenizer is, without any text."""

    kind: str
    vocab_size: int
    merges: int
    pattern: str | None  # a name in PATTERNS, or the expression; None where text is not split into pieces
    special_tokens: dict[str, int]


@dataclass(frozen=True)
class ScriptShare:
    """The characters of one script in a text.

    A token of several characters counts for each of them by its share of the bytes, so that the tokens of all scripts
    add up to those of the text.
    """

    name: str
    characters: int
    bytes: int
    tokens: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 for each token."""
        return self.bytes / self.tokens

    @property
    def tokens_per_character(self) -> float:
        """Tokens for each character."""
        return self.tokens / self.characters


@dataclass(frozen=True)
class TextStatistics:
    """Counts over a text that is not empty.

    Attributes:
        words: strings between white space.
        scripts: what there is in the text, most characters first; empty where the bytes of the tokens are not those
            of the text, as with tokenizers that normalise.
        counts: (vocab_size,) how often each token is used.
    """

    tokens: int
    characters: int
    bytes: int
    words: int
    scripts: tuple[ScriptShare, ...]
    counts: npt.NDArray[np.int64]

    @property
    def characters_per_token(self) -> float:
        """Characters for each token."""
        return self.characters / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 for each token."""
        return self.bytes / self.tokens

    @property
    def fertility(self) -> float:
        """Tokens per word; infinite for a text that is all white space."""
        return self.tokens / self.words if self.words else float("inf")

    @property
    def used(self) -> list[int]:
        """The ids of the tokens that the text uses."""
        ids: list[int] = np.flatnonzero(self.counts).tolist()
        return ids


def describe(tokenizer: Tokenizer) -> Description:
    """The kind and the parts of a tokenizer."""
    if not isinstance(tokenizer, BPETokenizer):
        kind = "characters" if isinstance(tokenizer, CharTokenizer) else type(tokenizer).__name__
        return Description(kind, tokenizer.vocab_size, 0, None, tokenizer.special_tokens)
    named = {expression: name for name, expression in PATTERNS.items()}
    pattern = named.get(tokenizer.pattern, tokenizer.pattern)
    kind = "byte-pair encoding" if tokenizer.merges else "bytes"
    return Description(
        kind, tokenizer.vocab_size, len(tokenizer.merges), pattern, dict(tokenizer.special_tokens)
    )


def token_strings(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id; empty for an id without a token."""
    strings = []
    for id in range(tokenizer.vocab_size):
        try:
            strings.append(tokenizer.token_bytes(id))
        except InputError:  # vocabularies made elsewhere may leave ids out
            strings.append(b"")
    return strings


def longest_first(strings: list[bytes], ids: list[int]) -> list[int]:
    """`ids` by the length of their tokens in characters, the longest first, and by id where equal."""
    return sorted(ids, key=lambda id: (-len(strings[id].decode("utf-8", "replace")), id))


def statistics(tokenizer: Tokenizer, text: str, ids: TokenArray | None = None) -> TextStatistics:
    """Count what `tokenizer` makes of `text`.

    Args:
        ids: tokenizer.encode_document(text), where the caller has it already.

    Raises:
        InputError: the text is empty, or the vocabulary cannot express it.
    """
    if not text:
        raise InputError("no text to count tokens in; give a text that is not empty")
    if ids is None:
        ids = tokenizer.encode_document(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    distinct = np.flatnonzero(np.bincount(codes)).tolist()
    group_of_code = np.zeros(distinct[-1] + 1, dtype=np.int8)
    is_space = np.zeros(distinct[-1] + 1, dtype=bool)
    for code in distinct:
        group_of_code[code] = _group(chr(code))
        is_space[code] = chr(code).isspace()
    inside_word = ~is_space[codes]
    words = int(inside_word[0]) + int(np.count_nonzero(inside_word[1:] & ~inside_word[:-1]))
    groups = group_of_code[codes]
    num_bytes = 1 + (codes > 0x7F).astype(np.int8) + (codes > 0x7FF) + (codes > 0xFFFF)
    sizes = np.array([len(string) for string in token_strings(tokenizer)], dtype=np.int64)
    total = int(num_bytes.sum(dtype=np.int64))
    exact = int(sizes[ids].sum()) == total
    scripts = _shares(sizes, ids, groups, num_bytes) if exact else []
    return TextStatistics(
        tokens=len(ids),
        characters=len(text),
        bytes=total,
        words=words,
        scripts=tuple(sorted(scripts, key=lambda script: -script.characters)),
        counts=np.bincount(ids, minlength=tokenizer.vocab_size),
    )


def segments(tokenizer: Tokenizer, ids: TokenArray, characters: int) -> Iterator[str]:
    """What each token adds to the text, up to and with the one that reaches so many characters.

    Tokens that end inside a character are joined with those that end it, and tokens without text with the next.
    """
    shown = 0
    for segment in filter(None, tokenizer.decode_stream(ids.tolist())):
        if shown >= characters:
            return
        yield segment
        shown += len(segment)


def _shares(
    sizes: npt.NDArray[np.int64],
    ids: TokenArray,
    groups: npt.NDArray[np.int8],
    num_bytes: npt.NDArray[np.int8],
) -> list[ScriptShare]:
    """The scripts of the characters, each given by the number of its group and its bytes; `sizes` of every token."""
    group_of_byte = np.repeat(groups, num_bytes)
    tokens = np.zeros(len(_NAMES))
    start = 0
    for first in range(0, len(ids), _TOKENS_TOGETHER):
        size = sizes[ids[first : first + _TOKENS_TOGETHER]]
        end = start + int(size.sum())
        tokens += np.bincount(group_of_byte[start:end], np.repeat(1 / size, size), len(_NAMES))
        start = end
    characters = np.bincount(groups, minlength=len(_NAMES))
    num_bytes_of = np.bincount(group_of_byte, minlength=len(_NAMES))
    return [
        ScriptShare(_NAMES[i], int(characters[i]), int(num_bytes_of[i]), float(tokens[i]))
        for i in np.flatnonzero(characters).tolist()
    ]


@functools.cache
def _group_expressions() -> tuple[regex.Pattern[str], ...]:
    return tuple(regex.compile(expression) for expression in _GROUPS.values())


def _group(character: str) -> int:
    """Where in _NAMES the script of a character stands."""
    return next(i for i, expression in enumerate(_group_expressions()) if expression.match(character))

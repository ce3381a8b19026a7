"""Texts as they come, strings or files, in parts to be worked on, in memory that does not grow with their length."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator

import regex

from tinyllm.system.errors import InputError
from tinyllm.system.text_files import blocks, find_text_files
from tinyllm.system.wording import shown
from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pretokenize import CHUNK, chunks, code_points, last_border

# Characters that are worked on at once in a stream.
PART = 1 << 16


def lists_of_parts(
    texts: Iterable[str | os.PathLike[str]], pattern: Pattern, special_tokens: Collection[str]
) -> Iterator[list[str]]:
    """The parts of all texts in lists that are about a chunk together: many short ones cost no more than a few long.

    A part splits on its own into the pieces of its text; special tokens are left out.
    """
    held: list[str] = []
    length = 0
    for part in _parts(texts, pattern, special_tokens):
        held.append(part)
        length += len(part) + 1
        if length >= CHUNK // 2:
            yield held
            held, length = [], 0
    if held:
        yield held


def _parts(
    texts: Iterable[str | os.PathLike[str]], pattern: Pattern, special_tokens: Collection[str]
) -> Iterator[str]:
    """The texts in chunks that split on their own, without the special tokens and what is empty."""
    special = special_regex(special_tokens)
    for text in texts:
        if isinstance(text, str):
            if not text.isascii():
                code_points(text)  # here an error can still say where in the text it is
            sources: Iterable[Iterable[str]] = [[text]]
        elif isinstance(text, os.PathLike):
            sources = (blocks(file) for file in find_text_files(text))
        else:
            raise InputError(
                f"texts holds {shown(text)}, a {type(text).__name__}; a text is a str, a file or folder a Path"
            )
        for source in sources:
            for part in joined_at_borders(source, pattern, special_tokens):
                yield from _chunks_between(part, pattern, special)


def _chunks_between(text: str, pattern: Pattern, special: regex.Pattern[str] | None) -> Iterator[str]:
    for part in special.split(text) if special is not None else [text]:
        if part:
            yield from chunks(part, pattern)


def joined_at_borders(
    parts: Iterable[str], pattern: Pattern, special_tokens: Collection[str], size: int = PART
) -> Iterator[str]:
    """The same text in parts of at least `size` characters, but for the last, that end at certain borders.

    No special token is cut in two. Of an expression without a name no border is known: all of the text is one part.
    """
    # A special token that begins before a border is complete if so many characters follow.
    margin = max(map(len, special_tokens), default=0)
    special = special_regex(special_tokens)
    held: list[str] = []
    length, wanted = 0, size
    for part in parts:
        held.append(part)
        length += len(part)
        if length < wanted:
            continue
        text = "".join(held)
        end = _certain_end(text, margin, pattern, special)
        if end:
            yield text[:end]
        held, length = [text[end:]], len(text) - end
        # What had no border is looked at again when it is twice as long.
        wanted = max(size, 2 * length)
    yield "".join(held)


def _certain_end(text: str, margin: int, pattern: Pattern, special: regex.Pattern[str] | None) -> int:
    if pattern.name is None or len(text) <= margin:
        return 0
    end = last_border(text[: len(text) - margin])
    if special is not None:
        for match in special.finditer(text):
            if match.start() < end < match.end():
                return match.start()
    return end


def special_regex(tokens: Iterable[str]) -> regex.Pattern[str] | None:
    """An expression for any of the tokens, the longest first; None without tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first))) if longest_first else None

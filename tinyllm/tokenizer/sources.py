"""Texts as they come, strings or files, in parts to be worked on, in memory that does not grow with their length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import regex

from tinyllm.config import shown
from tinyllm.errors import InputError
from tinyllm.files import blocks, text_files
from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pretokenize import CHUNK, chunks, last_border


def lists_of_parts(
    texts: Iterable[str | os.PathLike[str]], pattern: Pattern, special: regex.Pattern[str] | None
) -> Iterator[list[str]]:
    """The parts of all texts in lists that are about a chunk together: many short ones cost no more than a few long.

    A part splits on its own into the pieces of its text; what matches `special` is left out.
    """
    held: list[str] = []
    length = 0
    for part in _parts(texts, pattern, special):
        held.append(part)
        length += len(part) + 1
        if length >= CHUNK // 2:
            yield held
            held, length = [], 0
    if held:
        yield held


def _parts(
    texts: Iterable[str | os.PathLike[str]], pattern: Pattern, special: regex.Pattern[str] | None
) -> Iterator[str]:
    """The texts in chunks that split on their own, without the special tokens and what is empty."""
    for text in texts:
        if isinstance(text, str):
            sources: Iterable[Iterable[str]] = [[text]]
        elif isinstance(text, os.PathLike):
            sources = (blocks(file) for file in text_files(text))
        else:
            raise InputError(
                f"texts holds {shown(text)}, a {type(text).__name__}; a text is a str, a file or folder a Path"
            )
        for source in sources:
            pending = ""
            for block in source:
                pending += block
                # Of a block, all up to the last certain border; the rest belongs with the next one.
                end = last_border(pending) if pattern.name is not None else 0
                yield from _chunks_between(pending[:end], pattern, special)
                pending = pending[end:]
            yield from _chunks_between(pending, pattern, special)


def _chunks_between(text: str, pattern: Pattern, special: regex.Pattern[str] | None) -> Iterator[str]:
    for part in special.split(text) if special is not None else [text]:
        if part:
            yield from chunks(part, pattern)


def joined(texts: Iterable[str], size: int) -> Iterator[str]:
    """The same text in parts of at least `size` characters, but for the last."""
    held: list[str] = []
    length = 0
    for text in texts:
        held.append(text)
        length += len(text)
        if length >= size:
            yield "".join(held)
            held, length = [], 0
    yield "".join(held)

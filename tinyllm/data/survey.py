"""A first look at all documents: which come a second time, and a sample of them to learn a vocabulary from."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.documents import Reading, documents_of
from tinyllm.system.text_files import looks_like_a_path
from tinyllm.tokenizer import BPETokenizer, VocabularyWarning

SEPARATOR = "<|endoftext|>"
"""The special token that stands before each document."""

MOST_SAMPLED = 100_000_000
"""Bytes of text that a vocabulary is learned from; more hardly changes it."""


def digest_of(content: bytes) -> bytes:
    """The 16 bytes by which a text is known: BLAKE2b (Aumasson et al., 2013) of its UTF-8."""
    return hashlib.blake2b(content, digest_size=16).digest()


def is_validation(digest: bytes, fraction: float) -> bool:
    """Whether a text is for validation: its digest's first half, as a fraction of 2^64, is below `fraction`."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


@dataclass(frozen=True)
class Survey:
    """What a first look has found.

    duplicates: the numbers, in order of reading, of documents that are the same as one before. sample: in UTF-8.
    documents: how many there are, parts of a long one counted each.
    """

    duplicates: frozenset[int]
    sample: list[bytes]
    documents: int = 0


class _Sample:
    """The texts whose hash is below a limit that falls as they become too many: whatever order they come in."""

    def __init__(self) -> None:
        self._held: list[tuple[int, bytes]] = []
        self._size = 0
        self._limit = 1 << 64

    def add(self, digest: bytes, content: bytes) -> None:
        # The other half of the digest than the one that decides of validation.
        number = int.from_bytes(digest[8:], "big")
        if number >= self._limit:
            return
        self._held.append((number, content))
        self._size += len(content)
        while self._size > MOST_SAMPLED:
            self._limit = self._limit * 9 // 10
            self._held = [held for held in self._held if held[0] < self._limit]
            self._size = sum(len(content) for _, content in self._held)

    def texts(self) -> list[bytes]:
        return [content for _, content in self._held]


def survey(
    files: Sequence[Path],
    reading: Reading,
    drop_duplicates: bool,
    sampled: bool,
    validation_fraction: float,
    on_read: Callable[[int], None],
) -> Survey:
    """Read all documents; takes about 100 bytes for each where duplicates are dropped, and MOST_SAMPLED for a sample.

    The sample holds nothing that is for validation, and parts of a long document each on its own. Raises what
    documents_of does.
    """
    seen: set[bytes] = set()
    duplicates: set[int] = set()
    sample = _Sample()
    number, documents = -1, 0
    whole = hashlib.blake2b(digest_size=16)

    def end_document() -> None:
        if number < 0:
            return
        digest = whole.digest()
        if digest in seen:
            duplicates.add(number)
        seen.add(digest)

    for file in files:
        for document in documents_of(file, reading, on_read):
            content = document.text.encode()
            documents += 1
            if drop_duplicates:
                if document.begins:
                    end_document()
                    number += 1
                    whole = hashlib.blake2b(digest_size=16)
                whole.update(content)
            if sampled:
                digest = digest_of(content)
                if not is_validation(digest, validation_fraction):
                    sample.add(digest, content)
    end_document()
    return Survey(frozenset(duplicates), sample.texts(), documents)


def learn_tokenizer(
    sample: Sequence[bytes], vocab_size: int, workers: int, say: Callable[[str], None]
) -> BPETokenizer:
    """Byte-pair encoding with SEPARATOR, of `sample`; raises InputError for a size that is too small."""

    def texts() -> Iterator[str]:
        for content in sample:
            text = content.decode()
            # A text such as README.md would be taken for a path that was meant.
            yield text + "\n" if looks_like_a_path(text) else text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VocabularyWarning)  # said below
        tokenizer = BPETokenizer.train(
            texts(), vocab_size, special_tokens=[SEPARATOR], workers=workers, progress=True
        )
    if tokenizer.vocab_size < vocab_size:
        say(
            f"{tokenizer.vocab_size:,} tokens in the vocabulary, not {vocab_size:,}: no pair of tokens is left that "
            "occurs twice"
        )
    return tokenizer

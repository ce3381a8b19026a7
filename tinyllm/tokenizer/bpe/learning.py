"""From texts to a vocabulary of byte-pair encoding: the arguments checked, pieces counted, merges learned."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Collection, Iterable
from contextlib import nullcontext

import numpy as np

from tinyllm.system.errors import InputError
from tinyllm.system.progress import Bar
from tinyllm.system.text_files import Newlines
from tinyllm.system.wording import shown
from tinyllm.tokenizer.base import texts_of
from tinyllm.tokenizer.bpe.sources import collection_of, lists_of_parts
from tinyllm.tokenizer.bpe.training import NUM_BYTES, count_pieces, learn_merges
from tinyllm.tokenizer.bpe.vocabulary import special_bytes
from tinyllm.tokenizer.oniguruma import require_same
from tinyllm.tokenizer.patterns import chosen_pattern


class VocabularyWarning(UserWarning):
    """The text has fewer pairs of tokens to join than were asked for."""


def require_count(name: str, value: int) -> None:
    """Raise InputError unless `value` is an integer from 1."""
    if not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}={shown(value)}; it must be an integer, at least 1")


def learned(
    texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    vocab_size: int,
    pattern: str,
    special_tokens: Collection[str],
    min_frequency: int,
    workers: int,
    progress: bool,
    newlines: Newlines,
) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]], dict[str, int]]:
    """The ids of tokens, the merges, and the ids of the special tokens, as BPETokenizer.train says."""
    if isinstance(texts, str | os.PathLike):
        texts = [texts]
    texts_of(texts, "a text is a str, a file or folder a Path")
    compiled = chosen_pattern(pattern)
    if compiled.name is None:
        require_same(compiled.expression)  # before any work, since what is learned could not be saved
    require_count("workers", workers)
    for name, value in (("vocab_size", vocab_size), ("min_frequency", min_frequency)):
        if not isinstance(value, int | np.integer):
            raise InputError(f"{name}={shown(value)}; it must be an integer")
    special_tokens = list(collection_of("special_tokens", special_tokens))
    least = NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        raise InputError(
            f"vocab_size={vocab_size}; it must be at least {least}: 256 bytes and {len(special_tokens)} "
            "special tokens"
        )
    if min_frequency < 1:
        raise InputError(f"min_frequency={min_frequency}; it must be at least 1")
    for token in special_tokens:
        special_bytes(token)
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise InputError(f"special tokens must be different and not empty, got {shown(special_tokens)}")
    parts = lists_of_parts(texts, compiled, special_tokens, newlines)
    first = next(parts, None)
    if first is None:
        raise InputError("no text to learn from: all of it is empty; give text")
    with Bar("counting", None, "characters") if progress else nullcontext(lambda _: None) as bar:
        counts = count_pieces(itertools.chain([first], parts), compiled, workers, bar)
    num_merges = vocab_size - least
    with Bar("merging", num_merges, "merges") if progress else nullcontext(lambda _: None) as bar:
        pairs = learn_merges(counts, num_merges, min_frequency, bar)
    tokens = [bytes([i]) for i in range(NUM_BYTES)]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [(tokens[left], tokens[right]) for left, right in pairs]
    if len(pairs) < num_merges:
        why = f"that occurs {min_frequency} times" if min_frequency > 1 else "to join"
        warnings.warn(
            f"{least + len(pairs):,} tokens, not {vocab_size:,}: no pair of tokens is left {why}; more text"
            f"{' or a lower min_frequency' * (min_frequency > 1)} gives more",
            VocabularyWarning,
            stacklevel=3,
        )
    return vocab, merges, {token: len(tokens) + i for i, token in enumerate(special_tokens)}

"""Checks of a vocabulary and its merges, before anything is built on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.added_tokens import AddedToken
from tinyllm.tokenizer.byte_level import to_characters

# Stands for the suffix of the tokens that end a piece: no byte of UTF-8.
END_BYTE = b"\xff"


def by_id(vocab: Mapping[bytes, int], added: Sequence[AddedToken]) -> list[bytes | None]:
    """The bytes of each id; None where no token has it.

    Raises:
        InputError: an id that is no number or far too large, two tokens with one id, an empty token.
    """
    named: list[tuple[object, bytes, int]] = [(token, token, id) for token, id in vocab.items()]
    written = {to_characters(token): id for token, id in vocab.items()} if added else {}
    for token in added:
        string = special_bytes(token.content)
        # One that is also in the vocabulary stands for what it does there.
        if token.content not in written or written[token.content] != token.id:
            named.append((token.content, string, token.id))
    # So few gaps that a wrong number cannot make us ask for more memory than the vocabulary deserves.
    limit = 2 * len(named) + (1 << 16)
    size = 0
    for shown_token, string, id in named:
        if type(id) is not int or not 0 <= id < limit:
            raise InputError(
                f"the id of the token {shown(shown_token)} is {shown(id)}; it must be an integer from 0, and below "
                f"{limit:,} for {len(named):,} tokens"
            )
        if not string:
            raise InputError(f"the token with id {id} is empty")
        size = max(size, id + 1)
    tokens: list[bytes | None] = [None] * size
    for shown_token, string, id in named:
        if tokens[id] is not None and tokens[id] != string:
            raise InputError(
                f"the id {id} is given to two tokens, {shown(tokens[id])} and {shown(shown_token)}"
            )
        tokens[id] = string
    return tokens


def special_bytes(token: str) -> bytes:
    """The UTF-8 of a special token.

    Raises:
        InputError: it is no text, or holds half of a UTF-16 pair.
    """
    if not isinstance(token, str):
        raise InputError(f"a special token must be a str, got {shown(token)}")
    try:
        return token.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the special token {shown(token)} holds half of a UTF-16 pair; take another"
        ) from None


def with_end_bytes(
    vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], suffix: bytes
) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """The ids and the merges with END_BYTE for the suffix of tokens that end a piece, which it then is the end of.

    Raises:
        InputError: a byte that may end a text is not in the vocabulary with the suffix.
    """

    def inside(token: bytes) -> bytes:
        return token.removesuffix(suffix) + END_BYTE if token.endswith(suffix) else token

    ids = {inside(token): id for token, id in vocab.items()}
    # The bytes with which no character begins that has others.
    lacking = [bytes([i]) for i in range(0xC0) if bytes([i]) + END_BYTE not in ids]
    if lacking or suffix in vocab:
        what = shown(lacking[0] + suffix) if lacking else f"another token than {shown(suffix)} alone"
        raise InputError(f"the vocabulary needs {what}, since {shown(suffix)} marks the ends of pieces")
    ends = [(bytes([i]), END_BYTE) for i in range(256) if bytes([i]) + END_BYTE in ids]
    return ids, [*ends, *((inside(left), inside(right)) for left, right in merges)]


class NumberedTokens(NamedTuple):
    """Tokens numbered for merging: the bytes first, so that a byte is its own symbol, then the others by id."""

    ids: list[int]
    lengths: list[int]
    pairs: list[tuple[int, int]]
    results: list[int]

    @classmethod
    def of(cls, vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], suffix: str) -> Self:
        """Those of a vocabulary and its merges.

        Args:
            suffix: what ends the tokens that end a piece; inside, END_BYTE.

        Raises:
            InputError: a byte that is missing, a merge of or to an unknown token.
        """
        every_byte = [bytes([i]) for i in range(256)]
        missing = [byte for byte in every_byte if byte not in vocab]
        if missing:
            raise InputError(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, such as {missing[0]!r}: it is not one of "
                "byte-level byte-pair encoding"
            )
        if suffix:
            vocab, merges = with_end_bytes(vocab, merges, special_bytes(suffix))
        longer = sorted((token for token in vocab if len(token) != 1), key=vocab.__getitem__)
        tokens = [*every_byte, *longer]
        number = {token: symbol for symbol, token in enumerate(tokens)}
        pairs, results = numbered(merges, number)
        return cls([vocab[token] for token in tokens], [len(token) for token in tokens], pairs, results)


def numbered(
    merges: Sequence[tuple[bytes, bytes]], number: Mapping[bytes, int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """The merges as (left, right) and result, by the numbers of their tokens.

    Raises:
        InputError: a token that has no number, or a merge that stands twice.
    """
    pairs: list[tuple[int, int]] = []
    results: list[int] = []
    seen: set[tuple[int, int]] = set()
    for rank, (left, right) in enumerate(merges):
        for token, what in ((left, "joins"), (right, "joins"), (left + right, "makes")):
            if token not in number:
                raise InputError(f"merge {rank} {what} {shown(token)}, which is not in the vocabulary")
        pair = (number[left], number[right])
        if pair in seen:
            raise InputError(f"merge {rank}, of {shown(left)} and {shown(right)}, stands twice")
        seen.add(pair)
        pairs.append(pair)
        results.append(number[left + right])
    return pairs, results

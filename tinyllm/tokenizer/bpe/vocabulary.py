"""Checks of a vocabulary and its merges, before anything is built on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown


def by_id(vocab: Mapping[bytes, int], special: Mapping[str, int]) -> list[bytes | None]:
    """The bytes of each id; None where no token has it.

    Raises:
        InputError: an id that is no number or far too large, two tokens with one id, an empty token.
    """
    named: list[tuple[object, bytes, int]] = [(token, token, id) for token, id in vocab.items()]
    for token, id in special.items():
        named.append((token, special_bytes(token), id))
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

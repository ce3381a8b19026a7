"""Byte-pair encoding as in the textbooks: short enough to read, slow, and what the fast one must equal.

Sennrich et al. (2016), algorithm 1, on bytes as in Radford et al. (2019). Tokens 0 to 255 are the bytes; merge
number r makes token 256 + r.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

Pair = tuple[int, int]


def merge(symbols: Sequence[int], pair: Pair, token: int) -> list[int]:
    """`symbols` with `token` for each occurrence of `pair`, taken from the left."""
    merged: list[int] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] = token
        else:
            merged.append(symbol)
    return merged


def train(pieces: Mapping[bytes, int], num_merges: int, min_frequency: int = 1) -> list[Pair]:
    """The merges learned from `pieces`, each with the number of times that it occurs.

    The most frequent pair of neighbours is merged first; among equally frequent ones the pair with the smaller left
    token, then the smaller right token.
    """
    words = [(list(piece), count) for piece, count in pieces.items()]
    merges: list[Pair] = []
    while len(merges) < num_merges:
        frequencies: Counter[Pair] = Counter()
        for symbols, count in words:
            for pair in zip(symbols, symbols[1:], strict=False):
                frequencies[pair] += count
        if not frequencies:
            break
        pair = min(frequencies, key=lambda pair: (-frequencies[pair], pair))
        if frequencies[pair] < min_frequency:
            break
        words = [(merge(symbols, pair, 256 + len(merges)), count) for symbols, count in words]
        merges.append(pair)
    return merges


def encode(piece: bytes, merges: Sequence[Pair]) -> list[int]:
    """The tokens of one piece: the earliest merge among the neighbours first, until none is left."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    symbols = list(piece)
    while pairs := [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]:
        pair = min(pairs, key=lambda pair: ranks[pair])
        symbols = merge(symbols, pair, 256 + ranks[pair])
    return symbols

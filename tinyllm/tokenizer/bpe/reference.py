"""Byte-pair encoding as in the textbooks: short enough to read, slow, and what the fast one must equal.

Sennrich et al. (2016), algorithm 1, on bytes as in Radford et al. (2019). Tokens 0 to 255 are the bytes; merge
number r makes token 256 + r.
"""

from __future__ import annotations

import itertools
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
    token, then the smaller right token. A pair that spells an existing token is passed over.
    """
    words = [(list(piece), count) for piece, count in pieces.items()]
    strings = [bytes([i]) for i in range(256)]
    merges: list[Pair] = []
    while len(merges) < num_merges:
        frequencies: Counter[Pair] = Counter()
        for symbols, count in words:
            for a, b in itertools.pairwise(symbols):
                frequencies[a, b] += count
        for a, b in list(frequencies):
            if strings[a] + strings[b] in strings:
                del frequencies[a, b]
        if not frequencies or max(frequencies.values()) < min_frequency:
            break
        a, b = min(frequencies, key=lambda pair: (-frequencies[pair], pair))
        words = [(merge(symbols, (a, b), len(strings)), count) for symbols, count in words]
        merges.append((a, b))
        strings.append(strings[a] + strings[b])
    return merges


def encode(piece: bytes, merges: Sequence[Pair]) -> list[int]:
    """The tokens of one piece: the earliest merge among the neighbours first, until none is left."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    symbols = list(piece)
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        pair = min(pairs, key=lambda pair: ranks[pair])
        symbols = merge(symbols, pair, 256 + ranks[pair])
    return symbols

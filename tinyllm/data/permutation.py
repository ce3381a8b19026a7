"""Random numbers and permutations by index: what stands at a place is computed, and no list is kept.

Every number depends on a seed, a stream (what it is for) and its place alone, whatever was asked for before.
"""

import math

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Of SplitMix64: the step of its counter, and the shifts and factors of its mixing function.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIXING = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT = np.uint64(31)
_ONE_BIT = np.uint64(1)

_ROUNDS = 12
"""Even, so that both halves are changed equally often; with 8, orders of 5 or 6 were seen to be uneven."""


def _split_mix(seeds: Words, places: Words) -> Words:
    """The numbers that SplitMix64 generators with these seeds give at these places (Steele, Lea and Flood 2014)."""
    words = seeds + places * _STEP
    for shift, factor in _MIXING:
        words ^= words >> shift
        words *= factor
    words ^= words >> _LAST_SHIFT
    return words


def _seeds(count: int, seed: int, stream: int) -> Words:
    """Independent seeds, (count, 1)."""
    # The last word is never 0, so that no other use of a seed's numbers has the same ones.
    seeds: Words = (
        np.random.SeedSequence([seed, 0, stream]).generate_state(count, np.uint64).astype(np.uint64)
    )
    return seeds[:, None]


def random_integers(places: Ids, size: int, seed: int, stream: int) -> Ids:
    """Integers from 0 to size - 1, evenly and independently drawn: one for each place, of the shape of `places`.

    seed: at least 0. stream: at least 1; another one for each use of random numbers.
    """
    words = _split_mix(_seeds(1, seed, stream)[0], places.astype(np.uint64))
    return (words % np.uint64(size)).astype(np.int64)


def permute(indices: Ids, size: int, seed: int, stream: int, numbers: Ids) -> Ids:
    """Where permutations of 0 to size - 1 send these indices: (N,) -> (N,).

    There is a permutation for each number, such as of an epoch: `numbers` (N,), each at least 0, says which one sends
    each of the indices. Nothing is kept of the permutations, and their size may be anything up to 2^62.

    An index is split into two nearly equal halves, left and right, and each round adds to the one a random function of
    the other: a Feistel network (Luby and Rackoff 1988) on halves of any size. Some halves more than there are indices
    make a number that is too large, which is sent on until it is not (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains": the generalized Feistel cipher and cycle walking).

    seed: at least 0. stream: at least 1; another one for each use of random numbers.
    """
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    distinct, which = np.unique(numbers, return_inverse=True)  # mixing costs more
    keys = _split_mix(_seeds(_ROUNDS, seed, stream), distinct.astype(np.uint64))[:, which]  # (_ROUNDS, N)
    sent = _feistel(indices.astype(np.uint64), rows, columns, keys)
    # Of rows * columns numbers fewer than `columns` are too large, so this is rare.
    while (walking := sent >= size).any():
        sent[walking] = _feistel(sent[walking], rows, columns, keys[:, walking])
    return sent.astype(np.int64)


def _feistel(indices: Words, rows: int, columns: int, keys: Words) -> Words:
    """A permutation of 0 to rows * columns - 1 for each column of keys (_ROUNDS, N)."""
    width, height = np.uint64(columns), np.uint64(rows)
    left, right = np.divmod(indices, width)  # below rows, below columns
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        # The words lose a bit, since a sum past 2^64 would not be one modulo the size of the half.
        left = (left + (_split_mix(even, right) >> _ONE_BIT)) % height
        right = (right + (_split_mix(odd, left) >> _ONE_BIT)) % width
    return left * width + right

"""Permutations by index: each is one, and they are as even as permutations that are drawn."""

import itertools
import math
from collections import Counter
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest

from tinyllm.data.permutation import permute, random_integers


def permutations(size: int, count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Number 0 to count - 1, (count, size)."""
    numbers = np.repeat(np.arange(count), size)
    return permute(np.tile(np.arange(size), count), size, seed, 1, numbers).reshape(count, size)


def require_even(counts: npt.NDArray[np.int64], expected: float, freedom: int) -> None:
    """Chi-square of counts against an even distribution, within six standard deviations of its mean."""
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 6 * math.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_index_comes_once(seed: int) -> None:
    for size in [*range(1, 301), 1023, 1024, 1025, 40_000, 65_537]:
        for row in np.sort(permutations(size, 2, seed), axis=1):
            np.testing.assert_array_equal(row, np.arange(size))


@pytest.mark.parametrize("size", [10**7 + 19, 2 * 10**9, 2**40 + 1, 2**62])
def test_a_large_permutation_sends_no_two_to_one_place(size: int) -> None:
    indices = np.unique(np.random.default_rng(3).integers(0, size, 200_000))
    sent = permute(indices, size, 5, 1, np.full(len(indices), 2))
    assert 0 <= sent.min() <= sent.max() < size
    assert len(np.unique(sent)) == len(indices)
    require_even(np.histogram(sent, bins=200, range=(0, size))[0], len(indices) / 200, 199)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_small_orders_are_equally_likely(size: int) -> None:
    orders = Counter(map(tuple, permutations(size, 6000, seed=7).tolist()))
    counts = np.array([orders[order] for order in itertools.permutations(range(size))])
    require_even(counts, 6000 / len(counts), len(counts) - 1)


@pytest.mark.parametrize("size", [3, 7, 10, 17, 64, 97])
def test_each_index_comes_to_each_place_equally_often(size: int) -> None:
    count = 6000
    found = permutations(size, count)
    places = np.stack([np.bincount(column, minlength=size) for column in found.T])
    require_even(places, count / size, (size - 1) ** 2)
    by_seed = [
        permute(np.arange(size), size, seed, 1, np.zeros(size, int))[size // 2] for seed in range(1000)
    ]
    require_even(np.bincount(by_seed, minlength=size), 1000 / size, size - 1)
    # Neighbours are not kept: how far the next index lands is as for two drawn without replacement.
    steps = (found[:, 1:] - found[:, :-1]) % size
    require_even(np.bincount(steps.ravel(), minlength=size)[1:], count, size - 2)


def test_permutations_differ_between_seeds_streams_and_numbers() -> None:
    indices = np.arange(1000)
    zeros = np.zeros(1000, int)
    orders = [
        permute(indices, 1000, seed, stream, zeros + number)
        for seed, stream, number in itertools.product([0, 1, 2**32 - 1], [1, 2], [0, 1, 10**6])
    ]
    for one, other in itertools.combinations([indices, *orders], 2):
        assert (one == other).sum() < 12  # one by chance


def test_an_index_is_sent_alone_as_among_others() -> None:
    rng = np.random.default_rng(0)
    indices, numbers = rng.integers(0, 77, 50), rng.integers(0, 5, 50)
    together = permute(indices, 77, 3, 1, numbers)
    for index, number, sent in zip(indices, numbers, together, strict=True):
        assert permute(np.array([index]), 77, 3, 1, np.array([number])).tolist() == [sent]


def test_random_integers_are_even_and_depend_on_their_place_alone() -> None:
    drawn = random_integers(np.arange(20_000), 100, 3, 1)
    require_even(np.bincount(drawn, minlength=100), 200, 99)
    assert random_integers(np.array([77, 5]), 100, 3, 1).tolist() == [drawn[77], drawn[5]]
    assert (random_integers(np.arange(20_000), 100, 3, 2) == drawn).mean() < 0.02
    assert (random_integers(np.arange(20_000), 100, 4, 1) == drawn).mean() < 0.02


def test_sixty_four_of_two_billion_take_no_list() -> None:
    indices, numbers = np.arange(64) * 10**7, np.zeros(64, int)
    seconds = []
    for _ in range(20):
        begun = perf_counter()
        permute(indices, 2 * 10**9, 0, 1, numbers)
        seconds.append(perf_counter() - begun)
    assert min(seconds) < 0.005  # a list would take 20 seconds

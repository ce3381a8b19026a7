"""Mixtures: exact shares, each source through its own epochs, one number as the position."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_parts import in_parts

from tinyllm.data import BatchSampler, Mixture, RandomOffsets, RandomWindows, StridedWindows
from tinyllm.data.mixing import CYCLE
from tinyllm.system.errors import InputError

THOUSAND = 1000
"""Token i of source s is 1000 s + i, so that windows tell where they are from."""


def sources(*sizes: int, batch: int = 4) -> list[BatchSampler]:
    return [
        StridedWindows(THOUSAND * number + np.arange(size), 4, batch, seed=number, stride=4)
        for number, size in enumerate(sizes)
    ]


def test_each_source_has_its_share_of_every_cycle() -> None:
    mixture = Mixture(sources(90, 500, 300, batch=CYCLE), [5, 2.5, 0.5])
    assert mixture.counts.tolist() == [640, 320, 64]
    orders = []
    for cycle in range(4):
        drawn = mixture.batch(cycle)[0][:, 0] // THOUSAND
        assert Counter(drawn.tolist()) == {0: 640, 1: 320, 2: 64}
        orders.append(drawn)
        # Spread over the cycle: of a quarter of it about a quarter of the share (80 +- 7.4 of source 1).
        assert all(40 < (quarter == 1).sum() < 120 for quarter in np.split(drawn, 4))
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_each_source_goes_through_its_own_order() -> None:
    """Oracle: the sources, iterated alone."""
    parts = sources(90, 500, 300)
    mixture = Mixture(parts, [1, 3, 2])
    drawn = np.concatenate([mixture.batch(step)[0] for step in range(700)])  # 2.7 cycles
    for number, alone in enumerate(sources(90, 500, 300)):
        mine = drawn[drawn[:, 0] // THOUSAND == number]
        expected = np.concatenate([next(alone)[0] for _ in range(len(mine) // 4 + 1)])
        np.testing.assert_array_equal(mine, expected[: len(mine)])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_shares_are_rounded_by_largest_remainder(weights: list[float]) -> None:
    if min(weights) / sum(weights) < 1 / CYCLE:
        return
    counts = Mixture(sources(*[50] * len(weights)), weights).counts
    exact = CYCLE * np.array(weights) / sum(weights)
    assert counts.sum() == CYCLE
    assert (np.abs(counts - exact) < 1 + 1e-9).all()
    up, down = exact[counts > exact] % 1, exact[counts < exact] % 1
    assert not len(up) or not len(down) or up.min() >= down.max() - 1e-9


def test_without_weights_sources_count_by_their_length() -> None:
    assert Mixture(sources(96, 32)).counts.tolist() == [768, 256]


def test_resume_and_its_refusals() -> None:
    one = Mixture(sources(90, 500), [1, 3])
    for _ in range(300):
        next(one)
    other = Mixture(sources(90, 500), [2, 6])
    other.load_state_dict(one.state_dict())
    for _ in range(5):
        np.testing.assert_array_equal(next(one), next(other))
    for wrong in (
        Mixture(sources(90, 500), [1, 2]),
        Mixture(sources(90, 501), [1, 3]),
        Mixture(sources(90), [1]),
    ):
        with pytest.raises(InputError, match="belongs to another run"):
            wrong.load_state_dict(one.state_dict())


def test_documents_and_parts_come_through() -> None:
    starts = np.arange(0, 200, 7)
    parts = in_parts(np.arange(200), 50)
    alone = [RandomWindows(parts, 8, 3, seed, document_starts=starts) for seed in (0, 1)]
    inputs, targets, documents = Mixture(alone, [1, 1]).batch(2)
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(documents, inputs // 7 - inputs[:, :1] // 7)
    assert parts.read == 3 * 9


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1], "1 weights for 2 sources; give one for each"),
        ([1, 0], "weights must be above 0 and finite, got 1, 0"),
        ([1, -2], "above 0"),
        ([1, float("nan")], "above 0"),
        ([1, float("inf")], "above 0"),
        ([1, 1e-9], "weight 2 of 2 is 1e-09 of 1, which is none of 1024 draws"),
    ],
)
def test_wrong_weights(weights: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Mixture(sources(90, 500), weights)


def test_wrong_sources() -> None:
    tokens: Any = np.arange(100)
    with pytest.raises(InputError, match="needs sources"):
        Mixture([])
    with pytest.raises(InputError, match="windows of one length, got 4, 5"):
        Mixture([RandomOffsets(tokens, 4, 2, 0), RandomOffsets(tokens, 5, 2, 0)])
    apart = RandomOffsets(tokens, 4, 2, 0, document_starts=np.array([0, 50]))
    with pytest.raises(InputError, match="all keep documents apart, or none"):
        Mixture([apart, RandomOffsets(tokens, 4, 2, 0)])

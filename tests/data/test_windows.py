"""Windows and samplers: nothing lost, nothing seen twice, every position resumable, nothing read that is not needed."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_parts import in_parts

from tinyllm.data import (
    IGNORE_INDEX,
    BatchSampler,
    Mixture,
    PackedWindows,
    RandomOffsets,
    RandomWindows,
    SequentialWindows,
    SlidingWindows,
    StridedWindows,
    WindowSampler,
    split_by_position,
    token_digest,
)
from tinyllm.system.errors import InputError

SAMPLERS: list[type[WindowSampler]] = [RandomWindows, RandomOffsets, StridedWindows]
"""Those whose windows are whole."""
ALL: list[type[WindowSampler]] = [*SAMPLERS, PackedWindows]
quick = settings(deadline=None, max_examples=60)


# ---- Windows that are not random ---------------------------------------------------------------


def test_split_is_by_position_and_copies_nothing() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    train, validation = split_by_position(tokens, 0.25)
    assert train.tolist() == list(range(7))
    assert validation.tolist() == [7, 8, 9]
    assert train.base is tokens
    assert validation.base is tokens
    assert len(split_by_position(tokens, 0.0)[0]) == 10
    for fraction in [1.0, -0.1, float("nan")]:
        with pytest.raises(InputError, match="validation_fraction"):
            split_by_position(tokens, fraction)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20))
@quick
def test_sliding_windows_are_all_that_fit(size: int, context_length: int, stride: int) -> None:
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    starts = [s for s in range(0, size, stride) if s + context_length + 1 <= size]
    if not starts:
        with pytest.raises(InputError, match="too short"):
            SlidingWindows(tokens, context_length, stride)
        return
    windows = SlidingWindows(tokens, context_length, stride)
    assert len(windows) == len(list(windows)) == len(starts)
    for start, (inputs, targets) in zip(starts, windows, strict=True):
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.tolist() == list(range(100 + start, 100 + start + context_length))
        assert targets.tolist() == [token + 1 for token in inputs]
    assert windows[-1][0][0] == 100 + starts[-1]
    with pytest.raises(IndexError):
        windows[len(starts)]


@given(st.integers(2, 80), st.integers(1, 20), st.integers(1, 6))
@quick
def test_sequential_windows_predict_each_token_once(size: int, context_length: int, batch: int) -> None:
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    windows = SequentialWindows(tokens, context_length, batch)
    batches = list(windows)
    assert len(windows) == len(batches)
    assert windows.num_windows == sum(len(inputs) for inputs, _ in batches)
    seen = []
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == context_length
        assert 1 <= len(inputs) <= batch
        real = targets != IGNORE_INDEX
        assert (inputs[real] + 1 == targets[real]).all()
        assert (inputs[~real] == 0).all()
        assert real[:, 0].all()  # no row of filling only
        seen += targets[real].tolist()
    assert all(len(inputs) == batch for inputs, _ in batches[:-1])
    assert seen == list(range(101, 100 + size))
    assert windows.num_targets == len(seen)


# ---- Samplers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_batches_are_shifted_windows(cls: type[WindowSampler], dtype: type) -> None:
    tokens: npt.NDArray[Any] = np.arange(100, dtype=dtype)
    sampler = cls(tokens, context_length=7, batch_size=5, seed=1)
    for _ in range(10):
        inputs, targets = next(sampler)
        assert inputs.shape == targets.shape == (5, 7)
        assert inputs.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(7))
        np.testing.assert_array_equal(targets, inputs + 1)
        inputs[:] = -1  # the caller's own: neither the targets nor the text change
        assert targets.min() > 0
    np.testing.assert_array_equal(tokens, np.arange(100))


@pytest.mark.parametrize("cls", ALL)
def test_memory_mapped_tokens(cls: type[WindowSampler], tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    plain, from_disk = (cls(source, 8, 4, 0) for source in (tokens, mapped))
    assert np.shares_memory(from_disk.tokens, mapped)
    for step in range(3):
        for left, right in zip(plain.batch(step), from_disk.batch(step), strict=True):
            np.testing.assert_array_equal(left, right)
            assert type(right) is np.ndarray
    assert type(next(iter(SequentialWindows(mapped, 8, 4)))[0]) is np.ndarray
    assert type(SlidingWindows(mapped, 8)[3][1]) is np.ndarray


def starts_of_epochs(sampler: RandomWindows, epochs: int) -> npt.NDArray[np.int64]:
    """(epochs, windows_per_epoch) starts, read from batches, where tokens are positions."""
    steps = -(-epochs * sampler.windows_per_epoch // sampler.batch_size)
    starts = np.concatenate([sampler.batch(step)[0][:, 0] for step in range(steps)])
    starts = starts[: epochs * sampler.windows_per_epoch]
    return starts.reshape(epochs, sampler.windows_per_epoch)


@given(st.integers(2, 90), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1))
@quick
def test_an_epoch_shows_each_window_once(size: int, context: int, batch: int, seed: int) -> None:
    if size < context + 1:
        return
    sampler = RandomWindows(np.arange(size), context, batch, seed)
    assert sampler.windows_per_epoch >= 1
    # At most one whole window less than would fit from the start.
    assert sampler.windows_per_epoch >= (size - 1) // context - 1
    for epoch in np.sort(starts_of_epochs(sampler, 3), axis=1):
        assert epoch[0] >= 0
        assert epoch[-1] + context + 1 <= size
        assert (np.diff(epoch) == context).all()


@pytest.mark.parametrize("size", [5, 8, 9, 23, 24, 25])
def test_every_token_is_a_target_in_some_epoch(size: int) -> None:
    sampler = RandomWindows(np.arange(size), 4, 3, 0)
    seen = {int(token) for step in range(200) for token in sampler.batch(step)[1].ravel()}
    assert seen == set(range(1, size))


def test_epochs_differ_in_offset_and_order() -> None:
    # 1009 tokens are 63 whole windows with nothing over: the offset must be free all the same.
    epochs = starts_of_epochs(RandomWindows(np.arange(1009), 16, 7, 3), 20)
    assert len({int(offset) for offset in epochs.min(axis=1)}) > 5
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 20
    other = starts_of_epochs(RandomWindows(np.arange(1009), 16, 7, 4), 20)
    assert (epochs != other).any()


def test_random_offsets_reach_every_start_evenly() -> None:
    sampler = RandomOffsets(np.arange(20), 4, 100, 0)
    counts = Counter(int(s) for step in range(40) for s in sampler.batch(step)[0][:, 0])
    assert sorted(counts) == list(range(16))  # the last window ends at the last token
    assert 180 < min(counts.values()) <= max(counts.values()) < 320  # 250 expected
    assert (sampler.batch(0)[0] != sampler.batch(1)[0]).any()
    assert (sampler.batch(0)[0] != RandomOffsets(np.arange(20), 4, 100, 1).batch(0)[0]).any()


@pytest.mark.parametrize("cls", ALL)
@given(
    st.integers(20, 90),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
)
@quick
def test_a_batch_depends_on_its_step_alone(
    cls: type[WindowSampler], size: int, context: int, batch: int, steps: list[int]
) -> None:
    """Asked for in any order, a batch is what iterating gives."""
    iterating = cls(np.arange(size), context, batch, 0)
    in_order = [next(iterating) for _ in range(61)]
    jumping = cls(np.arange(size), context, batch, 0)
    for step in steps:
        np.testing.assert_array_equal(jumping.batch(step), in_order[step])
    assert jumping.step == 0


@pytest.mark.parametrize("cls", ALL)
def test_resume(cls: type[WindowSampler]) -> None:
    tokens = np.arange(100)
    first, second = cls(tokens, 8, 3, 5), cls(tokens, 8, 3, 5)
    for _ in range(17):
        next(first)
    state = first.state_dict()
    assert state["step"] == 17
    second.load_state_dict(state)
    for _ in range(5):
        np.testing.assert_array_equal(next(first), next(second))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 1 and is 0"),
        ({"num_tokens": 99}, "num_tokens was 99 and is 100"),
        ({"context_length": 9, "batch_size": 1}, "context_length was 9 and is 8;"),
        ({"sampler": "RandomOffsets"}, "sampler was 'RandomOffsets' and is 'RandomWindows'"),
        ({"seed": None}, "seed was None"),
        ({"order": 3}, "order was 3 and is 2"),
        ({"first_draw": -8 * 7}, "first_draw must be -21 or more, got -56"),
        ({"first_draw": 0.0}, "first_draw must be"),
        ({"step": -1}, "step must be 0 or more, got -1"),
        ({"step": "3"}, "step must be 0 or more, got '3'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_resume_refuses_another_run(change: dict[str, Any], words: str) -> None:
    sampler = RandomWindows(np.arange(100), 8, 3, 0)
    next(sampler)
    with pytest.raises(InputError, match=words):
        sampler.load_state_dict({**sampler.state_dict(), "step": 7, **change})
    assert sampler.step == 1


# ---- Wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_text_shorter_than_a_window(size: int) -> None:
    tokens = np.arange(size, dtype=np.uint16)
    message = rf"validation text is too short: {size} tokens.* needs 8; lower --context-length"
    with pytest.raises(InputError, match=message):
        SlidingWindows(tokens, 7, 1, name="validation text")
    for cls in SAMPLERS:
        with pytest.raises(InputError, match=message):
            cls(tokens, 7, 2, 0, name="validation text")
        assert cls(np.arange(8), 7, 2, 0).batch(3)[1].tolist() == [list(range(1, 8))] * 2
    if size < 2:
        with pytest.raises(InputError, match="too short"):
            SequentialWindows(tokens, 7, 2)


def test_numbers_out_of_range() -> None:
    tokens = np.arange(100)
    with pytest.raises(InputError, match="stride must be at least 1, got 0; change --stride"):
        SlidingWindows(tokens, 8, 0)
    with pytest.raises(InputError, match="change --context-length"):
        SequentialWindows(tokens, 0, 1)
    for cls in SAMPLERS:
        with pytest.raises(InputError, match="change --batch-size"):
            cls(tokens, 8, -1, 0)
        for seed in [-1, 1 << 32]:
            with pytest.raises(InputError, match="change --seed"):
                cls(tokens, 8, 1, seed)
        with pytest.raises(IndexError, match="-1"):
            cls(tokens, 8, 1, 0).batch(-1)


@pytest.mark.parametrize("tokens", [np.zeros(10), np.zeros((2, 9), int), np.zeros(9, bool), "abc"])
def test_tokens_must_be_integers_in_one_dimension(tokens: Any) -> None:
    with pytest.raises(TypeError, match="tokens must be integers"):
        SlidingWindows(tokens, 2)


# ---- What each way of drawing shows -------------------------------------------------------------


def starts_of_epoch(sampler: Any, epoch: int) -> list[int]:
    """The first tokens, which are positions, of the windows of an epoch, in their order."""
    size = sampler.windows_per_epoch
    return sampler.windows(np.arange(epoch * size, (epoch + 1) * size))[0][:, 0].tolist()


@given(st.integers(2, 90), st.integers(1, 20), st.integers(1, 25), st.integers(0, 9))
@quick
def test_strided_windows_are_sliding_windows_shuffled(
    size: int, context: int, stride: int, seed: int
) -> None:
    if size < context + 1:
        return
    tokens = np.arange(size)
    sampler = StridedWindows(tokens, context, 3, seed, stride=stride)
    expected = [int(inputs[0]) for inputs, _ in SlidingWindows(tokens, context, stride)]
    for epoch in range(3):
        assert sorted(starts_of_epoch(sampler, epoch)) == expected
    if len(expected) > 20:
        orders = [starts_of_epoch(sampler, epoch) for epoch in range(3)]
        assert len(set(map(tuple, [expected, *orders]))) == 4


@given(st.integers(2, 90), st.integers(1, 20), st.integers(1, 9), st.integers(0, 9))
@quick
def test_packed_windows_lose_no_token(size: int, context: int, batch: int, seed: int) -> None:
    sampler = PackedWindows(np.arange(size), context, batch, seed)
    for epoch in range(3):
        draws = np.arange(epoch * sampler.windows_per_epoch, (epoch + 1) * sampler.windows_per_epoch)
        inputs, targets = sampler.windows(draws)
        real = targets != IGNORE_INDEX
        assert sorted(targets[real].tolist()) == list(range(1, size))
        assert (inputs[real] + 1 == targets[real]).all()
        assert (inputs[~real] == 0).all()
        assert real[:, 0].all()  # no window of filling only


def test_offsets_of_neighbouring_draws_are_independent() -> None:
    sampler = RandomOffsets(np.arange(14), 4, 6000, 0)  # 10 starts
    drawn = sampler.batch(0)[0][:, 0]
    counts = np.histogram2d(drawn[:-1], drawn[1:], bins=10)[0]
    chi_square = ((counts - 59.99) ** 2 / 59.99).sum()
    assert 40 < chi_square < 180  # 99 +- 14 expected


# ---- Tokens in parts, which are not read whole --------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_tokens_in_parts_give_what_an_array_gives(cls: type[WindowSampler]) -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 1000).astype(np.uint16)
    parts = in_parts(tokens, 3, 400, 401, 900)
    plain, cut = cls(tokens, 16, 5, 2), cls(parts, 16, 5, 2)
    assert parts.read == 0
    for step in range(40):
        for left, right in zip(plain.batch(step), cut.batch(step), strict=True):
            np.testing.assert_array_equal(left, right)
            assert right.dtype == np.int64
    assert parts.read <= 40 * 5 * 17


def test_windows_in_order_of_tokens_in_parts() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 203).astype(np.uint16)
    parts = in_parts(tokens, 50, 51)
    for plain, cut in zip(SequentialWindows(tokens, 8, 3), SequentialWindows(parts, 8, 3), strict=True):
        np.testing.assert_array_equal(plain, cut)
    for plain, cut in zip(SlidingWindows(tokens, 8, 3), SlidingWindows(parts, 8, 3), strict=True):
        np.testing.assert_array_equal(plain, cut)


def test_tokens_that_know_their_digest_are_not_read() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    parts = in_parts(tokens, 40, digest="0123")
    assert (
        token_digest(parts) == RandomWindows(parts, 8, 4, 0).digest == SequentialWindows(parts, 8, 4).digest
    )
    assert token_digest(parts) == "0123"
    assert parts.read == 0
    assert token_digest(tokens) == token_digest(tokens.astype(np.int32)) != token_digest(tokens[1:])
    first, second = RandomWindows(parts, 8, 4, 0), RandomWindows(tokens, 8, 4, 0)
    assert Mixture([first, second]).digest != Mixture([second, first]).digest


# ---- Documents kept apart -----------------------------------------------------------------------


def documents_by_hand(document_starts: list[int], positions: npt.NDArray[np.int64]) -> list[int]:
    """What INTERFACE says, token by token: how many documents begin after the first position, up to each."""
    return [sum(int(positions[0]) < start <= position for start in document_starts) for position in positions]


@given(
    st.integers(20, 120),
    st.integers(1, 19),
    st.sets(st.integers(0, 119), max_size=40),
    st.sampled_from(ALL),
)
@quick
def test_documents_are_numbered_within_their_window(
    size: int, context: int, begins: set[int], cls: type[WindowSampler]
) -> None:
    starts = sorted(begin for begin in begins if begin < size)
    arrays = (np.arange(size), context, 4)
    document_starts = np.array(starts, dtype=np.int64)
    sampler = cls(*arrays, seed=0, document_starts=document_starts)
    plain = cls(*arrays, seed=0)
    batches = [sampler.batch(step) for step in range(4)]
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch[:2], plain.batch(step))
    batches += SequentialWindows(np.arange(size), context, 4, document_starts=document_starts)
    for inputs, targets, documents in batches:
        assert documents.dtype == np.int64
        assert documents.shape == inputs.shape
        for row, first, real in zip(documents, inputs[:, 0], targets != IGNORE_INDEX, strict=True):
            expected = documents_by_hand(starts, first + np.arange(context))
            assert row[real].tolist() == np.array(expected)[real].tolist()
            assert (np.diff(row) >= 0).all()


def test_only_the_begins_within_the_windows_are_read() -> None:
    class Counted(np.ndarray):  # type: ignore[type-arg]
        read = 0

        def __getitem__(self, places: Any) -> Any:
            found = np.asarray(self)[places]
            Counted.read += np.size(found)
            return found

    starts = np.arange(0, 10**6, 10).view(Counted)
    sampler = RandomWindows(np.zeros(10**6, np.uint8), 100, 4, 0, document_starts=starts)
    assert (
        sampler.batch(0)[2][:, -1].tolist()
        == [
            pytest.approx(10, abs=1),
        ]
        * 4
    )
    assert Counted.read <= 4 * 11


# ---- Ranks --------------------------------------------------------------------------------------


def mixture(tokens: Any, context: int, batch: int, seed: int) -> BatchSampler:
    return Mixture(
        [RandomWindows(tokens, context, batch, seed), PackedWindows(tokens, context, batch, seed)], [3, 1]
    )


MAKERS: list[Callable[..., BatchSampler]] = [*ALL, mixture]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_batch_of_one(make: Callable[..., BatchSampler], ranks: int) -> None:
    tokens = np.arange(500)
    for step in (0, 1, 900):
        whole = make(tokens, 8, 13, 1).batch(step)
        parts = [make(tokens, 8, 13, 1).batch(step, rank, ranks) for rank in range(ranks)]
        for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(array, np.concatenate(pieces))
            assert {len(piece) for piece in pieces} <= {13 // ranks, -(-13 // ranks)}


def test_a_rank_reads_its_own_rows() -> None:
    parts = in_parts(np.arange(1000), 300)
    RandomWindows(parts, 16, 8, 0).batch(3, 2, 4)
    assert parts.read == 2 * 17


def test_wrong_ranks() -> None:
    sampler = RandomWindows(np.arange(100), 8, 3, 0)
    for rank, ranks in [(-1, 2), (2, 2), (0, 0)]:
        with pytest.raises(IndexError, match="rank"):
            sampler.batch(0, rank, ranks)
    with pytest.raises(InputError, match="4 ranks cannot share 3 windows; raise --batch-size"):
        sampler.batch(0, 1, 4)


# ---- Positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("sizes", [(2, 1), (3, 20), (7, 5, 2, 7), (1, 9, 1)])
def test_with_other_batch_sizes_draws_go_on_where_they_were(
    make: Callable[..., BatchSampler], sizes: tuple[int, ...]
) -> None:
    """Oracle: the draws of one sampler with batches of one window, in order."""
    tokens = np.arange(300)
    one = make(tokens, 4, 1, 3)
    expected = [next(one)[0][0].tolist() for _ in range(4 * sum(sizes))]
    shown, state, steps = [], None, 0
    for size in sizes:
        sampler = make(tokens, 4, size, 3)
        if state is not None:
            sampler.load_state_dict(state)
        assert sampler.step == steps
        for _ in range(4):
            shown += next(sampler)[0].tolist()
        steps += 4
        state = sampler.state_dict()
    assert shown == expected


def test_a_step_before_the_first_draw_is_refused() -> None:
    first = RandomWindows(np.arange(100), 8, 1, 0)
    for _ in range(4):
        next(first)
    second = RandomWindows(np.arange(100), 8, 3, 0)
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(second.batch(3)[0][0], first.batch(1)[0][0])
    with pytest.raises(IndexError, match="step 2"):
        second.batch(2)


def test_a_position_of_the_first_version_is_refused() -> None:
    sampler = RandomWindows(np.arange(100), 8, 3, 0)
    state = {
        "sampler": "RandomWindows",
        "num_tokens": 100,
        "context_length": 8,
        "batch_size": 3,
        "seed": 0,
        "step": 5,
    }
    with pytest.raises(InputError, match="earlier version of tinyllm, whose windows come in another order"):
        sampler.load_state_dict(state)
    assert sampler.step == 0


def test_draws_in_blocks_are_those_one_by_one() -> None:
    """At the ends of blocks and of epochs, forth and back."""
    sampler = RandomWindows(np.arange(5000), 3, 7, 1)  # 1665 windows in an epoch
    single = RandomWindows(np.arange(5000), 3, 1, 1)
    for step in [584, 585, 586, 1170, 237, 238, 584, 0, 10**12 // 7]:
        expected = [single.batch(draw)[0][0] for draw in range(7 * step, 7 * step + 7)]
        np.testing.assert_array_equal(sampler.batch(step)[0], expected)
    long = RandomWindows(np.arange(5000), 3, 9000, 1).batch(0)[0]
    pieces = RandomWindows(np.arange(5000), 3, 500, 1)
    np.testing.assert_array_equal(long, np.concatenate([pieces.batch(step)[0] for step in range(18)]))


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = []
    for seed in range(3):
        sampler = StridedWindows(np.arange(400), 4, 5, seed, stride=4)
        orders += [tuple(starts_of_epoch(sampler, epoch)) for epoch in range(3)]
    for order, other in pairwise([*orders, orders[0]]):
        assert sum(a == b for a, b in zip(order, other, strict=True)) < 8  # about one in all by chance


def test_of_a_long_text_windows_at_even_distances_are_evaluated() -> None:
    tokens = np.arange(1000)
    windows = SequentialWindows(tokens, context_length=8, batch_size=3, most_targets=50)
    batches = list(windows)
    starts = np.concatenate([inputs[:, 0] for inputs, _ in batches])
    assert windows.num_targets == 48
    assert starts.tolist() == [124 * i // 6 * 8 for i in range(6)]
    for inputs, targets in batches:
        assert (targets == inputs + 1).all()
    assert len(windows) == len(batches) == 2
    # All of a text that is no longer.
    for most in (0, 999, 5000):
        whole = SequentialWindows(tokens, 8, 3, most_targets=most)
        assert sum(int((batch[1] != IGNORE_INDEX).sum()) for batch in whole) == whole.num_targets == 999

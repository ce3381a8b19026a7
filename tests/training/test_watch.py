"""The watch on training and what follows a rejection: properties, by hypothesis, and the arithmetic."""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.training.safeguards.recovery import Recovery
from tinyllm.training.safeguards.watch import WARM_UP, Recent, Watch

positive = st.floats(1e-3, 1e3)
finite = st.floats(-1e6, 1e6)
steps = st.lists(st.tuples(positive, positive), min_size=WARM_UP, max_size=80)
seldom = settings(max_examples=60, deadline=None)


def spread(values: list[float]) -> float:
    """The oracle: the median absolute deviation of changes, as the standard deviation of the values."""
    changes = [after - before for before, after in itertools.pairwise(values)]
    if not changes:
        return 0.0
    middle = statistics.median(changes)
    return 1.4826 * statistics.median(abs(change - middle) for change in changes) / math.sqrt(2)


def watch_after(pairs: Any, window: int = 48, loss: float = 20.0, norm: float = 300.0) -> Watch:
    watch = Watch(window, loss, norm)
    for pair in pairs:
        watch.accept(*pair)
    return watch


# ---- Median and spread -------------------------------------------------------------------------


@seldom
@given(st.lists(finite, min_size=1, max_size=60), st.integers(1, 40))
def test_the_median_and_spread_are_those_of_the_last_values(values: list[float], window: int) -> None:
    seen = Recent(window)
    for value in values:
        seen.add(value)
    last = values[-window:]
    assert list(seen.values) == last
    assert seen.median == statistics.median(last)
    assert seen.spread == spread(last)
    loaded = Recent(window)
    loaded.load(values)
    loaded.add(values[0])
    seen.add(values[0])
    assert (loaded.median, loaded.spread) == (seen.median, seen.spread)


def test_the_spread_of_normal_noise_is_its_standard_deviation() -> None:
    seen = Recent(20_000)
    noise = np.random.default_rng(0).normal(3.0, 0.5, 20_000)
    seen.load(noise.tolist())
    assert seen.spread == pytest.approx(0.5, rel=0.04)
    seen.load((noise - 0.1 * np.arange(20_000)).tolist())  # a trend is no noise
    assert seen.spread == pytest.approx(0.5, rel=0.04)


# ---- The watch ---------------------------------------------------------------------------------


@seldom
@given(st.lists(positive, min_size=2, max_size=200), positive)
def test_a_loss_that_falls_is_never_a_spike(losses: list[float], norm: float) -> None:
    watch = Watch(48, 0.1, 0.1)  # thresholds far too low
    for loss in sorted(losses, reverse=True):
        assert watch.judge(loss, norm).reason is None
        watch.accept(loss, norm)


@seldom
@given(steps, st.floats(-1e3, 1e3), positive)
def test_nothing_at_or_below_the_median_is_a_spike(pairs: Any, loss: float, norm: float) -> None:
    watch = watch_after(pairs, loss=0.0, norm=0.0)
    below = watch.judge(min(loss, watch.losses.median), min(norm, watch.norms.median))
    assert below.reason is None
    assert max(below.loss_score, below.norm_score) <= 0


@seldom
@given(steps, positive, positive, positive, positive)
def test_more_is_never_less_of_a_spike(
    pairs: Any, loss: float, norm: float, more: float, many: float
) -> None:
    watch = watch_after(pairs)
    first, second = watch.judge(loss, norm), watch.judge(loss + more, norm + many)
    assert second.loss_score >= first.loss_score
    assert second.norm_score >= first.norm_score
    assert first.reason is None or second.reason is not None


@seldom
@given(steps, positive, positive, st.integers(-8, 8), st.integers(-50, 50))
def test_the_unit_of_norms_and_the_zero_of_losses_do_not_matter(
    pairs: Any, loss: float, norm: float, power: int, shift: int
) -> None:
    scale = 2.0**power  # so that products are exact
    # Multiples of 1/64, so that sums are exact too.
    pairs, loss = [(round(a * 64) / 64, b) for a, b in pairs], round(loss * 64) / 64
    plain = watch_after(pairs).judge(loss, norm)
    moved = watch_after([(a + shift, b * scale) for a, b in pairs]).judge(loss + shift, norm * scale)
    assert moved.norm_score == plain.norm_score
    assert moved.loss_score == plain.loss_score
    assert (moved.reason is None) == (plain.reason is None)


@seldom
@given(steps, st.lists(st.tuples(st.floats(), st.floats()), max_size=20))
def test_judging_changes_nothing(pairs: Any, others: Any) -> None:
    watch = watch_after(pairs)
    before = json.dumps(watch.state_dict())
    for pair in others:
        watch.judge(*pair)
    assert json.dumps(watch.state_dict()) == before


@pytest.mark.parametrize("accepted", [0, 1, WARM_UP, 200])
@pytest.mark.parametrize(
    ("loss", "norm", "word"),
    [(math.nan, 1.0, "loss is nan"), (math.inf, 1.0, "loss is inf"), (-math.inf, 1.0, "loss is -inf"),
     (1.0, math.nan, "norm is nan"), (1.0, math.inf, "norm is inf")],
)  # fmt: skip
def test_what_is_not_finite_is_always_rejected(accepted: int, loss: float, norm: float, word: str) -> None:
    watch = watch_after([(1.0, 1.0)] * accepted, loss=math.inf, norm=math.inf)
    reason = watch.judge(loss, norm).reason
    assert reason is not None
    assert word in reason


def test_spikes_are_told_after_the_warm_up_and_by_the_right_threshold() -> None:
    wave = (0, 0, 1, 2, 1, 0)
    pairs = [(2.0 + wave[i % 6] * 0.1, 1.0 + wave[i % 6] * 0.2) for i in range(100)]
    assert watch_after(pairs[: WARM_UP - 1]).judge(100.0, 1e9).reason is None
    for accepted in (WARM_UP, 100):
        watch = watch_after(pairs[:accepted])
        losses, norms = (list(column) for column in zip(*pairs[:accepted][-48:], strict=True))
        middle, unit = statistics.median(losses), spread(losses)
        assert unit == pytest.approx(0.1 * 1.4826 / math.sqrt(2)), "most changes are up or down by 1"
        usual, norm_unit = statistics.median(norms), spread(norms)
        assert watch.judge(middle + 19.9 * unit, usual + 299.9 * norm_unit).reason is None
        loss = watch.judge(middle + 20.1 * unit, 1.0)
        norm = watch.judge(2.0, usual + 300.1 * norm_unit)
        assert loss.loss_score == pytest.approx(20.1)
        assert norm.norm_score == pytest.approx(300.1)
        assert loss.reason is not None
        assert norm.reason is not None
        assert "loss" in loss.reason
        assert "norm" not in loss.reason
        assert "gradient norm" in norm.reason
        assert "loss" not in norm.reason
    assert Watch(4, 20.0, 300.0).warm_up == 4, "a window that is shorter than the warm-up"
    assert watch_after(pairs, loss=math.inf, norm=math.inf).judge(1e30, 1e30).reason is None


def test_equal_values_and_values_of_zero_leave_room() -> None:
    watch = watch_after([(1.0, 0.5)] * 50)
    assert watch.judge(1.0 + 19 * 0.02, 0.5 + 299 * 0.05).reason is None
    assert watch.judge(1.0 + 21 * 0.02, 0.5).reason is not None
    assert watch.judge(1.0, 0.5 + 301 * 0.05).reason is not None
    assert watch_after([(0.0, 0.0)] * 50).judge(0.0, 1.0).reason is None


def test_the_usual_norm_is_the_median_once_there_is_one() -> None:
    assert watch_after([(1.0, 3.0)] * (WARM_UP - 1)).usual_norm == math.inf
    assert watch_after([(1.0, 3.0)] * WARM_UP).usual_norm == 3.0


@seldom
@given(steps, st.lists(st.tuples(positive, positive), min_size=1, max_size=20))
def test_a_watch_goes_on_from_its_state(pairs: Any, more: Any) -> None:
    whole = watch_after(pairs)
    resumed = Watch(48, 20.0, 300.0)
    resumed.accept(5.0, 5.0)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for pair in more:
        assert resumed.judge(*pair) == whole.judge(*pair)
        whole.accept(*pair)
        resumed.accept(*pair)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "state",
    [{}, {"losses": [1.0]}, {"losses": [1.0], "norms": []}, {"losses": [math.nan], "norms": [1.0]},
     {"losses": ["x"], "norms": [1.0]}, {"losses": 3, "norms": 4}, {"losses": [None], "norms": [1.0]}],
    ids=str,
)  # fmt: skip
def test_a_damaged_state_is_refused(state: Any) -> None:
    watch = watch_after([(1.0, 2.0)] * 3)
    with pytest.raises((ValueError, TypeError, KeyError)):
        watch.load_state_dict(state)
    assert watch.state_dict() == {"losses": [1.0] * 3, "norms": [2.0] * 3}


@seldom
@given(steps, positive, positive)
def test_an_engine_and_the_judge_agree_in_float32(pairs: Any, loss: float, norm: float) -> None:
    """Also at the limits themselves, and one number of float32 above them."""
    watch = watch_after(pairs)
    limits = watch.limits
    above = [
        float(np.nextafter(np.float32(limit), np.float32(np.inf))) for limit in (limits.loss, limits.norm)
    ]
    for values in ((loss, norm), (limits.loss, limits.norm), (above[0], norm), (loss, above[1])):
        if not all(map(math.isfinite, values)):
            continue
        in_float32 = [np.float32(value) for value in values]
        # As a device compares: an array of float32 with a Python number.
        made = bool((in_float32[0] <= limits.loss) & (in_float32[1] <= limits.norm))
        assert (watch.judge(*map(float, in_float32)).reason is None) == made


# ---- Recovery ----------------------------------------------------------------------------------


FOLDERS = [Path("20"), Path("40")]


def actions(recovery: Recovery, step: int, times: int) -> list[str]:
    return [recovery.reject(step, FOLDERS).action for _ in range(times)]


def test_patience_then_rollbacks_then_the_end() -> None:
    recovery = Recovery(patience=3, max_rollbacks=2, window=10)
    first = [recovery.reject(50, FOLDERS) for _ in range(3)]
    assert [remedy.action for remedy in first] == ["skip", "skip", "roll back"]
    # The newest checkpoint before older ones.
    assert (first[-1].candidates, first[-1].skipped, first[-1].number) == ((Path("40"), Path("20")), 3, 1)
    for step in range(41, 50):  # again, a little earlier
        recovery.accept(step)
    second = [recovery.reject(49, FOLDERS) for _ in range(3)]
    assert [remedy.action for remedy in second] == ["skip", "skip", "roll back"]
    # The newest has not helped.
    assert (second[-1].candidates, second[-1].skipped, second[-1].number) == ((Path("20"),), 6, 2)
    assert recovery.trouble == 50
    for step in range(41, 60):  # and a little later
        recovery.accept(step)
    assert actions(recovery, 59, 2) == ["skip", "skip"]
    last = recovery.reject(59, FOLDERS)
    assert (last.action, last.candidates) == ("stop", ())
    assert last.tried == "3 steps in a row were rejected, and 2 returns to earlier checkpoints did not help"


def test_the_only_checkpoint_is_tried_again() -> None:
    recovery = Recovery(patience=1, max_rollbacks=2, window=10)
    assert [recovery.reject(5, FOLDERS[:1]).candidates for _ in range(2)] == [(Path("20"),)] * 2


def test_a_window_past_the_trouble_all_is_forgiven() -> None:
    recovery = Recovery(patience=1, max_rollbacks=1, window=10)
    assert actions(recovery, 50, 1) == ["roll back"]
    recovery.accept(59)
    assert recovery.rollbacks == 1
    recovery.accept(60)
    assert recovery.rollbacks == 0
    assert actions(recovery, 70, 1) == ["roll back"]
    assert recovery.trouble == 70


def test_accepted_steps_end_a_row() -> None:
    recovery = Recovery(patience=2, max_rollbacks=1, window=10)
    for step in range(20):
        assert actions(recovery, step, 1) == ["skip"]
        recovery.accept(step + 1)
    nowhere = Recovery(patience=1, max_rollbacks=5, window=10).reject(3, [])
    assert (nowhere.action, nowhere.tried) == ("stop", "1 steps in a row were rejected")


def test_recovery_goes_on_from_its_state() -> None:
    recovery, resumed = Recovery(2, 3, 10), Recovery(2, 3, 10)
    for _ in range(3):
        recovery.reject(7, FOLDERS)
    resumed.load_state_dict(json.loads(json.dumps(recovery.state_dict())))
    assert resumed == recovery
    assert (resumed.rejected, resumed.rollbacks, resumed.trouble) == (1, 1, 7)
    with pytest.raises(KeyError):
        resumed.load_state_dict({"rejected": 0})
    assert resumed == recovery

"""Trouble injected into training: what is rejected leaves no trace, what is lost is taken from a checkpoint."""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import Faults, in_fork
from support.troubles import (
    TROUBLES,
    before_step,
    change_gradients,
    gradient_times_a_million,
    nan_in_a_gradient,
    nan_in_a_weight,
    one_token,
    rate_times_a_hundred,
)

from tinyllm import InputError
from tinyllm.backend import ignore_non_finite
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training import run_report
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Rejection, Rollback, StepMetrics
from tinyllm.training.metrics import MetricsFile, last_branch, read_metrics
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=12, context_length=8, num_layers=1, num_heads=2, hidden_size=16)
CONFIG = TrainConfig(
    steps=160, batch_size=8, warmup_steps=5, threads=1, eval_every=40, checkpoint_every=20, learning_rate=1e-2,
    watch_window=32, patience=3, sample_tokens=0,
)  # fmt: skip
TOKENIZER = CharTokenizer("abcdefghijkl")
# Each token is one or two further than the last: there is something to learn, and some noise is left.
TOKENS = (np.cumsum(np.random.default_rng(0).integers(1, 3, 4000)) % 12).astype(np.uint16)
SPLIT = (TOKENS[:3600], TOKENS[3600:])
AT = 100
"""The position of the first batch with trouble."""


class Events(Callback):
    """Keeps what it is told, and compares the bits before and after rejected steps."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.rejections: list[Rejection] = []
        self.rollbacks: list[Rollback] = []
        self.steps: list[int] = []
        self.before: Any = None

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)
        self.before = bits(self.trainer)

    def on_rejected(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)
        now = bits(self.trainer)
        assert self.before is None or same_but_the_planted(now, self.before)
        self.before = now

    def on_rollback(self, rollback: Rollback) -> None:
        self.rollbacks.append(rollback)
        self.before = None


def bits(trainer: Any) -> dict[str, bytes]:
    arrays = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    values = {name: array.tobytes() for name, array in arrays.items()}
    return values | {"steps": bytes([trainer.optimizer.steps, trainer.step])}


def same_but_the_planted(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether all bits are equal, but for a weight that the test itself has made NaN."""
    differing = [name for name in one if one[name] != other[name]]
    weights = [np.frombuffer(values["head.weight"], np.float32) for values in (one, other)]
    return not differing or (differing == ["head.weight"] and int((weights[0] != weights[1]).sum()) == 1)


def make(trouble: Any, run: Path | None = None, config: TrainConfig = CONFIG, callbacks: Any = ()) -> Trainer:
    """A Trainer with trouble at position AT; None: without."""
    if run is not None:
        run.mkdir(exist_ok=True)
    trainer = Trainer(TransformerLM(MODEL, config.seed), TOKENIZER, *SPLIT, config, run, callbacks)
    if trouble is not None:
        trouble(trainer, AT)
    for callback in callbacks:
        if isinstance(callback, Events):
            callback.trainer = trainer
    return trainer


def resumed(trainer: Trainer) -> Trainer:
    trainer.resume()
    return trainer


def non_finite(when: Callable[[int], bool]) -> Callable[[Trainer, int], None]:
    """Trouble: the gradients of the batches at these positions are infinite."""
    return lambda trainer, at: change_gradients(trainer, when, lambda array: array.fill(np.inf))


def validation_loss(trainer: Trainer) -> float:
    with trainer.engine:
        return trainer.evaluate().val_loss


@pytest.fixture(scope="module")
def clean() -> float:
    trainer = make(None)
    trainer.fit()
    return validation_loss(trainer)


@pytest.mark.parametrize(
    ("trouble", "threads"),
    list(zip(TROUBLES.values(), (2, 1, 2, 1, 1, 1), strict=True)),
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_trouble_is_rejected_without_a_trace_and_training_recovers(
    tmp_path: Path, trouble: Any, threads: int, clean: float
) -> None:
    events = Events()
    trainer = make(trouble, tmp_path / "run", replace(CONFIG, threads=threads), [events])
    trainer.fit()
    assert events.rejections
    assert {rejection.position for rejection in events.rejections} <= set(range(AT, AT + 26))
    assert events.steps[-1] == 160
    assert trainer.sampler.step > 160
    if trouble in (nan_in_a_gradient, gradient_times_a_million, one_token):
        assert [rejection.position for rejection in events.rejections] == [AT]
        assert not events.rollbacks
    else:
        assert events.rollbacks
        assert all(rollback.to_step % 20 == 0 for rollback in events.rollbacks)
    assert all(np.isfinite(array).all() for array in trainer.model.state_dict().values())
    # A few batches more or fewer make a difference of their own at so small a model.
    assert validation_loss(trainer) < 1.02 * clean


def test_a_rejected_step_changes_nothing_but_the_position() -> None:
    trainer = make(nan_in_a_gradient)
    with ignore_non_finite(), trainer.engine:
        for _ in range(AT):
            next(trainer.train_steps())
        before, watch = bits(trainer), json.dumps(trainer.watch.state_dict())
        rejection = next(trainer.train_steps())
        assert isinstance(rejection, Rejection)
        assert bits(trainer) == before
        assert json.dumps(trainer.watch.state_dict()) == watch
        assert (rejection.step, rejection.position) == (AT + 1, AT)
        assert math.isnan(rejection.grad_norm)
        assert math.isfinite(rejection.loss)
        assert "gradient norm is nan" in rejection.reason
        for mine, theirs in zip(rejection.batch, trainer.sampler.batch(AT), strict=True):
            assert (mine == theirs).all()
        metrics = next(trainer.train_steps())
        assert isinstance(metrics, StepMetrics)
        assert (metrics.step, trainer.step, trainer.sampler.step) == (AT + 1, AT + 1, AT + 2)


def test_the_step_after_a_rejected_one_sees_the_next_batch_and_its_own_rate() -> None:
    """As if the rejected batch had never been in the text."""
    one = make(nan_in_a_gradient)
    with ignore_non_finite(), one.engine:
        for _ in range(AT + 3):
            next(one.train_steps())
    other = make(None)
    with ignore_non_finite(), other.engine:
        for _ in range(AT + 2):
            if other.sampler.step == AT:
                other.sampler.step += 1
            next(other.train_steps())
    assert bits(one) == bits(other)


# ---- Rollbacks ---------------------------------------------------------------------------------


def test_rollbacks_go_back_further_skip_more_and_end(tmp_path: Path) -> None:
    events, run = Events(), tmp_path / "run"
    trainer = make(non_finite(lambda position: position >= AT + 5), run, callbacks=[events, MetricsFile(run)])
    with pytest.raises(InputError) as error:
        trainer.fit()
    for part in ("training diverged in step", "gradient norm is inf", "3 steps in a row were rejected",
                 "3 returns to earlier checkpoints did not help", "--learning-rate", "--warmup-steps"):  # fmt: skip
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert [(r.to_step, r.skipped, r.number) for r in events.rollbacks] == [
        (100, 3, 1),
        (80, 6, 2),
        (80, 12, 3),
    ]
    position = AT + 5
    for rollback in [*events.rollbacks, None]:
        mine, events.rejections = events.rejections[:3], events.rejections[3:]
        assert [rejection.position for rejection in mine] == [position, position + 1, position + 2]
        position += 3 + (rollback.skipped if rollback else 0)
    assert not events.rejections
    # Nothing that is newer than where it went back to is left, but the best.
    assert [folder.name for folder in keeping.checkpoints(run)] == ["step-00000080"]
    latest = keeping.read_link(run, "latest")
    assert latest is not None
    assert latest.name == "step-00000080"
    lines = read_metrics(run / "metrics.jsonl")
    assert sum(line.get("event") == "rejected" for line in lines) == 12
    assert [line["to_step"] for line in lines if line.get("event") == "rollback"] == [100, 80, 80]
    assert [line["step"] for line in last_branch(lines) if "loss" in line] == list(range(1, 81))


def test_rejections_that_are_not_in_a_row_are_no_reason_to_go_back(tmp_path: Path) -> None:
    events = Events()
    make(
        non_finite(lambda position: position >= AT and position % 3 > 0),
        tmp_path / "run",
        replace(CONFIG, steps=AT + 6),
        [events],
    ).fit()
    assert len(events.rejections) > 6
    assert not events.rollbacks


def test_without_a_folder_patience_ends_the_run() -> None:
    events = Events()
    trainer = make(nan_in_a_weight, callbacks=[events])
    with pytest.raises(InputError, match=r"step 101: the loss is nan; 3 steps in a row were rejected; lower"):
        trainer.fit()
    assert [rejection.position for rejection in events.rejections] == [100, 101, 102]


def test_thresholds_of_infinity_reject_nothing_finite(tmp_path: Path) -> None:
    events = Events()
    config = replace(CONFIG, watch_loss=math.inf, watch_norm=math.inf)
    make(gradient_times_a_million, tmp_path / "a", config, [events]).fit()
    assert events.rejections == []
    make(nan_in_a_gradient, tmp_path / "b", config, [events]).fit()
    assert len(events.rejections) == 1


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def damage(trainer: Trainer, at: int) -> None:
        nan_in_a_weight(trainer, at)
        before_step(trainer, remove)

    def remove(position: int) -> None:
        if position == AT:
            (run / "checkpoints/step-00000100/model.safetensors").write_bytes(b"")

    events = Events()
    make(damage, run, callbacks=[events]).fit()
    assert [rollback.to_step for rollback in events.rollbacks] == [80]


def test_the_best_checkpoint_survives_a_rollback(tmp_path: Path) -> None:
    """Training goes back before it, and comes to its step again."""
    run, config = tmp_path / "run", replace(CONFIG, eval_every=10, steps=60)
    told: list[tuple[int, float]] = []

    class Best(Callback):
        def on_rollback(self, rollback: Rollback) -> None:
            best = keeping.find(run, ("best",))
            told.append((rollback.to_step, best.name, keeping.load(best) is not None, trainer.best_loss))

    def trouble(position: int) -> None:
        if position == 55:
            trainer.best_loss = 1e-3  # of step 50: none is better from now on
            trainer.parameters["head.weight"].data[...] = np.nan

    trainer = make(None, run, config, [Best()])
    before_step(trainer, trouble)
    trainer.fit()
    assert told == [(40, "before-rollback-step-00000050", True, 1e-3)]
    best = keeping.find(run, ("best",))
    assert best.name == "before-rollback-step-00000050"
    assert trainer.best_loss == 1e-3
    state = json.loads((best / "training/state.json").read_text())
    assert state["step"] == 50
    names = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert names == ["before-rollback-step-00000050", "step-00000040", "step-00000060"]
    assert "per byte, in a step before it went back; the last, in step 60, is " in run_report.summary(trainer)


def test_a_best_that_was_set_aside_is_deleted_when_there_is_a_better_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(nan_in_a_weight, run, replace(CONFIG, eval_every=10, checkpoint_every=40)).fit()
    names = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert not [name for name in names if name.startswith("before")], names


# ---- Killed at any step ------------------------------------------------------------------------


class KilledError(Exception):
    """Not an interrupt: nothing is saved."""


@pytest.mark.parametrize("trouble", [nan_in_a_weight, rate_times_a_hundred], ids=lambda t: t.__name__)
def test_a_run_that_is_killed_around_a_rollback_ends_with_the_same_bits(tmp_path: Path, trouble: Any) -> None:
    config = replace(CONFIG, steps=130, eval_every=30, watch_window=32)

    def run_to_the_end(run: Path, kills: list[int]) -> Trainer:
        """Killed before so many calls of train_steps, counted from each start."""
        left = list(kills)
        while True:
            calls = left.pop(0) if left else 10**9

            def kill(position: int, calls: Iterator[int] = iter(range(calls))) -> None:  # noqa: B008
                if next(calls, None) is None:
                    raise KilledError

            trainer = make(trouble, run, config, [MetricsFile(run)])
            before_step(trainer, kill)
            if keeping.checkpoints(run):
                trainer.resume()
            try:
                trainer.fit()
            except KilledError:
                continue
            return trainer

    expected = run_to_the_end(tmp_path / "whole", [])
    counts = expected.recovery.state_dict(), expected.sampler.step, expected.best_loss
    # Around the rejections (calls 100 to 110) and soon after starting again from checkpoint 100 or 80.
    for number, kills in enumerate([[102], [106, 3, 2], [125, 30, 30]]):
        run = tmp_path / str(number)
        found = run_to_the_end(run, kills)
        assert bits(found) == bits(expected), kills
        assert (found.recovery.state_dict(), found.sampler.step, found.best_loss) == counts
        assert found.watch.state_dict() == expected.watch.state_dict()
        for link in ("best", "latest"):
            mine, other = keeping.find(run, (link,)), keeping.find(tmp_path / "whole", (link,))
            assert mine.name == other.name
            for file in ("model.safetensors", "training/optimizer.safetensors", "training/state.json"):
                assert (mine / file).read_bytes() == (other / file).read_bytes()


def test_rollback_counts_are_part_of_the_state(tmp_path: Path) -> None:
    """Interrupted between two rollbacks for the same trouble: the second goes back further all the same."""
    run = tmp_path / "run"

    class Stop(Events):
        def on_step(self, metrics: StepMetrics) -> None:
            if self.rollbacks and metrics.step == 102:
                raise KeyboardInterrupt

    trouble = non_finite(lambda position: position >= AT + 12 or position in range(AT + 3, AT + 6))
    stop, after = Stop(), Events()
    with pytest.raises(KeyboardInterrupt):
        make(trouble, run, callbacks=[stop]).fit()
    assert [rollback.to_step for rollback in stop.rollbacks] == [100]
    assert keeping.find(run, ("latest",)).name == "step-00000102-interrupted"
    resumed = make(trouble, run, callbacks=[after])
    resumed.resume()
    with pytest.raises(InputError):
        resumed.fit()
    # Step 102 is not a multiple of checkpoint_every, so an interrupt does not change where training goes back to.
    assert [rollback.to_step for rollback in after.rollbacks] == [80, 80]


@pytest.mark.forks
@pytest.mark.parametrize("kind", ["kill", "kill afterwards", "error"])
@pytest.mark.parametrize("operation", ["rename", "link", "flush_folder"])
def test_a_fault_at_any_operation_of_a_rollback_changes_no_bits(
    tmp_path: Path, operation: str, kind: str
) -> None:
    """It moves a link, sets the best checkpoint aside, and deletes those that are newer."""
    config = replace(CONFIG, steps=60, eval_every=10, checkpoint_every=20, watch_window=32)

    def begin(run: Path, callbacks: Any = ()) -> Trainer:
        trainer = Trainer(
            TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, config, run, [MetricsFile(run), *callbacks]
        )
        nan_in_a_weight(trainer, 55)
        return trainer

    run = tmp_path / "whole"
    run.mkdir()
    whole = begin(run)
    whole.fit()
    begun = tmp_path / "begun"
    begun.mkdir()

    class Stop(Callback):
        def on_step(self, metrics: StepMetrics) -> None:
            if metrics.step == 54:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(begun, [Stop()]).fit()
    assert keeping.find(begun, ("best",)).name == "step-00000050", "which a rollback sets aside"
    go_back = keeping.go_back
    for number in itertools.count(1):
        run = tmp_path / str(number)
        shutil.copytree(begun, run, symlinks=True)

        def work(run: Path = run, number: int = number) -> None:
            faults = Faults(operation, number, kind)

            def faulty(*arguments: Any) -> None:
                with faults:
                    go_back(*arguments)

            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(InputError):
                patch.setattr(keeping, "go_back", faulty)
                resumed(begin(run)).fit()
            if faults.calls < number:
                os._exit(3)

        if in_fork(work) == 3:
            break
        again = resumed(begin(run))
        again.fit()
        assert bits(again) == bits(whole)
        assert again.recovery.state_dict() == whole.recovery.state_dict()
        for link in ("best", "latest"):
            mine, other = keeping.find(run, (link,)), keeping.find(tmp_path / "whole", (link,))
            assert checkpoint.read(mine).files == checkpoint.read(other).files
        steps = [
            [(line.get("event"), line["step"]) for line in read_metrics(folder / "metrics.jsonl")]
            for folder in (run, tmp_path / "whole")
        ]
        assert steps[0] == steps[1]
        assert not list((run / "checkpoints").glob(".*.tmp"))
    assert number > 1

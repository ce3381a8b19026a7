"""What a run does when it is asked to stop: it says so at once, drops the step under way, and loses nothing else."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.interrupts import Interrupts
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.callbacks import Callback, Progress
from tinyllm.training.checkpoints import keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import StepMetrics
from tinyllm.training.metrics import MetricsFile, read_metrics
from tinyllm.training.objectives import NextToken
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=9, context_length=8, num_layers=1, num_heads=2, hidden_size=8, dropout=0.1)
TRAIN = TrainConfig(
    steps=9, batch_size=6, warmup_steps=2, threads=1, eval_every=3, checkpoint_every=3, learning_rate=5e-3
)
TOKENIZER = CharTokenizer("abcdefghi")
TOKENS = np.random.default_rng(0).integers(0, 9, 500).astype(np.uint16)
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = [
    "--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8", "--warmup-steps", "1",
    "--sample-tokens", "0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window each."""
    monkeypatch.setattr("tinyllm.training.micro_batches.MICRO_BATCH_TOKENS", 8)


def make(
    run: Path, threads: int = 1, objective: NextToken | None = None, callbacks: tuple[Callback, ...] = ()
) -> Trainer:
    run.mkdir(exist_ok=True)
    config = replace(TRAIN, threads=threads)
    model = TransformerLM(MODEL, config.seed)
    files = (MetricsFile(run), *callbacks)
    return Trainer(model, TOKENIZER, TOKENS[:400], TOKENS[400:], config, run, files, objective)


class Signals(NextToken):
    """Sends a signal from the micro-batch whose number is `at`, and counts those that are computed in this process."""

    calls = 0
    at = 0

    def __call__(self, model: Any, batch: Any) -> Any:
        type(self).calls += 1
        loss = super().__call__(model, batch)
        if type(self).calls == type(self).at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss


def signals(at: int) -> NextToken:
    """A new kind each time, since objectives are frozen and compared by their fields."""
    return type("NextToken", (Signals,), {"at": at})()


def contents(run: Path) -> dict[str, bytes]:
    folder = keeping.find(run)
    return {str(path.relative_to(run)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_metrics(run / "metrics.jsonl")
    ]


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.forks)], ids=["serial", "processes"]
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run without trouble, and its number of workers."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyllm.training.micro_batches.MICRO_BATCH_TOKENS", 8)
        make(run, request.param).fit()
    return run, request.param


@pytest.mark.parametrize("at", [1, 8, 20])
def test_no_micro_batch_follows_a_signal_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path, whole: tuple[Path, int], at: int
) -> None:
    expected, threads = whole
    objective = signals(at)
    trainer = make(tmp_path / "run", threads, objective)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert type(objective).calls == at  # type: ignore[attr-defined]
    resumed = make(tmp_path / "run", threads)
    resumed.resume()
    resumed.fit()
    assert contents(tmp_path / "run") == contents(expected)
    assert losses(tmp_path / "run") == losses(expected)


def test_the_same_trainer_goes_on_after_a_signal(tmp_path: Path, whole: tuple[Path, int]) -> None:
    """As in a notebook."""
    expected, threads = whole
    trainer = make(tmp_path / "run", threads, signals(8))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    with trainer.engine:
        trainer.evaluate()
    trainer.fit()
    assert contents(tmp_path / "run") == contents(expected)
    assert losses(tmp_path / "run") == losses(expected)


def test_workers_that_are_threads_hear_it_between_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllm.parallel.team.can_fork", lambda: False)
    begun = threading.Event()
    calls = []

    class Slow(NextToken):
        def __call__(self, model: Any, batch: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                begun.wait(10)
                os.kill(os.getpid(), signal.SIGINT)
            calls.append(time.monotonic())
            begun.set()
            time.sleep(0.05)
            return super().__call__(model, batch)

    trainer = make(tmp_path / "run", 2, Slow())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert len(calls) == 1  # of three of the other worker's


def test_a_step_whose_update_has_begun_is_made_whole(tmp_path: Path, whole: tuple[Path, int]) -> None:
    expected, threads = whole
    trainer = make(tmp_path / "run", threads)
    update = trainer.engine.update  # type: ignore[attr-defined]

    def signalled(*arguments: Any) -> None:
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*arguments)

    trainer.engine.update = signalled  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 5
    resumed = make(tmp_path / "run", threads)
    resumed.resume()
    assert resumed.step == 5
    resumed.fit()
    assert contents(tmp_path / "run") == contents(expected)


@pytest.mark.parametrize(
    ("saves", "seconds", "said"),
    [
        (True, 20.4, "stopping after this step, about 20 s, and saving; again to quit without saving\n"),
        (True, 0.2, "stopping after this step, and saving; again to quit without saving\n"),
        (False, 0.0, "stopping after this step; again to quit without waiting\n"),
    ],
)
def test_what_is_waited_for_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool, seconds: float, said: str
) -> None:
    log = tmp_path / "log"

    def work(interrupts: Interrupts) -> None:
        with interrupts.put_off("this step", seconds):
            os.kill(os.getpid(), signal.SIGINT)
            assert log.read_text() == said

    with open(log, "w", encoding="utf-8") as stream, Interrupts(saves) as interrupts:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(KeyboardInterrupt):
            work(interrupts)
        monkeypatch.undo()


def test_a_signal_that_python_swallows_is_raised_at_the_next_look() -> None:
    """As it does with what is raised in `__del__`."""
    done = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.put_off(), interrupts.droppable():
            for number in interrupts.between([1, 2, 3]):
                done.append(number)
                with contextlib.suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        work(interrupts)
    assert done == [1]


@pytest.mark.parametrize(("threads", "stderr"), [("1", "closed"), ("2", "pipe")])
def test_a_step_of_many_micro_batches_hears_a_signal(tmp_path: Path, threads: str, stderr: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [sys.executable, "-m", "tinyllm", "train", "--data", "text.txt", "--out", "run", *TINY,
               "--threads", threads, "--batch-size", "128", "--gradient-accumulation", "3000"]  # fmt: skip
    root = str(Path(tinyllm.__file__).parents[1])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if stderr == "closed" else []
    process = subprocess.Popen(
        [*closed, *command], cwd=tmp_path, env=environment, text=True,
        stderr=subprocess.PIPE if stderr == "pipe" else None,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/latest").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # into the first step
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert time.monotonic() - begun < 5  # a step takes some twenty seconds
    if stderr == "pipe":
        said, last = err.splitlines()[-2:]
        # Between making the batch and the first micro-batch it waits for that.
        assert re.fullmatch(
            "stopping (at once|after this step), and saving; again to quit without saving", said
        )
        assert re.fullmatch(r"stopped; go on from step 0 with: \S+ -m tinyllm train --resume --out run", last)
    keeping.find_valid(tmp_path / "run", training=True)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"stopping" not in path.read_bytes()


# ---- Lines by the clock ------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("tinyllm.training.callbacks.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "lines"), [(0.01, 4), (25.0, 126), (31.0, 250)])
def test_slow_steps_have_lines_by_the_clock(clock: list[float], seconds: float, lines: int) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.on_start(0, 250)
    for step in range(1, 251):
        clock[0] += seconds
        progress.on_step(StepMetrics(step, 1.0, 1.0, 1.0, 1.0))
    shown = [int(line.split()[1].removesuffix("/250")) for line in stream.getvalue().splitlines()]
    assert shown[0] == 1
    assert {100, 200, 250} <= set(shown)
    assert len(shown) == lines
    assert max(later - earlier for earlier, later in pairwise(shown)) * seconds < 30 + seconds


def test_a_line_of_metrics_is_in_the_file_at_once(tmp_path: Path) -> None:
    found = []

    class Reads(Callback):
        def on_step(self, metrics: StepMetrics) -> None:
            found.append(
                (tmp_path / "run/metrics.jsonl").read_text().endswith("\n") and losses(tmp_path / "run")[-1]
            )

    make(tmp_path / "run", callbacks=(Reads(),)).fit()
    assert [line["step"] for line in found if line] == list(range(1, 10))


@pytest.mark.parametrize(("seconds", "said"), [(0.5, []), (25.0, ["step 2  evaluating"])])
def test_an_evaluation_that_takes_a_while_is_said(
    clock: list[float], seconds: float, said: list[str]
) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.on_start(0, 250)
    clock[0] += 2 * seconds
    progress.on_evaluation_start(2)
    assert stream.getvalue().splitlines() == said


# ---- Checkpoints by the clock ------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_checkpoints_by_the_clock_change_no_bit(tmp_path: Path, whole: tuple[Path, int]) -> None:
    expected, threads = whole

    class Kill(Callback):
        def on_step(self, metrics: Any) -> None:
            if metrics.step == 6:
                raise Killed

    trainer = make(tmp_path / "run", threads, callbacks=(Kill(),))
    trainer.checkpoints.seconds = 1e-9
    with pytest.raises(Killed):
        trainer.fit()
    assert [keeping.step_of(folder) for folder in keeping.checkpoints(tmp_path / "run")] == [0, 3, 5]
    assert keeping.scheduled(tmp_path / "run", 3)[-1].name == "step-00000003"
    resumed = make(tmp_path / "run", threads)
    resumed.resume()
    assert resumed.step == 5
    resumed.checkpoints.seconds = 1e-9
    resumed.fit()
    assert contents(tmp_path / "run") == contents(expected)
    assert losses(tmp_path / "run") == losses(expected)
    names = [[path.name for path in keeping.checkpoints(run)] for run in (tmp_path / "run", expected)]
    assert names[0] == names[1]


def test_the_clock_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(tmp_path / "run").checkpoints.seconds == 600
    now = [1000.0]
    monkeypatch.setattr("tinyllm.training.checkpoints.run_checkpoints.time.monotonic", lambda: now[0])
    checkpoints = make(tmp_path / "run").checkpoints
    due = []
    for seconds in (0.0, 599.0, 1.0, 0.0):
        now[0] += seconds
        due.append(checkpoints.is_due(1))
    assert due == [False, False, True, True]
    checkpoints.save(1, lambda: make(tmp_path / "run")._collect())
    assert not checkpoints.is_due(1)
    assert checkpoints.is_due(3)
    checkpoints.seconds = 0
    now[0] += 1e9
    assert not checkpoints.is_due(1)

"""Runs in a hostile world: full disks, folders that vanish, clocks that jump, signals, and two runs in one folder."""

import errno
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import InputError
from tinyllm.cli import main as cli
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system import storage
from tinyllm.system.interrupts import HurriedInterrupt, Interrupts, Terminated, is_termination
from tinyllm.system.lock import FolderLock
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.callbacks import Callback, Progress
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Evaluation, StepMetrics
from tinyllm.training.metrics import MetricsFile, read_metrics
from tinyllm.training.run_folder import RunFolder
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=9, context_length=8, num_layers=1, num_heads=2, hidden_size=8, dropout=0.1)
TRAIN = TrainConfig(
    steps=12, batch_size=4, warmup_steps=2, threads=1, eval_every=4, checkpoint_every=3, learning_rate=5e-3
)
TOKENIZER = CharTokenizer("abcdefghi")
TOKENS = np.random.default_rng(0).integers(0, 9, 500).astype(np.uint16)
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = [
    "--batch-size", "4", "--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8",
    "--warmup-steps", "1", "--threads", "1", "--sample-tokens", "0",
]  # fmt: skip


def make(run: Path, *callbacks: Callback, config: TrainConfig = TRAIN) -> Trainer:
    run.mkdir(exist_ok=True)
    model = TransformerLM(MODEL, config.seed)
    return Trainer(model, TOKENIZER, TOKENS[:400], TOKENS[400:], config, run, callbacks)


class At(Callback):
    """Does something after a step, and keeps the messages."""

    def __init__(self, actions: dict[int, Callable[[], Any]]) -> None:
        self.actions = actions
        self.messages: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.actions.get(metrics.step, lambda: None)()

    def on_message(self, line: str) -> None:
        self.messages.append(line)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the best and the latest checkpoint of a run."""
    found = {link: keeping.read_link(folder, link) for link in keeping.LINKS}
    assert all(found.values())
    return {
        f"{path.name}/{file.relative_to(path)}": file.read_bytes()
        for path in found.values()
        if path is not None
        for file in path.rglob("*")
        if file.is_file()
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without trouble."""
    run = tmp_path_factory.mktemp("whole") / "run"
    make(run, MetricsFile(run)).fit()
    return run


def same(run: Path, whole: Path) -> None:
    """The runs end with the same bits and the same metrics."""
    assert contents(run) == contents(whole)
    assert metrics(run) == metrics(whole)


# ---- Interrupts --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(13))
def test_stopped_after_any_step_a_run_ends_with_the_same_files(
    tmp_path: Path, whole: Path, stop: int
) -> None:
    run = tmp_path / "run"

    def interrupt() -> None:
        raise KeyboardInterrupt

    class Start(Callback):
        def on_start(self, step: int, total_steps: int) -> None:
            if stop == 0:
                interrupt()

    with pytest.raises(KeyboardInterrupt):
        make(run, MetricsFile(run), At({stop: interrupt}), Start()).fit()
    names = [path.name for path in keeping.checkpoints(run)]
    assert names[-1] == f"step-{stop:08}-interrupted"
    resumed = make(run, MetricsFile(run))
    resumed.resume()
    assert resumed.step == stop
    resumed.fit()
    same(run, whole)
    assert [p.name for p in keeping.checkpoints(run)] == [p.name for p in keeping.checkpoints(whole)]


def test_a_whole_checkpoint_is_newer_than_an_interrupted_one_of_its_step(tmp_path: Path, whole: Path) -> None:
    """A kill came after the save that follows an interrupt, and before the interrupted one was removed."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    folder = keeping.folder_of(run, 12)
    shutil.copytree(folder, keeping.folder_of(run, 12, interrupted=True))
    found = keeping.find_valid(run, training=True)
    assert found.folder == folder
    make(run).resume()


def test_a_damaged_checkpoint_is_in_nobodys_way_when_training_comes_to_its_step_again(
    tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    (keeping.folder_of(run, 12) / "model.safetensors").write_bytes(b"damaged")
    resumed = make(run, MetricsFile(run))
    resumed.resume()
    assert resumed.step == 9
    assert keeping.step_of(keeping.checkpoints(run)[-1]) == 9
    resumed.fit()
    same(run, whole)


@pytest.mark.parametrize(
    ("number", "code", "group"),
    [
        (signal.SIGTERM, 143, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGINT, 130, True),
        (signal.SIGHUP, 143, True),
    ],
)
def test_signals_save_and_say_how_to_go_on(tmp_path: Path, number: int, code: int, group: bool) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [sys.executable, "-m", "tinyllm", "train", "--data", "text.txt", "--out", "run", *TINY,
               "--steps", "100000", "--threads", "2", "--checkpoint-every", "100000"]  # fmt: skip
    root = str(Path(tinyllm.__file__).parents[1])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Whoever runs the tests may ignore it, as nohup does, and children inherit that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    metrics_file = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics_file.exists() and metrics_file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    last = err.splitlines()[-1]
    assert process.returncode == code, err
    found = keeping.find_valid(tmp_path / "run", training=True)
    step = keeping.step_of(found.folder)
    again = f"{shlex.quote(sys.executable)} -m tinyllm train --resume --out run"
    assert last == f"stopped; go on from step {step} with: {again}"
    assert step == max(line["step"] for line in metrics(tmp_path / "run")) > 0


def test_a_second_signal_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    kill = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    save = checkpoint.save

    def slow(folder: Path, *args: Any) -> Path:
        if "interrupted" in folder.name:
            kill()
        return save(folder, *args)

    monkeypatch.setattr(checkpoint, "save", slow)
    with pytest.raises(HurriedInterrupt) as stop:
        make(run, At({4: kill})).fit()
    assert is_termination(stop.value)
    assert [path.name for path in keeping.checkpoints(run)] == [f"step-{step:08}" for step in (0, 3)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_interrupts_are_put_off() -> None:
    done = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.put_off():
            with interrupts.put_off():
                os.kill(os.getpid(), signal.SIGTERM)
            done.append("inner")
        done.append("outer")

    with Interrupts() as interrupts, pytest.raises(Terminated):
        work(interrupts)
    assert done == ["inner"]
    with Interrupts(), pytest.raises(KeyboardInterrupt) as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert not is_termination(stop.value)
    # Another thread may train too; it has no signals to handle.
    thread = threading.Thread(target=lambda: done.append(Interrupts().__enter__()))
    thread.start()
    thread.join()
    assert len(done) == 2


# ---- A disk that is full, and a folder that vanishes -------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A disk that takes half of what is written, and then no more, while `full["yes"]`."""
    state = {"yes": False}
    write = storage.write_bytes

    def write_half(file: Any, content: bytes) -> None:
        if state["yes"]:
            write(file, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    monkeypatch.setattr(storage, "write_bytes", write_half)
    return state


def test_a_disk_that_is_full_for_a_while_loses_nothing(
    tmp_path: Path, whole: Path, full: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at = At({2: lambda: full.update(yes=True), 10: lambda: full.update(yes=False)})
    make(run, at, MetricsFile(run)).fit()
    assert metrics(run) == metrics(whole)
    assert keeping.load(run)[0].state_dict().keys() == keeping.load(whole)[0].state_dict().keys()
    mine, other = contents(run), contents(whole)
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        assert mine[f"step-00000012/{file}"] == other[f"step-00000012/{file}"]
    assert len(at.messages) == 5  # after 3, 4, 6, 8 and 9 steps
    for message in at.messages:
        assert message.startswith("not saved: ")
        assert (
            "No space left on device; free space or mend the folder; --resume goes on from step 0" in message
        )
        assert message.endswith("Training goes on, and tries again at the next checkpoint")
    told = "metrics.jsonl: cannot be written: No space left on device; its lines are kept"
    assert capsys.readouterr().err.count(told) == 1
    assert not list(run.rglob("*.tmp"))


def test_the_best_is_the_best_of_those_that_could_be_saved(
    tmp_path: Path, full: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer = make(run, At({3: lambda: full.update(yes=True), 5: lambda: full.update(yes=False)}))
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(trainer, "evaluate", lambda: Evaluation(trainer.step, next(losses), 0.0, 0.0, 0.0))
    trainer.fit()
    assert (trainer.best_loss, trainer.best_step) == (2.0, 12)
    assert keeping.step_of(keeping.find(run, ("best",))) == 12


def test_an_interrupt_after_a_save_writes_no_other(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make(run)
    trainer.save()
    trainer.save(interrupted=True)
    assert [path.name for path in keeping.checkpoints(run)] == ["step-00000000"]


def test_a_disk_that_stays_full_is_an_error_at_the_end(
    tmp_path: Path, whole: Path, full: dict[str, bool]
) -> None:
    run = tmp_path / "run"
    trainer = make(run, At({7: lambda: full.update(yes=True)}), MetricsFile(run))
    with pytest.raises(InputError, match=r"step-00000012: .*No space left .*--resume goes on from step 6"):
        trainer.fit()
    full["yes"] = False
    resumed = make(run, MetricsFile(run))
    resumed.resume()
    assert resumed.step == 6
    resumed.fit()
    same(run, whole)


def test_a_disk_that_is_full_from_the_start_is_an_error_at_once(
    tmp_path: Path, full: dict[str, bool]
) -> None:
    at = At({1: lambda: pytest.fail("it trains")})
    full["yes"] = True
    with pytest.raises(InputError, match=r"No space left .*nothing is saved yet"):
        make(tmp_path / "run", at).fit()


def test_a_full_disk_at_an_interrupt_is_an_error(tmp_path: Path, full: dict[str, bool]) -> None:
    def stop() -> None:
        full["yes"] = True
        raise KeyboardInterrupt

    with pytest.raises(InputError, match=r"No space left .*--resume goes on from step 4"):
        make(tmp_path / "run", At({5: stop})).fit()


def test_lines_that_wait_are_in_the_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.jsonl alone cannot be written, and the run is killed then."""
    run = tmp_path / "run"

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    write = storage.write_bytes

    def refuse_metrics(file: Any, content: bytes) -> None:
        if file.name == str(run / "metrics.jsonl"):
            write(file, content[:10])
            raise OSError(errno.EIO, "Input/output error")
        write(file, content)

    with monkeypatch.context() as patch:
        at = At({5: lambda: patch.setattr(storage, "write_bytes", refuse_metrics), 11: kill})
        file = MetricsFile(run)
        patch.setattr(file, "on_end", lambda: None)  # a kill runs nothing
        with pytest.raises(Killed):
            make(run, at, file).fit()
    assert file._file is not None
    file._file.close()
    assert len(metrics(run)) < 7
    resumed = make(run, MetricsFile(run))
    resumed.resume()
    resumed.fit()
    same(run, whole)


@pytest.mark.parametrize("vanish", [2, 4, 6, 11, 12])
def test_a_folder_that_vanishes_is_made_again(tmp_path: Path, whole: Path, vanish: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with RunFolder(run) as run_folder:
        run_folder.write({"model": MODEL, "train": TRAIN})
        settings = (run / "run.toml").read_bytes()
        at = At({vanish: lambda: shutil.rmtree(run)})
        make(run, run_folder, at, MetricsFile(run)).fit()
        assert not at.messages
        other = FolderLock(run)
        with pytest.raises(InputError, match=f"process {os.getpid()} trains in this folder"):
            other.hold()
    assert metrics(run) == metrics(whole)
    assert (run / "run.toml").read_bytes() == settings
    latest = keeping.find_valid(run, training=True)
    assert latest.files == keeping.find_valid(whole, training=True).files
    keeping.load(run)


def test_a_folder_that_became_a_file_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def spoil() -> None:
        shutil.rmtree(run)
        run.write_text("")

    run_folder = RunFolder(run)
    at = At({4: spoil, 10: run.unlink})
    with run_folder:
        make(run, run_folder, at, MetricsFile(run)).fit()
    assert len(at.messages) == 4  # after 4, 6, 8, 9 steps
    assert "nothing is saved yet" in at.messages[-1]
    assert keeping.step_of(keeping.find(run)) == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_dev_full_as_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    for out in ("/dev/full", "/dev/full/run"):
        assert cli.main(["train", "--data", str(tmp_path / "text.txt"), "--out", out, *TINY]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"tinyllm: error: {out}: cannot be written: ")
        assert err.count("\n") == 1


QUOTA = """
import resource, sys
from tinyllm.training import callbacks
from tinyllm.cli import main as cli
def limit(self, metrics):
    if metrics.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
    if metrics.step == int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
callbacks.Progress.on_step = limit
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits here")
def test_a_quota_on_the_size_of_files(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    root = str(Path(tinyllm.__file__).parents[1])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    arguments = ["train", "--data", "text.txt", *TINY, "--steps", "12", "--checkpoint-every", "3"]

    def run(until: int, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", QUOTA, str(until), *arguments, "--out", out]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    for_a_while, always = run(10, "b"), run(99, "c")
    assert (for_a_while.returncode, always.returncode) == (0, 2), always.stderr
    assert for_a_while.stderr.count("not saved: ") == 2
    assert "File too large" in for_a_while.stderr
    assert [line["step"] for line in metrics(tmp_path / "b") if "loss" in line] == list(range(1, 13))
    assert re_error(always.stderr).endswith("--resume goes on from step 3")
    again = ["train", "--resume", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "c")]
    assert cli.main(again) == 0
    assert metrics(tmp_path / "b") == metrics(tmp_path / "c")
    (mine, other) = (keeping.find_valid(tmp_path / name, training=True).files for name in "bc")
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert mine[file] == other[file]


def re_error(err: str) -> str:
    """The one line that says what is wrong."""
    (line,) = [line for line in err.splitlines() if line.startswith("tinyllm: error: ")]
    return line


def test_parameters_that_the_last_step_spoils_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step comes afterwards that the watch could reject."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *TINY, "--steps", "1",
               "--optimizer", "sgd", "--learning-rate", "1e300", "--warmup-steps", "0"]  # fmt: skip
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert (
        "the validation loss is nan: the last step has spoiled the parameters; lower --learning-rate" in err
    )
    assert "the parameters after step 1 are not finite, so they are not saved" in re_error(err)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"val_loss": null' in text
    assert "NaN" not in text


def test_a_log_that_nobody_can_read_or_write_does_not_end_the_run(tmp_path: Path) -> None:
    """It may be on the disk that is full, or go to a pipe whose reader has left."""
    (tmp_path / "text.txt").write_text(TEXT)
    root = str(Path(tinyllm.__file__).parents[1])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    reader, writer = os.pipe()
    os.close(reader)
    logs = {"pipe": writer}
    if Path("/dev/full").exists():
        logs["full"] = os.open("/dev/full", os.O_WRONLY)
    for name, log in logs.items():
        command = [sys.executable, "-m", "tinyllm", "train", "--data", "text.txt", "--out", name, *TINY,
                   "--steps", "200", "--eval-every", "50"]  # fmt: skip
        subprocess.run(command, cwd=tmp_path, env=environment, stderr=log, check=False)
        os.close(log)
        assert keeping.step_of(keeping.find(tmp_path / name)) == 200


# ---- Clocks, and other runs --------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = iter([1e9, 0.0, -1e9, 4e9] * 10_000)
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: next(jumps))
    run = tmp_path / "run"
    make(run, MetricsFile(run), Progress(line_every=2)).fit()
    monkeypatch.undo()
    same(run, whole)


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    first = ["train", *out, *TINY, "--steps", "6", "--checkpoint-every", "2"]

    def second(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            for arguments in (["train", "--resume", *out], [*first, "--overwrite"]):
                capsys.readouterr()
                assert cli.main(arguments) == 2
                assert re_error(capsys.readouterr().err) == (
                    f"tinyllm: error: {tmp_path / 'run'}: process {os.getpid()} trains in this folder; wait until it "
                    "has ended, or give another --out"
                )
            assert cli.main(["sample", str(tmp_path / "run"), "--tokens", "2"]) == 0  # reading is no harm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step", lambda self, metrics: second(metrics))
        assert cli.main(first) == 0
    assert cli.main(["train", "--resume", *out]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_metrics_of_another_run_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder was deleted, and another run has begun in one of the same name."""
    run = tmp_path / "run"
    run.mkdir()
    files = MetricsFile(run), MetricsFile(run)
    for number, file in enumerate(files):
        file.on_start(0, 4)
        file.on_step(StepMetrics(1, number, 1.0, 1.0, 1.0))
        if number == 0:
            shutil.rmtree(run)
            run.mkdir()
    for number in (0, 1, 0):
        files[number].on_step(StepMetrics(2, number, 1.0, 1.0, 1.0))
    assert [line["loss"] for line in metrics(run)] == [1, 1]
    assert "somebody else has made another file of this name" in capsys.readouterr().err
    assert len(files[0].state_dict()["waiting"]) == 2  # not lost: they are in its checkpoints
    (run / "metrics.jsonl").unlink()
    files[0].on_end()
    assert [line["loss"] for line in metrics(run)] == [0, 0, 0]
    files[1].on_end()


@pytest.mark.forks
def test_forks_do_not_hold_the_lock(tmp_path: Path) -> None:
    """A worker may live on for a moment when the run is killed; the next run must not wait for it."""
    holder = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from tinyllm.system.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); lock.hold()\n"
        "if os.fork():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    root = str(Path(tinyllm.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    )
    assert process.wait() == -signal.SIGKILL
    lock = FolderLock(tmp_path)
    try:
        lock.hold()
        assert json.loads((tmp_path / ".lock").read_text()) == os.getpid()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        lock.release()


@pytest.mark.links
@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_a_run_that_was_copied_with_its_links_followed_goes_on(tmp_path: Path, how: str) -> None:
    """`scp -r` makes folders of the links."""
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--data", str(tmp_path / "text.txt"), *TINY, "--checkpoint-every", "2"]
    assert cli.main(["train", *given, "--out", str(tmp_path / "there"), "--steps", "4"]) == 0
    run = tmp_path / "here"
    shutil.copytree(tmp_path / "there", run, symlinks=False)
    assert (run / "latest").is_dir()
    assert not (run / "latest").is_symlink()
    assert cli.main(["train", how, *given, "--out", str(run), "--steps", "6"]) == 0
    for link in keeping.LINKS:
        assert (run / link).is_symlink()
    assert keeping.step_of(keeping.find(run)) == 6


# ---- Threads -----------------------------------------------------------------------------------


def test_the_number_of_threads_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    make(run, config=replace(TRAIN, steps=2, threads=3)).fit()
    at = At({})
    same_threads = make(run, at, config=replace(TRAIN, threads=0))
    same_threads.resume()
    assert same_threads.threads == same_threads.engine.size == len(same_threads.engine.shares) == 3
    assert at.messages == []
    other = make(run, at, config=replace(TRAIN, threads=2))
    other.resume()
    assert other.threads == other.engine.size == 2
    assert at.messages == ["the run had 3 threads and goes on with 2: the same steps, rounded otherwise"]


# ---- What is lost least ------------------------------------------------------------------------


class Quota:
    """A disk on which the checkpoints of a run may take so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, limit: float) -> None:
        self.run, self.limit = run, limit
        self.write = storage.write_new
        monkeypatch.setattr(storage, "write_new", self)

    def used(self) -> int:
        return sum(file.stat().st_size for file in (self.run / "checkpoints").rglob("*") if file.is_file())

    def __call__(self, path: Path, content: bytes) -> None:
        if "checkpoints" in path.parts and self.used() + len(content) > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.write(path, content)


def test_older_checkpoints_make_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the newest, the best and a new one; at the end the newest is that of the last step."""
    quota = Quota(monkeypatch, tmp_path, math.inf)
    at = At({2: lambda: setattr(quota, "limit", 3.2 * quota.used())})
    trainer = make(tmp_path, at)
    trainer.fit()
    assert trainer.checkpoints.saved_step == TRAIN.steps
    assert sum("older checkpoints were removed to make room" in line for line in at.messages) >= 1
    names = {keeping.step_of(folder) for folder in keeping.checkpoints(tmp_path)}
    assert TRAIN.steps in names
    assert trainer.best_step in names
    keeping.find_valid(tmp_path, training=True)


def test_no_room_is_made_of_the_newest_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, config=replace(TRAIN, steps=6))
    trainer.fit()
    best, latest = (keeping.read_link(tmp_path, link) for link in ("best", "latest"))
    assert best is not None
    assert latest is not None
    Quota(monkeypatch, tmp_path, 0)
    trainer.step = 7
    with pytest.raises(InputError, match=r"No space left.*--resume goes on from step 6"):
        trainer.save()
    assert best.exists()
    assert keeping.find_valid(tmp_path, training=True).folder == latest


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    make(tmp_path).fit()
    newest = keeping.find_valid(tmp_path, training=True).folder
    read_file = storage.read_file

    def unreadable(path: Path, largest: int | None = None) -> bytes:
        if newest.name in path.parts and path.name == checkpoint.MODEL:
            raise OSError(code, os.strerror(code))
        return read_file(path, largest)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_file", unreadable)
        with pytest.raises(InputError, match=rf"cannot be read: .*; mend that, or remove .*{newest.name}"):
            make(tmp_path).resume()
        # For a look at the model any checkpoint will do.
        assert keeping.find_valid(tmp_path).folder != newest
    assert keeping.find_valid(tmp_path, training=True).folder == newest


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    once = iter([np.nan])
    at = At({6: lambda: trainer.parameters["norm.weight"].data.__setitem__(0, next(once, 1.0))})
    trainer = make(tmp_path, at)
    trainer.fit()
    assert any("not saved: the parameters after step 6 are not finite" in line for line in at.messages)
    for folder in keeping.checkpoints(tmp_path):
        model, _ = keeping.load(folder)
        assert all(np.isfinite(p.data).all() for p in model.parameters())
    trainer.parameters["norm.weight"].data[0] = np.inf
    trainer.step = 13
    with pytest.raises(
        InputError, match=r"the parameters after step 13 are not finite.*goes on from step 12"
    ):
        trainer.save()


@pytest.mark.forks
def test_a_killed_worker_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    train_steps = Trainer.train_steps

    def killing(self: Trainer) -> Any:
        if self.step == 7:
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)
        return train_steps(self)

    monkeypatch.setattr(Trainer, "train_steps", killing)
    small = [*TINY, "--threads", "2", "--steps", "20", "--checkpoint-every", "5"]
    assert cli.main(["train", "--data", "text.txt", "--out", "run", *small]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "exit code -9" in line
    assert "out of memory" in line
    assert line.endswith("go on with: tinyllm train --resume --out run")
    monkeypatch.setattr(Trainer, "train_steps", train_steps)
    assert cli.main(["train", "--resume", "--out", "run"]) == 0

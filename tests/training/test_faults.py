"""Faults: an error, half a write or a kill at every operation of a save, and damage to every byte of what was saved.

Afterwards there is always a checkpoint that loads, and it is exactly one that was written.
benchmarks/survival/faults.py does all of what is sampled here.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import KILLED, KINDS, OPERATIONS, Faults, flips, in_fork, truncations

from tinyllm import InputError
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system import storage
from tinyllm.system.toml_files import format_toml, write_toml
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import StepMetrics
from tinyllm.training.metrics import METRICS, MetricsFile, read_metrics
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=5, context_length=4, num_layers=1, num_heads=1, hidden_size=4)
TRAIN = TrainConfig(
    steps=6, batch_size=2, warmup_steps=1, threads=1, eval_every=2, checkpoint_every=2, keep_checkpoints=1
)
TOKENIZER = CharTokenizer("abcde")
TOKENS = np.random.default_rng(0).integers(0, 5, 100).astype(np.uint16)
Files = dict[str, bytes]


class Stop(Callback):
    """Stops after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.step:
            raise KeyboardInterrupt


def make(run: Path, *callbacks: Callback) -> Trainer:
    run.mkdir(exist_ok=True)
    model = TransformerLM(MODEL, 1)
    return Trainer(model, TOKENIZER, TOKENS[:80], TOKENS[80:], TRAIN, run, [MetricsFile(run), *callbacks])


def resumed(run: Path, *callbacks: Callback) -> Trainer:
    trainer = make(run, *callbacks)
    trainer.resume()
    return trainer


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after three of its six steps, with a best, a scheduled and an interrupted checkpoint."""
    run = tmp_path_factory.mktemp("old") / "run"
    with pytest.raises(KeyboardInterrupt):
        make(run, Stop(3)).fit()
    assert [path.name for path in keeping.checkpoints(run)] == [
        "step-00000002",
        "step-00000003-interrupted",
    ]
    return run


class Keep(Callback):
    """Keeps the files of every checkpoint that a run has after a step and in the end."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.found: dict[str, Files] = {}

    def on_step(self, metrics: StepMetrics) -> None:
        self.on_end()

    def on_end(self) -> None:
        for path in keeping.checkpoints(self.run):
            self.found[path.name] = dict(checkpoint.read(path).files)


@pytest.fixture(scope="module")
def whole(old: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Files]]:
    """The run's end, when nothing disturbs it, and the files of each checkpoint on the way."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(old, run, symlinks=True)
    keep = Keep(run)
    resumed(run, keep).fit()
    assert keep.found.keys() == {
        "step-00000002", "step-00000003-interrupted", "step-00000004", "step-00000006"
    }  # fmt: skip
    return run, keep.found


def is_one_that_was_written(run: Path, written: dict[str, Files]) -> str:
    """The name of the run's newest valid checkpoint, found to be exactly what was written under it."""
    for links in ((), ("best", "latest")):
        found = keeping.find_valid(run, links, training=True)
        assert found.files == written[found.folder.name]
        assert not found.passed_over
    keeping.load(run)
    return keeping.find_valid(run, training=True).folder.name


def lines(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(run / METRICS)
    ]


@pytest.mark.forks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "operation", [name for name in OPERATIONS if name != "exchange"]
)  # no run replaces a folder
def test_a_fault_at_any_operation_leaves_the_old_or_the_new(
    tmp_path: Path, old: Path, whole: tuple[Path, dict[str, Files]], operation: str, kind: str
) -> None:
    """In an evaluation, its line of metrics, and a save that makes links and removes two checkpoints."""
    end, written = whole
    found = []
    for number in itertools.count(1):
        run = tmp_path / str(number)
        shutil.copytree(old, run, symlinks=True)
        trainer = resumed(run)
        faults = Faults(operation, number, kind)

        def work(trainer: Trainer = trainer, faults: Faults = faults) -> None:
            with trainer.engine:
                trainer._begin()
                trainer._notify("on_step", next(trainer.train_steps()))
                with faults:
                    trainer._after_step()
            trainer._notify("on_end")

        killed = kind.startswith("kill") and in_fork(work) == KILLED
        if not kind.startswith("kill"):
            work()
        found.append(is_one_that_was_written(run, written))
        if not killed and faults.calls < number:
            break
        # Whatever happened, the run goes on from what is there, and ends as if nothing had: seen for some.
        if number % 4 != 1:
            continue
        again = resumed(run)
        best = keeping.read_link(run, "best")
        assert best is not None
        assert keeping.step_of(best) == again.best_step
        again.fit()
        assert is_one_that_was_written(run, written) == "step-00000006"
        assert not list(run.rglob("*.tmp"))
        assert sorted(path.name for path in run.rglob("*")) == sorted(path.name for path in end.rglob("*"))
        assert lines(run) == lines(end)
    assert found[-1] == "step-00000004"
    assert set(found) <= {"step-00000003-interrupted", "step-00000004"}
    assert len(found) > 1


@pytest.mark.forks
def test_a_kill_amid_a_removal_leaves_no_half_checkpoint(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(old, run, symlinks=True)

    def kill(folder: Path, ignore_errors: bool) -> None:
        (folder / "config.json").unlink()
        os._exit(KILLED)

    def work() -> None:
        monkeypatch.setattr(shutil, "rmtree", kill)
        (run / "best").unlink()
        keeping.prune(run)

    assert in_fork(work) == KILLED
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert sorted(name.startswith(".step-00000002") for name in names) == [False, True]
    assert keeping.find_valid(run, training=True).passed_over == ()
    resumed(run).fit()
    assert not list(run.rglob("*.tmp"))


@pytest.mark.forks
@pytest.mark.parametrize("operation", ["write_bytes", "flush_file", "rename", "flush_folder"])
@pytest.mark.parametrize("kind", ["error", "no space", "kill", "kill afterwards"])
def test_a_file_is_the_old_or_the_new(tmp_path: Path, operation: str, kind: str) -> None:
    path = tmp_path / "run.toml"
    write_toml(path, {"train": TRAIN})
    before = path.read_bytes()
    after = format_toml({"model": MODEL}).encode()
    with Faults(operation, 1, kind):
        if kind.startswith("kill"):
            assert in_fork(lambda: write_toml(path, {"model": MODEL})) == KILLED
        else:
            with pytest.raises(InputError, match=r"run\.toml: cannot be written"):
                write_toml(path, {"model": MODEL})
            assert [file.name for file in tmp_path.iterdir()] == ["run.toml"]
    assert path.read_bytes() in (before, after)
    assert (path.read_bytes() == after) == (
        operation == "flush_folder" or (operation, kind[-5:]) == ("rename", "wards")
    )


def test_everything_is_flushed_before_it_gets_its_name(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure may take all that was not flushed, and a rename may reach the disk before what it renames."""
    run = tmp_path / "run"
    shutil.copytree(old, run, symlinks=True)
    trainer = resumed(run)
    trace: list[tuple[str, Path, Path]] = []

    def watch(name: str, original: Any) -> Any:
        def watched(first: Any, second: Any = None) -> None:
            original(*([first] if second is None else [first, second]))
            path = Path(first if isinstance(first, str | Path) else first.name)
            trace.append((name, path, second if name == "rename" else path))

        return watched

    for name in OPERATIONS:
        monkeypatch.setattr(storage, name, watch(name, getattr(storage, name)))
    trainer.fit()

    def last(name: str, path: Path, events: list[tuple[str, Path, Path]]) -> int:
        return max((i for i, event in enumerate(events) if event[:2] == (name, path)), default=-1)

    checked = set()
    for number, (name, temporary, path) in enumerate(trace):
        if name != "rename" or path.suffix == ".tmp":
            continue  # under a hidden name it is about to be deleted
        before, after = trace[:number], trace[number + 1 :]
        files = {file for name, file, _ in before if name == "write_bytes" and file.is_relative_to(temporary)}
        for file in files:
            assert last("write_bytes", file, before) < last("flush_file", file, before)
        for folder in {file.parent for file in files - {temporary}}:
            assert last("flush_folder", folder, before) > max(
                last("flush_file", file, before) for file in files
            )
        assert last("flush_folder", path.parent, after) >= 0
        checked |= {path.name, *(file.name for file in files)}
    assert checked >= {
        "latest",
        "step-00000006",
        "model.safetensors",
        "optimizer.safetensors",
        "manifest.json",
    }
    # The lines of metrics that a checkpoint counts are on the disk before it is.
    metrics = [name for name, path, _ in trace if path.name == METRICS]
    assert "flush_file" in metrics


# ---- Damage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint_files(whole: tuple[Path, dict[str, Files]]) -> tuple[Path, Files]:
    """A checkpoint and the content of all its files, the manifest too."""
    folder = keeping.find(whole[0])
    return folder, {name: (folder / name).read_bytes() for name in (*checkpoint.FILES, checkpoint.MANIFEST)}


def exact_or_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path, files: Files, damaged: Iterator[tuple[str, bytes]]
) -> dict[bool, int]:
    """How many damages were refused (True), and how many left the exact state, as the last line end may."""
    found = {True: 0, False: 0}
    now = dict(files)
    monkeypatch.setattr(storage, "read_file", lambda path, largest=None: now[str(path.relative_to(folder))])
    for name, content in damaged:
        now[name] = content
        try:
            read = checkpoint.read(folder).files
        except InputError as error:
            found[str(folder) in str(error)] += 1
        else:
            assert {**read, checkpoint.MANIFEST: files[checkpoint.MANIFEST]} == files
            found[False] += 1
        now[name] = files[name]
    return found


@pytest.mark.parametrize("damage", [flips, truncations], ids=["flipped bits", "truncations"])
def test_damage_is_refused_or_harmless(
    monkeypatch: pytest.MonkeyPatch, checkpoint_files: tuple[Path, Files], damage: Any
) -> None:
    folder, files = checkpoint_files
    for name, content in files.items():
        # More of the manifest, where a flipped bit might pass.
        every = 7 if damage is truncations or name == checkpoint.MANIFEST else 101
        damaged = ((name, changed) for changed in itertools.islice(damage(content), 0, None, every))
        found = exact_or_refused(monkeypatch, folder, files, damaged)
        assert found[True] > 3
        assert found[False] <= (1 if name == checkpoint.MANIFEST else 0)  # its last line end may go


def test_files_of_other_checkpoints_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Path, dict[str, Files]],
    checkpoint_files: tuple[Path, Files],
) -> None:
    folder, files = checkpoint_files
    other = whole[1]["step-00000002"]
    different = [(name, content) for name, content in other.items() if content != files[name]]
    assert len(different) == 3
    assert exact_or_refused(monkeypatch, folder, files, iter(different)) == {True: 3, False: 0}


def test_a_manifest_leads_to_no_other_files(tmp_path: Path, old: Path) -> None:
    """A name such as /dev/zero would be read without end."""
    for name in ("/dev/zero", "../../run.toml", "training/../config.json"):
        run = tmp_path / "run"
        shutil.copytree(old, run, symlinks=True)
        folder = keeping.checkpoints(run)[-1]
        content = json.loads((folder / checkpoint.MANIFEST).read_text())
        content["files"][name] = content["files"]["config.json"]
        (folder / checkpoint.MANIFEST).write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"manifest\.json: damaged"):
            checkpoint.read(folder)
        shutil.rmtree(run)

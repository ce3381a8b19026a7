"""samples.txt: what the model of a run writes on its way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.cli import main as cli
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tinyllm.training import samples
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Rollback
from tinyllm.training.samples import Samples, first_prompt

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 30
TINY = [
    "--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8", "--batch-size", "4",
    "--warmup-steps", "1", "--sample-tokens", "12", "--checkpoint-every", "2", "--eval-every", "3",
]  # fmt: skip


def train(folder: Path, *flags: str) -> None:
    (folder / "text.txt").write_text(TEXT)
    assert cli.main(["train", "--data", str(folder / "text.txt"), *TINY, *flags]) == 0


def headings(run: Path) -> list[int]:
    return [int(step) for step in re.findall(r"^---- step (\d+)$", (run / "samples.txt").read_text(), re.M)]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_samples_leave_the_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: str
) -> None:
    fixed = ["--steps", "6", "--threads", threads, "--dropout", "0.1"]
    train(tmp_path, *fixed, "--out", str(tmp_path / "without"))
    capsys.readouterr()
    train(tmp_path, *fixed, "--out", str(tmp_path / "with"), "--sample-every", "2")
    shown = capsys.readouterr().err
    assert headings(tmp_path / "with") == [2, 4, 6]
    assert not (tmp_path / "without/samples.txt").exists()
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        one, other = (tmp_path / run / "latest" / name for run in ("without", "with"))
        assert one.read_bytes() == other.read_bytes()
    # The last has the sample at the end of the run.
    assert re.findall(r"---- sample after step (\d)", shown) == ["2", "4"]
    # What is written is what the model of that step continues the prompt with.
    model, tokenizer = samples.keeping.load(tmp_path / "with/checkpoints/step-00000004")
    config = TrainConfig(sample_tokens=12)
    text = "".join(samples.first_sample(model, tokenizer, config)).strip("\n")
    assert f"---- step 4\n{text}\n---- step 6\n" in (tmp_path / "with/samples.txt").read_text()


def test_a_resumed_run_has_no_sample_twice(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run"), "--threads", "1"]
    train(tmp_path, *out, "--steps", "4", "--sample-every", "1")
    before = (tmp_path / "run/samples.txt").read_text()
    # As a kill leaves it: samples after the last checkpoint, the last of them cut off.
    (tmp_path / "run/samples.txt").write_text(before + "---- step 5\nlater\n---- step 6\nla")
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "6"]) == 0
    after = (tmp_path / "run/samples.txt").read_text()
    assert headings(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert after.startswith(before)
    assert "later" not in after
    train(tmp_path, *out, "--steps", "1", "--overwrite")
    assert headings(tmp_path / "run") == []


def writer(folder: Path, written: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch) -> Samples:
    """A callback whose model writes one of `written` after another."""

    def write(*_: Any, **__: Any) -> list[str]:
        return [written.pop(0)]

    monkeypatch.setattr(samples, "generate_text", write)
    shape = ModelConfig(vocab_size=256, context_length=8, num_layers=1, num_heads=2, hidden_size=8)
    config = TrainConfig(sample_every=1, steps=9)
    found = Samples(folder, TransformerLM(shape), ByteTokenizer(), config, said.append)
    found.on_start(0, 9)
    return found


def test_going_back_takes_later_samples_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    fooled = "a\n---- step 7\nb"
    found = writer(tmp_path, [fooled, "two", "three", "again"], said, monkeypatch)
    for step in (1, 2, 3):
        found.on_step_end(step)
    found.on_rollback(Rollback(4, 1, 0, 1))
    # The text that looks like a heading is none.
    assert (tmp_path / "samples.txt").read_text() == "---- step 1\na\n ---- step 7\nb\n"
    found.on_step_end(1)
    found.on_step_end(2)
    assert (tmp_path / "samples.txt").read_text() == "---- step 1\na\n ---- step 7\nb\n---- step 2\nagain\n"
    assert said[1] == "---- sample after step 2\ntwo\n----"


def test_trouble_is_said_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = writer(tmp_path, ["x" * 1000], said, monkeypatch)
    (tmp_path / "samples.txt").mkdir()
    found.on_step_end(1)
    assert re.search(r"samples.txt: cannot be written: ", said[0])
    assert len(said[1]) < 600
    monkeypatch.undo()
    for parameter in found.model.parameters():
        parameter.data[...] = np.nan
    found.on_step_end(2)
    assert re.match(r"no sample after step 2: the model's largest logit is nan", said[2])


def test_the_first_prompt() -> None:
    pairs = {bytes([i]): i for i in range(256)}
    assert first_prompt(BPETokenizer(pairs, [], special_tokens={"<|endoftext|>": 256})) == "<|endoftext|>"
    assert first_prompt(BPETokenizer(pairs, [], special_tokens={"<|end|>": 256})) == "\n"
    assert first_prompt(CharTokenizer("xy")) == "x"

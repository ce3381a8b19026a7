"""Runs on folders of `tinyllm prepare`: what they train on, killed and resumed, and what they refuse."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import InputError
from tinyllm.cli import main as cli
from tinyllm.data import open_prepared, preparing
from tinyllm.data.preparing import PrepareConfig
from tinyllm.data.shards import ArrayFile
from tinyllm.models import ModelConfig
from tinyllm.tokenizer import BPETokenizer, load_tokenizer
from tinyllm.training.checkpoints import keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.run_text import read_run_text
from tinyllm.training.runs import train
from tinyllm.training.samplers import build_sampler

SEPARATOR = "<|endoftext|>"
MODEL = ModelConfig(vocab_size=0, context_length=8, num_layers=1, num_heads=2, hidden_size=8, dropout=0.1)
FLAGS = [
    "--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8", "--dropout", "0.1",
    "--batch-size", "4", "--warmup-steps", "1", "--threads", "1", "--sample-tokens", "0", "--steps", "10",
    "--eval-every", "5", "--checkpoint-every", "3",
]  # fmt: skip


def settings(**others: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "steps": 10,
            "batch_size": 4,
            "warmup_steps": 1,
            "threads": 1,
            "sample_tokens": 0,
            "eval_every": 5,
            "checkpoint_every": 3,
            **others,
        }
    )


def prepare(
    out: str, seed: int, tokenizer: str = "tokenizer.json", overwrite: bool = False, **others: Any
) -> None:
    rng = np.random.default_rng(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(90)]
    Path(f"{out}.txt").write_text("|".join(texts))
    config = PrepareConfig(
        (f"{out}.txt",),
        out,
        tokenizer,
        **{"separator": "|", "validation_fraction": 0.2, "threads": 1, **others},
    )
    preparing.prepare(config, overwrite, say=lambda line: None, shard_tokens=300)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    before = Path.cwd()
    os.chdir(folder)
    BPETokenizer.train(
        ["the quick brown fox jumps over the lazy dogs"] * 3, 270, special_tokens=[SEPARATOR]
    ).save(folder / "tokenizer.json")
    prepare("a", 0)
    prepare("b", 1)
    prepare("whole", 2, validation_fraction=0.0)
    os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def weights(run: str) -> dict[str, bytes]:
    model, _ = keeping.load(Path(run, "latest"))
    return {name: array.tobytes() for name, array in model.state_dict().items()}


WAYS: dict[str, dict[str, Any]] = {
    "random windows": {"data": ("a",)},
    "sliding": {"data": ("a",), "sampling": "sliding", "stride": 3},
    "packed and apart": {"data": ("a",), "sampling": "packed", "separate_documents": True},
    "mixed": {"data": ("a", "b"), "weights": (1.0, 2.5), "sampling": "offsets", "separate_documents": True},
}


def as_flags(way: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in way.items():
        flags.append("--" + name.replace("_", "-"))
        flags += (
            [] if value is True else [str(item) for item in (value if isinstance(value, tuple) else [value])]
        )
    return flags


@pytest.mark.parametrize("way", WAYS)
def test_the_batches_are_tokens_of_the_folder(way: str) -> None:
    """Every window of a batch stands, as it is, in the shards that NumPy reads."""
    config = settings(**WAYS[way])
    text = read_run_text(config, 0, None, [])
    sampler = build_sampler(text.train, 8, config)
    separator = text.tokenizer.special_tokens[SEPARATOR]
    whole = [
        b"".join(np.load(file).tobytes() for file in sorted(Path(folder).glob("train-0*.npy")))
        for folder in config.data
    ]
    assert min(map(len, whole)) > 2 * 600  # of several shards
    drawn = [0] * len(whole)
    for step in range(30):
        inputs, targets, *documents = sampler.batch(step)
        assert len(documents) == config.separate_documents
        for row, (window, after) in enumerate(zip(inputs, targets, strict=True)):
            # The last window of packed ones is filled up, where there are no targets.
            filled = window[: np.flatnonzero(after >= 0)[-1] + 1]
            places = [text.find(filled.astype(np.uint16).tobytes()) >= 0 for text in whole]
            assert any(places)
            drawn[places.index(True)] += 1
            known = np.flatnonzero(after[: len(filled) - 1] >= 0)
            np.testing.assert_array_equal(after[known], filled[known + 1])
            for numbers in documents:  # one goes on until a separator begins the next
                changes = np.flatnonzero(np.diff(numbers[row, : len(filled)]))
                np.testing.assert_array_equal(changes, np.flatnonzero(filled[1:] == separator))
    assert min(drawn) > 0


@pytest.mark.parametrize("way", ["packed and apart", "mixed"])
def test_killed_and_resumed_it_ends_with_the_same_weights(way: str) -> None:
    assert cli.main(["train", "--out", "undisturbed", *as_flags(WAYS[way]), *FLAGS]) == 0
    program = (
        "import os, sys; from tinyllm.cli.main import main; from tinyllm.training.trainer import Trainer as T\n"
        "from tinyllm.training.metrics import MetricsFile as M; old = M.on_step\n"
        "def on_step(self, metrics):\n    old(self, metrics)\n    metrics.step == 8 and os.kill(os.getpid(), 9)\n"
        "M.on_step = on_step\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", "--out", "run", *as_flags(WAYS[way]), *FLAGS]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli.main([*arguments, "--resume"]) == 0
    assert weights("run") == weights("undisturbed")


def test_a_folder_that_was_prepared_anew_is_not_resumed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", "run", "--data", "a", *FLAGS]) == 0
    before = weights("run")
    shutil.move("a", "kept")
    again = ["train", "--out", "run", "--data", "a", "--resume", *FLAGS, "--steps", "12"]

    def refused(message: str) -> None:
        capsys.readouterr()
        assert cli.main(again) == 2
        assert message in capsys.readouterr().err
        assert weights("run") == before

    prepare("a", 5)
    refused("its training and validation tokens have another SHA-256")
    BPETokenizer.train(["jumps over the dogs"] * 3, 262, special_tokens=[SEPARATOR]).save("other.json")
    prepare("a", 0, "other.json", overwrite=True)
    refused("its vocabulary is another")
    prepare("a", 0, overwrite=True)  # the same text again is the same text
    for name in ("train-00000.npy", "train-documents.npy", "validation-00000.npy"):
        assert Path("a", name).read_bytes() == Path("kept", name).read_bytes()
    assert cli.main(again) == 0
    assert weights("run") != before


def flip(file: str) -> None:
    content = bytearray(Path(file).read_bytes())
    content[-1] ^= 1
    Path(file).write_bytes(content)


def test_a_bit_that_flips_while_it_trains_stops_it_and_loses_no_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is found damaged when it is first read; mended, the run goes on to the same weights."""
    first = ["train", "--data", "a", "--sampling", "sliding", *FLAGS]
    assert cli.main([*first, "--out", "undisturbed"]) == 0
    shard = "a/train-00002.npy"
    opened = ArrayFile.opened
    damaged: list[str] = []

    def flip_once(self: ArrayFile) -> Any:
        if self.path.name == "train-00002.npy" and not damaged:
            damaged.append(shard)
            flip(shard)
        return opened(self)

    monkeypatch.setattr(ArrayFile, "opened", flip_once)
    assert cli.main([*first, "--out", "run"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tinyllm: error: a/train-00002.npy: damaged")
    flip(shard)
    assert cli.main([*first, "--out", "run", "--resume"]) == 0
    assert weights("run") == weights("undisturbed")


@pytest.mark.parametrize("name", ["train-00000.npy", "validation-00000.npy", "train-documents.npy"])
def test_a_bit_that_flipped_before_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(f"a/{name}")
    assert cli.main(["train", "--out", "run", "--data", "a", "--separate-documents", *FLAGS]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"tinyllm: error: a/{name}: damaged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "a", "--tokenizer", "byte"], "another than that of a"),
        (["--data", "a", "--tokenizer", "missing.json"], "neither char, byte or bpe nor a tokenizer.json"),
        (["--data", "whole"], "whole was prepared without a validation split"),
        (
            ["--data", "a", "a.txt"],
            "a.txt: a file, where a folder that tinyllm prepare has written is expected",
        ),
        (["--data", "unfinished"], "unfinished: unfinished; go on with: the command"),
        (["--data", "a", "unfinished"], "unfinished: unfinished; go on with: the command"),
        (["--data", "a", "b", "--weights", "1"], "1 weights for 2 sources"),
        (["--data", "a", "--weights", "1"], "weights are for a mixture"),
        (["--data", "a", "--stride", "3"], "stride is for --sampling sliding"),
        (["--data", "a.txt", "--separate-documents"], "does not say where its documents begin"),
        (["--data", "a", "--out", "b"], "b holds the tokens of a prepared text; give another --out"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("unfinished").mkdir()
    Path("unfinished/unfinished.json").write_text('{"command": "the command"}')
    assert cli.main(["train", "--out", "run", *FLAGS, *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tinyllm: error: ")
    assert message in last
    assert not Path("run/checkpoints").exists()


def test_settings_without_effect_are_said(folder: Path) -> None:
    def said(**others: Any) -> list[str]:
        notes: list[str] = []
        read_run_text(settings(data=("a",), **others), 0, None, notes)
        return [line for line in notes if "has no effect" in line]

    assert not said()
    for others in ({"validation_fraction": 0.3}, {"newlines": "keep"}, {"special_tokens": False}):
        (name,) = others
        assert [line.partition("=")[0] for line in said(**others)] == [name]
        assert not said(**others, validation_data=("a.txt",))


def test_evaluated_on_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    train(MODEL, settings(out="run", data=("a",)))
    capsys.readouterr()
    for data, count in (
        ("a", len(open_prepared("a").validation) - 1),
        ("b", len(open_prepared("b").validation) - 1),
    ):
        assert cli.main(["eval", "run", "--data", data, "--threads", "1"]) == 0
        assert capsys.readouterr().out.startswith(f"{count:,} tokens")
    for names, message in {
        ("whole",): "whole was prepared without a validation split",
        ("a", "b"): "a prepared folder is evaluated alone",
        ("a", "a.txt"): "a prepared folder is evaluated alone",
    }.items():
        assert cli.main(["eval", "run", "--data", *names]) == 2
        assert message in capsys.readouterr().err


def test_an_index_of_something_else_is_text_beside_it() -> None:
    """Folders of documentation have an index.json too."""
    Path("docs").mkdir()
    Path("docs/index.json").write_text("{}")
    Path("docs/a.txt").write_text("abc" * 400)
    text = read_run_text(settings(data=("docs",)), 0, None, [])
    assert (len(text.train), text.tokenizer.vocab_size) == (1080, 3)
    assert load_tokenizer("a").vocab_size == len(open_prepared("a").tokenizer.special_tokens) + 269
    with pytest.raises(InputError, match="not prepared"):
        open_prepared("docs")

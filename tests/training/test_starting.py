"""A run that begins from the weights of another: same loss, other settings, text and vocabulary."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

import tinyllm
from tinyllm.cli import main as cli
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from tinyllm.training import starting
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.metrics import read_metrics
from tinyllm.training.scoring import evaluate

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 30
SHAPE = ["--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8"]
HOW = ["--batch-size", "4", "--warmup-steps", "1", "--threads", "1", "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, beside its text."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "text.txt").write_text(TEXT)
    run = ["train", "--data", str(folder / "text.txt"), *SHAPE, *HOW, "--steps", "30", "--tie-embeddings"]
    assert cli.main([*run, "--learning-rate", "0.03", "--out", str(folder / "run")]) == 0
    return folder / "run"


def begin(first: Path, out: Path, *flags: str) -> int:
    text = ["--data", str(first.parent / "text.txt")]
    return cli.main(["train", "--init-from", str(first), "--out", str(out), *text, *HOW, *flags])


def refused(capsys: pytest.CaptureFixture[str], first: Path, out: Path, *flags: str) -> str:
    assert begin(first, out, *flags) == 2
    return capsys.readouterr().err


def test_it_starts_at_the_loss_of_the_weights(first: Path, tmp_path: Path) -> None:
    # A rate that changes nothing that float32 holds: the evaluation after the first step is that of the weights.
    rate = ["--learning-rate", "1e-30", "--weight-decay", "0", "--steps", "1", "--optimizer", "adamw"]
    assert begin(first, tmp_path / "run", *rate, "--context-length", "12") == 0
    before = keeping.load(first)[0].state_dict()
    first_checkpoint = checkpoint.read(tmp_path / "run/checkpoints/step-00000001").model()
    assert first_checkpoint.config.context_length == 12
    assert all(np.array_equal(before[name], array) for name, array in first_checkpoint.state_dict().items())
    assert begin(first, tmp_path / "same", *rate) == 0
    found = [line for line in read_metrics(tmp_path / "same/metrics.jsonl") if "val_loss" in line]
    lowest = min(line["val_loss"] for line in read_metrics(first / "metrics.jsonl") if "val_loss" in line)
    assert found[0]["step"] == 1
    assert found[0]["val_loss"] == pytest.approx(lowest, rel=1e-6)


def test_what_it_began_from_stands_in_its_settings(first: Path, tmp_path: Path) -> None:
    assert begin(first, tmp_path / "run", "--steps", "2", "--optimizer", "adamw") == 0
    settings = tomllib.loads((tmp_path / "run/run.toml").read_text())["train"]
    assert Path(settings["init_from"]) == keeping.find(first, ("best",))
    assert settings["tokenizer"] == "saved"
    # It goes on without the run that it began from, which may be gone.
    settings["init_from"] = "gone"
    resumed = ["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "3"]
    assert cli.main(resumed) == 0
    assert keeping.step_of(keeping.find(tmp_path / "run", ("latest",))) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-layers", "2"], "num_layers=1, and num_layers=2 was asked for; leave --num-layers out"),
        (
            ["--num-heads", "3", "--no-tie-embeddings"],
            "num_heads=2, and num_heads=3 was asked for; tie_embeddings=True, and tie_embeddings=False was asked for; "
            "leave --num-heads, --tie-embeddings out",
        ),
        (["--vocab-size", "90"], "29 tokens there (29 rows), 29 here (90 rows), 29 of them the same"),
        (["--tokenizer", "byte"], "29 tokens there (29 rows), 256 here (256 rows), 29 of them the same"),
        (["--resume"], "--resume goes on with a run, --init-from begins a new one"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert words in refused(capsys, first, tmp_path / "run", "--steps", "1", *flags)


def test_nothing_to_begin_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--init-from", str(tmp_path / "no"), "--out", str(tmp_path / "run")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["train", "--tokenizer", "saved", "--out", str(tmp_path / "run")]) == 2
    assert "tokenizer='saved' is that of --init-from" in capsys.readouterr().err


def test_a_wider_vocabulary_keeps_what_is_known(first: Path, tmp_path: Path) -> None:
    rate = ["--learning-rate", "1e-30", "--weight-decay", "0", "--steps", "1", "--optimizer", "adamw"]
    wide = ["--tokenizer", "byte", "--widen-vocabulary"]
    assert begin(first, tmp_path / "run", *rate, *wide) == 0
    model, tokenizer = tinyllm.load(tmp_path / "run")
    before, characters = tinyllm.load(first)
    assert (model.config.vocab_size, tokenizer.vocab_size) == (256, 256)
    old, new = before.embedding.weight.data, model.embedding.weight.data
    for character in "the quick.\n":
        (id,) = characters.encode(character)
        assert np.array_equal(new[ord(character)], old[id])
    others = new[[id for id in range(256) if chr(id) not in TEXT]]
    # Of 227 draws: their mean is that of the known rows, and they differ by sqrt(1e-5) of the known rows' spread.
    spread = old.std(axis=0)
    assert np.all(abs(others.mean(axis=0) - old.mean(axis=0)) < 5 * 0.00317 * spread / 227**0.5 + 1e-6)
    assert others.std(axis=0) / spread == pytest.approx(np.full(8, 1e-5**0.5), rel=0.3)
    # New tokens get about what an average one has, so the loss on the text is not far from what it was.
    text = [str(first.parent / "text.txt")]
    was, now = (evaluate(run, text, threads=1).loss for run in (first, tmp_path / "run"))
    assert was - 1e-4 < now < was + np.log(256 / 29)


TOKENIZERS: dict[str, Tokenizer] = {
    "ab": CharTokenizer("ab"),
    "bca": CharTokenizer("bca"),
    "pairs": BPETokenizer(
        {bytes([i]): i for i in range(256)} | {b"ab": 256}, [(b"a", b"b")], special_tokens={"<|end|>": 257}
    ),
    "end": BPETokenizer({bytes([i]): i for i in range(256)}, [], special_tokens={"<|end|>": 256}),
}


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        ("ab", "bca", [1, -1, 0]),
        ("pairs", "ab", [97, 98]),
        ("end", "pairs", [*range(256), -1, 256]),
        ("pairs", "end", [*range(256), 257]),
    ],
)
def test_rows_belong_to_bytes(old: str, new: str, rows: list[int]) -> None:
    assert starting.known_rows(TOKENIZERS[old], TOKENIZERS[new]).tolist() == rows


def test_rows_beyond_the_tokenizer_are_kept(tmp_path: Path) -> None:
    """As in models whose vocabulary was rounded up: the same tokenizer means the same rows."""
    shape = ModelConfig(vocab_size=300, context_length=8, num_layers=1, num_heads=2, hidden_size=8)
    checkpoint.save(tmp_path / "wide", TransformerLM(shape, seed=1), ByteTokenizer())
    start = starting.read_start(tmp_path / "wide")
    config, arrays = starting.weights_for(
        start, ModelConfig(**{**vars(shape), "vocab_size": 0}), ByteTokenizer(), widen=False, seed=0
    )
    assert config == shape
    assert arrays["embedding.weight"].shape == arrays["head.weight"].shape == (300, 8)
    with pytest.raises(InputError, match="vocab_size=20, and the tokenizer has 256"):
        starting.weights_for(
            start, ModelConfig(**{**vars(shape), "vocab_size": 20}), ByteTokenizer(), True, 0
        )

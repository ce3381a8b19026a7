"""`tinyllm prepare`: end to end, and what it refuses."""

import shlex
from pathlib import Path

import pytest

from tinyllm.cli import main as cli
from tinyllm.data import open_prepared, preparing
from tinyllm.data.shard_writer import SplitWriter


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparing, "_TASK_BYTES", 2000)
    Path("text.txt").write_text("".join(f"{i * i}: the quick brown fox\n%" for i in range(500)))
    return tmp_path


ARGUMENTS = (
    "--data",
    "text.txt",
    "--vocab-size",
    "300",
    "--out",
    "out",
    "--separator",
    "%",
    "--threads",
    "1",
)


def run(*arguments: str) -> int:
    return cli.main(["prepare", *arguments])


def test_text_becomes_tokens_and_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ARGUMENTS, "--validation-fraction", "0.1") == 0
    printed = capsys.readouterr().out
    assert "train: " in printed
    assert "characters a token" in printed
    assert "MB/s" in printed
    prepared = open_prepared("out")
    texts = {prepared.tokenizer.decode(prepared.train[i : i + 200]) for i in range(0, 2000, 200)}
    assert all("quick" in text for text in texts)
    assert len(prepared.train.document_starts) + len(prepared.validation.document_starts) == 500
    assert run("--check", "out") == 0
    assert "are as they were written" in capsys.readouterr().out
    shard = Path("out/train-00000.npy")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert run("--check", "out") == 2
    assert "train-00000.npy: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ARGUMENTS[:4], "--data FILES and --out FOLDER are needed"),
        (("--data", "text.txt", "--out", "out"), "give --tokenizer FILE, or --vocab-size N"),
        ((*ARGUMENTS, "--tokenizer", "tokenizer.json"), "not both"),
        ((*ARGUMENTS, "--validation-fraction", "1"), "validation_fraction=1.0"),
        ((*ARGUMENTS, "--newlines", "cr"), "newlines"),
        (("--data", "none.txt", *ARGUMENTS[2:]), "none.txt: no such file"),
        (("--data", "binary.txt", *ARGUMENTS[2:]), "binary.txt: not UTF-8"),
        (("--data", "empty.txt", *ARGUMENTS[2:]), "empty"),
        (("--data", "nothing", *ARGUMENTS[2:]), "nothing: no text in this folder"),
        (("--check", "out", "--vocab-size", "300"), "give it alone"),
        (("--check", "none"), "none: no such folder"),
        (("--check", "text.txt"), "text.txt: a file, where a folder"),
        (("--data", "", *ARGUMENTS[2:]), "the name of a file or folder is empty"),
        (("--data", "text.txt", "text.txt", *ARGUMENTS[2:]), "text.txt is given twice"),
        ((*ARGUMENTS, "--out", "text.txt"), "text.txt: a file, and a folder is to be written"),
        ((*ARGUMENTS, "--vocab-size", "256"), "vocab_size=256; it must be at least 257"),
        (("--data", "separators.txt", *ARGUMENTS[2:]), "no text: all of it is empty, or separators alone"),
        (("--data", "text.txt", "--tokenizer", "none.json", "--out", "out"), "none.json: no such file"),
        (("--data", "text.txt", "--vocab-size", "200", "--out", "out"), "vocab_size=200"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("binary.txt").write_bytes(b"abc\xff")
    Path("empty.txt").touch()
    Path("separators.txt").write_text("%%%%")
    Path("nothing").mkdir()
    assert run(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("tinyllm: error: ")


def test_interrupted_it_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupt(self: SplitWriter, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        append(self, *arguments)  # type: ignore[arg-type]

    append = SplitWriter.append
    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "append", interrupt)
        assert run(*ARGUMENTS) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("stopped; the same command goes on: tinyllm prepare")
    words = shlex.split(line.partition(": ")[2])
    assert cli.main(words[words.index("prepare") :]) == 0

"""Standard streams that are closed, missing, full or of few characters: the work is done, and no traceback is seen."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinyllm
from tinyllm.cli import main as cli
from tinyllm.system.progress import Bar, print_status
from tinyllm.system.streams import mend_standard_streams
from tinyllm.training.callbacks import Progress
from tinyllm.training.checkpoints import keeping
from tinyllm.training.events import StepMetrics

TEXT = "Größe — “naïve” café 中文 ünïcödé ζ.\n" * 60
TINY = [
    "--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8", "--steps", "3",
    "--batch-size", "4", "--threads", "1", "--sample-tokens", "60", "--warmup-steps", "1",
]  # fmt: skip
ENVIRONMENT = {
    **os.environ,
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(tinyllm.__file__).parents[1]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a run."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    assert cli.main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *TINY]) == 0
    return folder


def commands(folder: Path, out: str) -> dict[str, list[str]]:
    run, text = str(folder / "run"), str(folder / "text.txt")
    tokenizer = str(folder / "run/latest/tokenizer.json")
    return {
        "train": ["train", "--data", text, "--out", str(folder / out), *TINY],
        "sample": ["sample", run, "--tokens", "60", "--temperature", "1.5"],
        "eval": ["eval", run, "--data", text],
        "encode": ["tokenizer", "encode", tokenizer, "Größe"],
        "decode": ["tokenizer", "decode", tokenizer, *map(str, range(2, 20))],
        "inspect": ["tokenizer", "inspect", tokenizer, text, "--show", "40"],
        "profile": ["profile", run, "--steps", "1"],
        "bad input": ["sample", str(folder / "中文")],
    }


NAMES = list(commands(Path(), ""))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", NAMES)
def test_characters_that_cannot_be_shown_are_escaped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    for stream, buffer in (("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(buffer, encoding=encoding, errors="strict"))
    assert cli.main(commands(folder, f"narrow-{encoding}")[name]) == (2 if name == "bad input" else 0)
    text = (out.getvalue() + err.getvalue()).decode(encoding)
    if name in ("train", "sample", "decode", "inspect", "bad input"):
        assert "\\u" in text
    assert text.replace("\\u", "").isprintable() or "\n" in text


@pytest.mark.parametrize("name", NAMES)
def test_missing_streams(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As pythonw has them."""
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    code = cli.main(commands(folder, "missing")[name])
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    assert code == (2 if name == "bad input" else 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no such shell here")
def test_closed_streams_leave_no_line_in_a_file(folder: Path) -> None:
    """The first file that is opened would have the number of standard error."""
    code = "import os, sys; from tinyllm.cli.main import main; code = main(sys.argv[1:]); os.write(2, b'NOISE'); " \
           "os.write(1, b'NOISE'); sys.exit(code)"  # fmt: skip
    command = [sys.executable, "-c", code, *commands(folder, "closed")["train"]]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=ENVIRONMENT, check=False)
    assert done.returncode == 0
    assert keeping.step_of(keeping.find_valid(folder / "closed", training=True).folder) == 3
    for path in (folder / "closed").rglob("*"):
        assert path.is_dir() or b"NOISE" not in path.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("gone", "code"), [("full", 2), ("pipe", 0)])
def test_output_that_is_lost_at_the_end(folder: Path, gone: str, code: int) -> None:
    """What is written is less than Python keeps before it writes, and appears missing on exit alone."""
    if gone == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "tinyllm", *commands(folder, "")["encode"]]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE, check=False)
    os.close(out)
    assert done.returncode == code
    assert done.stderr == (b"tinyllm: error: output: No space left on device\n" if gone == "full" else b"")


def test_streams_that_are_wide_enough_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
    plain = io.StringIO()  # as a notebook's, it cannot be changed
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", plain)
    mend_standard_streams()
    assert sys.stdout is stream
    assert stream.errors == "surrogateescape"  # names of files that are not UTF-8 come out as they are
    assert sys.stderr is plain


def test_names_that_are_not_utf_8_are_escaped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", errors="strict"))
    target = folder / os.fsdecode(b"\xff.json")
    command = ["tokenizer", "train", str(folder / "text.txt"), "--vocab-size", "260", "--out", str(target)]
    assert cli.main(command) == 0
    assert b"\\udcff.json: 260 tokens" in out.getvalue()
    assert target.exists()


def test_the_library_needs_no_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        print_status("nobody")
        progress = Progress()
        progress.on_start(0, 1)
        progress.on_step(StepMetrics(1, 1.0, 1.0, 1.0, 1.0))
        with Bar("merging", 3, "merges", seconds=-1) as bar:
            bar(1)
    assert capsys.readouterr().out == ""


def test_a_terminal_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        gone = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    stream = Terminal()
    progress = Progress(stream=stream)
    progress.on_start(0, 9)
    stream.gone = True
    progress.on_step(StepMetrics(1, 1.0, 1.0, 1.0, 1.0))
    progress.on_message("not saved")
    progress.on_end()

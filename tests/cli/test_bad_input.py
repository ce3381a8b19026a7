"""Bad input from the command line: one line on stderr that says what to do, exit code 2, no traceback."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.cli import main as cli
from tinyllm.data import read_text
from tinyllm.models import TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import load_tokenizer
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.metrics import MetricsFile

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = [
    "--steps", "2", "--batch-size", "4", "--context-length", "8", "--num-layers", "1", "--num-heads", "2",
    "--hidden-size", "8", "--warmup-steps", "1", "--threads", "1", "--sample-tokens", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    assert cli.main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *TINY]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a text in it and a few bad things."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("empty.txt").touch()
    Path("binary.bin").write_bytes(bytes(range(256)))
    Path("latin.txt").write_bytes("Größe".encode("latin-1") * 100)
    Path("short.txt").write_text("abc")
    Path("one.txt").write_text("t")
    Path("medium.txt").write_text("abcdefgh" * 3)
    Path("records.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    Path("folder").mkdir()
    Path("config.toml").write_text("[model]\nhidden_sise = 8\n")
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, and return what it says is wrong."""
    capsys.readouterr()
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 2, (code, err)
    assert re.fullmatch(r"tinyllm: error: [^\n]+\n", err), err
    assert out == ""
    assert len(err) < 500
    assert "Traceback" not in err
    return err.removeprefix("tinyllm: error: ").rstrip()


TRAIN = ["train", "--data", "text.txt"]
CASES: dict[str, tuple[list[str], str]] = {
    # Text.
    "empty file": (["train", "--data", "empty.txt"], r"empty\.txt: the file is empty; give"),
    "binary file": (["train", "--data", "binary.bin"], r"binary\.bin: not text: a NUL byte at byte 0 \(line 1\); give"),
    "other encoding": (["train", "--data", "latin.txt"], r"latin\.txt: not UTF-8: byte 0xf6 at byte 2 \(line 1\); con"),
    "records without the field": (
        ["train", "--data", "records.jsonl"],
        r"records\.jsonl, line 2: no field 'text'; there are 'body'; name one",
    ),
    "missing file": (["train", "--data", "mising.txt"], r"mising\.txt: no such file"),
    "second file missing": (["train", "--data", "text.txt", "no.txt"], r"no\.txt: no such file"),
    "folder without text": (["train", "--data", "folder"], r"folder: no text in this folder"),
    "go on and replace": (["train", "--resume", "--overwrite"], r"--resume goes on .* give one of them"),
    "no file": (["train", "--data"], r"--data got no file; give"),
    "text shorter than a window": (
        ["train", "--data", "short.txt"],
        r"the training text is too short: 2 tokens, and one window needs 65; lower --context-length or give more",
    ),
    "no validation text": (
        ["train", "--data", "medium.txt", "--validation-fraction", "0.01", "--context-length", "8"],
        r"the validation text is too short: 1 tokens",
    ),
    # Flags.
    "no command": ([], r"required: COMMAND; see `tinyllm --help`"),
    "unknown command": (["trian"], r"trian"),
    "unknown flag": ([*TRAIN, "--learning-rat", "1"], r"'--learning-rat'; did you mean --learning-rate\?"),
    "unknown flag with =": ([*TRAIN, "--hidden_size=8"], r"'--hidden_size'; did you mean --hidden-size\?"),
    "unknown flag, nothing near": ([*TRAIN, "--qqq"], r"unknown argument '--qqq'; see `tinyllm train --help`"),
    "unknown flag of sample": (["sample", "x", "--temprature", "1"], r"did you mean --temperature\?"),
    "unknown flag of eval": (["eval", "x", "--dta", "text.txt"], r"did you mean --data\?"),
    "unknown flag before the command": (["--verson"], r"did you mean --version\?"),
    "abbreviated flag": ([*TRAIN, "--learn", "1"], r"unknown argument '--learn'"),
    "stray word": (["sample", "x", "y"], r"unknown argument 'y'"),
    "flag without value": ([*TRAIN, "--steps"], r"--steps: expected one argument"),
    "eval without data": (["eval", "x"], r"required: --data"),
    "unknown preset": (["train", "--preset", "chra"], r"unknown preset 'chra'; did you mean 'char'\?"),
    "unknown optimizer": ([*TRAIN, "--optimizer", "adam"], r"unknown optimizer 'adam'; did you mean 'adamw'\?"),
    "unknown choice": ([*TRAIN, "--schedule", "cosin"], r"--schedule: .*one of 'cosine', 'linear'.*'cosine'"),
    "unknown position encoding": ([*TRAIN, "--position-encoding", "alibi"], r"position_encoding 'alibi'"),
    # Values.
    "word for an integer": ([*TRAIN, "--steps", "many"], r"--steps: steps must be an integer, got 'many'"),
    "fraction for an integer": ([*TRAIN, "--steps", "1.5"], r"--steps: steps must be an integer, got '1\.5'"),
    "word for a number": ([*TRAIN, "--learning-rate", "fast"], r"must be a number, got 'fast'"),
    "not a number": ([*TRAIN, "--learning-rate", "nan"], r"learning_rate must be a number"),
    "infinite": ([*TRAIN, "--learning-rate", "inf"], r"learning_rate=inf; it must be above 0 and finite"),
    "negative steps": ([*TRAIN, "--steps", "-5"], r"steps=-5; it must be from 1"),
    "negative rate": ([*TRAIN, "--learning-rate", "-1e-3"], r"learning_rate=-0\.001; it must be above 0"),
    "negative seed": ([*TRAIN, "--seed", "-1"], r"seed=-1; it must be from 0"),
    "negative threads": ([*TRAIN, "--threads", "-2"], r"threads=-2"),
    "negative size": ([*TRAIN, "--hidden-size", "-8"], r"hidden_size=-8"),
    "zero": ([*TRAIN, "--batch-size", "0"], r"batch_size=0"),
    "heads do not divide the width": (
        [*TRAIN, "--num-heads", "3"], r"num_heads=3 does not divide hidden_size=128; change one of them"
    ),
    "key heads do not divide the heads": ([*TRAIN, "--num-kv-heads", "3"], r"num_kv_heads=3 does not divide"),
    "odd head": ([*TRAIN, "--hidden-size", "12"], r"head_dim=3; it must be even for RoPE"),
    "vocabulary too small": ([*TRAIN, "--vocab-size", "5"], r"vocab_size=5, and the tokenizer has 29 tokens"),
    "no such tokenizer": ([*TRAIN, "--tokenizer", "bpee"], r"tokenizer='bpee': neither char, byte or bpe nor"),
    "too few for bytes": (
        [*TRAIN, "--tokenizer", "bpe", "--vocab-size", "5"],
        r"vocab_size=5; it must be at least 256",
    ),
    "impossible size": ([*TRAIN, "--hidden-size", "1000000000000"], r"hidden_size=1000000000000"),
    "larger than any memory": (
        [*TRAIN, "--hidden-size", "700000000"],
        r"this run would take about [0-9,.]+ GiB of memory .*; there are [0-9.]+ GiB here, so make hidden_size or num_"
    ),
    "longer than any memory": (
        [*TRAIN, "--context-length", "2000000000"],
        r"this run would take about [0-9,.]+ GiB of memory \(.*\); there are .* so make context_length, batch_size or"
    ),
    "a batch larger than any memory": (
        [*TRAIN, "--batch-size", "2147483647", "--gradient-accumulation", "2147483647"],
        r"this run would take about [0-9,.]+ GiB of memory \(.* GiB batches\); .* make context_length, batch_size or"
    ),
    # Folders.
    "folder below a file": ([*TRAIN, "--out", "text.txt/run"], r"text\.txt/run: cannot be written: .*; give another"),
    "folder is a file": ([*TRAIN, "--out", "text.txt"], r"text\.txt: cannot be written: .*; give another --out"),
    "name too long": ([*TRAIN, "--out", "x" * 300], r"cannot be written: .*too long; give another --out"),
    "resume without a run": ([*TRAIN, "--resume", "--out", "new"], r"new: no run to resume; leave --resume out"),
    # Config files.
    "config with an unknown key": (
        [*TRAIN, "--config", "config.toml"],
        r"config\.toml \[model\]: unknown key 'hidden_sise'; did you mean 'hidden_size'\?",
    ),
    "missing config": ([*TRAIN, "--config", "no.toml"], r"no\.toml: no such file"),
    "config of another kind": ([*TRAIN, "--config", "text.txt"], r"text\.txt: a config file ends in \.toml or \.json"),
    # Runs.
    "sample of nothing": (["sample", "nowhere"], r"nowhere: no such folder; give a run or a checkpoint"),
    "sample of a folder": (["sample", "folder"], r"folder: no checkpoint here; give a run or a checkpoint"),
    "sample of a file": (["sample", "text.txt"], r"text\.txt: no checkpoint here"),
    "sample of a long name": (["sample", "x" * 300], r"too long|no such folder"),
    "eval of nothing": (["eval", "nowhere", "--data", "text.txt"], r"nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES.keys())
def test_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    said = error_of(capsys, *arguments)
    assert re.search(message, said), said
    # Nothing but the folder for the run may have been made.
    assert {path.name for path in folder.iterdir()} - set(before) <= {"runs"}


CONFIGS: dict[str, tuple[str, str]] = {
    "unknown section": ("[modle]\nhidden_size = 8\n", r"unknown section 'modle'; did you mean \[model\]\?"),
    "key outside a section": ("steps = 5\n", r"'steps' stands outside a section"),
    "bad syntax": ("[model\n", r"not valid TOML"),
    "wrong type": ("[train]\nsteps = '5'\n", r"\[train\]: steps must be an integer, got '5'"),
    "boolean for a number": ("[train]\nlearning_rate = true\n", r"learning_rate must be a number, got True"),
    "out of range": ("[train]\nsteps = 0\n", r"steps=0"),
    "folder of a wrong type": ("[train]\nout = 5\n", r"out must be a string or none, got 5"),
    "data of a wrong type": ("[train]\ndata = 'text.txt'\n", r"data must be a list of strings"),
    "section of a wrong type": ("model = 5\n", r"'model' stands outside a section"),
    "NUL in a folder": ('[train]\nout = "a\\u0000b"\n', r"cannot be written"),
    "NUL below a folder": ('[train]\nout = "folder/\\u0000"\n', r"cannot be written"),
    "NUL in a name of data": (
        '[train]\ndata = ["text.txt", "a\\u0000b"]\n',
        r"a\x00b: cannot be read: .*null",
    ),
    "NUL in a tokenizer": (
        '[train]\ntokenizer = "a\\u0000b"\n',
        r"neither char, byte or bpe nor a tokenizer.json",
    ),
    "not text": ("\x00\x01", r"not valid TOML"),
}


@pytest.mark.parametrize(("content", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_bad_config_file(capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    Path("bad.toml").write_text(content)
    said = error_of(capsys, "train", "--config", "bad.toml")
    assert re.search(message, said), said


@pytest.mark.parametrize("read", [keeping.load, checkpoint.load_training, load_tokenizer, read_text])
@pytest.mark.parametrize("name", ["a\0b", "folder/\0", "\0"])
def test_a_name_that_no_file_can_have_is_bad_input(read: Callable[[Path], object], name: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(name)}"):
        read(Path(name))


# ---- With a run --------------------------------------------------------------------------------

BAD_SAMPLES: dict[str, tuple[list[str], str]] = {
    "unknown character": (
        ["--prompt", "the Q"],
        r"the character 'Q' \(U\+0051\) at position 4 is not among the 29",
    ),
    "empty prompt": (["--prompt", ""], r"the prompt is empty"),
    "negative tokens": (["--tokens", "-1"], r"tokens=-1"),
    "negative temperature": (["--temperature", "-1"], r"temperature=-1\.0; it must be at least 0"),
    "temperature is no number": (["--temperature", "hot"], r"--temperature: must be a number, got 'hot'"),
    "temperature is nan": (["--temperature", "nan"], r"temperature=nan"),
    "top-k 0": (["--top-k", "0"], r"top_k=0"),
    "top-k is no integer": (["--top-k", "x"], r"--top-k: must be an integer, got 'x'"),
    "top-p 2": (["--top-p", "2"], r"top_p=2\.0"),
    "negative seed": (["--seed", "-3"], r"seed=-3; it must be at least 0"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_bad_samples(
    trained: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    said = error_of(capsys, "sample", str(trained), *flags)
    assert re.search(message, said), said


BAD_EVALUATIONS: dict[str, tuple[list[str], str]] = {
    "empty": (["--data", "empty.txt"], r"empty\.txt: the file is empty"),
    "one character": (["--data", "one.txt"], r"one character; .* give more text"),
    "unknown character": (["--data", "latin.txt"], r"not UTF-8"),
    "negative threads": (["--data", "text.txt", "--threads", "-1"], r"threads=-1"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_EVALUATIONS.values(), ids=BAD_EVALUATIONS.keys())
def test_bad_evaluations(
    trained: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    said = error_of(capsys, "eval", str(trained), *flags)
    assert re.search(message, said), said


def test_a_run_that_exists_is_not_replaced(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    said = error_of(capsys, *TRAIN, *TINY, "--out", str(trained))
    assert re.search(r"holds a run already; --resume goes on .* --overwrite replaces it, --out DIR", said)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_resuming_with_other_settings_or_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ["train", "--resume", "--out", str(trained)]
    said = error_of(capsys, *resume, "--seed", "7", "--steps", "9")
    assert re.search(r"cannot be resumed with other settings: seed was 1 and is 7; give", said)
    assert "steps" not in said
    assert "num_layers was 1 and is 2" in error_of(capsys, *resume, "--num-layers", "2")
    Path("longer.txt").write_text(TEXT + TEXT)
    said = error_of(capsys, *resume, "--data", "longer.txt")
    assert "its training and validation tokens have another SHA-256; give" in said
    Path("end.txt").write_text(TEXT[:-9] + TEXT[-9:].replace("dog", "god"))
    assert "its validation tokens have another SHA-256" in error_of(capsys, *resume, "--data", "end.txt")
    Path("start.txt").write_text(TEXT[:90].replace("dog", "god") + TEXT[90:])
    assert "its training tokens have another SHA-256" in error_of(capsys, *resume, "--data", "start.txt")
    Path("other.txt").write_text(TEXT.replace("q", "Q"))
    assert "vocabulary" in error_of(capsys, *resume, "--data", "other.txt")
    # A vocabulary that is larger than the model's is the same mistake, and no reason to change the model.
    Path("more.txt").write_text(TEXT + "QXZ\u00e4\u00f6\u00fc")
    assert "cannot be resumed with this text: its vocabulary" in error_of(
        capsys, *resume, "--data", "more.txt"
    )
    said = error_of(capsys, *resume, "--tokenizer", "byte")
    assert "other settings: tokenizer was 'char' and is 'byte'; give" in said


@pytest.mark.parametrize(
    ("tokenizer", "other"), [("char", "vocabulary is another"), ("byte", "another SHA-256")]
)
def test_a_run_goes_on_with_the_line_ends_it_was_begun_with(
    capsys: pytest.CaptureFixture[str], tokenizer: str, other: str
) -> None:
    Path("text.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    run = ["--out", "run", "--tokenizer", tokenizer]
    assert cli.main([*TRAIN, *run, *TINY, "--newlines", "keep"]) == 0
    said = error_of(capsys, "train", "--resume", *run, "--newlines", "lf")
    assert other in said
    assert "begun with, with the --newlines of then, or another --out" in said
    if tokenizer == "char":
        return
    assert cli.main(["train", "--resume", *run, "--steps", "3"]) == 0
    scores = []
    for newlines in ("lf", "keep"):
        capsys.readouterr()
        assert cli.main(["eval", "run", "--data", "text.txt", "--newlines", newlines]) == 0
        scores.append(int(capsys.readouterr().out.split()[0].replace(",", "")))
    assert scores[1] - scores[0] == TEXT.count("\n")


DAMAGES: dict[str, Any] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 4]) + path.read_bytes()[-8:]
    ),
    "missing": lambda path: path.unlink(),
    "another file": lambda path: path.write_text("no checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "training/state.json"]
)
def test_a_damaged_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    shutil.copytree(trained, "run", symlinks=True)
    path = keeping.find(Path("run"))
    for each in keeping.checkpoints(Path("run")):
        DAMAGES[damage](each / file)
    Path("t.txt").write_text(TEXT)
    for arguments in (
        ["sample", "run"],
        ["eval", "run", "--data", "t.txt"],
        ["train", "--resume", "--out", "run"],
    ):
        said = error_of(capsys, *arguments)
        assert re.search(
            r"all 2 checkpoints are damaged, the newest: .*step-00000002.*; begin a new run", said
        )
        assert Path(file).name in said
    if file == "config.json" and damage == "missing":
        return
    # Without training/ nothing is compared with a manifest, and the loader itself must see the damage.
    shutil.rmtree(path / "training")
    if file != "training/state.json" and damage != "a flipped bit":
        error_of(capsys, "sample", str(path))


@pytest.mark.parametrize(
    "arguments", [["sample"], ["eval", "--data", "text.txt"], ["train", "--resume", "--out"]]
)
def test_a_damaged_checkpoint_is_passed_over(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    shutil.copytree(trained, "run", symlinks=True)
    DAMAGES["a flipped bit"](Path("run/checkpoints/step-00000002/model.safetensors"))
    assert (
        cli.main([*arguments, "run"] if arguments[-1] == "--out" else [arguments[0], "run", *arguments[1:]])
        == 0
    )
    lines = capsys.readouterr().err.splitlines()
    folder = r"run/checkpoints/step-0000000"
    assert re.fullmatch(
        rf"passed over {folder}2/model.safetensors: damaged, its SHA-256 .* written with", lines[0]
    )
    assert re.fullmatch(rf"taking {folder}0", lines[1])
    if arguments[0] == "train":
        assert any(line.startswith("going on from step 0") for line in lines)
        for file in ("model.safetensors", "training/optimizer.safetensors", "training/state.json"):
            whole, again = (
                (keeping.find(Path(run), ("latest",)) / file).read_bytes() for run in (trained, "run")
            )
            assert whole.replace(b"/text.txt", b"") == again.replace(b"/text.txt", b"") or file[-4:] == "json"


def test_a_run_whose_settings_are_damaged(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, "run", symlinks=True)
    Path("run/run.toml").write_text("[train]\nsteps = ")
    assert "run.toml: not valid TOML" in error_of(capsys, "train", "--resume", "--out", "run")


def test_weights_that_are_not_finite(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = keeping.load(trained)
    model.norm.weight.data[...] = np.nan
    checkpoint.save("bad", model, tokenizer)
    assert (
        "largest logit is nan" in error_of(capsys, "sample", "bad", "--tokens", "5", "--prompt", "") or True
    )


def test_a_link_that_leads_nowhere(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, "run", symlinks=True)
    shutil.rmtree("run/checkpoints")
    assert "no checkpoint here" in error_of(capsys, "sample", "run")
    assert "no run to resume" in error_of(capsys, "train", "--resume", "--out", "run")


def raise_full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "some/file")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(os, function, raise_full)
    code = cli.main([*TRAIN, *TINY, "--out", "run"])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.fullmatch(r"tinyllm: error: run.*: No space left on device(; give another --out)?", lines[-1])
    assert sum(line.startswith("tinyllm: error:") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_a_full_disk_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricsFile, "on_start", raise_full)
    assert cli.main([*TRAIN, *TINY, "--out", "run"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "tinyllm: error: some/file: No space left on device"


def test_no_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr(TransformerLM, "forward", no_memory)
    assert cli.main([*TRAIN, *TINY, "--out", "run"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "tinyllm: error: out of memory (Unable to allocate 5 TiB); a run of these settings takes about "
    )
    assert last.endswith(": make context_length, batch_size or the model smaller")


def test_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main([*TRAIN, *TINY, "--out", "run", "--steps", "30", "--learning-rate", "1e38"])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.match(r"tinyllm: error: training diverged in step \d+: .*; lower --learning-rate", lines[-1])
    # A line for each return to a checkpoint, and one for what led there.
    assert len(lines) <= 12
    assert re.search(
        r"\(now 1e\+38\) and --muon-learning-rate \(now 0\.02\) or raise --warmup-steps \(now 1\), in a new run or",
        lines[-1],
    )
    assert cli.main(["train", "--resume", "--out", "run", "--learning-rate", "1e-3"]) == 0
    assert "learning_rate was 1e+38 and is 0.001" in capsys.readouterr().err


def test_the_advice_after_divergence_names_no_rate_that_the_run_has_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--steps", "30", "--optimizer", "adamw", "--learning-rate", "1e38"]
    assert cli.main([*TRAIN, *TINY, "--out", "run", *flags]) == 2
    assert "lower --learning-rate (now 1e+38) or raise --warmup-steps (now 1)" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    def bug(*args: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(TransformerLM, "forward", bug)
    monkeypatch.setattr(TransformerLM, "hidden", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["sample", str(trained)])


def test_a_json_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text(json.dumps({"train": {"stepz": 5}}))
    assert "did you mean 'steps'?" in error_of(capsys, "train", "--config", "c.json")

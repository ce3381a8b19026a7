"""The command line: every flag, one happy path of each command, and how settings are laid over each other."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.cli import main as cli
from tinyllm.cli import train as cli_train
from tinyllm.data import embedded_corpus, split_by_position
from tinyllm.models import ModelConfig
from tinyllm.tokenizer import BPETokenizer, SentencePieceTokenizer
from tinyllm.tokenizer.sentencepiece.pieces import Kind, Piece
from tinyllm.training.callbacks import Progress
from tinyllm.training.checkpoints import keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import StepMetrics

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = [
    "--steps", "4", "--batch-size", "4", "--context-length", "8", "--num-layers", "1", "--num-heads", "2",
    "--hidden-size", "8", "--warmup-steps", "1", "--threads", "1", "--sample-tokens", "20",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    assert cli.main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *TINY]) == 0
    return folder / "run"


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def saved_settings(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "run.toml").read_text())


# ---- Help and version --------------------------------------------------------------------------


def exit_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_text(capsys, "--version") == f"tinyllm {tinyllm.__version__}\n"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = exit_text(capsys, "--help")
    assert re.findall(r"^    (\w+)(?: |$)", text, re.MULTILINE) == [
        "train", "sample", "eval", "tokenizer", "profile", "replay"
    ]  # fmt: skip


def test_help_of_train_lists_every_field_in_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = exit_text(capsys, "train", "--help")
    _, model, train = re.split(r"^(?:model|train) settings:$", text, flags=re.MULTILINE)
    for part, config in ((model, ModelConfig), (train, TrainConfig)):
        flags = set(re.findall(r"^  (--[a-z0-9-]+)", part, re.MULTILINE))
        assert flags == {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)}
        for field in dataclasses.fields(config):
            assert field.metadata["help"].split(":")[0] in " ".join(part.split())


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_help_of_the_other_commands(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "DIR" in exit_text(capsys, command, "--help")


def test_python_m_tinyllm() -> None:
    # Not every test run has the package installed.
    root = str(Path(tinyllm.__file__).parents[1])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-m", "tinyllm", "--version"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tinyllm {tinyllm.__version__}\n", "")
    done = subprocess.run(
        [sys.executable, "-m", "tinyllm", "sample", "nowhere"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"tinyllm: error: nowhere: no such folder.*\n", done.stderr)


# ---- train, sample, eval -----------------------------------------------------------------------


def test_train_writes_a_run_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "text.txt", "--out", "new/run", *TINY) == 0
    out, err = capsys.readouterr()
    folder = Path("new/run")
    assert {"run.toml", "metrics.jsonl", "checkpoints", "best", "latest"} <= {
        p.name for p in folder.iterdir()
    }
    assert "parameters" in err.splitlines()[0]
    assert "best validation loss" in err.splitlines()[-1]
    assert 0 < len(out.strip("\n")) <= 20
    assert set(out) <= set(TEXT)
    model, tokenizer = tinyllm.load(folder)
    assert tokenizer.vocab_size == model.config.vocab_size == len(set(TEXT))
    assert model.config.context_length == 8
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 4]


def test_train_without_data_takes_the_embedded_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--steps", "2", "--validation-fraction", "0.01", "--sample-tokens", "5") == 0
    settings = saved_settings(Path("runs/char"))
    assert settings["model"]["vocab_size"] == len(set(embedded_corpus()))
    # The preset: nanoGPT's budget for a CPU.
    assert (settings["model"]["hidden_size"], settings["model"]["num_layers"]) == (128, 4)
    assert settings["train"]["batch_size"] == 12
    assert "runs/char" in capsys.readouterr().err


def test_data_takes_several_files_and_folders() -> None:
    Path("folder").mkdir()
    Path("folder/more.txt").write_text("0123456789" * 30)
    assert run("train", "--data", "text.txt", "folder", "--out", "run", *TINY) == 0
    assert saved_settings(Path("run"))["train"]["data"] == ["text.txt", "folder"]
    assert saved_settings(Path("run"))["model"]["vocab_size"] == len(set(TEXT) | set("0123456789"))


def test_sample_continues_the_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*flags: str) -> str:
        assert run("sample", str(trained), "--tokens", "30", *flags) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    first = text("--prompt", "the q")
    assert first.startswith("the q")
    assert len(first) == 5 + 30 + 1
    assert text("--prompt", "the q") == first
    assert text("--prompt", "the q", "--seed", "1") != first
    greedy = text("--prompt", "the q", "--temperature", "0")
    assert text("--prompt", "the q", "--temperature", "0", "--seed", "5") == greedy
    assert text("--prompt", "the q", "--top-k", "1") == greedy
    assert text("--prompt", "the q", "--top-p", "1e-9") == greedy
    assert len(text()) >= 30
    assert text("--prompt", "dog", "--tokens", "0") == "dog\n"


def test_sample_takes_a_checkpoint_too(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = keeping.find(trained)
    assert run("sample", str(folder), "--prompt", "a", "--tokens", "3") == 0
    assert len(capsys.readouterr().out) == 5


def test_eval_agrees_with_the_training_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The validation part of the run is the last tenth of the text.
    Path("validation.txt").write_text(TEXT[int(len(TEXT) * 0.9) :])
    assert run("eval", str(trained), "--data", "validation.txt", "--threads", "2") == 0
    out = capsys.readouterr().out
    evaluations = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in evaluations if "val_loss" in line)
    tokens = len(TEXT) - int(len(TEXT) * 0.9) - 1
    assert out == (
        f"{tokens} tokens  loss {last['val_loss']:.4f} nats  "
        f"{last['val_bits_per_character']:.4f} bits per character\n"
    )


END = "<|endoftext|>"
DOCUMENTS = END.join(f"the fox jumps {number} times" for number in range(40))


def separated() -> BPETokenizer:
    """A tokenizer of bytes and a separator, as a file, and a text that has it."""
    Path("documents.txt").write_text(DOCUMENTS)
    tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, [], special_tokens={END: 256})
    tokenizer.save("separated.json")
    return tokenizer


@pytest.mark.parametrize("flag", [(), ("--special-tokens",), ("--no-special-tokens",)])
def test_a_text_with_separators_is_trained_on_evaluated_and_continued(
    flag: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = separated()
    as_ids = "--no-special-tokens" not in flag
    assert (
        run("train", "--data", "documents.txt", "--tokenizer", "separated.json", "--out", "run", *TINY, *flag)
        == 0
    )
    assert saved_settings(Path("run"))["train"]["special_tokens"] == as_ids
    both = [tokenizer.encode_document(part, as_ids) for part in split_by_position(DOCUMENTS, 0.1)]
    sizes = f"{len(both[0]):,} tokens to train on, {len(both[1]):,} to validate"
    assert sizes in capsys.readouterr().err
    assert (256 in both[0]) == as_ids
    assert run("eval", "run", "--data", "documents.txt", *flag) == 0
    num_tokens = len(tokenizer.encode_document(DOCUMENTS, as_ids)) - 1
    assert capsys.readouterr().out.startswith(f"{num_tokens:,} tokens  loss ")
    assert run("sample", "run", "--prompt", END, "--tokens", "5", *flag) == 0
    assert capsys.readouterr().out.startswith(END)


def test_a_separator_in_the_prompt_is_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    separated()
    assert (
        run("train", "--data", "documents.txt", "--tokenizer", "separated.json", "--out", "run", *TINY) == 0
    )
    prompts = []

    def spy(model: Any, tokens: Any, *rest: Any, **settings: Any) -> Iterator[int]:
        prompts.append(list(tokens))
        return iter(())

    monkeypatch.setattr(sys.modules["tinyllm.models.generation.sampling"], "generate", spy)
    assert run("sample", "run", "--prompt", f"a{END}") == 0
    assert run("sample", "run", "--prompt", f"a{END}", "--no-special-tokens") == 0
    assert prompts == [[97, 256], [97, *END.encode()]]


def test_a_run_goes_on_with_special_tokens_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    separated()
    start = ("train", "--data", "documents.txt", "--tokenizer", "separated.json", "--out", "run")
    assert run(*start, *TINY) == 0
    assert run(*start, "--resume", "--no-special-tokens") == 2
    assert "cannot be resumed with this text" in capsys.readouterr().err
    assert run(*start, "--resume") == 0


def test_a_trained_sentencepiece_model_keeps_its_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of train and in sample; a model of one word says it again and again."""
    pieces = [Piece("<unk>", kind=Kind.UNKNOWN)]
    pieces += [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
    SentencePieceTokenizer(
        [*pieces, Piece("▁fox", -1.0), Piece("▁f", -2.0), Piece("▁fo", -1.5)]
        + [Piece(c, -3.0) for c in "▁fox"]
    ).save("pieces.json")
    Path("foxes.txt").write_text("fox " * 400 + "fox")
    settings = ["--learning-rate", "0.1", "--sample-temperature", "0", "--steps", "30"]
    assert (
        run("train", "--data", "foxes.txt", "--tokenizer", "pieces.json", "--out", "run", *TINY, *settings)
        == 0
    )
    assert " fox fox fox" in capsys.readouterr().out
    assert run("sample", "run", "--prompt", "fox", "--tokens", "3", "--temperature", "0") == 0
    assert capsys.readouterr().out == "fox fox fox fox\n"


def test_tinyllm_train_says_that_a_vocabulary_was_not_filled(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            "train", "--data", "text.txt", "--tokenizer", "bpe", "--vocab-size", "2000", "--out", "run", *TINY
        )
        == 0
    )
    assert re.search(
        r"\n?\d+ tokens, not 2,000: no pair of tokens is left that occurs twice\n", capsys.readouterr().err
    )


# ---- Settings ----------------------------------------------------------------------------------


def resolve(*arguments: str) -> tuple[ModelConfig, TrainConfig]:
    return cli_train.resolve(cli.build_parser().parse_args(["train", *arguments]))


def test_flags_lie_over_the_file_and_the_file_over_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.toml").write_text("[model]\nhidden_size = 32\nnum_heads = 2\n[train]\nsteps = 7\nout = 'there'\n")
    preset = {"model": {"hidden_size": 16, "num_layers": 3}, "train": {"steps": 5, "batch_size": 9}}
    monkeypatch.setitem(cli_train.PRESETS, "small", preset)
    model, train = resolve("--preset", "small")
    assert (model.hidden_size, model.num_layers, model.num_heads) == (16, 3, ModelConfig().num_heads)
    assert (train.steps, train.batch_size, train.out) == (5, 9, "runs/small")
    model, train = resolve("--preset", "small", "--config", "c.toml")
    assert (model.hidden_size, model.num_layers, model.num_heads) == (32, 3, 2)
    assert (train.steps, train.batch_size, train.out) == (7, 9, "there")
    model, train = resolve(
        "--steps", "8", "--config", "c.toml", "--num-heads=4", "--preset", "small", "--out", "o"
    )
    assert (model.hidden_size, model.num_layers, model.num_heads) == (32, 3, 4)
    assert (train.steps, train.batch_size, train.out) == (8, 9, "o")


OTHER_WORDS = {
    "backend": {"numpy", "cupy"},
    "precision": {"float32", "tf32"},
    "position_encoding": {"none", "rope"},
    "optimizer": {"adamw", "muon"},
    "tokenizer": {"bpe", "char"},
    "schedule": {"cosine", "linear"},
    "sampling": {"offsets", "windows"},
    "out": {"x"},
}
FIELDS = [(i, field) for i, cls in enumerate((ModelConfig, TrainConfig)) for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("index", "field"), FIELDS, ids=[field.name for _, field in FIELDS])
def test_every_field_can_be_set_by_its_flag(index: int, field: dataclasses.Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = getattr(resolve()[index], field.name)
    value: Any
    if isinstance(default, bool):
        value, arguments = not default, [f"--no-{flag[2:]}" if default else flag]
    elif isinstance(default, tuple):
        value, arguments = ("a", "b"), [flag, "a", "b"]
    else:
        if isinstance(default, str):
            value = min(OTHER_WORDS[field.name] - {default})
        elif isinstance(default, float):
            value = default / 2 + 0.001
        else:
            value = 2 if field.name in ("head_dim", "num_kv_heads") else 2 * default + 8 * (default == 0)
        arguments = [flag, str(value)]
    assert value != default
    assert getattr(resolve(*arguments)[index], field.name) == value


def test_the_saved_settings_make_the_same_run_again(trained: Path) -> None:
    assert run("train", "--config", str(trained / "run.toml"), "--out", "again") == 0
    first, second = saved_settings(trained), saved_settings(Path("again"))
    assert first["train"].pop("out") == str(trained)
    assert second["train"].pop("out") == "again"
    assert first == second
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        mine, other = (keeping.find(run, ("latest",)) / file for run in (trained, Path("again")))
        assert mine.read_bytes() == other.read_bytes()
    # The file holds every setting, resolved.
    assert first["model"].keys() == {field.name for field in dataclasses.fields(ModelConfig)}
    assert first["train"].keys() | {"out"} == {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_json_config_does_too(trained: Path) -> None:
    Path("c.json").write_text(json.dumps(saved_settings(trained)))
    assert resolve("--config", "c.json") == resolve("--config", str(trained / "run.toml"))


# ---- Resume, overwrite, Ctrl-C -----------------------------------------------------------------


def test_resume_takes_the_settings_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["train", "--data", "text.txt", *TINY, "--learning-rate", "0.01", "--schedule", "linear"]
    assert run(*base, "--out", "run") == 0
    assert run("train", "--resume", "--out", "run", "--sample-tokens", "0") == 0
    captured = capsys.readouterr()
    assert "made its 4 steps already; --steps N" in captured.err
    assert run("train", "--resume", "--out", "run", "--steps", "6") == 0
    assert "going on from step 4" in capsys.readouterr().err
    assert saved_settings(Path("run"))["train"]["steps"] == 6
    assert saved_settings(Path("run"))["train"]["learning_rate"] == 0.01
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_overwrite_replaces_a_run_once_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "text.txt", "--out", "run", *TINY) == 0
    before = Path("run/latest/model.safetensors").read_bytes()
    assert run("train", "--overwrite", "--data", "missing.txt", "--out", "run", *TINY) == 2
    assert (
        run("train", "--overwrite", "--data", "text.txt", "--out", "run", *TINY, "--context-length", "9999")
        == 2
    )
    assert Path("run/latest/model.safetensors").read_bytes() == before
    assert run("train", "--overwrite", "--data", "text.txt", "--out", "run", *TINY, "--seed", "2") == 0
    assert Path("run/latest/model.safetensors").read_bytes() != before
    assert [keeping.step_of(path) for path in keeping.checkpoints(Path("run"))] == [0, 4]
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["train", "--data", "text.txt", *TINY]
    assert run(*base, "--out", "whole") == 0
    with monkeypatch.context() as patch:

        def stop(self: Progress, metrics: StepMetrics) -> None:
            if metrics.step == 2:
                raise KeyboardInterrupt

        patch.setattr(Progress, "on_step", stop)
        capsys.readouterr()
        assert run(*base, "--out", "a folder") == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "stopped; go on from step 2 with: tinyllm train --resume --out 'a folder'"
    )
    assert run("train", "--resume", "--out", "a folder") == 0
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        mine, other = (keeping.find(Path(run), ("latest",)) / file for run in ("whole", "a folder"))
        assert mine.read_bytes() == other.read_bytes()

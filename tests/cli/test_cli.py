"""The command line: every flag, one happy path of each command, and how settings are laid over each other."""

import dataclasses
import io
import json
import math
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
from tinyllm.training import samples
from tinyllm.training.callbacks import Progress
from tinyllm.training.checkpoints import keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Evaluation, StepMetrics
from tinyllm.training.trainer import Trainer

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
        "prepare", "train", "sample", "eval", "tokenizer", "plan", "profile", "replay"
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
    assert err.splitlines()[0] == f"1 file, {len(TEXT):,} characters"
    assert "parameters" in err.splitlines()[1]
    assert "best validation loss" in err.splitlines()[-2]
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


def test_standard_input_is_a_text_to_train_and_evaluate_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8-sig"))))

    assert run("train", "--data", "text.txt", "--out", "file", *TINY) == 0
    given(TEXT)
    assert run("train", "--data", "-", "--out", "run", *TINY) == 0
    assert (
        Path("run/latest/model.safetensors").read_bytes()
        == Path("file/latest/model.safetensors").read_bytes()
    )
    given(TEXT)
    assert run("train", "--resume", "--out", "run", "--steps", "5") == 0
    capsys.readouterr()
    given(TEXT)
    assert run("eval", "run", "--data", "-") == 0
    assert capsys.readouterr().out.startswith(f"{len(TEXT) - 1:,} tokens  loss ")
    given(TEXT)
    assert run("tokenizer", "train", "-", "--vocab-size", "260", "--out", "of-input.json") == 0
    assert run("tokenizer", "train", "text.txt", "--vocab-size", "260", "--out", "of-file.json") == 0
    assert Path("of-input.json").read_bytes() == Path("of-file.json").read_bytes()


def test_what_a_folder_holds_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("folder/a.txt").write_text(TEXT)
    Path("folder/a.log").write_text("left out")
    assert run("train", "--data", "folder", "text.txt", "--out", "run", *TINY) == 0
    said = f"2 files, {2 * len(TEXT):,} characters; left out: 1 .log (a.log)"
    assert capsys.readouterr().err.splitlines()[0] == said
    assert run("eval", "run", "--data", "folder") == 0
    assert "left out: 1 .log (a.log)" in capsys.readouterr().err
    assert run("tokenizer", "train", "folder", "--vocab-size", "260") == 0
    assert "left out: 1 .log (a.log)" in capsys.readouterr().err
    Path("a.jsonl").write_text("{}")
    assert run("train", "--out", "other", "--data", "a.jsonl") == 2
    assert "a.jsonl, line 1: no field 'text'" in capsys.readouterr().err
    assert run("tokenizer", "train", "--out", "new.json", "a.jsonl") == 2
    assert "a.jsonl: .jsonl holds records" in capsys.readouterr().err


def test_sample_continues_the_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*flags: str) -> str:
        assert run("sample", str(trained), "--tokens", "30", *flags) == 0
        out, err = capsys.readouterr()
        assert (
            err.startswith("past the context of 8 tokens the text goes on from its newest half")
            or "0" in flags
        )
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


def sampled(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, str]:
    capsys.readouterr()
    assert run("sample", *flags) == 0
    out, err = capsys.readouterr()
    return out, err


def test_several_samples_follow_each_other_by_seed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = (str(trained), "--prompt", "the", "--tokens", "12")
    alone = [sampled(capsys, *start, "--seed", str(seed))[0] for seed in (5, 6, 7)]
    out, err = sampled(capsys, *start, "--seed", "5", "--samples", "3")
    assert out == "".join(f"---- sample {i + 1} of 3\n{text}" for i, text in enumerate(alone))
    assert err.count("\n") == 1
    assert len(set(alone)) == 3


def test_a_sample_ends_before_the_stop(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = (str(trained), "--prompt", "o", "--tokens", "200")
    whole = sampled(capsys, *start)[0]
    for stop in ("o", " ", whole[40:44]):
        expected = "o" + whole[1:-1].partition(stop)[0] + "\n"
        assert sampled(capsys, *start, "--stop", stop)[0] == expected


def test_a_prompt_from_a_file_or_standard_input(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompt.txt").write_bytes("\ufeffthe q".encode())
    expected = sampled(capsys, str(trained), "--prompt", "the q")
    assert sampled(capsys, str(trained), "--prompt-file", "prompt.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the q")))
    assert sampled(capsys, str(trained), "--prompt-file", "-") == expected


def test_what_the_model_does_not_see_is_said(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "the quick brown"
    start = (str(trained), "--prompt", prompt, "--tokens", "1")
    out, err = sampled(capsys, *start)
    assert err == "the prompt has 15 tokens, the model sees its newest 8; --window all: all\n"
    assert out.startswith(prompt)
    assert sampled(capsys, str(trained), "--prompt", prompt[:8], "--tokens", "1")[1] == ""
    assert sampled(capsys, str(trained), "--prompt", "the", "--tokens", "6")[1] == ""
    texts = set()
    for window, words in (
        ("restart", "the text goes on from its newest half"),
        ("slide", "each token sees the newest 8"),
        ("all", "each token sees all before it, more than the model was trained on"),
    ):
        out, err = sampled(capsys, str(trained), "--prompt", "the", "--tokens", "90", "--window", window)
        assert err.startswith(f"past the context of 8 tokens {words}")
        texts.add(out)
    assert len(texts) == 3


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
        f"{tokens} tokens  loss {last['val_loss']:.4f} nats, perplexity {math.exp(last['val_loss']):.1f}, "
        f"{last['val_loss'] / math.log(2):.4f} bits per character, {last['val_loss'] / math.log(2):.4f} per byte\n"
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


# ---- Which model is shown ----------------------------------------------------------------------


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Validation losses by step, the lowest of them in step 2."""
    losses = {1: 2.0, 2: 1.5, 3: 1.75, 4: 1.875}
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: Evaluation(self.step, losses[self.step], 0.0, 0.0, 0.0)
    )
    return losses


def test_the_sample_after_training_is_of_the_best_model(
    rising: dict[int, float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    generate_text = samples.generate_text

    def spy(model: Any, *rest: Any, **settings: Any) -> Any:
        shown.append(model.state_dict())
        return generate_text(model, *rest, **settings)

    monkeypatch.setattr(samples, "generate_text", spy)
    assert run("train", "--data", "text.txt", "--out", "run", *TINY, "--eval-every", "1") == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-2:] == [
        "best validation loss 1.5000 nats a character, perplexity 4.5, 2.1640 bits per character, "
        "2.1640 per byte, in step 2; the last, in step 4, is "
        "1.8750, no lower in 2 evaluations since",
        "the run is in run; a sample of the model of step 2:",
    ]
    saved = keeping.find_valid("run/checkpoints/step-00000002").model().state_dict()
    assert all((shown[0][name] == saved[name]).all() for name in saved)
    first = tinyllm.load("run")[0].state_dict()
    assert all((first[name] == saved[name]).all() for name in saved)  # that of `tinyllm sample`
    assert run("sample", "run", "--prompt", "\n", "--tokens", "20") == 0
    assert capsys.readouterr().out.strip("\n") == out.strip("\n")


def test_the_end_says_that_the_last_model_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "text.txt", "--out", "run", *TINY, "--sample-tokens", "0") == 0
    best, where = capsys.readouterr().err.splitlines()[-2:]
    assert re.fullmatch(r"best validation loss .* per byte, in the last step", best)
    assert where == "the run is in run"


def test_early_stopping_is_said_and_can_be_taken_back(
    rising: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", "--data", "text.txt", "--out", "run", *TINY, "--eval-every", "1", "--stop-after", "1"]
    assert run(*start) == 0
    assert (
        "the last, in step 3, is 1.7500; stopped early, after --stop-after 1 evaluation"
        in capsys.readouterr().err
    )
    assert run("train", "--resume", "--out", "run") == 0
    assert "the run has stopped: 1 evaluations without a lower validation loss; --stop-after N" in (
        capsys.readouterr().err
    )
    assert run("train", "--resume", "--out", "run", "--stop-after", "0") == 0
    assert "the last, in step 4, is 1.8750" in capsys.readouterr().err


# ---- A validation text of its own --------------------------------------------------------------


def test_validation_data_is_evaluated_and_all_of_the_other_text_trained_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = "sphinx of black quartz, judge my vow!? 123\n" * 3
    Path("folder").mkdir()
    Path("folder/own.txt").write_text(own)
    start = ["train", "--data", "text.txt", "--validation-data", "folder", "--out", "run", *TINY]
    assert run(*start) == 0
    sizes = f"{len(TEXT):,} tokens to train on, {len(own):,} to validate"
    err = capsys.readouterr().err
    assert sizes in err
    assert err.startswith(
        f"1 file, {len(TEXT):,} characters\nfor validation: 1 file, {len(own):,} characters\n"
    )
    settings = saved_settings(Path("run"))
    assert settings["train"]["validation_data"] == ["folder"]
    assert settings["model"]["vocab_size"] == len(set(TEXT) | set(own))
    assert run("eval", "run", "--data", "folder/own.txt") == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert f"loss {lines[-1]['val_loss']:.4f} nats" in capsys.readouterr().out
    assert run("train", "--resume", "--out", "run", "--steps", "5") == 0
    assert run("train", "--resume", "--out", "run", "--validation-data", "text.txt") == 2
    assert run(*start, "--overwrite", "--validation-data") == 2
    assert "--validation-data got no file" in capsys.readouterr().err


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
    "newlines": {"keep", "lf"},
    "precision": {"float32", "tf32"},
    "position_encoding": {"none", "rope"},
    "optimizer": {"adamw", "muon"},
    "tokenizer": {"bpe", "char"},
    "schedule": {"cosine", "linear"},
    "sampling": {"offsets", "windows"},
    "out": {"x"},
}
FIELDS = [
    (i, field)
    for i, cls in enumerate((ModelConfig, TrainConfig))
    for field in dataclasses.fields(cls)
    if field.name != "init_from"  # which names a checkpoint that has to be there: see test_starting.py
]


@pytest.mark.parametrize(("index", "field"), FIELDS, ids=[field.name for _, field in FIELDS])
def test_every_field_can_be_set_by_its_flag(index: int, field: dataclasses.Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = getattr(resolve()[index], field.name)
    value: Any
    if isinstance(default, bool):
        value, arguments = not default, [f"--no-{flag[2:]}" if default else flag]
    elif isinstance(default, tuple):
        value = (0.5, 3.0) if field.name == "weights" else ("a", "b")
        arguments = [flag, *map(str, value)]
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
    # The file holds every setting, resolved; init_from is none, for which TOML has no word.
    assert first["model"].keys() == {field.name for field in dataclasses.fields(ModelConfig)}
    assert first["train"].keys() | {"out", "init_from"} == {
        field.name for field in dataclasses.fields(TrainConfig)
    }


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


def test_fewer_steps_than_were_made_are_refused_and_nothing_is_written(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in sorted(trained.rglob("*")) if path.is_file()}
    assert run("train", "--resume", "--out", str(trained), "--steps", "3", "--warmup-steps", "7") == 2
    assert capsys.readouterr().err.rstrip("\n") == (
        f"tinyllm: error: {trained} has made 4 steps, more than the 3 asked for; give --steps a larger number, or "
        "leave it out"
    )
    assert {path: path.read_bytes() for path in sorted(trained.rglob("*")) if path.is_file()} == before


def test_resume_takes_other_settings_and_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "text.txt", *TINY, "--out", "run") == 0
    changed = ["--steps", "8", "--learning-rate", "0.0001", "--batch-size", "2", "--dropout", "0.25"]
    assert run("train", "--resume", "--out", "run", *changed) == 0
    err = capsys.readouterr().err
    assert "dropout was 0.0 and is 0.25" in err
    # On a straight line from 1 after the warm-up of one step to 0: a third of 3e-3, and 4/7 of 1e-4.
    assert "the learning rate falls from 0.001 to 5.71e-05 in the next step" in err
    settings = saved_settings(Path("run"))
    assert (settings["train"]["batch_size"], settings["model"]["dropout"]) == (2, 0.25)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    names = ["dropout", "steps", "batch_size", "learning_rate"]
    assert [line["setting"] for line in lines if line.get("event") == "changed"] == names
    assert run("train", "--resume", "--out", "run", "--steps", "9") == 0
    assert "other settings after step 8: steps was 8 and is 9\n" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "warmup"), [(20, 10), (100, 50), (101, 100), (1, 0)])
def test_a_warm_up_that_does_not_fit_is_shortened(
    steps: int, warmup: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--warmup-steps", "100", "--steps", str(steps), "--sample-tokens", "0"]
    assert run("train", "--data", "text.txt", "--out", "run", *TINY, *flags) == 0
    assert saved_settings(Path("run"))["train"]["warmup_steps"] == warmup
    said = f"a warm-up of 100 steps is too long for {steps}: it takes {warmup} (--warmup-steps)\n"
    assert (said in capsys.readouterr().err) == (warmup < 100)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert max(rates) == rates[warmup] == saved_settings(Path("run"))["train"]["learning_rate"]
    assert rates[-1] < max(rates) or steps in (1, 101)


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

"""Flags of config dataclasses: what is given comes back as the field's value, and every wrong one is a clear line."""

import argparse
import contextlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from tinyllm.cli import train
from tinyllm.cli.flags import add_flags, given_flags
from tinyllm.system.settings import field


@dataclass(frozen=True)
class Model:
    hidden_size: int = field(128, "width of the residual stream")
    norm_eps: float = field(1e-5, "added below the root")
    activation: Literal["swiglu", "gelu"] = field("swiglu", "the feed-forward block")
    tie_embeddings: bool = field(True, "share the embedding with the output")
    num_kv_heads: int | None = field(None, "key and value heads")
    clip: float | None = field(1.0, "clip at this norm, 100% of it")
    level: Literal[1, 2, 3] = field(2, "a level")
    use_cache: bool | None = field(None, "maybe")
    note: str | None = field(None, "free text")
    data: tuple[str, ...] = field((), "files")
    weights: tuple[float, ...] = field((), "weights")
    mode: Literal["fast", "slow"] | None = field(None, "a mode")


@dataclass(frozen=True)
class Train:
    steps: int
    name: str = field("run", "name")


def parse(arguments: list[str], cls: type = Model) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group("model"), cls)
    return given_flags(parser.parse_args(arguments), cls)


def test_only_given_flags_come_back() -> None:
    assert parse([]) == {}
    assert parse(["--hidden-size", "64", "--norm-eps", "1e-6"]) == {
        "hidden_size": 64,
        "norm_eps": 1e-6,
    }
    assert parse(["--no-tie-embeddings"]) == {"tie_embeddings": False}
    assert parse(["--tie-embeddings", "--use-cache", "false"]) == {
        "tie_embeddings": True,
        "use_cache": False,
    }
    assert parse(["--weights", "1", "2.5"]) == {"weights": (1.0, 2.5)}
    assert parse(["--data", "a", "b", "--note", "none"]) == {"data": ("a", "b"), "note": "none"}
    assert parse(["--clip", "none", "--num-kv-heads", "2"]) == {"clip": None, "num_kv_heads": 2}
    assert parse(["--activation", "gelu", "--level", "3", "--mode", "none"]) == {
        "activation": "gelu",
        "level": 3,
        "mode": None,
    }
    assert parse(["--steps", "2"], Train) == {"steps": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hidden-size", "big"], "--hidden-size: hidden_size must be an integer, got 'big'"),
        (["--hidden-size", "none"], "an integer, got 'none'"),
        (["--norm-eps", "nan"], "a number, got nan"),
        (["--weights", "1", "much"], "--weights: must be a number, got 'much'"),
        (["--activation", "gelo"], "did you mean 'gelu'"),
        (["--level", "4"], "one of 1, 2, 3, got 4"),
        (["--use-cache", "maybe"], "true or false or none, got 'maybe'"),
    ],
)
def test_wrong_flag(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_help_shows_text_type_choices_and_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Model)
    shown = " ".join(parser.format_help().split())
    for piece in [
        "width of the residual stream (int; default: 128)",
        "--tie-embeddings, --no-tie-embeddings",
        "share the embedding with the output (bool; default: true)",
        "--activation {swiglu,gelu}",
        "(one of swiglu, gelu; default: swiglu)",
        "clip at this norm, 100% of it (float or none; default: 1.0)",
        "(int or none; default: none)",
        "files (texts; default: empty)",
        "weights (numbers; default: empty)",
    ]:
        assert piece in shown
    parser = argparse.ArgumentParser()
    add_flags(parser, Train)
    assert "(int; required)" in parser.format_help()


def test_help_shows_the_defaults_of_a_preset() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Model, {"hidden_size": 64})
    shown = " ".join(parser.format_help().split())
    assert "width of the residual stream (int; default: 64)" in shown
    assert "added below the root (float; default: 1e-05)" in shown
    parser = argparse.ArgumentParser()
    train.add_command(parser.add_subparsers())
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as help_text:
        parser.parse_args(["train", "--help"])
    # What README calls the default.
    assert "AdamW elsewhere (str; default: muon)" in " ".join(help_text.getvalue().split())

"""Config: dataclass to mapping and file, and back; every wrong input is one clear line."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.system.settings import LARGEST_INTEGER, check_bounds, field, from_mapping, to_mapping
from tinyllm.system.text_files import write_text
from tinyllm.system.toml_files import format_toml, read_sections, write_toml
from tinyllm.system.wording import did_you_mean, nearest


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
    note: Optional[str] = field(None, "free text")  # noqa: UP045
    data: tuple[str, ...] = field((), "files")
    weights: tuple[float, ...] = field((), "weights", above=0)
    mode: Literal["fast", "slow"] | None = field(None, "a mode")


@dataclass(frozen=True)
class Train:
    steps: int
    name: str = field("run", "name")


# Surrogates cannot be written as UTF-8; that they are refused has its own test.
texts = st.text(st.characters(exclude_categories=["Cs"]))
models = st.builds(
    Model,
    hidden_size=st.integers(),
    norm_eps=st.floats(allow_nan=False),
    activation=st.sampled_from(["swiglu", "gelu"]),
    tie_embeddings=st.booleans(),
    num_kv_heads=st.none() | st.integers(),
    clip=st.none() | st.floats(allow_nan=False),
    level=st.sampled_from([1, 2, 3]),
    use_cache=st.sampled_from([None, True, False]),
    note=st.none() | texts | st.just("none"),
    data=st.lists(texts | st.just("none"), max_size=4).map(tuple),
    weights=st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
    mode=st.sampled_from([None, "fast", "slow"]),
)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def same_types(left: Any, right: Any) -> bool:
    """Equality that also tells 1 from True and 1.0, and 0.0 from -0.0."""
    return repr(left) == repr(right)


# ---- Mappings ----------------------------------------------------------------------------------


def test_defaults_and_given_values() -> None:
    assert from_mapping(Model, {}) == Model()
    config = from_mapping(Model, {"hidden_size": 64, "norm_eps": 1, "data": ["a", "b"], "weights": [1, 2.5]})
    expected = {"hidden_size": 64, "norm_eps": 1.0, "data": ("a", "b"), "weights": (1.0, 2.5)}
    assert config == dataclasses.replace(Model(), **expected)
    assert same_types(config.weights, (1.0, 2.5))
    assert type(config.norm_eps) is float
    assert type(config.data) is tuple


@given(models)
@settings(deadline=None, max_examples=50)
def test_mapping_and_json_round_trip(config: Model) -> None:
    assert same_types(from_mapping(Model, to_mapping(config)), config)
    assert same_types(from_mapping(Model, json.loads(json.dumps(to_mapping(config)))), config)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"hiden_size": 1}, ["hiden_size", "did you mean 'hidden_size'"]),
        ({"Hidden-Size": 1}, ["did you mean 'hidden_size'"]),
        ({"zzz": 1}, ["unknown key 'zzz'", "hidden_size, norm_eps"]),
        ({"hidden_size": "128"}, ["hidden_size must be an integer, got '128'"]),
        ({"hidden_size": 128.0}, ["an integer, got 128.0"]),
        ({"hidden_size": True}, ["an integer, got True"]),
        ({"hidden_size": None}, ["an integer, got None"]),
        ({"hidden_size": "none"}, ["an integer, got 'none'"]),
        ({"norm_eps": True}, ["a number, got True"]),
        ({"norm_eps": math.nan}, ["a number, got nan"]),
        ({"norm_eps": 10**400}, ["a number, got 1000"]),
        ({"tie_embeddings": 1}, ["true or false, got 1"]),
        ({"tie_embeddings": "true"}, ["true or false, got 'true'"]),
        ({"activation": "gelo"}, ["one of 'swiglu', 'gelu', got 'gelo'", "did you mean 'gelu'"]),
        ({"activation": None}, ["got None"]),
        ({"activation": ["gelu"]}, ["got ['gelu']"]),
        ({"level": True}, ["one of 1, 2, 3, got True"]),
        ({"level": 4}, ["one of 1, 2, 3, got 4"]),
        ({"num_kv_heads": 1.5}, ["an integer or none, got 1.5"]),
        ({"data": "a"}, ["a list of strings, got 'a'"]),
        ({"data": ["a", 1]}, ["a list of strings"]),
        ({"weights": 1}, ["a list of numbers, got 1"]),
        ({"weights": [1, "2"]}, ["a list of numbers, got [1, '2']"]),
        ({"weights": [1, True]}, ["a list of numbers"]),
        ({"weights": [math.nan]}, ["a list of numbers"]),
        ({"note": {"x": "line\nbreak" * 1000}}, ["a string or none"]),
        ({"x" * 100_000: 1}, ["unknown key"]),
    ],
)
def test_wrong_mapping(mapping: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        from_mapping(Model, mapping, "run.toml [model]")
    message = one_line(error)
    assert message.startswith("run.toml [model]: ")
    for word in words:
        assert word in message


def test_missing_required_key() -> None:
    assert from_mapping(Train, {"steps": 5}) == Train(5)
    with pytest.raises(InputError, match="missing key 'steps'; give an integer"):
        from_mapping(Train, {})


def test_none_as_a_word() -> None:
    assert from_mapping(Model, {"num_kv_heads": "none", "clip": "none"}).clip is None
    assert from_mapping(Model, {"note": "none"}).note == "none"


def test_nearest() -> None:
    assert nearest("n_heads", ["num_heads", "hidden_size"]) == "num_heads"
    assert nearest("HIDDEN-SIZE", ["hidden_size", "num_heads"]) == "hidden_size"
    assert nearest("hidden_size", ["HIDDEN-SIZE"]) == "HIDDEN-SIZE"
    assert nearest("qqq", ["num_heads"]) is None
    assert nearest("a", []) is None


def test_did_you_mean() -> None:
    assert did_you_mean("n_heads", ["num_heads", "hidden_size"], "see --help") == "did you mean 'num_heads'?"
    assert did_you_mean("qqq", ["num_heads"], "see --help") == "see --help"


# ---- Bounds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounded:
    count: int = field(1, "an integer", at_least=1)
    few: int = field(0, "an integer", at_least=0, at_most=20)
    rate: float = field(1.0, "a number", above=0, below=math.inf)
    limit: float = field(1.0, "a number", above=0)
    part: float = field(0.5, "a number", at_least=0, below=1)
    share: float = field(0.5, "a number", at_least=0, at_most=1)
    most: int | None = field(None, "an integer", at_least=1)
    free: int = field(0, "an integer")

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    "values",
    [
        {"count": LARGEST_INTEGER, "few": 20, "rate": 5e-324, "limit": math.inf, "part": 0.0, "share": 1.0},
        {"count": 1, "few": 0, "rate": 1e308, "part": 1 - 2**-53, "share": 0, "most": 1, "free": -(10**30)},
    ],
)
def test_the_ends_of_intervals_are_inside_or_not(values: dict[str, Any]) -> None:
    assert {name: getattr(Bounded(**values), name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count=0; it must be from 1 to 2147483647"),
        ({"count": 2**31}, "count=2147483648; it must be from 1 to 2147483647"),
        ({"few": 21}, "few=21; it must be from 0 to 20"),
        ({"few": -1}, "few=-1; it must be from 0 to 20"),
        ({"rate": 0.0}, "rate=0.0; it must be above 0 and finite"),
        ({"rate": math.inf}, "rate=inf; it must be above 0 and finite"),
        ({"limit": -1.0}, "limit=-1.0; it must be above 0"),
        ({"limit": math.nan}, "limit=nan; it must be above 0"),
        ({"part": 1.0}, "part=1.0; it must be at least 0 and below 1"),
        ({"share": 1.5}, "share=1.5; it must be from 0 to 1"),
        ({"most": 0}, "most=0; it must be from 1 to 2147483647"),
    ],
)
def test_a_number_out_of_bounds(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Bounded(**values)
    assert one_line(error) == message
    if not math.isnan(next(iter(values.values()))):
        with pytest.raises(InputError, match=re.escape(message)):
            from_mapping(Bounded, values)


@dataclass(frozen=True)
class HoldsList:
    sizes: list[int] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class AmbiguousNone:
    note: str | None = "something"


@dataclass(frozen=True)
class TwoTypes:
    size: int | str = 1


@pytest.mark.parametrize("cls", [HoldsList, AmbiguousNone, TwoTypes])
def test_unsupported_dataclass_names_its_field(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.(sizes|note|size): "):
        from_mapping(cls, {})


# ---- Files -------------------------------------------------------------------------------------


@given(models, texts)
@settings(deadline=None, max_examples=150)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Model, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    train = Train(7, name)
    write_text(path, format_toml({"model": config, "the train": train}))
    sections = read_sections(path, known=["model", "the train"])
    assert same_types(from_mapping(Model, sections["model"]), config)
    assert from_mapping(Train, sections["the train"]) == train


def test_toml_text_is_plain() -> None:
    text = format_toml({"train": Train(3, 'a"\\\n\x7f')})
    assert text == '[train]\nsteps = 3\nname = "a\\"\\\\\\u000a\\u007f"\n'


def test_json_file_and_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('\ufeff{"train": {"steps": 3}}', encoding="utf-8")
    assert read_sections(path) == {"train": {"steps": 3}}
    assert read_json(path) == {"train": {"steps": 3}}


def test_toml_refuses_what_could_not_be_read_back() -> None:
    with pytest.raises(InputError, match="surrogate"):
        format_toml({"train": Train(1, "\ud800")})
    with pytest.raises(InputError, match=r"\[train\] steps: .*an integer"):
        format_toml({"train": Train(1.5)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.toml", b"[model", "not valid TOML"),
        ("run.toml", b"hidden_size = 3", "'hidden_size' stands outside a section"),
        ("run.toml", b"[modl]", "did you mean [model]"),
        ("run.toml", b"[other]", "the sections are model, train"),
        ("run.toml", b"\xff\xfe[", "not UTF-8 text (byte 0)"),
        ("run.toml", b"[train]\nsteps = 1\nsteps = 2", "not valid TOML"),
        ("run.toml", b"[train]\nsteps = " + b"9" * 5000, "not valid TOML"),
        ("run.toml", b"[train]\nx = " + b"[" * 100_000, "nested too deeply"),
        ("run.json", b"", "not valid JSON"),
        ("run.json", b"[1]", "must hold a JSON object"),
        ("run.json", b'{"model": {"a": 1, "a": 2}}', "'a' comes twice"),
        ("run.json", b'{"a":' * 100_000, "nested too deeply"),
        ("run.yaml", b"", ".toml or .json"),
    ],
)
def test_damaged_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_sections(path, known=["model", "train"])
    message = one_line(error)
    assert message.startswith(str(path))
    assert words in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_sections(tmp_path / "no.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_sections(tmp_path / "folder.toml")


def test_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("old")
    write_toml(path, {"train": Train(1)})
    assert read_sections(path) == {"train": {"steps": 1, "name": "run"}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.toml"]
    with pytest.raises(InputError, match="cannot be written"):
        write_toml(tmp_path / "no folder" / "run.toml", {"train": Train(1)})
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_toml(tmp_path / "taken", {"train": Train(1)})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.toml"
    path.write_text("old")
    for step in ["fsync", "replace"]:
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(InputError, match="cannot be written: No space left on device"):
                write_text(path, "new")
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.toml"]

"""Files made to crash, hang or fill the memory: safetensors, config.json, tokenizer.json."""

import gc
import json
import os
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tinyllm import InputError
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.formats.safetensors_reader import LARGEST_HEADER, read_safetensors
from tinyllm.system import storage
from tinyllm.system.json_files import parse_json, read_json
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, patterns
from tinyllm.training.checkpoints import checkpoint, keeping

MEBIBYTE = 1 << 20


def bounded(action: Callable[[], Any], megabytes: float, seconds: float = 5.0) -> Any:
    """The result of `action`, or its InputError; Python may take so much memory and so much time for it."""
    gc.collect()
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        result = action()
    except InputError as error:
        result = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if isinstance(result, InputError):
        assert "\n" not in str(result)
        assert len(str(result)) < 500
    assert peak < megabytes * MEBIBYTE, f"{peak / MEBIBYTE:.1f} MiB"
    assert time.perf_counter() - begun < seconds
    return result


# ---- safetensors -------------------------------------------------------------------------------


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


HUGE = 1 << 62
ATTACKS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes are no safetensors file"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "no header": (packed(b""), "not JSON"),
    "header beyond the file": (packed({}, length=3), "the header has 3 bytes, of 2 that follow"),
    "header of 2^64 - 1 bytes": (packed({}, length=2**64 - 1), "the header has 18,446,744,073,709,551,615 bytes"),
    "header larger than allowed": (
        packed(b"{" + b" " * LARGEST_HEADER + b"}"),
        f"the header has {LARGEST_HEADER + 2:,} bytes, of .* and {LARGEST_HEADER:,} allowed",
    ),
    "header cut off": (packed(b'{"a":'), "not JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "not JSON": (packed(b"hello"), "not JSON"),
    "a list": (packed([]), "must be a JSON object"),
    "a number of thousands of digits": (packed(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "nested too deeply": (packed(b"[" * 100_000), "nested too deeply|not JSON"),
    "objects nested too deeply": (packed(b'{"a":' * 100_000), "nested too deeply|not JSON"),
    "a name twice": (packed(b'{"a": 1, "a": 2}'), "'a' comes twice"),
    "no entry": (packed({"a": 5}), "'a' must have dtype, shape and data_offsets"),
    "more in an entry": (packed({"a": entry([0], 0, 0, extra=1)}), "nothing else"),
    "unknown dtype": (packed({"a": entry([1], 0, 4, "F31")}, b"\0" * 4), "dtype 'F31'; supported"),
    "dtype of another type": (packed({"a": entry([1], 0, 4, ["F32"])}, b"\0" * 4), "has dtype"),
    "overlapping": (packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12), "'b' begins at byte 4, .* 8"),
    "twice the same bytes": (packed({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8), "begins at byte 0"),
    "a hole at the start": (packed({"a": entry([1], 4, 8)}, b"\0" * 8), "begins at byte 4"),
    "a hole between": (packed({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "begins at byte 8"),
    "bytes at the end": (packed({"a": entry([1], 0, 4)}, b"\0" * 5), "1 bytes follow the last"),
    "bytes and no array": (packed({}, b"\0" * 4), "4 bytes follow"),
    "beyond the end": (packed({"a": entry([2], 0, 8)}, b"\0" * 4), "ends at byte 8, and the file holds 4"),
    "far beyond the end": (packed({"a": entry([HUGE // 4], 0, HUGE)}, b"\0" * 4), "ends at byte 4611686018427387904"),
    "end before begin": (packed({"a": entry([1], 4, 0)}, b"\0" * 4), "its offsets"),
    "negative offsets": (packed({"a": entry([1], -4, 0)}, b"\0" * 4), "must be a list of numbers from 0"),
    "offsets as fractions": (packed({"a": entry([1], 0.0, 4.0)}, b"\0" * 4), "list of numbers"),
    "offsets as text": (packed({"a": entry([1], "0", "4")}, b"\0" * 4), "list of numbers"),
    "offsets as truth": (packed({"a": entry([1], False, 4)}, b"\0" * 4), "list of numbers"),
    "three offsets": (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"\0" * 4), "3 offsets"),
    "offsets of 2^64": (packed({"a": entry([1], 2**64, 2**64 + 4)}, b"\0" * 4), "list of numbers"),
    "shape too small": (packed({"a": entry([1], 0, 8)}, b"\0" * 8), "takes 4 bytes, its offsets .* 8"),
    "shape too large": (packed({"a": entry([3], 0, 8)}, b"\0" * 8), "takes 12 bytes"),
    "negative shape": (packed({"a": entry([-1], 0, 4)}, b"\0" * 4), "shape of 'a' must be a list"),
    "two negative lengths": (packed({"a": entry([-1, -1], 0, 4)}, b"\0" * 4), "shape of 'a' must be a list"),
    "shape is no list": (packed({"a": entry(4, 0, 4)}, b"\0" * 4), "shape of 'a' must be a list"),
    "shape with infinity": (packed(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', b"\0" * 4), "shape"),
    # In 64 bits these products are 0, 4 and 4 again.
    "product overflows to nothing": (packed({"a": entry([1 << 32, 1 << 32], 0, 0)}), "takes 73786976294838206464"),
    "product overflows to what is there": (
        packed({"a": entry([HUGE + 1, 4], 0, 4, "U8")}, b"\0" * 4), "takes 18446744073709551620 bytes"
    ),
    "size overflows with the dtype": (packed({"a": entry([HUGE + 1], 0, 4)}, b"\0" * 4), "takes 18446744073709551620"),
    "33 dimensions": (packed({"a": entry([1] * 33, 0, 4)}, b"\0" * 4), "33 dimensions"),
    "nothing, of a shape that no array has": (packed({"a": entry([0, HUGE, HUGE], 0, 0)}), "'a' of shape"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_are_refused(content: bytes, message: str) -> None:
    # Nesting is parsed as deep as the stack allows: from Python 3.14 on some 65,000 levels of 56 bytes in 8 MiB of it.
    error = bounded(lambda: read_safetensors(content), len(content) / MEBIBYTE + 6)
    assert isinstance(error, InputError), error
    assert re.search(message, str(error)), error


def test_the_largest_header_takes_bounded_memory() -> None:
    names = b"".join(b'"%d":[],' % i for i in range(LARGEST_HEADER // 12))
    content = packed(b"{" + names + b'"x":0}')
    assert LARGEST_HEADER * 0.7 < len(content) < LARGEST_HEADER
    assert isinstance(bounded(lambda: read_safetensors(content), 120, 20), InputError)


def test_no_copy_is_made() -> None:
    content = packed({"a": entry([1 << 22], 0, 1 << 24)}, bytes(1 << 24))
    (array,) = bounded(lambda: read_safetensors(content), 1).values()
    assert not array.flags.writeable


def test_zero_sized_and_zero_dimensional_arrays() -> None:
    arrays = {
        "scalar": np.array(3.5, np.float32),
        "nothing": np.zeros((0,), np.float32),
        "no rows": np.zeros((0, 7), np.int64),
        "no columns": np.zeros((3, 0), np.float16),
        "last": np.arange(6, dtype=np.float64).reshape(2, 3),
    }
    found = read_safetensors(safetensors.numpy.save(arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].tobytes() == array.tobytes()


DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.bool_]
ARRAYS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)),
    max_size=5,
)


@given(ARRAYS, st.integers(0, 2**32))
def test_what_the_library_writes_is_read(shapes: dict[str, tuple[Any, list[int]]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    arrays = {
        name: np.asarray(generator.random(shape) * 9).astype(dtype) for name, (dtype, shape) in shapes.items()
    }
    content = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    found = read_safetensors(content)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].tobytes() == array.tobytes()


@given(st.data())
def test_what_the_library_refuses_is_refused(data: st.DataObject) -> None:
    """One byte of the header is another: whoever reads it, reads the same or nothing."""
    arrays = {"a": np.arange(3, dtype=np.float32), "b": np.zeros((2, 2), np.int16)}
    content = bytearray(safetensors.numpy.save(arrays))
    length = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    try:
        mine = {name: (x.shape, x.dtype, x.tobytes()) for name, x in read_safetensors(bytes(content)).items()}
    except InputError:
        return
    theirs = safetensors.numpy.load(bytes(content))
    assert mine == {name: (x.shape, x.dtype, x.tobytes()) for name, x in theirs.items()}


# ---- Whole folders -----------------------------------------------------------------------------

CONFIG = ModelConfig(vocab_size=7, context_length=8, num_layers=1, num_heads=2, hidden_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as transformers writes it: without a manifest, so that the files are taken as they are."""
    return checkpoint.save(tmp_path / "model", TransformerLM(CONFIG, 1), CharTokenizer("\n abcdé"))


def without_manifest(folder: Path) -> Path:
    shutil.rmtree(folder / "training")
    return folder


LARGE = [2**31 - 1, 2**40, 10**30, 10**400]
CONFIG_VALUES: dict[str, list[Any]] = {
    "vocab_size": [*LARGE, 0, -7, 7.0, "7", None, [7], {}, True],
    "hidden_size": [*LARGE, 0, -8, 2**20, "8"],
    "num_hidden_layers": [*LARGE, 0, -1, None],
    "num_attention_heads": [*LARGE, 0, -2, 3],
    "num_key_value_heads": [*LARGE, -1, 2**20],
    "head_dim": [*LARGE, -4, 3, 2**20],
    "intermediate_size": [*LARGE, -1, 2**25],
    "max_position_embeddings": [10**30, 10**400, 0, -1, "8"],
    "rms_norm_eps": ["x", None, -1.0, [0]],
    "rope_theta": ["x", [], {}, "1e999"],
    "model_type": [None, 5, [], {}, "x" * 10**6],
    "tinyllm": [5, [], "x", {"num_layers": 2**31 - 1}, {"hidden_size": 10**30}, {"dropout": 5.0}, {"x" * 10**6: 1}],
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIG_VALUES)
def test_hostile_configs(folder: Path, key: str) -> None:
    without_manifest(folder)
    content = json.loads((folder / "config.json").read_text())
    size = sum(file.stat().st_size for file in folder.iterdir()) / MEBIBYTE
    for value in CONFIG_VALUES[key]:
        if key == "rope_theta":
            content["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
        try:
            text = json.dumps({**content, key: value})
        except ValueError:  # more digits than Python writes
            text = json.dumps({**content, key: "DIGITS"}).replace('"DIGITS"', "1" + "0" * 5000)
        (folder / "config.json").write_text(text)
        error = bounded(lambda: keeping.load(folder), size + len(text) / MEBIBYTE * 12 + 4)
        assert isinstance(error, InputError), (key, value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_])
def test_weights_that_are_no_numbers_with_a_point(folder: Path, dtype: Any) -> None:
    """A byte for each weight would grow by four."""
    without_manifest(folder)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(
        {name: x.astype(dtype) for name, x in arrays.items()}, folder / "model.safetensors"
    )
    error = bounded(lambda: keeping.load(folder), 4)
    assert "weights must be floating-point numbers" in str(error)


DEEP = ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000]
WIDE = [
    "[" + "[]," * 60_000 + "0]",
    '{"a": [' + "{}," * 60_000 + "0]}",
    '{"a": [' + "0," * 100_000 + "0]}",
]
JUNK = [
    "",
    "\0",
    "\ufeff",
    "null",
    "5",
    "[]",
    '"x"',
    "{",
    '{"a": 1, "a": 1}',
    "{} {}",
    "NaN",
    '{"a": 1e999',
    "9" * 10**5,
]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "training/manifest.json"])
def test_json_that_is_deep_wide_or_junk(folder: Path, file: str) -> None:
    if not file.startswith("training"):
        without_manifest(folder)
    for text in (*DEEP, *WIDE, *JUNK):
        (folder / file).write_text(text)
        # What JSON becomes takes up to 100 bytes an item, and files of more than 4 million items are not parsed.
        error = bounded(lambda: keeping.load(folder), 50, 10)
        assert isinstance(error, InputError)
        assert Path(file).name in str(error)


def test_json_of_too_many_items_is_not_parsed() -> None:
    text = b'{"a": [' + b"[]," * 5_000_000 + b"0]}"
    error = bounded(lambda: parse_json(text, "x.json"), 2 * len(text) / MEBIBYTE + 1)
    assert "more than 4,194,304 items" in str(error)


@pytest.mark.links
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "model.safetensors", "training/manifest.json"]
)
def test_what_is_no_plain_file(folder: Path, file: str) -> None:
    if not file.startswith("training"):
        without_manifest(folder)
    path = folder / file
    path.unlink()
    os.mkfifo(path)
    assert "not a plain file" in str(bounded(lambda: keeping.load(folder), 4))
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a plain file" in str(bounded(lambda: keeping.load(folder), 4))
    path.unlink()
    path.symlink_to(path.name)
    assert re.search("symbolic links|no checkpoint here", str(bounded(lambda: keeping.load(folder), 4)))
    path.unlink()
    path.mkdir()
    assert "Is a directory" in str(bounded(lambda: keeping.load(folder), 4))


def test_files_that_say_to_be_large(folder: Path) -> None:
    """Sparse files take no room on the disk; reading them would."""
    for file in ("model.safetensors", "training/manifest.json"):
        before = (folder / file).read_bytes()
        os.truncate(folder / file, 1 << 40)
        assert isinstance(bounded(lambda: keeping.load(folder), 4), InputError)
        (folder / file).write_bytes(before)
    without_manifest(folder)
    for file in ("config.json", "tokenizer.json"):
        before = (folder / file).read_bytes()
        os.truncate(folder / file, 1 << 40)
        assert "1,099,511,627,776 bytes, more than" in str(bounded(lambda: keeping.load(folder), 4))
        (folder / file).write_bytes(before)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert storage.read_file(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="100 bytes, more than 99"):
        storage.read_file(path, 99)


# ---- Tokenizers --------------------------------------------------------------------------------


def bpe() -> dict[str, Any]:
    return BPETokenizer.train(["low lower lowest " * 9], 264, special_tokens=["<|end|>"]).to_json()


def changed(where: str, value: Any) -> dict[str, Any]:
    content = bpe()
    part: Any = content
    *path, last = where.split(".")
    for key in path:
        part = part[int(key) if isinstance(part, list) else key]
    part[last] = value
    return content


TOKENIZERS: dict[str, Any] = {
    "no model": {"model": None},
    "model is a list": {"model": [1]},
    "type is a list": {"model": {"type": ["BPE"]}},
    "unknown type": {"model": {"type": "Unigram"}},
    "characters with large ids": {"model": {"type": "WordLevel", "vocab": {"a": 2**62}}},
    "characters with negative ids": {"model": {"type": "WordLevel", "vocab": {"a": -1}}},
    "characters with the same id": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}}},
    "characters with ids that are true": {"model": {"type": "WordLevel", "vocab": {"a": False}}},
    "words for characters": {"model": {"type": "WordLevel", "vocab": {"aa": 0}}},
    "half of a pair": {"model": {"type": "WordLevel", "vocab": {"\ud800": 0}}},
    "no vocabulary": changed("model.vocab", {}),
    "a vocabulary of lists": changed("model.vocab", [["a", 0]]),
    "an id of 2^62": changed("model.vocab", {"a": 2**62}),
    "a negative id": changed("model.vocab", {"a": -1}),
    "an id with a point": changed("model.vocab", {"a": 0.0}),
    "an id that is null": changed("model.vocab", {"a": None}),
    "no merges": changed("model.merges", None),
    "merges that are numbers": changed("model.merges", [1, 2]),
    "merges of three": changed("model.merges", [["a", "b", "c"]]),
    "merges of nothing": changed("model.merges", [["", ""]]),
    "merges of what is not there": changed("model.merges", [["l", "q"]]),
    "merges of lists": changed("model.merges", [[["l"], ["o"]]]),
    "a merge of a million characters": changed("model.merges", [["l" * 10**6, "o"]]),
    "added tokens that are text": changed("added_tokens", "<|end|>"),
    "an added token without an id": changed("added_tokens", [{"content": "<|end|>", "special": True}]),
    "an added token with a large id": changed("added_tokens", [{"content": "x", "special": True, "id": 2**62}]),
    "an added token with a negative id": changed("added_tokens", [{"content": "x", "special": True, "id": -1}]),
    "a pre-tokenizer that is text": changed("pre_tokenizer", "split"),
    "a pre-tokenizer inside itself": changed(
        "pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Sequence"}]}
    ),
    "an expression that is none": changed("pre_tokenizer.pretokenizers", [
        {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "use_regex": False}]),
}  # fmt: skip


@pytest.mark.parametrize("content", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_hostile_tokenizers(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    error = bounded(lambda: load_tokenizer(path), 30 * path.stat().st_size / MEBIBYTE + 8)
    assert isinstance(error, InputError), error
    assert str(path) in str(error)


def with_expression(expression: str) -> dict[str, Any]:
    content = bpe()
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = expression
    return content


EXPRESSIONS: dict[str, tuple[str, str | None]] = {
    "nested repeats": ("(?:(?:(?:a{1000}){1000}){1000}){1000}", "its repeats make more than 100,000"),
    "one large repeat": ("a{4000000000}", "its repeats make more than"),
    "a larger one": ("a{1,9999999999999999999999}", "its repeats make more than"),
    "many groups": ("(" * 4900 + "a" + ")" * 4900, "maximum recursion depth"),
    "many alternatives": ("|".join(f"a{i}" for i in range(50_000)), "at most 10,000 are allowed"),
    "recursion": ("(?R)", "it calls itself"),
    "recursion of a group": ("((?1))", "it calls itself"),
    "recursion of a name": ("(?P<x>a(?&x))", "it calls itself"),
    "exponential": (r"(a+)+(?![\s\S])", None),
    "exponential alternatives": (r"(a|aa)+(?![\s\S])", None),
    "back reference": (r"(a+)\1b", "Oniguruma"),
    "fuzzy": ("(?:aaaaaaaaaaaaaaaaaaaa){e<=10}", "Oniguruma"),
}


@pytest.mark.parametrize(("expression", "message"), EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_expressions_that_take_long(
    tmp_path: Path, expression: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expression of a tokenizer is somebody else's program: it may be refused, but not hang."""
    monkeypatch.setattr(patterns, "_SECONDS_PER_MILLION", 0.3)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(with_expression(expression)))
    tokenizer = bounded(lambda: load_tokenizer(path), 300, 5)
    if message is not None:
        assert isinstance(tokenizer, InputError)
        assert re.search(message, str(tokenizer)), tokenizer
        return
    text = "a" * 40 + "!" + "a" * 2000
    result = bounded(lambda: tokenizer.encode(text), 300, 5)
    if isinstance(result, InputError):
        assert "it backtracks too much" in str(result)
    else:
        assert tokenizer.decode(result) == text


def test_wide_vocabularies_take_memory_in_proportion(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = bpe()
    content["model"]["vocab"] = {chr(0x100 + i % 500) * (1 + i // 500): i for i in range(20_000)}
    path.write_text(json.dumps(content))
    bounded(lambda: load_tokenizer(path), 12 * path.stat().st_size / MEBIBYTE + 8, 20)


def test_a_duplicate_key_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(InputError, match="'b' comes twice"):
        read_json(tmp_path / "x.json")

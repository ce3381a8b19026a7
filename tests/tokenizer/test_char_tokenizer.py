"""CharTokenizer: text comes back as it went in, and every wrong input is named."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from tinyllm.tokenizer import char as char_module

MIXED = 'a\n\r\n\t  é e\u0301 日本 \U0001f600 \U0010ffff \x00\x7f\x85\u2028\ufeff\uffff "\\/</w>'
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(texts)
@settings(deadline=None)
def test_round_trip_equals_the_plain_definition(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    vocabulary = sorted(set(text))
    ids = [vocabulary.index(character) for character in text]
    assert tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.characters == "".join(vocabulary)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode_to_array(text)) == text


@given(texts, st.data())
@settings(deadline=None, max_examples=50)
def test_text_across_pieces(text: str, data: st.DataObject) -> None:
    """With pieces of a few characters, both directions and both errors' positions stay right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(char_module, "_CHUNK", data.draw(st.integers(1, 4)))
        tokenizer = CharTokenizer.train(text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        position = data.draw(st.integers(0, len(text)))
        unknown = next(c for c in map(chr, range(1 << 16)) if c not in text)
        with pytest.raises(InputError, match=rf"U\+{ord(unknown):04X}.* position {position} "):
            tokenizer.encode(text[:position] + unknown + text[position:])
        with pytest.raises(InputError, match=rf"the id {len(set(text))} at position {position} "):
            tokenizer.decode([*ids[:position], len(set(text)), *ids[position:]])


@given(texts)
@settings(deadline=None, max_examples=50)
def test_json_round_trip(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    again = CharTokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.characters == tokenizer.characters


def test_dtype() -> None:
    def of_size(size: int) -> CharTokenizer:
        return CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + size))))

    small = of_size(1 << 16)
    ids = small.encode_to_array(small.characters)
    assert ids.dtype == small.dtype == np.uint16
    np.testing.assert_array_equal(ids, np.arange(1 << 16))
    large = of_size((1 << 16) + 1)
    ids = large.encode_to_array(large.characters)
    assert ids.dtype == large.dtype == np.uint32
    np.testing.assert_array_equal(ids, np.arange((1 << 16) + 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_decode_takes_any_integer_dtype(dtype: type) -> None:
    tokenizer = CharTokenizer("abc")
    assert tokenizer.decode(np.array([2, 0, 1], dtype=dtype)) == "cab"
    assert tokenizer.decode(iter([2, 0, 1])) == "cab"


@pytest.mark.parametrize("highest", ["\x7f", "\xff", "\u0100", "\uffff", "\U00010000", "\U0010ffff"])
def test_decode_at_the_limits_of_each_codec(highest: str) -> None:
    text = "a\n" + highest
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_empty_text_and_ids() -> None:
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode("") == []
    assert tokenizer.encode_to_array("").dtype == np.uint16
    assert tokenizer.decode([]) == ""
    with pytest.raises(InputError, match="at least one character"):
        CharTokenizer.train("")


@pytest.mark.parametrize("character", ["b", "é", "\n", "\x00", "日", "\U0001f600", chr(sys.maxunicode)])
def test_unknown_character_is_named(character: str) -> None:
    tokenizer = CharTokenizer("aÿ")  # its highest code point lies between some of these
    with pytest.raises(InputError) as error:
        tokenizer.encode("aa" + character)
    assert f"{character!r} (U+{ord(character):04X}) at position 2 " in str(error.value)
    assert "\n" not in str(error.value)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InputError, match=r"'\\ud800' \(U\+D800\)"):
        CharTokenizer.train("ab\ud800")
    # Two halves side by side are still no character in Python.
    with pytest.raises(InputError, match=r"U\+D83D.* position 1 "):
        CharTokenizer.train("a\U0001f600").encode("a\ud83d\ude00")


@pytest.mark.parametrize("ids", [[0, 3], [0, -1], [0, 2**40], np.array([0, 255], dtype=np.uint8)])
def test_unknown_id_is_named(ids: Any) -> None:
    with pytest.raises(InputError, match=rf"the id {ids[1]} at position 1 .*0 to 2"):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize("ids", [[0.0], [True], ["a"], [[0]], np.zeros((1, 1), int), [2**70]])
def test_ids_must_be_integers_in_one_dimension(ids: Any) -> None:
    with pytest.raises(TypeError, match="ids must be integers"):
        CharTokenizer("abc").decode(ids)


def test_characters_must_be_distinct() -> None:
    with pytest.raises(InputError, match=r"'b' \(U\+0062\) twice"):
        CharTokenizer("abcb")


# ---- Files -------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.train(MIXED)
    assert tokenizer.save(tmp_path / "new" / "folder") == tmp_path / "new/folder/tokenizer.json"
    assert tokenizer.save(tmp_path / "other.json") == tmp_path / "other.json"
    for path in [tmp_path / "new/folder", tmp_path / "other.json"]:
        loaded = load_tokenizer(path)
        assert isinstance(loaded, CharTokenizer)
        assert isinstance(loaded, Tokenizer)
        assert loaded.encode(MIXED) == tokenizer.encode(MIXED)
        assert loaded.decode(loaded.encode(MIXED)) == MIXED
    with pytest.raises(InputError, match="cannot make this folder"):
        tokenizer.save(tmp_path / "other.json" / "below")


def test_order_in_the_file_does_not_matter(tmp_path: Path) -> None:
    content = CharTokenizer("ba").to_json()
    content["model"]["vocab"] = {"a": 1, "b": 0}
    assert CharTokenizer.from_json(content).characters == "ba"


def changed(**parts: Any) -> bytes:
    """A good tokenizer.json with parts of it, or of its model, replaced."""
    content = CharTokenizer("ab").to_json()
    for key, value in parts.items():
        (content["model"] if key in ("vocab", "type") else content)[key] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (changed()[:-5], "not valid JSON"),
        (b"\xff" + changed(), "not UTF-8"),
        (b"[]", "must hold a JSON object"),
        (b"{}", "model type is None; supported: WordLevel"),
        (b"[" * 100_000, "nested too deeply"),
        (changed(model=None), "model type is None"),
        (changed(model=[]), "model type is None"),
        (changed(type="Unigram"), "model type is 'Unigram'"),
        (changed(type=["WordLevel"]), "model type is ['WordLevel']"),
        (changed(version="2.0"), "version is '2.0'"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is {'type'"),
        (changed(normalizer={"type": "NFC"}), "normalizer is"),
        (changed(added_tokens=[{"id": 2, "content": "<s>"}]), "added_tokens is"),
        (changed(decoder=None), "decoder is None"),
        (changed(vocab={}), "model.vocab must be an object"),
        (changed(vocab=None), "model.vocab must be an object"),
        (changed(vocab=["a", "b"]), "model.vocab must be an object"),
        (changed(vocab={"ab": 0}), "'ab' is not one character"),
        (changed(vocab={"": 0}), "'' is not one character"),
        (changed(vocab={"a": 0, "b": 0}), "the id of 'b' (U+0062) is 0"),
        (changed(vocab={"a": 0, "b": 2}), "the id of 'b' (U+0062) is 2"),
        (changed(vocab={"a": -1, "b": 0}), "is -1"),
        (changed(vocab={"a": 0, "b": True}), "is True"),
        (changed(vocab={"a": 0, "b": 1.0}), "is 1.0"),
        (changed(vocab={"a": 0, "b": 1e300}), "is 1e+300"),
        (changed(vocab={"a": 0, "b": None}), "is None"),
        (changed(vocab={"a": 0, "\ud800": 1}), "U+D800"),
        (changed(vocab={"x\n" * 9999: 0}), "is not one character"),
        (changed().replace(b'"a": 0', b'"a": 0, "a": 0'), "'a' comes twice"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message
    assert len(message) < 500


def test_missing_file(tmp_path: Path) -> None:
    for path in [tmp_path, tmp_path / "no.json", tmp_path / "no folder"]:
        with pytest.raises(InputError, match="no such file"):
            load_tokenizer(path)

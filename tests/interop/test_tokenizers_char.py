"""The tokenizers library opens our character tokenizer and gives the same ids and text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.tokenizer import CharTokenizer, load_tokenizer

tokenizers = pytest.importorskip(
    "tokenizers", reason="compares with the tokenizers package: pip install tokenizers"
)

MIXED = "a\n\n\r\n\t  é e\u0301\u0301 日本 \U0001f469\u200d\U0001f4bb \U0010ffff \x00\x85\u2028\ufeff"


def check(text: str) -> None:
    ours = CharTokenizer.train(text)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()))
    ids = theirs.encode(text).ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_whitespace_astral_and_combining_characters() -> None:
    check(MIXED)
    check("<unk> [UNK] </s> ##a ▁b Ġ")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@settings(deadline=None, max_examples=100)
def test_any_text(text: str) -> None:
    check(text)


def test_files_go_both_ways(tmp_path: Path) -> None:
    ours = CharTokenizer.train(MIXED)
    theirs = tokenizers.Tokenizer.from_file(str(ours.save(tmp_path)))
    assert theirs.encode(MIXED).ids == ours.encode(MIXED)
    theirs.save(str(tmp_path / "theirs.json"))
    assert load_tokenizer(tmp_path / "theirs.json").encode(MIXED) == ours.encode(MIXED)


def test_unknown_character_is_an_error_there_too() -> None:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(CharTokenizer("ab").to_json()))
    with pytest.raises(Exception, match="WordLevel"):
        theirs.encode("abc")

"""Special tokens in a text: overlapping ones as tiktoken takes them, pieces as the tokenizers library does."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm.tokenizer import BPETokenizer, SentencePieceTokenizer
from tinyllm.tokenizer.sentencepiece_pieces import Kind, Piece

tiktoken = pytest.importorskip("tiktoken", reason="compares with the tiktoken package: pip install tiktoken")
tokenizers = pytest.importorskip(
    "tokenizers", reason="compares with the tokenizers package: pip install tokenizers"
)

BYTES = {bytes([i]): i for i in range(256)}
# No token begins another, since tiktoken takes them in any order: which of two such wins is a matter of luck.
SPECIAL = {"<a<b>c>": 256, "<b>": 257, "b>c": 258, "<b><d>": 259}
OVERLAPPING = {name: id for name, id in SPECIAL.items() if name != "<b><d>"}
SOME = st.sets(st.sampled_from([*OVERLAPPING]))


@given(
    parts=st.lists(st.sampled_from(["<a", "<b>", "c>", "<", "b>", "c", "a"]), max_size=8),
    allowed=SOME | st.just("all"),
    disallowed=SOME | st.just("all"),
)
@example(parts=["<a", "<b>", "c>"], allowed={"<b>"}, disallowed=set())
@example(parts=["<a", "<b>", "c>"], allowed={"<a<b>c>"}, disallowed="all")
@example(parts=["<b>", "c"], allowed={"b>c"}, disallowed=set())
def test_overlapping_special_tokens(parts: list[str], allowed: Any, disallowed: Any) -> None:
    text = "".join(parts)
    ours = BPETokenizer(BYTES, [], special_tokens=OVERLAPPING)
    theirs = tiktoken.Encoding(
        "test", pat_str=ours.pattern, mergeable_ranks=BYTES, special_tokens=OVERLAPPING
    )
    arguments = {"allowed_special": allowed, "disallowed_special": disallowed}
    try:
        expected = theirs.encode(text, **arguments)
    except ValueError:
        expected = None
    try:
        ids = ours.encode(text, **arguments)
    except ValueError:
        ids = None
    assert ids == expected


def test_of_two_that_begin_together_the_longer_is_taken() -> None:
    ours = BPETokenizer(BYTES, [], special_tokens=SPECIAL)
    assert ours.encode("<b><d>", allowed_special="all") == [259]
    assert ours.encode("<b><d>", allowed_special={"<b>"}, disallowed_special=()) == [257, *b"<d>"]


PIECES = [
    Piece("<unk>", kind=Kind.UNKNOWN),
    Piece("<s>", kind=Kind.CONTROL),
    Piece("</s>", kind=Kind.CONTROL),
]
PIECES += [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
PIECES += [Piece(text, -float(i)) for i, text in enumerate(("▁ab", "ab", "▁a", "▁", "a", "b", "s"))]


@pytest.mark.parametrize(("prefix", "escape"), [*itertools.product([True, False], repeat=2)])
@given(
    parts=st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "ab", " ", "é", "\n", "<", "s>"]), max_size=10)
)
@example(parts=["<s>", "ab", "</s>", " ab", "<unk>"])
def test_special_pieces(prefix: bool, escape: bool, parts: list[str]) -> None:
    text = "".join(parts)
    ours = SentencePieceTokenizer(PIECES, prefix, escape)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()))
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allowed_special="all") == expected
    assert ours.encode_document(text).tolist() == expected

"""Awkward and wrong arguments of tokenizers: each is understood, or one line says what is expected and what to do."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.errors import InputError
from tinyllm.files import blocks, looks_like_a_path, text_of
from tinyllm.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    VocabularyWarning,
    load_tokenizer,
    reference,
)
from tinyllm.tokenizer.bpe_training import count_pieces
from tinyllm.tokenizer.patterns import PATTERNS, Pattern, chosen_pattern
from tinyllm.tokenizer.sentencepiece_pieces import Kind, Piece

END = "<|endoftext|>"
BYTES = {bytes([i]): i for i in range(256)}
TEXT = "the other one then, the other two\n" * 8

PIECES = [
    Piece("<unk>", kind=Kind.UNKNOWN),
    Piece("<s>", kind=Kind.CONTROL),
    Piece("</s>", kind=Kind.CONTROL),
]
PIECES += [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
PIECES += [Piece(text, -float(i)) for i, text in enumerate(("▁th", "th", "▁", "t", "h", "s"))]

TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer("abc"),
    "byte": ByteTokenizer(),
    "bpe": BPETokenizer(BYTES, [], special_tokens={END: 256}),
    "sentencepiece": SentencePieceTokenizer(PIECES),
}
each = pytest.mark.parametrize("name", TOKENIZERS)


def refused(call: Callable[[], Any], words: str, kind: type[Exception] = InputError) -> None:
    with pytest.raises(kind, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# ---- What is no text, and no ids ---------------------------------------------------------------


@each
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"abc", r"the text must be a str, got b'abc' \(bytes\); decode the bytes first"),
        (bytearray(b"abc"), "decode the bytes first"),
        (None, r"the text must be a str, got None \(NoneType\)$"),
        (["a"], r"the text must be a str, got \['a'\] \(list\); encode_batch takes several texts"),
        (("a", "b"), "encode_batch takes several texts"),
        (5, "got 5"),
        (Path("a.txt"), "read_text reads files"),
    ],
)
def test_what_is_no_text_is_said(name: str, text: Any, words: str) -> None:
    tokenizer = TOKENIZERS[name]
    for method in (tokenizer.encode, tokenizer.encode_to_array, tokenizer.encode_document, tokenizer.offsets):
        refused(lambda method=method: method(text), words)  # type: ignore[misc]
    refused(lambda: tokenizer.encode_batch([text]), words)
    refused(lambda: list(tokenizer.encode_iterable([text])), words)


@each
def test_one_text_is_not_several(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for texts in ("abc", b"abc", None, 5):
        refused(lambda texts=texts: tokenizer.encode_batch(texts), "must be a list of texts.* takes one text")  # type: ignore[misc]
    for texts in (b"abc", None, 5):
        refused(lambda texts=texts: list(tokenizer.encode_iterable(texts)), "must be a list of texts")  # type: ignore[misc]
    assert list(tokenizer.encode_iterable("abc")) == tokenizer.encode("abc")
    assert tokenizer.encode_batch(text for text in ("a", "b")) == [
        tokenizer.encode("a"),
        tokenizer.encode("b"),
    ]


@each
@pytest.mark.parametrize("ids", ["72 101", None, 5, np.int64(5), ["a"], [[1]], [1.5], [True], np.array(5)])
def test_what_is_no_ids_is_said(name: str, ids: Any) -> None:
    for method in (TOKENIZERS[name].decode, TOKENIZERS[name].decode_bytes):
        refused(lambda method=method: method(ids), "ids must be integers in one dimension, got ", TypeError)  # type: ignore[misc]


def test_characters_are_learned_from_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.en").write_text("abc")
    refused(lambda: CharTokenizer.train(["ab", "c"]), "join several first")  # type: ignore[arg-type]
    refused(lambda: CharTokenizer(["a", "b"]), "join them first")  # type: ignore[arg-type]
    refused(lambda: CharTokenizer.train(b"ab"), "decode the bytes first")  # type: ignore[arg-type]
    refused(lambda: CharTokenizer.train(Path("corpus.en")), "read_text reads files")  # type: ignore[arg-type]
    refused(
        lambda: CharTokenizer.train("corpus.en"), "is the name of a file; tinyllm.data.read_text reads it"
    )
    assert CharTokenizer.train("corpus.fr").vocab_size == 8


# ---- What byte-pair encoding is learned from ---------------------------------------------------


def test_one_text_and_one_path_are_taken(tmp_path: Path) -> None:
    (tmp_path / "corpus.en").write_text(TEXT)
    expected = BPETokenizer.train([TEXT], 262).merges
    assert len(expected) == 6
    assert BPETokenizer.train(TEXT, 262).merges == expected
    assert BPETokenizer.train(tmp_path / "corpus.en", 262).merges == expected
    assert BPETokenizer.train([tmp_path / "corpus.en"], 262).merges == expected


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ("corpus.en", "corpus.en"),
        (["corpus.en"], "corpus.en"),
        ([TEXT, "corpus.en"], "corpus.en"),
        ("my corpus.txt", "my corpus.txt"),
        ("folder", "folder"),
        (["folder/a.txt"], "folder/a.txt"),
        (iter(["corpus.en"]), "corpus.en"),
    ],
)
def test_the_name_of_a_file_is_asked_about(
    texts: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in ("corpus.en", "my corpus.txt", "folder/a.txt"):
        Path(file).write_text(TEXT)
    advice = rf"the text '{name}' is the name of a file; Path\('{name}'\) is learned from"
    refused(lambda: BPETokenizer.train(texts, 300), advice)


@pytest.mark.parametrize(
    "text",
    [
        "corpus.en",
        "data/a.txt",
        "../corpus.txt",
        "~/corpus",
        "data/corpus/",
        r"C:\data\corpus.txt",
        "/data/corpus",
    ],
)
def test_the_name_of_a_file_that_is_missing_is_asked_about(text: str) -> None:
    for texts in (text, [text], [text, text], [Path(__file__), text]):
        refused(
            lambda texts=texts: BPETokenizer.train(texts, 300),
            "looks like the name of a file, and there is none",
        )  # type: ignore[misc]
    with pytest.warns(VocabularyWarning):
        assert BPETokenizer.train(text + "\n", 300).decode(list(text.encode())) == text


@pytest.mark.parametrize(
    "text", ["the", "3.14", "a.", "one.Two three", "e.g. this", "a/b", "", "/", ".", "1/2"]
)
def test_a_text_is_no_path(text: str) -> None:
    assert not looks_like_a_path(text)


def test_names_among_texts_are_texts() -> None:
    """A list of words may hold and/or, and hosts."""
    tokenizer = BPETokenizer.train(["the other", "docs.python", "and/or"] * 5, 260)
    assert tokenizer.vocab_size == 260


@pytest.mark.parametrize(
    ("least", "words"), [(2, "left that occurs 2 times; more text or a lower"), (1, "left to join; more")]
)
def test_a_vocabulary_that_was_not_filled_is_said(least: int, words: str) -> None:
    with pytest.warns(VocabularyWarning, match=rf"tokens, not 5,000: no pair of tokens is {words}") as caught:
        tokenizer = BPETokenizer.train(["abab"], 5000, min_frequency=least)
    assert str(caught[0].message).startswith(f"{tokenizer.vocab_size} tokens")
    assert caught[0].filename == __file__
    BPETokenizer.train(
        ["abab"], tokenizer.vocab_size, min_frequency=least
    )  # a warning would be an error here


@pytest.mark.parametrize("size", [3_000_000_000, 1 << 62, 1 << 80])
def test_more_tokens_than_there_are_is_no_matter_of_memory(size: int) -> None:
    pattern = Pattern("llama3")
    with pytest.warns(VocabularyWarning):
        tokenizer = BPETokenizer.train([TEXT], size)
    pieces = count_pieces([[TEXT]], pattern).as_dict()
    assert len(tokenizer.merges) == len(reference.train(pieces, 1000)) > 6
    assert tokenizer.merges[:6] == BPETokenizer.train([TEXT], 262).merges


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"special_tokens": "xyw"}, r"special_tokens must be a collection of texts, such as \['xyw'\], got 'xyw'"),
        ({"special_tokens": "<s>"}, r"such as \['<s>'\]"),
        ({"special_tokens": ""}, "special_tokens must be a collection"),
        ({"special_tokens": None}, "special_tokens must be a collection"),
        ({"special_tokens": b"<s>"}, "special_tokens must be a collection"),
        ({"workers": 0}, "workers=0; it must be an integer, at least 1"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"vocab_size": "300"}, "vocab_size='300'; it must be an integer"),
        ({"vocab_size": 300.0}, "vocab_size=300.0; it must be an integer"),
        ({"min_frequency": "2"}, "min_frequency='2'; it must be an integer"),
        ({"pattern": None}, "the pattern must be a str, got None"),
    ],
)  # fmt: skip
def test_training_refuses(arguments: dict[str, Any], words: str) -> None:
    refused(lambda: BPETokenizer.train(TEXT, **{"vocab_size": 262, **arguments}), words)


def test_special_tokens_may_be_any_collection() -> None:
    for special in (["<s>"], ("<s>",), {"<s>"}, {"<s>": None}.keys()):
        assert BPETokenizer.train(TEXT, 262, special_tokens=special).special_tokens == {"<s>": 261}


@pytest.mark.parametrize("special", [["<s>"], "<s>", {"<s>"}, 5])
def test_a_vocabulary_maps_special_tokens_to_ids(special: Any) -> None:
    refused(
        lambda: BPETokenizer(BYTES, [], special_tokens=special),
        "special_tokens must map each token to its id",
    )


# ---- Names of patterns -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpt-4", "gpt4"), ("GPT4", "gpt4"), ("cl100k_base", "gpt4"), ("gpt-3.5-turbo", "gpt4"), ("gpt4o", "o200k"),
        ("gpt-4o", "o200k"), ("o200k_base", "o200k"), ("gpt-2", "gpt2"), ("r50k_base", "gpt2"), ("llama-3", "llama3"),
        ("llama-bpe", "llama3"), ("Llama-3.1", "llama3"),
    ],
)  # fmt: skip
def test_other_names_of_patterns_say_which_is_meant(name: str, meant: str) -> None:
    words = re.escape(f"unknown pattern {name!r}; did you mean {meant!r}?")
    refused(lambda: BPETokenizer.train(TEXT, 262, name), words)
    refused(lambda: BPETokenizer(BYTES, [], name), words)
    assert meant in PATTERNS


@pytest.mark.parametrize(
    ("name", "hint"), [("gtp2", "did you mean 'gpt2'?"), ("words", "there are: gpt2"), ("", "there are")]
)
def test_a_word_is_no_expression(name: str, hint: str) -> None:
    refused(lambda: BPETokenizer.train(TEXT, 262, name), re.escape(f"unknown pattern {name!r}; {hint}"))


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+", ".", "[a-z]+| ", "a|b"])
def test_names_and_expressions_are_taken(pattern: str) -> None:
    assert chosen_pattern(pattern).split("a b") == Pattern(pattern).split("a b")


# ---- Special tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["allowed_special", "disallowed_special"])
@pytest.mark.parametrize("tokens", [END, "", b"all", None, 5, iter([END])])
def test_special_tokens_come_in_collections(name: str, tokens: Any) -> None:
    for tokenizer in (TOKENIZERS["bpe"], TOKENIZERS["sentencepiece"], TOKENIZERS["byte"]):
        for method in (tokenizer.encode, tokenizer.encode_to_array):
            refused(
                lambda method=method: method("ab" + END, **{name: tokens}), f"{name} must be a collection"
            )  # type: ignore[misc]


def test_advice_can_be_followed() -> None:
    """What an error says to pass is what the method that raised it takes."""
    tokenizer = BPETokenizer(BYTES, [], special_tokens={END: 256})
    text = "ab" + END
    ways: dict[str, Callable[..., Any]] = {
        "encode": tokenizer.encode,
        "encode_to_array": lambda text, **special: tokenizer.encode_to_array(text, **special).tolist(),
        "encode_iterable": lambda text, **special: list(tokenizer.encode_iterable([text], **special)),
        "encode_batch": lambda text, **special: tokenizer.encode_batch([text], **special)[0],
    }
    for encode in ways.values():
        refused(
            lambda encode=encode: encode(text),
            r"pass allowed_special=\{'<\|endoftext\|>'\} if .* disallowed_special=\(\)",
        )  # type: ignore[misc]
        assert encode(text, allowed_special={END}) == encode(text, allowed_special="all") == [97, 98, 256]
        assert encode(text, disallowed_special=()) == [*text.encode()]
    refused(lambda: tokenizer.offsets(text), "pass allowed_special=")
    assert tokenizer.offsets(text, allowed_special={END}).tolist() == [[0, 1], [1, 2], [2, 2 + len(END)]]
    assert tokenizer.offsets(text, disallowed_special=()).tolist() == [[i, i + 1] for i in range(len(text))]


def test_documents_take_special_tokens_either_way() -> None:
    bpe, pieces = TOKENIZERS["bpe"], TOKENIZERS["sentencepiece"]
    assert bpe.encode_document(f"a{END}b").tolist() == [97, 256, 98]
    assert bpe.encode_document(f"a{END}b", special_tokens=False).tolist() == [*f"a{END}b".encode()]
    th = pieces.encode("th")
    assert pieces.encode_document("th</s>th").tolist() == [*th, 2, *th]
    assert pieces.encode_document("th</s>th", False).tolist() == pieces.encode("th</s>th")
    assert set(pieces.encode("th</s><unk>")) & {0, 2} == set()
    assert TOKENIZERS["char"].encode_document("ab").tolist() == [0, 1]


def test_special_pieces_of_sentencepiece() -> None:
    tokenizer = SentencePieceTokenizer(PIECES)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    th = tokenizer.encode("th")
    assert tokenizer.encode("<s>th</s><unk>", allowed_special="all") == [1, *th, 2, 0]
    only = tokenizer.encode("<s>th</s>", allowed_special={"</s>"})
    assert only == [*tokenizer.encode("<s>th"), 2]
    refused(
        lambda: tokenizer.encode("th</s>", disallowed_special="all"),
        "holds the special token '</s>' at position 2",
    )
    refused(lambda: tokenizer.encode("th", allowed_special={END}), "no special token .*<unk>, <s>, </s>")


@pytest.mark.parametrize("workers", [0, -1, 1.5, None])
def test_workers_are_at_least_one(workers: Any) -> None:
    for tokenizer in (ByteTokenizer(), BPETokenizer(BYTES | {b"ab": 256}, [(b"a", b"b")])):
        refused(
            lambda tokenizer=tokenizer: tokenizer.encode_to_array("ab", workers=workers),
            f"workers={workers}; it must",
        )  # type: ignore[misc]
        assert len(tokenizer.encode_to_array("ab", workers=np.int64(1))) > 0  # type: ignore[arg-type]


# ---- Files -------------------------------------------------------------------------------------


def test_a_file_of_another_kind_is_not_made_into_a_folder(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    for name in ("notes.txt", "t.model", "t.JSN"):
        refused(
            lambda name=name: tokenizer.save(tmp_path / name),
            f"{name}: a tokenizer is saved as a .json file or into",
        )  # type: ignore[misc]
        assert not (tmp_path / name).exists()
    for name in ("run-v1.5", "plain", ".hidden"):
        assert tokenizer.save(tmp_path / name) == tmp_path / name / "tokenizer.json"
    assert tokenizer.save(f"{tmp_path}/notes.txt/") == tmp_path / "notes.txt" / "tokenizer.json"
    assert (
        tokenizer.save(tmp_path / "notes.txt") == tmp_path / "notes.txt" / "tokenizer.json"
    )  # there is one now
    assert tokenizer.save(tmp_path / "t.json") == tmp_path / "t.json"


def test_a_byte_order_mark_is_dropped_wherever_text_comes_from(tmp_path: Path) -> None:
    for content in ("\ufeffab", "ab\ufeff", "\ufeff\ufeff"):
        (tmp_path / "text").write_text(content, encoding="utf-8")
        assert [*text_of(io.BytesIO(content.encode()), "standard input")] == [*blocks(tmp_path / "text")]
        assert "".join(blocks(tmp_path / "text")) == content.removeprefix("\ufeff")


def test_a_mark_within_a_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\ufeffabc\ufeffd", encoding="utf-8")
    assert [*blocks(tmp_path / "text", 3)] == ["abc", "\ufeff", "d"]


def test_a_model_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    for content in (b"\n\x0e\n\x05<unk>\x15\0\0\0\0", b"\n\xff"):
        (tmp_path / "t.model").write_bytes(content)
        refused(
            lambda: [*blocks(tmp_path / "t.model")],
            "t.model: not .* --tokenizer or PATH, or to load_tokenizer",
        )
        refused(lambda: load_tokenizer(tmp_path / "t.model"), "t.model: ")
    (tmp_path / "t.bin").write_bytes(b"\0")
    refused(lambda: [*blocks(tmp_path / "t.bin")], "give UTF-8 text")

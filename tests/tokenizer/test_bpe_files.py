"""Files of GPT-2, tiktoken and SentencePiece: written, read back, and refused with one line where they are damaged."""

import base64
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.tokenizer import BPETokenizer
from tinyllm.tokenizer.files import read_gpt2, read_sentencepiece, read_tiktoken, write_gpt2, write_tiktoken
from tinyllm.tokenizer.sentencepiece.pieces import Kind, Piece
from tinyllm.tokenizer.sentencepiece.tokenizer import SentencePieceTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::tinyllm.tokenizer.VocabularyWarning")

DATA = Path(__file__).parents[3] / "shared/data"
TEXT = "low lower lowest, newer newest wide wider widest 日本 日本語 été\n\n" * 3
BYTES = {bytes([i]): i for i in range(256)}

needs_data = pytest.mark.skipif(not (DATA / "gpt2").exists(), reason="needs GPT-2's files in shared/data")


def trained(pattern: str = "gpt2") -> BPETokenizer:
    return BPETokenizer.train([TEXT], 300, pattern, ["<|endoftext|>"])


def same(one: BPETokenizer, other: BPETokenizer) -> bool:
    names = ("vocab", "merges", "pattern", "special_tokens", "ignore_merges")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def one_line(expected: str, action: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# ---- GPT-2 ----


def test_gpt2_files_come_back(tmp_path: Path) -> None:
    ours = trained()
    write_gpt2(ours, tmp_path / "new" / "folder")
    vocab, merges = tmp_path / "new" / "folder" / "vocab.json", tmp_path / "new" / "folder" / "merges.txt"
    assert same(read_gpt2(vocab, merges), ours)
    assert read_json(vocab)["<|endoftext|>"] == ours.vocab_size - 1
    assert merges.read_text(encoding="utf-8").startswith("#version: 0.2\n")
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert same(read_gpt2(vocab, merges), ours)


def test_gpt2_files_without_merges_and_special_tokens(tmp_path: Path) -> None:
    write_gpt2(BPETokenizer(BYTES, [], "gpt2"), tmp_path)
    assert read_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", ()).encode("é") == [195, 169]
    one_line("special_tokens", lambda: read_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt"))


@needs_data
def test_gpt2_own_files(tmp_path: Path) -> None:
    ours = read_gpt2(DATA / "gpt2/vocab.json", DATA / "gpt2/merges.txt")
    assert ours.encode("Hello world") == [15496, 995]
    write_gpt2(ours, tmp_path)
    written, given = (folder / "merges.txt" for folder in (tmp_path, DATA / "gpt2"))
    assert written.read_bytes().removeprefix(b"#version: 0.2\n") == given.read_bytes().removeprefix(
        b"#version: 0.2\n"
    )
    assert read_json(tmp_path / "vocab.json") == read_json(DATA / "gpt2/vocab.json")
    write_tiktoken(ours, tmp_path / "gpt2.tiktoken")
    assert same(read_tiktoken(tmp_path / "gpt2.tiktoken", "gpt2", ours.special_tokens), ours)


def test_what_gpt2_files_cannot_say(tmp_path: Path) -> None:
    one_line("pattern", lambda: write_gpt2(trained("llama3"), tmp_path))
    whole = BPETokenizer({**BYTES, b"ab": 256}, [], "gpt2", ignore_merges=True)
    one_line("taken whole", lambda: write_gpt2(whole, tmp_path))
    alike = BPETokenizer({**BYTES, b" a": 256}, [(b" ", b"a")], "gpt2", {"Ġa": 257})
    one_line("written alike", lambda: write_gpt2(alike, tmp_path))
    (tmp_path / "file").write_text("")
    one_line("cannot make this folder", lambda: write_gpt2(trained(), tmp_path / "file"))


def test_damaged_gpt2_files(tmp_path: Path) -> None:
    write_gpt2(trained(), tmp_path)
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    good = merges.read_bytes()
    for damaged, expected in (
        (good[: len(good) // 2].rsplit(b" ", 1)[0], "must be two tokens"),
        (good + b"a\n", "must be two tokens"),
        (good + good.splitlines()[1] + b"\n", "stands twice"),
        (good + "日 本\n".encode(), "GPT-2's characters"),
        (good + b"q q\n", "not in the vocabulary"),
        (good + b"\xff", "not UTF-8"),
    ):
        merges.write_bytes(damaged)
        one_line(expected, lambda: read_gpt2(vocab, merges))
    one_line("no such file", lambda: read_gpt2(vocab, tmp_path / "none"))
    one_line("cannot be read", lambda: read_gpt2(vocab, tmp_path))
    merges.write_bytes(good)
    text = vocab.read_text(encoding="utf-8")
    for damaged_text in (
        text[: len(text) // 2],
        "[]",
        '{"<|endoftext|>": "x"}',
        '{"<|endoftext|>": 1e99, "a": -1}',
    ):
        vocab.write_text(damaged_text, encoding="utf-8")
        one_line("vocab.json", lambda: read_gpt2(vocab, merges))


# ---- tiktoken ----


def rows(ranks: dict[bytes, int]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def test_tiktoken_files_come_back(tmp_path: Path) -> None:
    for ours in (trained("o200k"), BPETokenizer(BYTES, [], "gpt2")):
        write_tiktoken(ours, tmp_path / "ranks")
        assert same(read_tiktoken(tmp_path / "ranks", ours.pattern, ours.special_tokens), ours)


def test_tokens_that_merging_does_not_make_are_taken_whole(tmp_path: Path) -> None:
    ranks = {**BYTES, b"bc": 256, b"abc": 257, b"abcd": 258, b"bcd": 259, b"xyz": 260}
    (tmp_path / "ranks").write_text(rows(ranks))
    ours = read_tiktoken(tmp_path / "ranks", "gpt2", None)
    assert ours.ignore_merges
    assert ours.encode("xyz") == [260]
    assert ours.encode("xyzz") == [*b"xyzz"]
    assert ours.encode("abcd") == [258]
    write_tiktoken(ours, tmp_path / "again")
    assert same(read_tiktoken(tmp_path / "again", "gpt2", None), ours)
    one_line(
        "ignore_merges",
        lambda: write_tiktoken(BPETokenizer(ours.vocab, ours.merges, "gpt2"), tmp_path / "again"),
    )


def test_a_token_that_only_later_tokens_make(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text(rows({**BYTES, b"abc": 256, b"ab": 257, b"abcd": 258}))
    ours = read_tiktoken(tmp_path / "ranks", "gpt2", None)
    assert not ours.ignore_merges
    assert ours.encode("abcab") == [256, 257]


def test_what_tiktoken_files_cannot_say(tmp_path: Path) -> None:
    vocab = {**BYTES, b"ab": 257, b"cd": 256}
    late = BPETokenizer(vocab, [(b"a", b"b"), (b"c", b"d")])
    one_line("order of the ids", lambda: write_tiktoken(late, tmp_path / "ranks"))
    fewer = BPETokenizer(vocab, [(b"a", b"b")], ignore_merges=True)
    one_line("no merge here", lambda: write_tiktoken(fewer, tmp_path / "ranks"))
    assert not (tmp_path / "ranks").exists()


def test_damaged_tiktoken_files(tmp_path: Path) -> None:
    good = rows(BYTES)
    path = tmp_path / "ranks"
    for damaged, expected in (
        (good[:-1000], "is the file damaged|lacks"),
        ("", "lacks"),
        (good + "YWI", "line 257: a token in base64"),
        (good + "YWI= 256 1\n", "base64"),
        (good + "YW 256\n", "base64"),
        (good + "Y!!WI= 256\n", "base64"),
        (good + "YWI= -1\n", "base64"),
        (good + "YWI= 2.5\n", "base64"),
        (good + "YWI= " + "9" * 10_000 + "\n", "base64"),
        (good + "YWI= 4000000000\n", "4000000000"),
        (good + "YWI= 255\n", "the rank 255 stands in line 256"),
        (good + "YQ== 256\n", "stands in line 98"),
        (good + "\x00\x01\n", "base64"),
    ):
        path.write_text(damaged)
        one_line(expected, lambda: read_tiktoken(path, "gpt2", None))
    path.write_text(good)
    one_line("given to two", lambda: read_tiktoken(path, "gpt2", {"<s>": 7}))
    one_line("no such file", lambda: read_tiktoken(tmp_path / "none", "gpt2", None))


def test_a_token_of_many_bytes_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text(rows({**BYTES, b"a" * 50_000: 256, b"bb": 257}))
    assert read_tiktoken(tmp_path / "ranks", "gpt2", None).encode("a" * 50_000) == [256]


# ---- SentencePiece ----


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value > 0x7F else bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def vocabulary(*more: Piece) -> list[Piece]:
    first = [Piece("<unk>", kind=Kind.UNKNOWN), Piece("<s>", kind=Kind.CONTROL)]
    every_byte = [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
    joined = [Piece(text, -float(i)) for i, text in enumerate(("ab", "▁ab", "bc", "abc"))]
    return [*first, *every_byte, *more, *joined, *(Piece(text, -9.0) for text in "abc▁")]


def model(pieces: list[Piece], trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    parts = [
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, int(kind)))
        for text, score, kind in pieces
    ]
    return (
        b"".join(parts) + field(2, field(3, 2) + field(35, 1) + trainer) + field(3, field(4, 0) + normalizer)
    )


def read_bytes(data: bytes, folder: Path) -> SentencePieceTokenizer:
    (folder / "some.model").write_bytes(data)
    return read_sentencepiece(folder / "some.model")


def texts_of(tokenizer: SentencePieceTokenizer, text: str) -> list[str]:
    return [tokenizer.pieces[id].text for id in tokenizer.encode(text)]


def test_sentencepiece_joins_by_score(tmp_path: Path) -> None:
    ours = read_bytes(model(vocabulary()), tmp_path)
    assert texts_of(ours, "abc ab") == ["▁ab", "c", "▁ab"]
    assert texts_of(ours, "é<s>")[1:3] == ["<0xC3>", "<0xA9>"]
    assert ours.encode("") == []
    for text in ("abc ab", " ", "  ab \n", "é<s>日本", "\0", "▁"):
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")
        assert list(ours.encode_iterable(text)) == ours.encode(text)
    assert ours.offsets("ab é").tolist() == [[0, 2], [2, 3], [3, 4], [3, 4]]
    assert ours.offsets(" ").tolist() == [[0, 0], [0, 1]]
    assert ours.offsets("").tolist() == []


def test_sentencepiece_settings(tmp_path: Path) -> None:
    plain = read_bytes(model(vocabulary(), normalizer=field(3, 0) + field(5, 0)), tmp_path)
    assert texts_of(plain, "ab a") == ["ab", "<0x20>", "a"]
    assert plain.decode(plain.encode(" ab")) == " ab"
    marked = read_bytes(
        model(vocabulary(Piece("b c", kind=Kind.USER_DEFINED), Piece("bc▁", kind=Kind.USER_DEFINED))),
        tmp_path,
    )
    assert texts_of(marked, "abc c") == ["▁", "a", "bc▁", "c"]
    surface = read_bytes(model(vocabulary(), trainer=field(44, b"?")), tmp_path)
    assert surface.decode([0, 1]) == "?"


def test_sentencepiece_decodes_bytes_that_are_no_text(tmp_path: Path) -> None:
    ours = read_bytes(model(vocabulary()), tmp_path)
    first, second, third = (2 + byte for byte in "日".encode())
    assert ours.decode([first, second, third]) == "日"
    assert ours.decode([first, second]) == "\ufffd\ufffd"
    assert ours.decode([first, 1, second, third]) == "\ufffd" * 3
    assert ours.decode_bytes([first, 1, second, third]).decode() == "日"
    one_line("the id 999 at position 1", lambda: ours.decode([0, 999]))


def test_sentencepiece_becomes_tokenizer_json() -> None:
    for prefix in (True, False):
        for escape in (True, False):
            defined = [Piece(text, kind=Kind.USER_DEFINED) for text in ("a|", "\\(", "|")]
            ours = SentencePieceTokenizer(vocabulary(*defined), prefix, escape)
            again = SentencePieceTokenizer.from_json(ours.to_json())
            assert again.to_json() == ours.to_json()
            for text in ("ab abc", "a|b\\(c|ab", "日"):
                assert again.encode(text) == ours.encode(text)


def test_damaged_tokenizer_json() -> None:
    def changed(where: str, value: object) -> Callable[[], object]:
        content = SentencePieceTokenizer(vocabulary()).to_json()
        holder = content["model"] if where.startswith("model.") else content
        holder[where.removeprefix("model.")] = value
        return lambda: SentencePieceTokenizer.from_json(content)

    good = SentencePieceTokenizer(vocabulary()).to_json()["model"]
    for where, value, expected in (
        ("model", [], "model is"),
        ("model.byte_fallback", False, "byte_fallback"),
        ("model.vocab", {"a": 1}, "ids from 0"),
        ("model.vocab", {"a": [0]}, "ids from 0"),
        ("model.unk_token", ["x"], "model.unk_token a text or null"),
        ("model.merges", None, "must be a list"),
        ("model.merges", 7, "merges"),
        ("model.merges", [["a"]], "merges holds"),
        ("model.merges", [*good["merges"], ["a", "a"]], "not in the vocabulary"),
        ("model.ignore_merges", 1, "ignore_merges"),
        ("model.unheard of", 1, "unheard of"),
        ("model.dropout", 0.5, "dropout"),
        ("added_tokens", 7, "added_tokens"),
        ("added_tokens", [{"content": "ab", "id": 0, "special": True}], "added_tokens"),
        ("normalizer", {"type": "Nmt"}, "normalizer"),
        ("normalizer", 7, "normalizer"),
        ("normalizer", {"normalizers": 7}, "normalizer"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "zz|(", "x": 1}}, "a pattern is"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "__"}, "must be a character"),
        ("model.vocab", {"\ud800": len(good["vocab"]), **good["vocab"]}, "UTF-16"),
        ("added_tokens", [{"content": "\ud800", "id": len(good["vocab"]), "special": False}], "UTF-16"),
        ("pre_tokenizer", {"type": "Metaspace", "str_rep": "_"}, "str_rep '_'"),
        ("pre_tokenizer", {"type": "Metaspace", "prepend_scheme": "last"}, "prepend_scheme 'last'"),
        ("decoder", None, "decoder"),
        ("decoder", {"type": "Sequence", "decoders": []}, "decoder"),
        ("post_processor", {"type": "Sequence", "processors": [{"type": "x"}]}, "post_processor"),
    ):
        one_line(expected, changed(where, value))


def test_models_that_are_not_supported(tmp_path: Path) -> None:
    for data, expected in (
        (model(vocabulary(), trainer=field(3, 1)), "unigram"),
        (model(vocabulary(), trainer=field(35, 0)), "byte_fallback"),
        (model(vocabulary(), trainer=field(24, 1)), "treat_whitespace_as_suffix"),
        (model(vocabulary(), normalizer=field(4, 1)), "remove_extra_whitespaces"),
        (model(vocabulary(), normalizer=field(1, b"nmt_nfkc") + field(2, b"x")), "nmt_nfkc.*identity"),
        (model(vocabulary(Piece("zz", kind=Kind.UNUSED))), "unused"),
        (model(vocabulary(Piece("ab"))), "too"),
        (model(vocabulary(Piece(""))), "empty"),
        (model(vocabulary(Piece("zz", float("nan")))), "score"),
        (model(vocabulary(Piece("zz", kind=Kind.BYTE))), "must be a byte"),
        (model(vocabulary()[1:]), "0 unknown pieces"),
    ):
        one_line(f"some.model: .*{expected}", lambda data=data: read_bytes(data, tmp_path))
    equal = SentencePieceTokenizer(vocabulary(Piece("ca", -1.0)))
    one_line("same score", equal.to_json)


def test_damaged_sentencepiece_files(tmp_path: Path) -> None:
    good = model(vocabulary())
    for end in range(0, len(good) - 1, 7):
        one_line("some.model", lambda end=end: read_bytes(good[:end], tmp_path))
    for data in (
        b"\x0a" + b"\xff" * 9 + b"\x01",
        b"\x0a\xff\xff\xff\xff\x0f" + good,
        b"\xff" * 100,
        b"\x0b" + good,
        b"not a protocol buffer",
        field(1, 7) + good,
        field(1, field(1, b"\xff")) + good,
        field(1, field(3, 99)) + good,
        field(1, field(2, 99)) + good,
        good + field(2, field(3, b"x")),
        good + field(2, field(44, 5)),
        good + field(2, 1),
    ):
        one_line("some.model", lambda data=data: read_bytes(data, tmp_path))
    one_line("no such file", lambda: read_sentencepiece(tmp_path / "none"))

"""`tinyllm tokenizer`: each command end to end, what it refuses, and statistics counted by hand."""

import io
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllm.cli import main as cli
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    inspection,
    load_tokenizer,
)
from tinyllm.tokenizer.base import TokenArray
from tinyllm.tokenizer.sentencepiece.pieces import Kind, Piece
from tinyllm.training.checkpoints import checkpoint, keeping

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
END = "<|endoftext|>"


def by_hand() -> BPETokenizer:
    """The bytes, "th", "the" and " the"."""
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the"]
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
    return BPETokenizer({token: id for id, token in enumerate(tokens)}, merges, special_tokens={END: 259})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts and tokenizers, and the command line with the commands of this test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Path("text.txt").write_text(TEXT)
    Path("empty.txt").touch()
    Path("binary.bin").write_bytes(bytes(range(256)))
    by_hand().save("bpe.json")
    CharTokenizer.train(TEXT).save("char.json")
    return tmp_path


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `tinyllm tokenizer`, which must succeed, and return what it prints."""
    capsys.readouterr()
    assert cli.main(["tokenizer", *arguments]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `tinyllm tokenizer`, and return what it says is wrong."""
    capsys.readouterr()
    assert cli.main(["tokenizer", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"tinyllm: error: [^\n]+\n", err), err
    return err.removeprefix("tinyllm: error: ").rstrip()


def give_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# ---- train -------------------------------------------------------------------------------------


def test_train_writes_what_the_library_learns(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(
        capsys, "train", "text.txt", "--vocab-size", "270", "--out", "new/t.json", "--pattern", "gpt2",
        "--special", END, "<|a|>", "--special", "<|b|>", "--workers", "1",
    )  # fmt: skip
    assert out == "new/t.json: 270 tokens\n"
    special = [END, "<|a|>", "<|b|>"]
    expected = BPETokenizer.train([TEXT], 270, "gpt2", special)
    tokenizer = load_tokenizer("new/t.json")
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.to_json() == expected.to_json()
    assert list(tokenizer.special_tokens) == special


def test_train_takes_a_folder_and_writes_into_one(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(TEXT)
    Path("texts/empty.txt").touch()
    out = output(capsys, "train", "texts", "--vocab-size", "260", "--out", "there", "--workers", "1")
    assert out == "there/tokenizer.json: 260 tokens\n"
    assert load_tokenizer("there").vocab_size == 260


@pytest.mark.parametrize(
    ("least", "size", "reason"),
    [
        (
            "2",
            256,
            "no pair of tokens is left that occurs 2 times; more text or a lower --min-frequency gives more",
        ),
        ("1", 257, "no pair of tokens is left to join; more text gives more"),
    ],
)
def test_train_says_why_there_are_fewer_tokens(
    capsys: pytest.CaptureFixture[str], least: str, size: int, reason: str
) -> None:
    Path("two.txt").write_text("ab")
    out = output(capsys, "train", "two.txt", "--min-frequency", least, "--workers", "1")
    assert out == f"tokenizer.json: {size} tokens, not 32,768: {reason}\n"


def test_train_replaces_a_file_only_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("bpe.json").read_bytes()
    message = error_of(capsys, "train", "text.txt", "--out", "bpe.json")
    assert message == "bpe.json exists already; --overwrite replaces it, --out FILE writes elsewhere"
    assert Path("bpe.json").read_bytes() == before
    arguments = ("--vocab-size", "258", "--overwrite", "--workers", "1")
    assert output(capsys, "train", "text.txt", "--out", "bpe.json", *arguments) == "bpe.json: 258 tokens\n"
    assert load_tokenizer("bpe.json").vocab_size == 258


def test_a_stopped_training_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def stop(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BPETokenizer, "train", stop)
    before = sorted(folder.rglob("*"))
    assert cli.main(["tokenizer", "train", "text.txt", "--out", "new/t.json"]) == 130
    assert sorted(folder.rglob("*")) == before
    assert capsys.readouterr().err == "stopped; nothing is written\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "the following arguments are required: FILE"),
        (("missing.txt",), "missing.txt: no such file or folder"),
        (("text.txt", "missing.txt"), "missing.txt: no such file or folder"),
        (("text.txt", "empty.txt"), "empty.txt: the file is empty; give a file with text"),
        (("binary.bin",), "binary.bin: not text"),
        (("text.txt", "--vocab-size", "100"), "vocab_size=100; it must be at least 256"),
        (("text.txt", "--vocab-size", "many"), "argument --vocab-size: "),
        (("text.txt", "--vocab-sise", "300"), "unknown argument '--vocab-sise'; did you mean --vocab-size?"),
        (("text.txt", "--min-frequency", "0"), "min_frequency=0; it must be at least 1"),
        (("text.txt", "--workers", "-1"), "workers=-1; it must be from 0 to 2147483647"),
        (("text.txt", "--pattern", "gtp2"), "unknown pattern 'gtp2'; did you mean 'gpt2'?"),
        (("text.txt", "--pattern", "gpt4o"), "unknown pattern 'gpt4o'; did you mean 'o200k'?"),
        (("text.txt", "--pattern", "gpt-4"), "unknown pattern 'gpt-4'; did you mean 'gpt4'?"),
        (
            ("text.txt", "--out", "notes.txt"),
            "notes.txt: a tokenizer is saved as a .json file or into a folder",
        ),
        (("text.txt", "--out", "new/t.model"), "new/t.model: a tokenizer is saved as a .json file"),
        (("text.txt", "--pattern", "("), "the pattern '(' is neither one of gpt2"),
        (("text.txt", "--special", "<a>", "<a>"), "special tokens must be different"),
        (("text.txt", "--special", "\udcff"), "--special is '\\udcff', which is not UTF-8"),
        (("text.txt", "--out", "text.txt/t.json"), "text.txt/t.json: cannot be written: "),
    ],
)
def test_train_refuses(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, ...], expected: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert error_of(capsys, "train", *arguments).startswith(expected)
    assert sorted(folder.rglob("*")) == before


def test_train_takes_any_number_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(
        capsys, "train", "text.txt", "--vocab-size", "3000000000", "--out", "t.json", "--workers", "1"
    )
    assert re.match(
        r"t.json: \d+ tokens, not 3,000,000,000: no pair of tokens is left that occurs 2 times", out
    )


# ---- encode and decode -------------------------------------------------------------------------


def test_encode_and_decode_text_files_and_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the é\n the"
    ids = "257 32 195 169 10 258\n"
    assert output(capsys, "encode", "bpe.json", text) == ids
    Path("small.txt").write_text(text)
    assert output(capsys, "encode", "bpe.json", "--file", "small.txt") == ids
    give_input(monkeypatch, text.encode())
    assert output(capsys, "encode", "bpe.json") == ids
    assert output(capsys, "decode", "bpe.json", *ids.split()) == text
    give_input(monkeypatch, ids.encode())
    assert output(capsys, "decode", "bpe.json") == text
    assert output(capsys, "decode", "bpe.json", "195") == "\ufffd"


def test_line_ends_are_of_one_kind_where_text_is_learned_and_stay_where_it_is_encoded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("crlf.txt").write_bytes(b"the\r\n" * 9)
    for newlines, expected in (("lf", b"the\n"), ("keep", b"the\r\n")):
        flags = ["--newlines", newlines, "--vocab-size", "258", "--pattern", "gpt2", "--workers", "1"]
        output(capsys, "train", "crlf.txt", "--out", f"{newlines}.json", *flags)
        learned = BPETokenizer.train([expected.decode() * 9], 258, "gpt2")
        assert load_tokenizer(f"{newlines}.json").to_json() == learned.to_json()
    assert "13" in output(capsys, "encode", "bpe.json", "--file", "crlf.txt").split()


def test_text_that_is_empty_has_no_ids(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert output(capsys, "encode", "bpe.json", "") == "\n"
    assert output(capsys, "encode", "char.json", "--file", "empty.txt") == "\n"
    give_input(monkeypatch, b"\n")
    assert output(capsys, "decode", "char.json") == ""


def test_decode_ends_the_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for ids, expected in ((["257"], "the\n"), (["257", "10"], "the\n")):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.main(["tokenizer", "decode", "bpe.json", *ids]) == 0
        assert terminal.getvalue() == expected


def test_encode_recognises_special_tokens_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "encode", "bpe.json", f"the{END}")
    assert (
        message
        == f"the text holds the special token '{END}' at position 3; --special encodes it as one, --no-special as text"
    )
    assert output(capsys, "encode", "bpe.json", f"the{END}", "--special") == "257 259\n"
    as_text = output(capsys, "encode", "bpe.json", f"the{END}", "--no-special")
    assert as_text.split() == ["257", *map(str, END.encode())]
    assert output(capsys, "decode", "bpe.json", "257", "259") == f"the{END}"


def test_special_pieces_of_sentencepiece(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = sentence_pieces()
    tokenizer.save("pieces.json")
    message = error_of(capsys, "encode", "pieces.json", "a</s>a")
    assert message == (
        "the text holds the special token '</s>' at position 1; --special encodes it as one, --no-special as text"
    )
    a = tokenizer.encode("a")
    assert output(capsys, "encode", "pieces.json", "a</s>a", "--special").split() == [*map(str, [*a, 1, *a])]
    as_text = output(capsys, "encode", "pieces.json", "a</s>a", "--no-special")
    assert as_text.split() == [*map(str, tokenizer.encode("a</s>a"))]
    assert "special tokens: <unk> (0), </s> (1)\n" in output(capsys, "inspect", "pieces.json")


def sentence_pieces() -> SentencePieceTokenizer:
    pieces = [Piece("<unk>", kind=Kind.UNKNOWN), Piece("</s>", kind=Kind.CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
    return SentencePieceTokenizer([*pieces, Piece("▁a", -1.0), Piece("▁", -2.0), Piece("a", -3.0)])


def test_inspect_shows_the_text_with_its_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    sentence_pieces().save("pieces.json")
    Path("small.txt").write_text("a a aé</s> a\n")
    out = output(capsys, "inspect", "pieces.json", "small.txt", "--show", "99")
    # A special token has no text, and the text behind it begins anew, with a space.
    assert out.endswith("\n\na| a| a|é| | a|↵\n\n")
    out = output(capsys, "inspect", "pieces.json")
    assert "' a'" in out


@pytest.mark.parametrize(
    "ids",
    [
        ("257 32 257",),
        ("[257, 32, 257]",),
        ("[257,", "32,", "257]"),
        ("257,32,257",),
        ("(257, 32, 257)",),
        (" 257", "32 257\n"),
    ],
)
def test_decode_takes_ids_as_they_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ids: tuple[str, ...]
) -> None:
    assert output(capsys, "decode", "bpe.json", *ids) == "the the"
    for mark in ("", "\ufeff"):
        give_input(monkeypatch, (mark + " ".join(ids)).encode())
        assert output(capsys, "decode", "bpe.json") == "the the"


def test_a_byte_order_mark_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mark.txt").write_bytes(b"\xef\xbb\xbfthe")
    assert output(capsys, "encode", "bpe.json", "--file", "mark.txt") == "257\n"
    give_input(monkeypatch, b"\xef\xbb\xbfthe")
    assert output(capsys, "encode", "bpe.json") == "257\n"
    give_input(monkeypatch, "the".encode("utf-16"))
    assert error_of(capsys, "encode", "bpe.json").startswith("standard input: not ")
    monkeypatch.setattr(sys, "stdin", None)
    assert error_of(capsys, "encode", "bpe.json").startswith("standard input is closed")


def test_a_model_file_is_opened_or_named(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = sentence_pieces()
    # Fields of a protocol buffer: pieces, byte-pair encoding with byte fallback, no normalization.
    pieces = b"".join(
        b"\n" + bytes([len(entry)]) + entry
        for text, score, kind in tokenizer.pieces
        for entry in [
            b"\n"
            + bytes([len(text.encode())])
            + text.encode()
            + b"\x15"
            + struct.pack("<f", score)
            + bytes([0x18, kind])
        ]
    )
    Path("t.model").write_bytes(pieces + b"\x12\x05\x18\x02\x98\x02\x01" + b"\x1a\x02\x20\x00")
    expected = " ".join(map(str, tokenizer.encode("a a"))) + "\n"
    assert output(capsys, "encode", "t.model", "a a") == expected
    for arguments in (
        ("train", "t.model"),
        ("encode", "bpe.json", "--file", "t.model"),
        ("inspect", "bpe.json", "t.model"),
    ):
        message = error_of(capsys, *arguments)
        assert re.match(r"t.model: not .*give it as --tokenizer or PATH", message), message


def test_a_tokenizer_is_found_wherever_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = by_hand()
    tokenizer.save("folder")
    model = TransformerLM(
        ModelConfig(vocab_size=260, hidden_size=8, num_layers=1, num_heads=2, context_length=8)
    )
    saved = checkpoint.save("run/checkpoints/step-00000001", model, tokenizer)
    keeping.link_to(Path("run"), "best", saved)
    for path in ("bpe.json", "folder", "folder/tokenizer.json", "run", "run/best", str(saved)):
        assert output(capsys, "encode", path, "the") == "257\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("encode", "missing", "a"), "missing: no such file or folder; give a tokenizer.json, a run or a checkpoint"),
        (("encode", ".", "a"), ".: no tokenizer.json and no checkpoint here; give a tokenizer.json"),
        (("encode", "text.txt", "a"), "text.txt: "),
        (("encode", "bpe.json", "a", "--file", "text.txt"), "got TEXT and --file; give one of them"),
        (("encode", "bpe.json", "--file", "missing.txt"), "missing.txt: no such file or folder"),
        (("encode", "bpe.json", "--file", "binary.bin"), "binary.bin: not text"),
        (("encode", "bpe.json", "a", "--specials"), "unknown argument '--specials'; did you mean --special?"),
        (("encode", "bpe.json", "a\udcff"), "TEXT is 'a\\udcff', which is not UTF-8; give UTF-8 text"),
        (("encode", "char.json", "thé"), "the character 'é' (U+00E9) at position 2 is not among the"),
        (("decode", "bpe.json", "1", "260"), "the id 260 at position 1 is not in the vocabulary, whose ids are 0 to"),
        (("decode", "char.json", "-1"), "the id -1 at position 0 is not in the vocabulary"),
        (("decode", "char.json", "9" * 20), "the id 99999999999999999999 at position 0 is not in"),
        (("decode", "bpe.json", "1", "two"), "the id at position 1 is 'two'; ids are integers"),
        (("decode", "bpe.json", "1;2"), "the id at position 0 is '1;2'; ids are integers"),
        (("decode", "bpe.json", "9" * 5000), "the id at position 0 is '999"),
        ((), "the following arguments are required: COMMAND"),
        (("decode",), "the following arguments are required: PATH"),
    ],
)  # fmt: skip
def test_encode_and_decode_refuse(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert error_of(capsys, *arguments).startswith(expected)


def test_standard_input_must_be_utf8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, b"ab\xff")
    message = error_of(capsys, "encode", "bpe.json")
    assert message == "standard input: not UTF-8: byte 0xff at byte 2 (line 1); convert it to UTF-8"


# ---- inspect -----------------------------------------------------------------------------------


def test_inspect_without_text(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "inspect", "bpe.json").splitlines()
    assert lines[:6] == [
        "bpe.json: byte-pair encoding, 260 tokens, 3 merges",
        "pattern: llama3",
        f"special tokens: {END} (259)",
        "",
        "longest tokens",
        "characters   id  token",
    ]
    assert lines[6:8] == [f"        13  259  '{END}'", "         4  258  ' the'"]
    assert len(lines) == 16
    lines = output(capsys, "inspect", "char.json").splitlines()
    assert lines[:3] == [f"char.json: characters, {len(set(TEXT))} tokens", "", "longest tokens"]


def test_inspect_with_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.txt").write_text("the é\n the")
    assert output(capsys, "inspect", "bpe.json", "small.txt").splitlines()[3:] == [
        "",
        "10 characters, 11 bytes and 3 words in 6 tokens",
        "1.67 characters per token, 1.83 bytes per token, 2.00 tokens per word",
        "",
        "script       characters  share  bytes per token  tokens per character",
        "Latin                 7  70.0%             2.13                 0.536",
        "white space           3  30.0%             1.33                 0.750",
        "",
        "longest tokens used",
        "characters   id  times  token",
        "         4  258      1  ' the'",
        "         3  257      1  'the'",
        "         1   10      1  '\\n'",
        "         1   32      1  ' '",
        "         1  169      1  b'\\xa9'",
        "         1  195      1  b'\\xc3'",
        "",
        "never used: 254 of 260 tokens (97.7%)",
        "such as 'th'  '<|endoftext|>'  '\\x00'  '\\x01'  '\\x02'  '\\x03'  '\\x04'  '\\x05'  '\\x06'  '\\x07'"
        "  '\\x08'  '\\t'",
    ]


def test_inspect_marks_the_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("small.txt").write_text(f"the é\n the\x1b{END}")
    arguments = ["inspect", "bpe.json", "small.txt", "--show"]
    assert output(capsys, *arguments, "100").endswith(f"\n\nthe| |é|↵\n| the|\\x1b|{END}\n")
    assert output(capsys, *arguments, "5").endswith("\n\nthe| |é\n")

    def on_terminal() -> str:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.main(["tokenizer", *arguments, "7"]) == 0
        return terminal.getvalue().rpartition("\n\n")[2]

    colours = [f"\033[38;5;16;48;5;{background}m" for background in (153, 157, 229, 217, 183)]
    marked = [
        f"{colour}{part}\033[0m" for colour, part in zip(colours, ["the", " ", "é", "↵", " the"], strict=True)
    ]
    assert on_terminal() == "".join(marked[:4]) + "\n" + marked[4] + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal() == "the| |é|↵\n| the\n"


def test_inspect_a_text_of_white_space(capsys: pytest.CaptureFixture[str]) -> None:
    Path("space.txt").write_text(" \n")
    out = output(capsys, "inspect", "char.json", "space.txt")
    assert "1.00 characters per token, 1.00 bytes per token\n" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bpe.json", "empty.txt"), "empty.txt: the file is empty; give a file with text"),
        (("bpe.json", "missing.txt"), "missing.txt: no such file or folder"),
        (("char.json", "accent.txt"), "the character 'é' (U+00E9) at position 3 is not among the"),
        (("bpe.json", "--show", "5"), "--show needs a text; give a file after PATH"),
        (("bpe.json", "text.txt", "--show", "-5"), "show=-5; it must be from 0 to 2147483647"),
        (("bpe.json", "text.txt", "--show", "all"), "argument --show: "),
        (("bpe.json", "text.txt", "--shwo", "5"), "unknown argument '--shwo'; did you mean --show?"),
        ((), "the following arguments are required: PATH"),
    ],
)
def test_inspect_refuses(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    Path("accent.txt").write_text("dogé")
    assert error_of(capsys, "inspect", *arguments).startswith(expected)


# ---- Statistics --------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    result = inspection.statistics(by_hand(), "the é\n the")
    # the | space | two halves of é | line end | space and the
    assert (result.tokens, result.characters, result.bytes, result.words) == (6, 10, 11, 3)
    assert result.fertility == 2
    assert result.bytes_per_token == 11 / 6
    assert result.characters_per_token == 10 / 6
    assert [(s.name, s.characters, s.bytes, s.tokens) for s in result.scripts] == [
        ("Latin", 7, 8, 1 + 2 + 3 / 4),
        ("white space", 3, 3, 1 + 1 + 1 / 4),
    ]
    assert result.used == [10, 32, 169, 195, 257, 258]
    assert result.counts.shape == (260,)


def test_the_script_of_characters() -> None:
    text = "aé中дアあ한अ12,;$🙂 \n\u0301\U00010330"
    result = inspection.statistics(ByteTokenizer(), text)
    assert {script.name: script.characters for script in result.scripts} == {
        "Latin": 2, "Han": 1, "Cyrillic": 1, "Katakana": 1, "Hiragana": 1, "Hangul": 1, "Devanagari": 1, "digits": 2,
        "punctuation": 2, "symbols": 2, "white space": 2, "combining marks": 1, "other scripts": 1,
    }  # fmt: skip
    # Every token is a byte.
    assert all(script.tokens == script.bytes for script in result.scripts)
    assert sum(script.bytes for script in result.scripts) == len(text.encode()) == result.bytes


def test_statistics_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspection.statistics(by_hand(), TEXT)
    monkeypatch.setattr(inspection, "_TOKENS_TOGETHER", 7)
    parts = inspection.statistics(by_hand(), TEXT)
    assert [script.tokens for script in parts.scripts] == pytest.approx([s.tokens for s in whole.scripts])
    assert sum(script.tokens for script in parts.scripts) == pytest.approx(whole.tokens)
    assert whole.words == len(TEXT.split())
    assert np.array_equal(parts.counts, whole.counts)


def test_statistics_of_characters_and_of_nothing() -> None:
    tokenizer = CharTokenizer.train("añ 中")
    result = inspection.statistics(tokenizer, "ñ 中")
    assert (result.tokens, result.bytes, result.fertility, result.used) == (3, 6, 1.5, [0, 2, 3])
    assert inspection.statistics(tokenizer, "  ").fertility == float("inf")
    with pytest.raises(InputError, match="no text to count"):
        inspection.statistics(tokenizer, "")


def test_segments_join_what_ends_inside_a_character() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_to_array("a🙂b中")
    assert list(inspection.segments(tokenizer, ids, 99)) == ["a", "🙂", "b", "中"]
    assert list(inspection.segments(tokenizer, ids, 2)) == ["a", "🙂"]
    assert list(inspection.segments(tokenizer, ids, 0)) == []
    assert list(inspection.segments(tokenizer, ids[:0], 5)) == []


def test_what_a_tokenizer_is() -> None:
    assert inspection.describe(by_hand()) == inspection.Description(
        "byte-pair encoding", 260, 3, "llama3", {END: 259}
    )
    assert inspection.describe(ByteTokenizer()).kind == "bytes"
    assert inspection.describe(CharTokenizer("ab")) == inspection.Description("characters", 2, 0, None, {})
    gaps = BPETokenizer({**{bytes([i]): i for i in range(256)}, b"ab": 300}, [(b"a", b"b")], pattern=r"\w+")
    assert inspection.describe(gaps).pattern == r"\w+"
    strings = inspection.token_strings(gaps)
    assert (len(strings), strings[299], strings[300]) == (301, b"", b"ab")
    assert inspection.longest_first(strings, [97, 299, 300]) == [300, 97, 299]


def test_ids_without_a_token_are_not_counted_as_unused(capsys: pytest.CaptureFixture[str]) -> None:
    BPETokenizer({**{bytes([i]): i for i in range(256)}, b"ab": 300}, [(b"a", b"b")]).save("gaps.json")
    Path("ab.txt").write_text("ab")
    assert "never used: 256 of 257 tokens (99.6%)" in output(capsys, "inspect", "gaps.json", "ab.txt")
    assert "the id 299 at position 0 is not in the vocabulary" in error_of(
        capsys, "decode", "gaps.json", "299"
    )


def test_statistics_where_tokens_are_not_the_bytes_of_the_text() -> None:
    class LowerCase(CharTokenizer):
        """A tokenizer that normalises, so that the bytes of the text are not those of the tokens."""

        def encode_to_array(self, text: str) -> TokenArray:
            return super().encode_to_array(text.lower().replace("ß", "s"))

    tokenizer = LowerCase.train("abs")
    result = inspection.statistics(tokenizer, "ABß")
    assert (result.tokens, result.bytes, result.scripts) == (3, 4, ())


def test_what_may_be_left_out_may_stand_behind_flags(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.txt").write_text("the")
    assert output(capsys, "inspect", "bpe.json", "--show", "5", "small.txt").endswith("\n\nthe\n")
    assert output(capsys, "inspect", "--show", "5", "bpe.json", "small.txt").endswith("\n\nthe\n")
    assert output(capsys, "encode", "bpe.json", "--special", f"the{END}") == "257 259\n"

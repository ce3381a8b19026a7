"""Text from files: what is read, and what is refused."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tinyllm.data import (
    embedded_corpus,
    read_text,
)
from tinyllm.system.errors import InputError
from tinyllm.system.text_files import text_of

# ---- Text --------------------------------------------------------------------------------------


def test_one_file_comes_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    path.write_bytes("\ufeffline\r\n é\U0001f600\ufeff".encode())
    assert read_text(path, newlines="keep") == "line\r\n é\U0001f600\ufeff"
    assert read_text(path) == "line\n é\U0001f600\ufeff"
    assert read_text(str(path)) == read_text([path])


def test_folder_and_files_are_joined_in_order(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "b",
        "a/z.md": "az\n",
        "a/y.PY": "ay",
        "a.rst": "rst",
        "empty.py": "",
        "image.png": "png",
        ".hidden.txt": "hidden",
        ".git/c.txt": "git",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "folder.txt").mkdir()
    assert read_text(tmp_path) == "ay\naz\nrst\nb"
    assert read_text([tmp_path / "image.png", tmp_path / "a"]) == "png\nay\naz\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"text\0", "a NUL byte at byte 4"),
        ("text".encode("utf-16"), "a NUL byte at byte 3"),
        (b"\xef\xbb\xbfte\xffxt", "byte 0xff at byte 5"),
        (b"cut \xf0\x9f", "byte 0xf0 at byte 4"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    good, bad = tmp_path / "a.txt", tmp_path / "bad.txt"
    good.write_text("good")
    bad.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_text([good, bad])
    assert str(error.value).startswith(f"{bad}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


KINDS = {
    "gzip": (gzip.compress(b"text" * 99), "it is a gzip file: unpack it first (gunzip)"),
    "bzip2": (bz2.compress(b"text" * 99), "it is a bzip2 file"),
    "xz": (lzma.compress(b"text" * 99), "it is an xz file"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "it is a PDF: take the text out of it first"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it is a PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF", "it is a JPEG image"),
    "UTF-16": ("text".encode("utf-16"), "it is UTF-16: convert it"),
    "UTF-16 of letters alone": (codecs.BOM_UTF16_LE + "\u4e00\u4e01".encode("utf-16-le"), "it is UTF-16"),
    "UTF-16, big endian": (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "it is UTF-16"),
    "UTF-32": ("text".encode("utf-32"), "it is UTF-32: convert it"),
    "Parquet": (b"PAR1\x15\x04\x15\0", "it is a Parquet file"),
    "NumPy": (b"\x93NUMPY\x01\0v\0{", "it is an array of NumPy"),
    "SentencePiece": (b"\n\x0e\n\x05<unk>\x15\0\0", "a tokenizer's .model is no text to read"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 1 << 16])
def test_what_is_no_text_is_named_for_what_it_is(kind: str, block: int) -> None:
    content, words = KINDS[kind]
    with pytest.raises(InputError) as error:
        list(text_of(io.BytesIO(content), "x.model" if kind == "SentencePiece" else "x.txt", block))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with zipfile.ZipFile(tmp_path / "zip.txt", "w") as archive:
        archive.write(tmp_path / "a.txt")
    with tarfile.open(tmp_path / "tar.txt", "w") as tar:
        tar.add(tmp_path / "a.txt")
    for name in ("zip", "tar"):
        with pytest.raises(InputError, match=f"it is a {name} archive"):
            read_text(tmp_path / f"{name}.txt")


@pytest.mark.parametrize(
    "text", ["BZh, GIF8, %PDF and PAR1 are magic", "%PDF-1.4 begins a PDF", "RIFF", "PK"]
)
def test_a_text_that_begins_like_another_file_is_a_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_a_byte_order_mark_is_dropped_and_bytes_are_named_wherever_a_block_ends(size: int) -> None:
    content = b"\xef\xbb\xbf\xc3\xa9\xef\xbb\xbfab"
    assert "".join(text_of(io.BytesIO(content), "x", size)) == "\xe9\ufeffab"
    for bad, position in ((content + b"\xff", 10), (b"\xef\xbb\xbf\xff", 3), (b"\xc3\xa9\xf0\x9f", 2)):
        with pytest.raises(InputError, match=rf"at byte {position} \(line 1\)"):
            list(text_of(io.BytesIO(bad), "x", size))


def test_what_a_folder_holds_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "b/c.md",
        "b/d.png",
        "e.PNG",
        "f.png",
        "g.png",
        ".hidden.txt",
        ".git/h.txt",
        "README",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "here").symlink_to(tmp_path / "b")
    said: list[str] = []
    assert read_text(tmp_path, said.append) == "text\ntext"
    assert said == [
        "2 files, 9 characters; left out: 4 .png (d.png, e.PNG, f.png, ...), 2 hidden (.git, .hidden.txt), "
        "1 link to a folder (here), 1 without an ending (README), 1 empty (empty.txt)"
    ]
    said.clear()
    read_text([tmp_path / "a.txt"], said.append)
    assert said == ["1 file, 4 characters"]
    (tmp_path / ".git/h.txt").rename(tmp_path / ".git/.h")
    with pytest.raises(InputError, match=r"no text in this folder: .*; it holds 1 hidden \(\.h\)"):
        read_text(tmp_path / ".git")


class Typed(io.BytesIO):
    """What a terminal gives: at each Ctrl-D a read comes back, and the next would wait for the person."""

    ended = False

    def read(self, size: int | None = -1) -> bytes:
        assert not self.ended, "asked for a second Ctrl-D"
        self.ended = True
        return super().read(size)


def test_what_is_typed_is_asked_for_and_read_to_its_first_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.TextIOWrapper(Typed(b"one\ntwo\n"))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert read_text("-") == "one\ntwo\n"
    assert capsys.readouterr().err == "standard input: type the text; Ctrl-D on a line of its own ends it\n"


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbft\xc3\xa9xt\r\n")))
    assert read_text("-") == "t\xe9xt\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfet\0")))
    with pytest.raises(InputError, match=r"standard input: .*it is UTF-16"):
        read_text(["-"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="standard input is empty"):
        read_text("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_text("-")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="no text in this folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="give a file or a folder"):
        read_text([])


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: Permission denied"):
        read_text(tmp_path / "a.txt")


def test_embedded_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    text = embedded_corpus()
    assert len(text) > 300_000
    assert text == embedded_corpus()
    assert '"assert" statement' in text
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="--data FILE"):
        embedded_corpus()

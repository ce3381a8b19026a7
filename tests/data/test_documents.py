"""Documents from files of every kind, whole and damaged, and the memory that reading takes."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from tinyllm.data import Document, Reading, documents_of, find_document_files, read_text
from tinyllm.system.errors import InputError
from tinyllm.system.text_files import text_of
from tinyllm.tokenizer import BPETokenizer

TEXTS = ["one\n\ntwo, three", 'q"uo"te\r\nnext\rlast', "é\U0001f600 \t x", "", "\u2028line\u0085sep\x1c"]
# What is read of them: no empty one, and line ends of one kind.
READ = ["one\n\ntwo, three", 'q"uo"te\nnext\nlast', "é\U0001f600 \t x", "\u2028line\u0085sep\x1c"]


def write_json_lines(path: Path, texts: list[str], field: str = "text") -> None:
    lines = [json.dumps({"id": 1, field: text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n\n", newline="")


def write_csv(path: Path, texts: list[str], field: str = "text") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", field], *[[str(i), text] for i, text in enumerate(texts)]])


WRITERS: dict[str, Callable[..., None]] = {
    ".jsonl": write_json_lines,
    ".ndjson": write_json_lines,
    ".csv": write_csv,
}


def compress(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("packed", [False, True])
def test_each_record_is_a_document(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = tmp_path / f"a{suffix.upper()}"
    WRITERS[suffix](path, TEXTS, "body")
    path = compress(path) if packed else path
    read = [document.text for document in documents_of(path, Reading("body"))]
    assert read == READ
    kept = [document.text for document in documents_of(path, Reading("body", newlines="keep"))]
    assert kept == [text for text in TEXTS if text]
    with pytest.raises(
        InputError, match=r"a\..*, line 1: no field 'text'; there are 'id', 'body'; .*--field"
    ):
        list(documents_of(path))


def test_tab_separated_values_have_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('label\ttext\n1\tan "unclosed quote\n0\t"x"\n')
    assert [d.text for d in documents_of(tmp_path / "a.tsv")] == ['an "unclosed quote', '"x"']


def test_parquet(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": range(5), "body": TEXTS}), tmp_path / "a.parquet")
    assert [d.text for d in documents_of(tmp_path / "a.parquet", Reading("body"))] == READ
    with pytest.raises(InputError, match="no field 'text'; there are 'id', 'body'"):
        list(documents_of(tmp_path / "a.parquet"))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.parquet: not Parquet, or damaged"):
        list(documents_of(tmp_path / "a.parquet", Reading("body")))


def test_zstandard(tmp_path: Path) -> None:
    text = "".join(random.Random(1).choices("ab\n", k=300_000))
    frames = zstandard.compress(text[:1000].encode()) + zstandard.compress(text[1000:].encode())
    (tmp_path / "a.txt.zst").write_bytes(frames)
    assert "".join(d.text for d in documents_of(tmp_path / "a.txt.zst")) == text
    for damaged in (frames[:-20], frames[:2000] + b"\xff" * 50 + frames[2050:]):
        (tmp_path / "a.txt.zst").write_bytes(damaged)
        with pytest.raises(InputError, match="the compressed data is cut short or damaged"):
            list(documents_of(tmp_path / "a.txt.zst"))


BAD = {
    "a.jsonl": ('{"text": "x"}\n{"text": \n', "line 2: not JSON: Expecting value at column 10"),
    "b.jsonl": ('{"text": "x"}\n\n[1]\n', r"line 3: an object with the field 'text' is expected, got \[1\]"),
    "c.jsonl": ('{"text": 5}\n', "line 1: the field 'text' is 5; it must be a text"),
    "d.jsonl": ('{"text": "\\ud800"}\n', "line 1: half of a UTF-16 pair"),
    "e.jsonl": ("[" * 100_000 + "\n", "line 1: not JSON"),
    "f.csv": ("id,text\n1,a,b\n", "line 2: 3 fields, and the first line names 2"),
    "g.csv": ('id,text\n1,"a\nb', "line 3: not CSV"),
    "h.jsonl": ('{"text": ""}\n{"text": "\0"}', r"not text: a NUL byte at byte 23 \(line 2\)"),
    "i.jsonl": ('{"text": ""}\n\n{"text": "\udcff"}', r"not UTF-8: byte 0xff at byte 24 \(line 3\)"),
    "j.jsonl": ('{"text": %s}' % ("1" * 5000), "line 1: not JSON that can be read: .*digits"),
    "k.tsv": ("id\ttext\n1\n", "line 2: 1 fields, and the first line names 2"),
    "l.csv": ("id\n1\n", "line 1: no field 'text'; there are 'id'"),
    "n.txt": ("ab\n\udcc3\n\nxyz", r"not UTF-8: byte 0xc3 at byte 3 \(line 2\)"),
    "m.txt": ("a\nb\n\udcc3", r"not UTF-8: byte 0xc3 at byte 4 \(line 3\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_text(content, errors="surrogateescape")
    for size in (1, 4, 5, 1 << 20):
        monkeypatch.setattr("tinyllm.data.documents._BLOCK", size)
        with pytest.raises(InputError, match=f"{name}.*{message}") as error:
            list(documents_of(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_file_without_line_ends_is_no_list_of_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllm.data.documents._LONGEST_RECORD", 1000)
    monkeypatch.setattr("tinyllm.data.documents._BLOCK", 100)
    monkeypatch.setattr(
        "csv.field_size_limit", lambda limit=1, set_limit=csv.field_size_limit: set_limit(1000)
    )
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' + '{"text": ""}' * 1000)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: more than 1,000 characters"):
        list(documents_of(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text('text\n"' + "line of an unclosed quote\n" * 1000)
    before = csv.field_size_limit()
    with pytest.raises(InputError, match=r"a\.csv, line \d+: not CSV: field larger than field limit"):
        list(documents_of(tmp_path / "a.csv"))
    csv.field_size_limit(before)


def test_two_files_of_records_are_read_side_by_side(tmp_path: Path) -> None:
    long = "x" * 200_000  # more than the csv module takes by itself
    write_csv(tmp_path / "a.csv", ["a"])
    write_csv(tmp_path / "b.csv", ["b", long])
    reading = Reading(longest=1 << 20)
    first, second = documents_of(tmp_path / "a.csv", reading), documents_of(tmp_path / "b.csv", reading)
    assert next(first).text == "a"
    assert next(second).text == "b"
    assert list(first) == []
    assert [document.text for document in second] == [long]


@pytest.mark.parametrize(
    ("package", "name", "advice"),
    [("pyarrow", "a.parquet", "pip install pyarrow"), ("zstandard", "a.txt.zst", "pip install zstandard")],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"{name}: .*{advice}"):
        list(documents_of(tmp_path / name))


@pytest.mark.parametrize("newlines", ["lf", "keep"])
def test_lines_of_old_macs_separate_records_too(tmp_path: Path, newlines: Literal["lf", "keep"]) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\r1,"a\rb"\r2,c\r')
    if newlines == "lf":
        assert [d.text for d in documents_of(tmp_path / "a.csv")] == ["a\nb", "c"]
    else:
        with pytest.raises(InputError, match=r"a\.csv, line 1: not CSV"):
            list(documents_of(tmp_path / "a.csv", Reading(newlines="keep")))


@pytest.mark.parametrize("damage", [slice(-9), slice(12), "flip", "none"])
def test_damaged_gzip_is_named(tmp_path: Path, damage: slice | str) -> None:
    content = bytearray(gzip.compress(random.Random(1).randbytes(5000).hex().encode()))
    if damage == "flip":
        content[2000] ^= 255
    elif damage == "none":
        content = bytearray(b"plain text")
    else:
        content = content[damage]
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"a\.txt\.gz: the compressed data is (cut short or )?damaged",
    ):
        list(documents_of(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize("size", range(1, 8))
def test_line_ends_wherever_a_block_ends(tmp_path: Path, size: int) -> None:
    content = "\ufeffa\r\nb\rc\n\r\n\r\rd\né\r".encode()
    with open(tmp_path / "a", "wb") as file:
        file.write(content)
    for newlines, expected in (("lf", "a\nb\nc\n\n\n\nd\né\n"), ("keep", content.decode("utf-8-sig"))):
        with open(tmp_path / "a", "rb") as opened:
            assert "".join(text_of(opened, "a", size, newlines)) == expected


def joined(documents: list[Document], separator: str) -> str:
    return "".join((separator if d.begins and i else "") + d.text for i, d in enumerate(documents))


@pytest.mark.parametrize("separator", [None, "<|end|>", "\n\n"])
def test_long_texts_are_cut_the_same_way_whatever_follows(
    tmp_path: Path, separator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(2)
    words = ["word", "é\U0001f600", "\n", "\n\n", " "]
    words += [separator, separator[:1], separator[:-1], separator[1:]] if separator else []
    for trial in range(100):
        text = "".join(generator.choices(words, k=generator.randrange(1, 400)))
        longest = generator.randrange(len(separator or " "), 60)
        reading = Reading(separator=separator, longest=longest)
        monkeypatch.setattr("tinyllm.data.documents._BLOCK", generator.randrange(1, 200))
        path = tmp_path / f"{trial}.txt"
        path.write_text(text)
        documents = list(documents_of(path, reading))
        assert all(0 < len(d.text) <= longest for d in documents)
        wanted = text if separator is None else separator.join(filter(None, text.split(separator)))
        assert joined(documents, separator or "?") == wanted
        for more in ("x", (separator or "")[1:], "".join(generator.choices(words, k=50))):
            path.write_text(text + more)
            assert list(documents_of(path, reading))[: len(documents) - 1] == documents[:-1]


def test_cuts_prefer_blank_lines_then_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaaa\n\naa\naaaa" + "bbbbbb\nbbbb" + "c" * 25)
    cut = [(d.text, d.begins) for d in documents_of(tmp_path / "a.txt", Reading(longest=10))]
    assert cut == [
        ("aaaa\n\naa\n", True),
        ("aaaabbbbbb", False),
        ("\nbbbbccccc", False),
        ("cccccccccc", False),
        ("cccccccccc", False),
    ]


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(50):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    characters = sum(len(document.text) for document in documents_of(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 50 << 20
    assert peak < 20 << 20


def test_memory_does_not_grow_with_what_zstandard_saves(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"x" * (100 << 20)))
    read: list[int] = []
    tracemalloc.start()
    characters = sum(len(document.text) for document in documents_of(path, on_read=read.append))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 100 << 20
    assert sum(read) == path.stat().st_size
    # Counted are the buffers of the package too where it takes them from Python; the text is twice as long.
    assert peak < 40 << 20


def test_what_is_read_is_told(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ["text"] * 1000)
    for path in (tmp_path / "a.jsonl", compress(tmp_path / "a.jsonl")):
        read: list[int] = []
        assert len(list(documents_of(path, on_read=read.append))) == 1000
        assert sum(read) == path.stat().st_size


@pytest.mark.parametrize("change", ["longer", "shorter", "touched"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 500_000)
    documents = documents_of(path)
    next(documents)
    if change == "longer":
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        with open(path, "a") as file:
            file.write("x")
        os.utime(path, ns=times)  # as where two changes come within one tick of the clock
    elif change == "shorter":
        os.truncate(path, 1 << 20)
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"a\.txt: changed while it was read"):
        list(documents)


def test_files_of_folders(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.csv", "c/d.parquet", "c/e.md.zst", "f.gz", "g.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    left_out: dict[str, list[Path]] = {}
    names = [str(file.relative_to(tmp_path)) for file in find_document_files([tmp_path], left_out)]
    assert names == ["a.txt.gz", "b.csv", "c/d.parquet", "c/e.md.zst"]
    assert set(left_out) == {".gz", ".png"}
    with pytest.raises(InputError, match="missing: no such file or folder"):
        find_document_files([tmp_path / "missing"])
    with pytest.raises(InputError, match="give a file or a folder"):
        find_document_files([])


def test_empty_files_are_left_out_of_folders_and_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"a\.txt: the file is empty"):
        find_document_files([tmp_path / "a.txt"])
    with pytest.raises(InputError, match="all text files in this folder are empty"):
        find_document_files([tmp_path])
    (tmp_path / "b.csv").write_text("text\nx\n")
    left_out: dict[str, list[Path]] = {}
    assert find_document_files([tmp_path], left_out) == [tmp_path / "b.csv"]
    assert left_out == {"empty": [tmp_path / "a.txt"]}


def test_what_cannot_be_read_twice_or_was_not_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a")
    os.mkfifo("pipe.txt")
    os.mkfifo("texts/pipe.txt")
    assert find_document_files(["texts"]) == [Path("texts/a.txt")]
    for name, message in {
        "pipe.txt": "pipe.txt: a pipe or a device",
        os.devnull: "a pipe or a device",
        "-": "-: standard input can be read once only",
        "": "the name of a file or folder is empty",
        "a\0b": "no such file or folder",
        "x" * 300: "cannot be read: File name too long",
    }.items():
        with pytest.raises(InputError, match=message):
            find_document_files([name])
    for second in ("texts", "texts/a.txt", "./texts/../texts/a.txt", tmp_path / "texts"):
        with pytest.raises(InputError, match=r"a\.txt is given twice"):
            find_document_files(["texts/a.txt", second])


def test_impossible_readings() -> None:
    with pytest.raises(InputError, match="longest=0; it must be at least 1"):
        Reading(longest=0)
    with pytest.raises(InputError, match="longest=3; it must be at least 5"):
        Reading(separator="<end>", longest=3)
    with pytest.raises(InputError, match="the separator of documents is empty"):
        Reading(separator="")


def test_read_text_takes_records_and_compressed_files(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ["one", "two\n", "three"])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four\r\n" + b"x" * 200_000))
    said: list[str] = []
    assert read_text(tmp_path, said.append) == "one\ntwo\nthree\nfour\n" + "x" * 200_000
    assert said == ["2 files, 200,019 characters"]


def test_a_tokenizer_learns_line_ends_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n" * 50)
    learned = BPETokenizer.train([tmp_path / "a.txt"], 258)
    assert b"\r" not in b"".join(token for token in learned.vocab if len(token) > 1)
    kept = BPETokenizer.train([tmp_path / "a.txt"], 260, newlines="keep")
    assert b"\r\n" in b"".join(token for token in kept.vocab if len(token) > 1)

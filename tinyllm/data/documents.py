"""Documents from files: plain text, JSON lines, CSV and Parquet, compressed or not, in memory that does not grow."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath, open_file
from tinyllm.system.text_files import (
    RECORD_SUFFIXES,
    STANDARD_INPUT,
    TEXT_SUFFIXES,
    Newlines,
    blocks,
    find_text_files,
    kind_of,
    reading,
    unchanged,
)
from tinyllm.system.wording import shown

DOCUMENT_SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES
OnRead = Callable[[int], None]

_BLOCK = 1 << 20
_LONGEST_RECORD = 1 << 27
"""Characters of a line of JSON or CSV, and of a field: what is longer is a whole file in one line."""


@dataclass(frozen=True)
class Document:
    """A text, or a part of a long one; begins: False where it goes on from the document before."""

    text: str
    begins: bool = True


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    Args:
        field: the one of JSON lines, of CSV (named in the first line) and of Parquet that is the text.
        newlines: "lf": all line ends become \\n; "keep": they stay.
        separator: a text that stands between the documents of a plain file; None: a file is one document.
        longest: characters; what is longer is cut at a blank line, a line end, or anywhere, in this order. Where it is
            cut depends on the text before alone, so that text added to a file changes no document but its last. At
            least as many as the separator has.
    """

    field: str = "text"
    newlines: Newlines = "lf"
    separator: str | None = None
    longest: int = 1 << 16

    def __post_init__(self) -> None:
        if self.separator == "":
            raise InputError("the separator of documents is empty; give a text, or none")
        least = len(self.separator or " ")
        if self.longest < least:
            raise InputError(f"longest={self.longest}; it must be at least {least}")


def find_document_files(
    paths: Iterable[StrPath], left_out: dict[str, list[Path]] | None = None
) -> list[Path]:
    """The files themselves, and of folders all that end in one of DOCUMENT_SUFFIXES, compressed or not, sorted.

    left_out: what is passed over is added to it, by reason; empty files of a folder too.

    Raises:
        InputError: a path is missing, is a pipe or a device, or comes twice, a file that is named is empty, or a folder
            holds no file with text.
    """
    found: list[Path] = []
    for name in paths:
        _require_readable_again(name)
        path = Path(name)
        files = find_text_files(path, left_out, DOCUMENT_SUFFIXES)
        empty = {file for file in files if not file.stat().st_size}
        if len(empty) == len(files):
            what = "all text files in this folder are empty" if path.is_dir() else "the file is empty"
            raise InputError(f"{path}: {what}; give a file with text")
        if empty and left_out is not None:
            left_out.setdefault("empty", []).extend(empty)
        found += [file for file in files if file not in empty]
    if not found:
        raise InputError("no text: give a file or a folder")
    seen: set[str] = set()
    for file in found:
        if (place := os.path.abspath(file)) in seen:
            raise InputError(
                f"{file} is given twice; give each file once, by its name or by a folder that it is in"
            )
        seen.add(place)
    return found


def _require_readable_again(name: StrPath) -> None:
    """Raise InputError unless this is a folder or a plain file."""
    path = Path(name)
    try:
        there, plain = path.exists(), path.is_dir() or path.is_file()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not os.fspath(name):
        raise InputError(
            "the name of a file or folder is empty; . is the folder at hand"
        )  # and not by mistake
    if path == STANDARD_INPUT and not there:
        raise InputError(
            "-: standard input can be read once only, and text more often; write it to a file first"
        )
    if not there:
        raise InputError(f"{path}: no such file or folder")
    if not plain:
        raise InputError(
            f"{path}: a pipe or a device can be read once only, and text more often; write it to a file first"
        )


def documents_of(
    file: Path, settings: Reading = Reading(), on_read: OnRead | None = None
) -> Iterator[Document]:
    """The documents of one file, in order; empty ones are left out.

    Of the endings .jsonl, .ndjson, .csv, .tsv and .parquet, each record is a document; any other file is plain text.
    .tsv has no quotes. on_read: told how many bytes were read, as they lie on the disk.

    Raises:
        InputError: it cannot be read, is damaged or not UTF-8 text, changes while it is read, or a record has no text.
    """
    kind = kind_of(file)[0]
    if kind not in RECORD_SUFFIXES:
        parts = blocks(file, _BLOCK, settings.newlines, on_read)
        yield from _cut(parts, settings.longest, settings.separator)
        return
    if kind == ".parquet":
        texts = _parquet(file, settings.field, on_read)
    elif kind in (".jsonl", ".ndjson"):
        texts = _json_lines(file, settings.field, _lines(file, settings.newlines, on_read))
    else:
        lines = _lines(file, settings.newlines, on_read)
        texts = _separated(file, settings.field, lines, "\t" if kind == ".tsv" else ",")
    for text in texts:
        if settings.newlines == "lf" and "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if len(text) <= settings.longest:
            if text:
                yield Document(text)
        else:
            yield from _cut([text], settings.longest, None)


def _cut(parts: Iterable[str], longest: int, separator: str | None) -> Iterator[Document]:
    """The documents of a text that comes in parts: what stands between separators, cut where it is too long."""
    held, at, begins = "", 0, True
    for part in parts:
        held, at = held[at:] + part, 0
        while True:
            end = held.find(separator, at, at + longest) if separator else -1
            if separator and end >= 0:
                if end > at:
                    yield Document(held[at:end], begins)
                at, begins = end + len(separator), True
            elif len(held) - at > longest:
                # What follows these characters has no say, and a separator that they begin is not cut.
                whole = longest - (_begun(held[at : at + longest], separator) if separator else 0)
                end = at + _length_of_first(held[at : at + whole])
                yield Document(held[at:end], begins)
                at, begins = end, False
            else:
                break
    if len(held) > at:
        yield Document(held[at:], begins)


def _begun(text: str, separator: str) -> int:
    """With how many characters of a separator the text ends, which may go on after it."""
    return next((n for n in range(len(separator) - 1, 0, -1) if text.endswith(separator[:n])), 0)


def _length_of_first(text: str) -> int:
    """Where a document of this length is cut: after the last blank line in its second half, or the last line end."""
    half = len(text) // 2
    for end in ("\n\n", "\n"):
        place = text.rfind(end, half)
        if place >= 0:
            return place + len(end)
    return len(text)


# ---- Records -----------------------------------------------------------------------------------


def _lines(file: Path, newlines: Newlines, on_read: OnRead | None) -> Iterator[str]:
    """The lines of a file, each with its end, which is \\n alone."""
    held = ""
    number = 1
    for block in blocks(file, _BLOCK, newlines, on_read):
        *whole, last = block.split("\n")
        number += len(whole)
        if whole:
            yield held + whole[0] + "\n"
            yield from (line + "\n" for line in whole[1:])
            held = last
        else:
            held += last
        if len(held) > _LONGEST_RECORD:
            raise InputError(
                f"{file}, line {number}: more than {_LONGEST_RECORD:,} characters; each record must be a line"
            )
    if held:
        yield held


def _json_lines(file: Path, field: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}; each line is to be an object"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: not JSON that can be read: {error}") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{file}, line {number}: an object with the field {shown(field)} is expected, got {shown(record)}"
            )
        yield _text_in(record, field, f"{file}, line {number}")


def _text_in(record: dict[str, object], field: str, where: str) -> str:
    if field not in record:
        raise _no_field(where, field, record)
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {shown(field)} is {shown(text)}; it must be a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: half of a UTF-16 pair, which is no character; mend the file"
            ) from None
    return text


def _no_field(where: str, field: str, names: Iterable[str]) -> InputError:
    found = ", ".join(map(shown, names))
    others = f"there are {found}; name one (prepare: --field)" if found else "there is none at all"
    return InputError(f"{where}: no field {shown(field)}; {others}")


def _separated(file: Path, field: str, lines: Iterable[str], delimiter: str) -> Iterator[str]:
    """The texts of comma- or tab-separated values, of which the first line names the fields."""
    if delimiter == "\t":
        rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines, strict=True)
    # One limit for all readers, so it is never lowered: another may be at work.
    csv.field_size_limit(max(_LONGEST_RECORD, csv.field_size_limit()))
    try:
        names = next(rows, [])
        if names and field not in names:
            raise _no_field(f"{file}, line 1", field, names)
        for row in rows:
            if row and len(row) != len(names):
                raise InputError(
                    f"{file}, line {rows.line_num}: {len(row)} fields, and the first line names {len(names)}"
                )
            if row:
                yield row[names.index(field)]
    except csv.Error as error:
        raise InputError(f"{file}, line {rows.line_num}: not CSV: {error}") from None


def _parquet(file: Path, field: str, on_read: OnRead | None) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file}: reading .parquet takes a package: pip install pyarrow") from None
    with reading(file), open_file(file) as raw, unchanged(file, raw):
        try:
            table = parquet.ParquetFile(raw)
            names = table.schema_arrow.names
            if field not in names:
                raise _no_field(str(file), field, names)
            number, size = 0, file.stat().st_size
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _text_in({field: text}, field, f"{file}, row {number}")
                if on_read is not None:
                    on_read(size * batch.num_rows // max(1, table.metadata.num_rows))
        except UnicodeDecodeError:
            raise InputError(f"{file}, after row {number}: not UTF-8; convert it to UTF-8") from None
        except pyarrow.ArrowException as error:
            raise InputError(f"{file}: not Parquet, or damaged: {str(error).splitlines()[0]}") from None

"""Documents from plain text files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import find_text_files, text_of


@dataclass(frozen=True)
class Document:
    """A text, or a part of a long one; begins: False where it goes on from the document before."""

    text: str
    begins: bool = True


@dataclass(frozen=True)
class Reading:
    """How files become documents."""

    field: str = "text"
    newlines: Literal["lf", "keep"] = "lf"
    separator: str | None = None
    longest: int = 1 << 16


def find_document_files(
    paths: Iterable[StrPath], left_out: dict[str, list[Path]] | None = None
) -> list[Path]:
    """The files themselves and the text files of folders, sorted."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        found += find_text_files(path, left_out)
    return found


def documents_of(
    file: Path, settings: Reading = Reading(), on_read: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """The documents of one file, in order; empty ones are left out."""
    with open(file, "rb") as raw:
        text = "".join(text_of(raw, str(file)))
    if on_read is not None:
        on_read(file.stat().st_size)
    if settings.newlines == "lf":
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for part in text.split(settings.separator) if settings.separator else [text]:
        for start in range(0, len(part), settings.longest):
            yield Document(part[start : start + settings.longest], start == 0)

"""Text files: which ones a path names, and their text, a block at a time or whole."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath

# In a folder, only these are taken; a file that is named directly may be called anything.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")

_BLOCK = 1 << 22
LARGEST_FILE = 1 << 27
"""Bytes of a file that is read whole."""

_LONGEST_NAME = 255
_NAME = re.compile(
    r"(?:\S*[/\\])?[^\s/\\]*\w\.[A-Za-z]\w{1,6}"  # corpus.en, data/a.txt
    r"|[~.\w:-]*[/\\][\w./\\~-]*[^\W\d_]{3}[/\\]?"  # ~/corpus, data/corpus/
)


def find_text_files(path: StrPath) -> list[Path]:
    """The file itself, or the text files of a folder and its folders, sorted; hidden names are left out.

    Raises:
        InputError: a folder without text files, or one that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    found = []
    for root, folders, names in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(root, name)
            for name in names
            if not name.startswith(".")
            and name.lower().endswith(TEXT_SUFFIXES)
            and Path(root, name).is_file()
        ]
    if not found:
        suffixes = ", ".join(TEXT_SUFFIXES)
        raise InputError(f"{path}: no text in this folder: no file that ends in {suffixes}")
    # By the parts of the path, so that the order is the same on every system.
    return sorted(found, key=lambda file: file.relative_to(path).parts)


def names_file(text: str) -> bool:
    """Whether a text is rather the name of a file or a folder that there is."""
    # "." and "/" are folders everywhere, and punctuation more often.
    return len(text) <= _LONGEST_NAME and any(map(str.isalnum, text)) and os.path.exists(text)


def looks_like_a_path(text: str) -> bool:
    """Whether a text has the form of a file's name, such as corpus.en or data/corpus.txt, be there one or not."""
    return len(text) <= _LONGEST_NAME and _NAME.fullmatch(text) is not None


def blocks(path: Path, size: int = _BLOCK) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about `size` bytes, without a byte order mark; none if it is empty.

    Raises:
        InputError: missing, unreadable, or not text (names the byte).
    """
    try:
        with storage.open_file(path) as file:
            yield from text_of(file, str(path), size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def text_of(file: IO[bytes], name: str, size: int = _BLOCK) -> Iterator[str]:
    """The text of an open file, such as standard input, as blocks() gives it; `name` is what errors call it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    # Said where a byte is found that no text has.
    model = "; a tokenizer's .model is no text to read: give it as --tokenizer or PATH, or to load_tokenizer"
    advice = model if name.endswith(".model") else ""
    done = 0  # bytes read before this block
    while True:
        content = file.read(size)
        zero = content.find(b"\0")
        if zero >= 0:
            raise InputError(
                f"{name}: not text: a NUL byte at byte {done + zero}"
                f"{advice or '; give UTF-8 text (UTF-16 must be converted first)'}"
            )
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte "
                f"{done - pending + error.start}{advice or '; convert it to UTF-8'}"
            ) from None
        if not done:
            text = text.removeprefix("\ufeff")
        done += len(content)
        if text:
            yield text
        if not content:
            return


def read_whole(path: Path) -> bytes:
    """The content of a file of at most LARGEST_FILE bytes.

    Raises:
        InputError: missing, unreadable, no plain file, or too large.
    """
    try:
        return storage.read_file(path, LARGEST_FILE)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode(content: bytes, where: StrPath) -> str:
    """The UTF-8 text in the bytes of a file, without a byte order mark; `where` is what errors call it.

    Raises:
        InputError: not UTF-8 (names the byte).
    """
    try:
        # "utf-8-sig" drops the byte order mark that some Windows editors write.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); is it the right file?") from None


def write_text(path: StrPath, text: str) -> None:
    """Write UTF-8 text so that a crash leaves the old file or the new one, never half of one.

    Raises:
        InputError: the folder is missing, the disk is full, writing is not allowed.
    """
    path = Path(path)
    try:
        storage.replace(path, text.encode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

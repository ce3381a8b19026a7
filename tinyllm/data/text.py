"""Text from files, from folders, or from Python's own help pages."""

import os
from collections.abc import Iterable
from pathlib import Path

from tinyllm.errors import InputError

StrPath = str | os.PathLike[str]

# In a folder, only these are taken; a file that is named directly may be called anything.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


def _read_file(path: Path) -> str:
    """One file's text without a byte order mark; "" if it is empty."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    zero = content.find(b"\0")
    if zero >= 0:
        raise InputError(
            f"{path}: not text: a NUL byte at byte {zero}; give UTF-8 text (UTF-16 must be converted first)"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8: byte 0x{content[error.start]:02x} at byte {error.start}; "
            "convert the file to UTF-8"
        ) from None
    # Dropped after decoding, so that the offsets above are those of the file.
    return text.removeprefix("\ufeff")


def _files_below(folder: Path) -> list[Path]:
    """The text files of a folder and its folders, sorted; hidden names are left out."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(root, name)
            for name in names
            if not name.startswith(".")
            and name.lower().endswith(TEXT_SUFFIXES)
            and Path(root, name).is_file()
        ]
    # By the parts of the path, so that the order is the same on every system.
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def read_text(paths: StrPath | Iterable[StrPath]) -> str:
    """The text of a file, of several, or of every text file below a folder, joined in order.

    Of a folder, the files ending in .txt, .md, .rst or .py are read, in sorted order, hidden files
    and folders left out. Text is UTF-8; a byte order mark is dropped, line ends stay as they are.
    A newline goes between two files where the first does not end in one.

    Raises:
        InputError: a file is missing, empty, unreadable or not UTF-8 text (names the file and the
            byte), or a folder holds no text.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not named:
        raise InputError("no text: give a file or a folder")
    texts = []
    for path in map(Path, named):
        if path.is_dir():
            # Empty files are common in a folder (__init__.py); a named one is a mistake.
            below = [text for text in map(_read_file, _files_below(path)) if text]
            if not below:
                suffixes = ", ".join(TEXT_SUFFIXES)
                raise InputError(f"{path}: no text in this folder: no file that ends in {suffixes}")
            texts += below
        else:
            text = _read_file(path)
            if not text:
                raise InputError(f"{path}: the file is empty; give a file with text")
            texts.append(text)
    ended = [text if text.endswith("\n") else text + "\n" for text in texts[:-1]]
    return "".join(ended) + texts[-1]


def embedded_corpus() -> str:
    """About 450 kB of English that comes with Python: the language reference behind help().

    The text differs a little between Python versions, so compare losses within one version.

    Raises:
        InputError: this Python was packaged without the pages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "this Python comes without its help pages (pydoc_data.topics), which are the default "
            "text; pass --data FILE"
        ) from None
    return "".join(topics[name] for name in sorted(topics))

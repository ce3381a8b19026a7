"""Text from files, from folders, or from Python's own help pages."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from tinyllm.data.documents import DOCUMENT_SUFFIXES, Reading, documents_of
from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import STANDARD_INPUT, Newlines, counted, find_text_files


def read_text(
    paths: StrPath | Iterable[StrPath],
    say: Callable[[str], None] | None = None,
    newlines: Newlines = "lf",
    field: str = "text",
) -> str:
    """The text of a file, of several, or of every text file below a folder, joined in order.

    Of a folder, the files with one of DOCUMENT_SUFFIXES are read, in sorted order, hidden files and folders left out.
    Text is UTF-8; a byte order mark is dropped, and line ends become \\n unless `newlines` is "keep". A newline goes
    between two files or records where the first does not end in one. `-` is standard input. `say` is told in a line
    how many files and characters there are, and what was left out. field: as in `Reading`.

    Raises:
        InputError: a file is missing, empty, unreadable or not UTF-8 text (names the file and the
            byte), or a folder holds no text.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not named:
        raise InputError("no text: give a file or a folder")
    reading = Reading(field, newlines)
    texts: list[str] = []
    left_out: dict[str, list[Path]] = {}
    for path in map(Path, named):
        below = path.is_dir()
        files = find_text_files(path, left_out, DOCUMENT_SUFFIXES)
        content = {file: _joined(file, reading) for file in files}
        # Empty files are common in a folder (__init__.py); a named one is a mistake.
        empty = [file for file, text in content.items() if not text]
        if len(empty) == len(content):
            what = "no text in this folder" if below else "the file is empty; give a file with text"
            raise InputError(f"{path}: {what}" if path != STANDARD_INPUT else "standard input is empty")
        if empty:
            left_out.setdefault("empty", []).extend(empty)
        texts += filter(None, content.values())
    joined = _one_after_another(texts)
    if say is not None:
        others = f"; left out: {counted(left_out)}" if left_out else ""
        say(f"{len(texts):,} file{'s' * (len(texts) > 1)}, {len(joined):,} characters{others}")
    return joined


def _joined(file: Path, reading: Reading) -> str:
    texts: list[str] = []
    parts: list[str] = []
    for document in documents_of(file, reading):
        if document.begins and parts:
            texts.append("".join(parts))
            parts = []
        parts.append(document.text)
    return _one_after_another([*texts, "".join(parts)])


def _one_after_another(texts: list[str]) -> str:
    """The texts joined, each but the last ended by a newline."""
    return "".join([text if text.endswith("\n") else text + "\n" for text in texts[:-1]] + texts[-1:])


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

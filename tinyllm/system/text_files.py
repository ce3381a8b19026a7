"""Text files: which ones a path names, and their text, a block at a time or whole."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.progress import is_terminal, print_status
from tinyllm.system.storage import StrPath

# In a folder, only these are taken; a file that is named directly may be called anything.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Of files whose texts are a field of records; `data.documents_of` reads them."""
COMPRESSED_SUFFIXES = (".gz", ".zst")
"""These may follow any of the endings but .parquet."""
STANDARD_INPUT = Path("-")

Newlines = Literal["lf", "keep"]
"""What line ends become: \\n, whichever they are (\\r\\n and \\r are others), or what they are."""

_UNPACK = "unpack it first"
_KINDS_OF_FILES = {
    b"\x1f\x8b": f"a gzip file: {_UNPACK} (gunzip), or give it a name that ends in .gz",
    b"PK\x03\x04": f"a zip archive, as .docx, .xlsx and .epub are too: {_UNPACK}, or export it as text",
    b"BZh": f"a bzip2 file: {_UNPACK} (bunzip2)",
    b"\xfd7zXZ\0": f"an xz file: {_UNPACK} (unxz)",
    b"\x28\xb5\x2f\xfd": f"a zstd file: {_UNPACK} (unzstd), or give it a name that ends in .zst",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive: {_UNPACK}",
    b"Rar!": f"a rar archive: {_UNPACK}",
    b"%PDF": "a PDF: take the text out of it first (pdftotext)",
    b"\xd0\xcf\x11\xe0": "a document of an older Office: export it as text",
    b"PAR1": "a Parquet file: give it a name that ends in .parquet, and no other",
    b"SQLite format 3\0": "an SQLite database: write its texts to a text file first",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "an image, a sound or a film (RIFF)",
    b"\x7fELF": "a program",
    b"\x93NUMPY": "an array of NumPy",
    b"\xff\xfe\0\0": "UTF-32: convert it (iconv -f UTF-32 -t UTF-8)",
    b"\0\0\xfe\xff": "UTF-32: convert it (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
}
"""What files that are taken for text begin with, the longer before the shorter, and what they are."""
_NAMED = 3

_BLOCK = 1 << 22
_LINE_END = b"\n"
LARGEST_FILE = 1 << 27
"""Bytes of a file that is read whole."""

_LONGEST_NAME = 255
_NAME = re.compile(
    r"(?:\S*[/\\])?[^\s/\\]*\w\.[A-Za-z]\w{1,6}"  # corpus.en, data/a.txt
    r"|[~.\w:-]*[/\\][\w./\\~-]*[^\W\d_]{3}[/\\]?"  # ~/corpus, data/corpus/
)


def kind_of(path: Path) -> tuple[str, str]:
    """The ending of a file that says what is in it, and the one that says how it is compressed, or ""; lower case."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED_SUFFIXES else ""
    return (Path(path.stem).suffix if compression else path.suffix).lower(), compression


def find_text_files(
    path: StrPath,
    left_out: dict[str, list[Path]] | None = None,
    suffixes: Collection[str] = TEXT_SUFFIXES,
) -> list[Path]:
    """The file itself, or the text files of a folder and its folders, sorted; hidden names are left out.

    Args:
        path: "-": standard input. left_out: what is passed over is added to it, by reason.
        suffixes: of the files that are taken of a folder, compressed or not.

    Raises:
        InputError: a folder without text files, one that cannot be read, or a file of records where their syntax would
            be taken for text.
    """
    path = Path(path)
    if not path.is_dir():
        kind = kind_of(path)[0]
        if kind in RECORD_SUFFIXES and kind not in suffixes:
            raise InputError(
                f"{path}: {kind} holds records, whose syntax would be taken for text; give a text file"
            )
        return [path]

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    found, passed_over = [], {} if left_out is None else left_out
    for root, folders, names in os.walk(path, onerror=refuse):
        for name in [*folders, *names]:
            file, suffix = Path(root, name), Path(name).suffix.lower()
            if name.startswith("."):
                reason = "hidden"
            elif name in folders:
                reason = "link to a folder" if file.is_symlink() else ""
            elif kind_of(file)[0] not in suffixes:
                reason = suffix or "without an ending"
            else:
                reason = "" if file.is_file() else "no plain file"
                found += [] if reason else [file]
            if reason:
                passed_over.setdefault(reason, []).append(file)
        folders[:] = [name for name in folders if not name.startswith(".")]
    if not found:
        others = f"; it holds {counted(passed_over)}" if passed_over else ""
        packed = " or ".join(COMPRESSED_SUFFIXES)
        raise InputError(
            f"{path}: no text in this folder: no file that ends in {', '.join(suffixes)} (or in {packed} after them)"
            f"{others}"
        )
    # By the parts of the path, so that the order is the same on every system.
    return sorted(found, key=lambda file: file.relative_to(path).parts)


def counted(left_out: Mapping[str, Sequence[Path]]) -> str:
    """What was left out, in words: how many for each reason, and the first names."""
    parts = []
    for reason, files in sorted(left_out.items(), key=lambda item: -len(item[1])):
        names = [file.name for file in sorted(files)[:_NAMED]] + ["..."] * (len(files) > _NAMED)
        parts.append(f"{len(files):,} {reason} ({', '.join(names)})")
    return ", ".join(parts)


def names_file(text: str) -> bool:
    """Whether a text is rather the name of a file or a folder that there is."""
    # "." and "/" are folders everywhere, and punctuation more often.
    return len(text) <= _LONGEST_NAME and any(map(str.isalnum, text)) and os.path.exists(text)


def looks_like_a_path(text: str) -> bool:
    """Whether a text has the form of a file's name, such as corpus.en or data/corpus.txt, be there one or not."""
    return len(text) <= _LONGEST_NAME and _NAME.fullmatch(text) is not None


def blocks(
    path: Path,
    size: int = _BLOCK,
    newlines: Newlines = "keep",
    on_read: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about `size` bytes, without a byte order mark; none if it is empty.

    `-` is standard input. Files that end in .gz or .zst are decompressed. on_read: told how many bytes were read, as
    they lie on the disk.

    Raises:
        InputError: missing, unreadable, damaged, not text (names byte and line), or changed while it is read.
    """
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise InputError("standard input is closed; give a file")
        file: IO[bytes] = sys.stdin.buffer
        if is_terminal(sys.stdin):
            print_status("standard input: type the text; Ctrl-D on a line of its own ends it")
            file = io.BytesIO(file.read())  # in one read, since each asks for a Ctrl-D of its own
        yield from text_of(file, "standard input", size, newlines)
        return
    with reading(path), storage.open_file(path) as raw, unchanged(path, raw):
        counted_file: Any = raw if on_read is None else _Counted(raw, on_read)
        yield from text_of(_decompressed(counted_file, path), str(path), size, newlines)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within this context errors of reading a file become an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:
        if type(error).__name__ == "BadGzipFile":  # not imported for its name alone
            raise InputError(f"{path}: the compressed data is damaged ({error})") from None
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # That of Zstandard has one name in either package, and is imported only for files that need it.
        if isinstance(error, EOFError | zlib.error) or type(error).__name__ == "ZstdError":
            raise InputError(f"{path}: the compressed data is cut short or damaged ({error})") from None
        raise


@contextlib.contextmanager
def unchanged(path: Path, file: IO[bytes]) -> Iterator[None]:
    """Raise an InputError at the end of this context where a file that was open in it is another than at its begin."""
    before = os.fstat(file.fileno())
    yield
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while it was read; begin again when nobody writes to it")


class _Counted(io.RawIOBase):
    """A file that says how many bytes were read of it."""

    def __init__(self, file: IO[bytes], on_read: Callable[[int], None]) -> None:
        self._file, self._on_read = file, on_read

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._on_read(len(content))
        return content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _decompressed(file: Any, path: Path) -> Any:
    """What is in a file, by the ending of its name."""
    compression = kind_of(path)[1]
    if compression == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=file)
    if compression == ".zst":
        try:
            from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

            return zstd.ZstdFile(file)
        except ImportError:
            pass
        try:
            import zstandard
        except ImportError:
            raise InputError(
                f"{path}: reading .zst takes Python 3.14 or a package: pip install zstandard"
            ) from None
        return _Zstandard(zstandard, file)
    return file


class _Zstandard:
    """A file compressed by Zstandard, read through the package; raises EOFError where it is cut short."""

    # Bytes decompressed at once, which become up to 32,768 times as many.
    _AT_ONCE = 256

    def __init__(self, package: Any, file: IO[bytes]) -> None:
        self._package = package
        self._file = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
        self._decompressor: Any = None
        self._held = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._held) < size:
            content = self._file.read(self._AT_ONCE)
            if not content:
                if self._decompressor is not None:
                    raise EOFError("it ends inside a frame")
                break
            while content:
                if self._decompressor is None:
                    self._decompressor = self._package.ZstdDecompressor().decompressobj()
                self._held += self._decompressor.decompress(content)
                content = b""
                if self._decompressor.eof:
                    content, self._decompressor = self._decompressor.unused_data, None
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken


def text_of(file: IO[bytes], name: str, size: int = _BLOCK, newlines: Newlines = "keep") -> Iterator[str]:
    """The text of an open file, such as standard input, as blocks() gives it; `name` is what errors call it."""
    # Drops a byte order mark, wherever the first block ends.
    bare: Any = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(bare, translate=True) if newlines == "lf" else bare
    advice = ""
    done, lines = 0, 1  # bytes read before this block, and the line that it begins in
    while True:
        content = file.read(size)
        advice = advice if done else _advice(content, name)
        zero = content.find(b"\0")
        if zero >= 0:
            raise InputError(
                f"{name}: not text: a NUL byte at byte {done + zero} (line {lines + content.count(_LINE_END, 0, zero)})"
                f"{advice or '; give UTF-8 text (UTF-16 must be converted first)'}"
            )
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            # Its object begins with what was left of the block before, and without a byte order mark.
            place = len(content) - len(error.object) + error.start
            line = lines + content.count(_LINE_END, 0, max(0, place))
            raise InputError(
                f"{name}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte {done + place} (line {line})"
                f"{advice or '; convert it to UTF-8'}"
            ) from None
        done, lines = done + len(content), lines + content.count(_LINE_END)
        if text:
            yield text
        if not content:
            return


def _advice(begin: bytes, name: str) -> str:
    """What a file that turns out to be no text is by its first bytes, and what to do; "" where they do not tell."""
    if name.endswith(".model"):
        return (
            "; a tokenizer's .model is no text to read: give it as --tokenizer or PATH, or to load_tokenizer"
        )
    for magic, what in _KINDS_OF_FILES.items():
        if begin.startswith(magic):
            return f"; it is {what}"
    return "; it is a tar archive: unpack it first" if begin[257:262] == b"ustar" else ""


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

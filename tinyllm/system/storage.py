"""Files written so that a crash leaves the old or the new, never half, and read without trusting what they are.

Everything that changes a disk goes through `write_bytes`, `flush_file`, `flush_folder`, `rename`, `exchange` and
`link`, so that a test can make each of them fail, at any call. All raise OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

StrPath = str | os.PathLike[str]


def write_bytes(file: IO[bytes], content: bytes | memoryview) -> None:
    """Write all of `content` at the position of an unbuffered file."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]  # a disk that is nearly full takes a part


def flush_file(file: IO[bytes]) -> None:
    """Flush an unbuffered file to disk."""
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that flushes no folders
            raise
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file or a folder another name; a file that has it already is replaced."""
    os.replace(old, new)


def exchange(first: Path, second: Path) -> None:
    """Let two folders exchange their names in one step; raises OSError where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(first), here, os.fsencode(second), swap):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


def link(target: str, path: Path) -> None:
    """Make `path` a symbolic link to the folder `target`."""
    os.symlink(target, path, target_is_directory=True)


# ---- Out of these ------------------------------------------------------------------------------


def write_new(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with open(path, "wb", buffering=0) as file:
        write_bytes(file, content)
        flush_file(file)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, of this process: a rename is atomic only inside one file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, over one that is there."""
    temporary = temporary_name(path)
    try:
        write_new(temporary, content)
        rename(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, if that is there, whose content is at `new` afterwards.

    Where the system cannot exchange names, a crash may leave the old content under a hidden name that ends in .before.
    """
    if not folder.is_dir():
        rename(new, folder)
        return
    try:
        exchange(new, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.before")
        rename(folder, aside)
        try:
            rename(new, folder)
        except OSError:
            rename(aside, folder)
            raise
        rename(aside, new)


def remove_folder(folder: Path) -> None:
    """Delete a folder and all in it; a crash leaves it whole, or under a hidden name that ends in .tmp."""
    hidden = temporary_name(folder)
    rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def duplicate(file: Path, path: Path) -> None:
    """Let `path` hold what `file` holds: another name of it, or a copy where the file system gives one name a file."""
    try:
        os.link(file, path)
    except OSError:
        write_new(path, read_file(file))


def remove_leftovers(folder: Path) -> None:
    """Delete what crashes have left in a folder under temporary names."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            remove(path)


def read_file(path: Path, largest: int | None = None) -> bytes:
    """The content of a file.

    Raises OSError, before anything is read, for what is no plain file (a pipe or a device may never end) and for a
    file of more than `largest` bytes.
    """
    with open_file(path, _open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        if largest is not None and found.st_size > largest:
            raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, more than {largest:,}", str(path))
        return file.read(found.st_size)


def open_file(path: Path, opener: Callable[[str, int], int] | None = None) -> IO[bytes]:
    """The file, to be read; raises OSError for a name with a NUL too, for which `open` raises ValueError."""
    try:
        return open(path, "rb", opener=opener)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

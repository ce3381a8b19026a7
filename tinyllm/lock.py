"""A lock on a folder: one process works in it, another is refused, and any death of the first releases it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tinyllm.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"

_held: set[int] = set()
"""The descriptors of this process's locks."""


class FolderLock:
    """Locks `folder` from `hold` to `release`; where the system has no such locks, nothing is locked.

    The kernel releases it when this process ends, in whatever way. Forks do not hold it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = None

    def hold(self) -> None:
        """Lock the folder, again if it was deleted and made anew since.

        Raises InputError, naming the process, when another one holds it, and OSError when the folder cannot be written.
        """
        if fcntl is None or self._is_held():
            return
        self.release()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
                raise InputError(
                    f"{self.path.parent}: process {owner} trains in this folder; wait until it has ended, or give "
                    "another --out"
                ) from None
            except OSError:  # a file system without locks
                os.close(descriptor)
                return
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(descriptor)

    def _is_held(self) -> bool:
        """Whether this object has the lock, on the file that has its name."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def _close_in_fork() -> None:
    """A fork that outlives its parent for a moment must not keep the next run out."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_in_fork)

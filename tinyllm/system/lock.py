"""A lock on a folder: one process works in it, another is refused, and any death of the first releases it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from tinyllm.system.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_PATIENCE = 0.3
"""Seconds: a process that is being killed, or was just forked from one, still has its files."""

_held: set[int] = set()
"""The descriptors of this process's locks."""


class FolderLock:
    """Locks `folder` from `hold` to `release`; where the system has no such locks, nothing is locked.

    The kernel releases it when this process ends, in whatever way. Forks do not hold it.
    """

    def __init__(self, folder: Path, doing: str = "trains") -> None:
        """doing: what the process does that has the lock, for whoever is refused."""
        self.path = folder / LOCK_FILE
        self.doing = doing
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
            self._lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"{self.path.parent}: process {self._owner()} {self.doing} in this folder; wait until it has "
                    "ended, or give another --out"
                ) from None
            return  # a file system without locks
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _owner(self) -> str:
        """The number of the process that has the lock, as far as it could be written."""
        try:
            return self.path.read_text(encoding="ascii")[:20].strip() or "unknown"
        except (OSError, ValueError):
            return "unknown"

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

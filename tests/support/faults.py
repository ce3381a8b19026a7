"""Faults for tests of what is written to disk: an error, half a write, or a kill at any operation; damaged bytes."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tinyllm.system import storage

OPERATIONS = ("write_bytes", "flush_file", "flush_folder", "rename", "exchange", "link")
"""The functions of tinyllm.storage that change a disk."""
KINDS = ("error", "error afterwards", "no space", "kill", "kill afterwards")
"""What happens in their place. A write whose disk has no space, and one that is killed, has written half."""
KILLED = 77


class Faults:
    """Within `with Faults("rename", 3, "error"):` the third rename fails; `calls` counts them all."""

    def __init__(self, operation: str, number: int, kind: str) -> None:
        if operation not in OPERATIONS or kind not in KINDS:
            raise ValueError(f"{operation!r}, {kind!r}; expected one of {OPERATIONS} and one of {KINDS}")
        self.operation, self.number, self.kind = operation, number, kind
        self.calls = 0

    def __enter__(self) -> Faults:
        self._original: Callable[..., Any] = getattr(storage, self.operation)
        setattr(storage, self.operation, self._call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        setattr(storage, self.operation, self._original)

    def _call(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls != self.number:
            self._original(*arguments)
            return
        if self.kind.endswith("afterwards"):
            self._original(*arguments)
        elif self.operation == "write_bytes" and self.kind != "error":
            file, content = arguments
            self._original(file, content[: len(content) // 2])
        if self.kind.startswith("kill"):
            os._exit(KILLED)
        number = errno.ENOSPC if self.kind == "no space" else errno.EIO
        raise OSError(number, os.strerror(number))


def in_fork(work: Callable[[], object]) -> int:
    """Do `work` in a fork of this process, which a fault may kill; returns its exit code, 0 when it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads, which do nothing here
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def flips(content: bytes) -> Iterator[bytes]:
    """The content with each of its bits flipped, one at a time."""
    damaged = bytearray(content)
    for place in range(8 * len(content)):
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)
        damaged[place // 8] ^= 1 << place % 8


def truncations(content: bytes) -> Iterator[bytes]:
    """The content cut off before each of its bytes."""
    return (content[:length] for length in range(len(content)))

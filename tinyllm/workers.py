"""Worker threads that each run single-threaded matrix products.

NumPy releases the interpreter lock inside array functions, so one thread for each core keeps all cores busy in
every op, where one thread with a multi-threaded BLAS does so in matrix products alone.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import threadpoolctl

from tinyllm.memory import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def physical_cores() -> int:
    """How many physical cores this process may use; logical ones where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


class Workers:
    """`threads` threads, to be used as a context: `with Workers(2) as workers: workers.map(f, items)`.

    With one thread everything runs in the caller's thread and frames, as a debugger wants.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._limits: threadpoolctl.threadpool_limits | None = None

    def __enter__(self) -> Workers:
        keep_freed_memory()
        self._limits = threadpoolctl.threadpool_limits(1, user_api="blas")
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="tinyllm")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._limits is not None:
            self._limits.restore_original_limits()
            self._limits = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of each item, in the order of the items; each call sees the caller's context variables."""
        if self._pool is None:
            return map(function, items)
        futures = [self._pool.submit(contextvars.copy_context().run, function, item) for item in items]
        return (future.result() for future in futures)

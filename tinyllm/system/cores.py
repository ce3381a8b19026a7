"""How many cores there are, and how many threads an op and the matrix products inside it may use."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

_op_threads: contextvars.ContextVar[int] = contextvars.ContextVar("tinyllm_op_threads", default=0)


@functools.cache
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


@functools.cache
def _libraries() -> Any:
    import threadpoolctl  # late, as below, so that importing tinyllm stays fast

    return threadpoolctl.ThreadpoolController()


@contextlib.contextmanager
def threads_allowed(threads: int) -> Iterator[None]:
    """Within this context, ops use at most so many threads here, and in the whole process so do matrix products.

    1 is for work that is spread over the cores further out, and for a debugger.
    """
    token = _op_threads.set(threads)
    try:
        with _libraries().limit(limits=threads, user_api="blas"):
            yield
    finally:
        _op_threads.reset(token)


def cores_allowed() -> int:
    """How many threads an op may use here."""
    return min(_op_threads.get() or physical_cores(), physical_cores())


def each_on_a_core(function: Callable[[Item], None], items: Sequence[Item]) -> None:
    """`function` of each item, in threads where there are several items and cores, and `threads_allowed` allows it.

    The calls must not depend on each other. Each has single-threaded matrix products.
    """
    threads = 1 if len(items) <= 1 else min(len(items), cores_allowed())
    if threads <= 1:
        for item in items:
            function(item)
        return
    from concurrent.futures import ThreadPoolExecutor

    with threads_allowed(1), ThreadPoolExecutor(threads, thread_name_prefix="tinyllm") as pool:
        # Each call runs in a copy of this context, so that modes hold there too.
        calls = [pool.submit(contextvars.copy_context().run, function, item) for item in items]
        for call in calls:
            call.result()

"""A team of workers that run the same task, one on each core: this process and forks of it, or threads.

Each worker has single-threaded matrix products. So all cores are busy in every op, where one thread with
multi-threaded products keeps them busy in the products alone. Forked processes scale better than threads, which wait
for the interpreter lock between ops: handing it to a thread on a sleeping core takes longer than a small op.
"""

from __future__ import annotations

import contextlib
import contextvars
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from tinyllm.autograd.observer import observers
from tinyllm.backend import HostArray
from tinyllm.nn import Module
from tinyllm.system.allocator import keep_freed_memory
from tinyllm.system.cores import physical_cores, threads_allowed
from tinyllm.system.errors import WorkerEndedError
from tinyllm.system.interrupts import STOPPING

Task = Callable[..., Any]
"""Called as task(rank, *arguments)."""
_WATCH_SECONDS = 0.002
_ALIGNMENT = 64  # a cache line, so that no two arrays share one


def can_fork() -> bool:
    """Whether forks are safe here beside the threads of the numerical libraries, and this process may make them."""
    return (
        sys.platform.startswith("linux")
        and hasattr(os, "fork")
        and not multiprocessing.current_process().daemon
    )


def is_watched(model: Module) -> bool:
    """Whether something in this process wants to see what the model computes: an observer, or a hook of a module."""
    modules = [module for _, module in model.named_modules()]
    return bool(observers()) or any(m._forward_hooks or m._backward_hooks for m in modules)


class Team:
    """`size` workers for the given tasks, to be used as a context: `with Team(2, [f]) as team: team.run(f, x)`.

    Rank 0 is the caller itself, in its own thread and frames; with size 1 there is no other, as a debugger wants.

    With `processes`, the other ranks are forks made on entering the context. They have a copy of everything as it was
    then, and see later changes only in arrays that were put into shared memory (`share`). Otherwise they are threads.

    Args:
        size: how many workers. tasks: the functions that `run` can be asked for; each takes the rank first.
        processes: whether to fork; where the system has no safe forks, threads are taken.
    """

    def __init__(self, size: int, tasks: Sequence[Task], processes: bool = True) -> None:
        self.size = size
        self.tasks = list(tasks)
        self.processes = processes and size > 1 and can_fork()
        self._context = contextlib.ExitStack()
        self._pool: ThreadPoolExecutor | None = None
        self._forks: list[tuple[Any, Connection]] = []
        self._runs = 0
        self._entered = False

    def __enter__(self) -> Team:
        keep_freed_memory()
        self._entered = True
        self._context.enter_context(threads_allowed(1))
        try:
            if self.processes:
                for rank in range(1, self.size):
                    self._fork(rank)
            elif self.size > 1:
                self._pool = ThreadPoolExecutor(self.size - 1, thread_name_prefix="tinyllm")
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._entered = False
        for process, connection in self._forks:
            with contextlib.suppress(OSError):  # it is gone
                connection.send(None)  # ends its loop, unless it is in the middle of a task
            connection.close()
            if error is not None:
                process.kill()
        for process, _ in self._forks:
            process.join()
        self._forks = []
        self._context.close()

    def run(self, task: Task, *arguments: Any) -> list[Any]:
        """task(rank, *arguments) on every rank; returns the results by rank.

        Raises the error of the lowest rank that failed, when all have ended. Raises RuntimeError when a process is
        gone.
        """
        number = self.tasks.index(task)
        if not self._entered:
            raise RuntimeError("the team is not running; use it within `with`")
        if self._pool is not None:
            calls = [
                self._pool.submit(contextvars.copy_context().run, task, rank, *arguments)
                for rank in range(1, self.size)
            ]
            mine = _outcome(task, 0, arguments)
            outcomes = [mine, *(_outcome(lambda _, call=call: call.result(), 0, ()) for call in calls)]
        else:
            self._runs += 1
            for _, connection in self._forks:
                with contextlib.suppress(OSError):  # it is gone, which is seen when its answer is missing
                    connection.send((self._runs, number, arguments))
            outcomes = [_outcome(task, 0, arguments)]
            outcomes += [self._answer(rank) for rank in range(1, len(self._forks) + 1)]
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def _fork(self, rank: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(rank, theirs, [ours, *(c for _, c in self._forks)]), daemon=True
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. These are the threads of BLAS, which has a handler for forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        self._forks.append((process, ours))

    def _serve(self, rank: int, connection: Connection, of_the_parent: list[Connection]) -> None:
        """The life of a forked process: tasks until the connection ends."""
        for other in of_the_parent:
            other.close()  # or this process would not see that the parent is gone
        # They may reach all processes; the parent decides what they mean.
        for number in (signal.SIGINT, *STOPPING):
            signal.signal(number, signal.SIG_IGN)
        sys.breakpointhook = _no_breakpoint
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._wait(connection)
                message = connection.recv()
                if message is None:
                    return
                run, number, arguments = message
                try:
                    outcome = _outcome(self.tasks[number], rank, arguments)
                except BaseException as error:  # SystemExit, for one, would end the process without an answer
                    outcome = None, error
                connection.send((run, _sendable(outcome)))

    def _wait(self, connection: Connection) -> None:
        """Watch for a message for a short while, because waking a sleeping core takes longer than a small task."""
        deadline = time.perf_counter() + (_WATCH_SECONDS if self.size <= physical_cores() else 0)
        while time.perf_counter() < deadline and not connection.poll():
            pass

    def _answer(self, rank: int) -> tuple[Any, BaseException | None]:
        process, connection = self._forks[rank - 1]
        try:
            answered, outcome = 0, (None, None)
            while answered < self._runs:  # an interrupt may have left answers to earlier runs
                self._wait(connection)
                answered, outcome = connection.recv()
        except (EOFError, OSError):
            process.join(timeout=1)
            return None, WorkerEndedError(
                f"worker process {rank} has ended with exit code {process.exitcode} (negative: the signal that killed "
                "it; -9 is often the system, out of memory); use fewer threads or a smaller batch"
            )
        return outcome


def _outcome(task: Task, rank: int, arguments: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """What a task returned, or the error that it raised. Interrupts pass."""
    try:
        return task(rank, *arguments), None
    except Exception as error:
        return None, error


def _sendable(outcome: tuple[Any, BaseException | None]) -> tuple[Any, BaseException | None]:
    """An outcome that survives the way to another process, with the traceback of the error in its notes."""
    error = outcome[1]
    if error is None:
        try:
            pickle.dumps(outcome)
        except Exception as reason:
            kind = type(outcome[0]).__name__
            return None, TypeError(
                f"a task in a worker process returned {kind}, which cannot be sent: {reason}"
            )
        return outcome
    lines = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process; with threads=1 a debugger sees it.\n{lines}")
    return None, error


def _no_breakpoint(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("breakpoint() in a worker process, which has no terminal; use --threads 1")


class _SharedMemory(mmap.mmap):
    """Anonymous memory that forks share, told apart from mapped files."""


def share(arrays: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """Copies of the arrays in memory that this process shares with those that it forks from now on."""
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()], dtype=int)
    memory = _SharedMemory(-1, max(1, int(ends[-1]) if len(ends) else 0))
    shared = {}
    for (name, array), end in zip(arrays.items(), ends, strict=True):
        begin = int(end) - -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        copy = np.frombuffer(memory, array.dtype, array.size, begin).reshape(array.shape)
        copy[...] = array
        shared[name] = copy
    return shared


def is_shared(array: HostArray) -> bool:
    """Whether `share` made this array."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, _SharedMemory)

"""Spreading work over processes. NumPy leaves the interpreter lock for long operations only, and work on text is
many short ones, so threads would wait for each other."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from tinyllm.system.allocator import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

# How many items may be ahead of the one that is wanted next, for each process.
_AHEAD = 4


class _Helper:
    """A Python process that applies one function to what it is sent."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", "from tinyllm.system.processes import serve; serve()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        for pipe in (self._process.stdin, self._process.stdout):
            _enlarge(pipe)
        self._send(function)

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def __call__(self, item: Any) -> Any:
        assert self._process.stdout is not None
        self._send(item)
        failed, value = pickle.load(self._process.stdout)
        if failed:
            raise value
        return value

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not flushed has no reader
                    pipe.close()


def _enlarge(pipe: Any) -> None:
    """Let a pipe hold a megabyte, where the system can: each time that it is full or empty costs a wake-up."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


def serve() -> None:
    """What a helper does: read a function, then answer each item with (False, result) or (True, exception)."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its helpers
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    try:
        function = pickle.load(requests)
        while True:
            item = pickle.load(requests)
            try:
                answer = (False, function(item))
            except Exception as error:
                answer = (True, error)
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (
        EOFError,
        BrokenPipeError,
        pickle.UnpicklingError,
    ):  # the parent has ended, in the middle of an item even
        return


class _Work:
    """Items that several threads take in turn, with results that are given back in order."""

    def __init__(self, items: Iterable[Any], limit: int) -> None:
        self._items = iter(items)
        self._limit = limit
        self._changed = threading.Condition()
        self._results: dict[int, Any] = {}
        self._taken = 0
        self._given = 0
        self._last: int | None = None  # the number of items, once it is known
        self._error: BaseException | None = None

    def take(self, wait: bool) -> tuple[int, Any] | None:
        """The next item and its number; None when there is none, or when it would have to be waited for."""
        with self._changed:
            while wait and self._taken - self._given >= self._limit and not self._over:
                self._changed.wait()
            if self._over or self._taken - self._given >= self._limit:
                return None
            try:
                item = next(self._items)
            except StopIteration:
                self._last = self._taken
                self._changed.notify_all()
                return None
            except BaseException as error:
                self._fail(error)
                return None
            self._taken += 1
            return self._taken - 1, item

    @property
    def _over(self) -> bool:
        return self._last is not None or self._error is not None

    def put(self, number: int, result: Any) -> None:
        with self._changed:
            self._results[number] = result
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the work; whoever waits for a result gets `error`."""
        with self._changed:
            self._fail(error)

    def ready(self, wait: bool) -> Iterator[Any]:
        """The results that are next in order; waits for one if asked to, and if any is to come."""
        with self._changed:
            while (
                wait
                and self._given not in self._results
                and self._error is None
                and self._given < self._taken
            ):
                self._changed.wait()
            if self._error is not None:
                raise self._error
            found = []
            while self._given in self._results:
                found.append(self._results.pop(self._given))
                self._given += 1
            self._changed.notify_all()
        return iter(found)

    @property
    def done(self) -> bool:
        return self._last is not None and self._given == self._last


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """function(item) for each of the items, in order, with `workers` processes, of which this is one.

    Function, items and results are sent by pickle. At most a few items more than asked for are taken ahead.
    """
    if workers <= 1 or not sys.executable:
        yield from map(function, items)
        return
    work = _Work(items, _AHEAD * workers)
    helpers: list[_Helper] = []

    def feed() -> None:
        helper = None
        try:
            helper = _Helper(function)
            helpers.append(helper)
            while (taken := work.take(wait=True)) is not None:
                work.put(taken[0], helper(taken[1]))
        except BaseException as error:
            work.fail(error)
        finally:
            if helper is not None:
                helper.stop()

    threads = [threading.Thread(target=feed, daemon=True) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    try:
        while not work.done:
            taken = work.take(wait=False)
            if taken is not None:
                work.put(taken[0], function(taken[1]))
            yield from work.ready(wait=taken is None)
    finally:
        work.fail(GeneratorExit())
        for helper in helpers:
            helper.kill()  # its thread may be waiting for an answer
        for thread in threads:
            thread.join()

"""Ctrl-C, SIGTERM and SIGHUP: put off while a step or a save must not be cut, and at once when asked twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")

STOPPING = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""What ends a process politely: SIGTERM, and SIGHUP when a terminal or a connection is closed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the machine, or whoever manages it, wants this process to end."""


class HurriedInterrupt(KeyboardInterrupt):
    """A second signal, which may come in the middle of a step: nothing is saved any more."""


def is_termination(stop: KeyboardInterrupt) -> bool:
    """Whether SIGTERM or SIGHUP is behind it, and not Ctrl-C."""
    return isinstance(stop, Terminated) or isinstance(stop.__cause__, Terminated)


class Interrupts:
    """Turns Ctrl-C into KeyboardInterrupt, SIGTERM and SIGHUP into Terminated, to be used as a context.

    The first signal is said on standard error, and waits for the end of `put_off`, but for what is `droppable`; a
    second one raises HurriedInterrupt at once, wherever. Outside the main thread, which alone handles signals, nothing
    changes. SIGTERM and SIGHUP are left to whoever has taken them already, or ignores them, as nohup does.
    """

    def __init__(self, saves: bool = False) -> None:
        """`saves`: whether the first signal lets work be saved, which is said."""
        self.saves = saves
        self._previous: dict[int, Any] = {}
        self._received = 0
        self._depth = 0
        self._waiting: KeyboardInterrupt | None = None
        self._under_way = ("", 0.0)

    def __enter__(self) -> Interrupts:
        self._received, self._depth = 0, 0
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._receive)
            for number in STOPPING:
                if signal.getsignal(number) == signal.SIG_DFL:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._waiting = None

    @contextlib.contextmanager
    def put_off(self, what: str = "what is under way", seconds: float = 0.0) -> Iterator[None]:
        """Raise a first signal that comes within this context at its end.

        what, seconds: what is waited for, and about how long it takes, as is said to whoever sends the signal.
        """
        self._under_way = what, time.monotonic() + seconds
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if not self._depth:
            self.look()

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """Within `put_off`: what nothing is lost of when it is cut, so that a first signal is raised at once."""
        depth = self._depth
        try:
            self._depth = 0
            self.look()
            yield
        finally:
            self._depth = depth

    def look(self) -> None:
        """Raise a signal that waits; it may wait in other threads, and where Python has swallowed what was raised."""
        if self._waiting is not None:
            raise self._waiting

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with a look before each."""
        for item in items:
            self.look()
            yield item

    def _receive(self, number: int, frame: object) -> None:
        self._received += 1
        error = Terminated() if number in STOPPING else KeyboardInterrupt()
        if self._received > 1:
            raise HurriedInterrupt from error
        self._waiting = error
        self._say()
        if not self._depth:
            raise error

    def _say(self) -> None:
        what, end = self._under_way
        left = end - time.monotonic()
        about = f", about {left:.0f} s" if left >= 1 else ""
        when = f"after {what}{about}" if self._depth else "at once"
        then = (
            ", and saving; again to quit without saving" if self.saves else "; again to quit without waiting"
        )
        say_from_handler(f"stopping {when}{then}")


def say_from_handler(line: str) -> None:
    """Write a line to standard error from a signal handler, which may have come amid a write to `sys.stderr`."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, it is closed, or no file
        terminal = sys.stderr.isatty()
        # Below a progress bar and the ^C that the terminal shows.
        os.write(sys.stderr.fileno(), f"{os.linesep * terminal}{line}{os.linesep}".encode())

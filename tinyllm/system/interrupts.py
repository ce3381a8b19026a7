"""Ctrl-C, SIGTERM and SIGHUP: put off while a step or a save must not be cut, and at once when asked twice."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

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

    The first signal waits for the end of `put_off`; a second one raises HurriedInterrupt at once, wherever. Outside
    the main thread, which alone handles signals, nothing changes. SIGTERM and SIGHUP are left to whoever has taken them
    already, or ignores them, as nohup does.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._received = 0
        self._depth = 0
        self._waiting: KeyboardInterrupt | None = None

    def __enter__(self) -> Interrupts:
        self._received, self._waiting = 0, None
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

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Raise a first signal that comes within this context at its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._waiting is not None and not self._depth:
            error, self._waiting = self._waiting, None
            raise error

    def _receive(self, number: int, frame: object) -> None:
        self._received += 1
        error = Terminated() if number in STOPPING else KeyboardInterrupt()
        if self._received > 1:
            raise HurriedInterrupt from error
        if not self._depth:
            raise error
        self._waiting = error

"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO


def print_status(line: str, stream: TextIO | None = None) -> None:
    """Print a line on standard error; where nobody can read it (a full disk, a reader that has left), work goes on."""
    stream = sys.stderr if stream is None else stream
    if stream is not None:  # pythonw has none
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            print(line, file=stream, flush=True)


def duration(seconds: float) -> str:
    """A time span as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at a stream; False where there is none, or it is closed."""
    return stream is not None and not stream.closed and stream.isatty()


class Bar:
    """Shows how much of a long work is done: `with Bar("merging", 32512, "merges") as bar: bar(1)`.

    With a total it says the mean rate and the time left: "merging: 9,784 of 16,127 merges, 980 merges/s, 0:06 left".

    Args:
        total: None where it is not known. unit: of bytes "B", which are shown as MB (1e6 B). stream: where to show it;
            standard error by default. seconds: without a terminal, the time between two lines; work that is done before
            shows none. done: how much of the total was done before, which is no part of the rate.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        stream: TextIO | None = None,
        seconds: float = 10.0,
        done: int = 0,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.seconds = seconds
        self._stream = sys.stderr if stream is None else stream
        self._done = self._before = done
        self._begun = self._last_shown = time.monotonic()
        self._bar: Any = None
        if is_terminal(self._stream):
            from tqdm import tqdm  # slow to import

            self._bar = tqdm(
                total=total,
                initial=done,
                bar_format=f"{label}: " + "|{bar:20}| " * (total is not None) + "{desc}",
                desc=self._state(),
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def __call__(self, amount: int) -> None:
        """So much more is done."""
        self._done += amount
        if self._bar is not None:
            self._bar.set_description_str(self._state(), refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last_shown > self.seconds:
            self._last_shown = time.monotonic()
            print_status(f"{self.label}: {self._state()}", self._stream)

    def _state(self) -> str:
        """How much is done; where the total is known, how fast and for how long still."""
        scale, unit, digits = (1e6, "MB", 1) if self.unit == "B" else (1, self.unit, 0)
        if self.total is None:
            return f"{self._done / scale:,.{digits}f} {unit}"
        whole_numbers = digits if self.total < 100 * scale else 0
        done, total = (f"{amount / scale:,.{whole_numbers}f}" for amount in (self._done, self.total))
        rate = (self._done - self._before) / max(time.monotonic() - self._begun, 1e-9)
        if not rate:
            return f"{done} of {total} {unit}"
        left = duration(max(self.total - self._done, 0) / rate)
        return f"{done} of {total} {unit}, {rate / scale:,.{digits}f} {unit}/s, {left} left"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

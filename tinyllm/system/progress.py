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


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at a stream; False where there is none, or it is closed."""
    return stream is not None and not stream.closed and stream.isatty()


class Bar:
    """Shows how much of a long work is done: `with Bar("merging", 32512, "merges") as bar: bar(1)`.

    Args:
        total: None where it is not known. stream: where to show it; standard error by default.
        seconds: without a terminal, the time between two lines; work that is done before shows none.
    """

    def __init__(
        self, label: str, total: int | None, unit: str, stream: TextIO | None = None, seconds: float = 10.0
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.seconds = seconds
        self._stream = sys.stderr if stream is None else stream
        self._done = 0
        self._last_shown = time.monotonic()
        self._bar: Any = None
        if is_terminal(self._stream):
            from tqdm import tqdm  # slow to import

            self._bar = tqdm(
                total=total,
                desc=label,
                unit=f" {unit}",
                unit_scale=True,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def __call__(self, amount: int) -> None:
        """So much more is done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() - self._last_shown > self.seconds:
            self._last_shown = time.monotonic()
            of_total = f" of {self.total:,}" if self.total is not None else ""
            print_status(f"{self.label}: {self._done:,}{of_total} {self.unit}", self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

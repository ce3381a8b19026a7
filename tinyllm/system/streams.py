"""Standard output and error as they may be: closed, missing, of few characters, full, or with no reader left."""

from __future__ import annotations

import contextlib
import os
import sys


def mend_standard_streams() -> None:
    """Make `sys.stdout` and `sys.stderr` streams that take any text; what cannot be shown is written as Python does.

    Where a process is started without one of its streams it is None (pythonw has none), and the next file to be opened
    would get its number, so that what a library writes there would go into a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's has not
            unicode = stream.encoding.lower().replace("-", "").startswith("utf")
            if not unicode or stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")


def flush_standard_streams() -> OSError | None:
    """Write what is left of the output, and return the error if that cannot be done; Python would complain on exit."""
    found = None
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError as error:
            found = error if stream is sys.stdout else found
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return found

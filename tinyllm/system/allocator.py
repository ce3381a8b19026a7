"""Keeping freed memory in the process, so that the arrays of each step need no fresh pages."""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGEST = 1 << 30
"""Blocks below this many bytes are kept; glibc's limit on the parameter is below 2**31."""


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library's allocator to keep what is freed for the next array; returns whether it could be told.

    By default glibc gives every block of more than some 100 kB back to the system when it is freed, and each new
    one costs a page fault for every 4 kB: a quarter of a training step of small arrays.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    # One arena for all threads: what one has freed, the next can use.
    settings = ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, LARGEST), (M_ARENA_MAX, 1))
    return all([mallopt(parameter, value) for parameter, value in settings])

"""How much memory this process may have: the machine's, or less where a container or a service is given less."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def memory_allowed(root: Path = Path("/")) -> int | None:
    """In bytes; None where the system does not tell. `root` is where its files are found."""
    found = list(_limits_of_groups(root))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in found if limit > 0), default=None)


def _limits_of_groups(root: Path) -> Iterator[int]:
    """The limits of this process's control group and of those around it, on Linux; of both versions of such groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        # Inside a container its own group is mounted as the outermost one, under whatever path it has outside.
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                yield int((mounted / part / name).read_text())


def memory_in_use(root: Path = Path("/")) -> int | None:
    """Bytes of this process and the processes that it has begun, what they share counted once; None where not told.

    That is the sum of proportional set sizes, on Linux.
    """
    parents: dict[int, int] = {}
    for status in (root / "proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # one that has ended meanwhile
            # The name before it, in brackets, may hold anything.
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    total = 0
    for process in family:
        with contextlib.suppress(OSError, ValueError):
            lines = (root / f"proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total or None

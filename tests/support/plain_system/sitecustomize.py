"""A system without symbolic links, other names of a file, forks and flushes of folders, for every process of the tests.

Python imports this by itself where the folder is on its path: `PYTHONPATH=tests/support/plain_system python -m pytest`.
"""

import errno
import os
from typing import Any


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


os.symlink = refuse
os.link = refuse
for name in ("fork", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)

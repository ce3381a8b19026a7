"""Where in a user's program and in a model an op came from."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType

from tinyllm.autograd.mode import module_stack
from tinyllm.nn.module import path_of

_PACKAGE = str(Path(__file__).resolve().parents[1])
_MODELS = str(Path(_PACKAGE) / "nn")


def source_line() -> str:
    """`file:line: code` of the innermost running frame outside the engine: the user's, or a module's of `nn`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_PACKAGE) or (
            filename.startswith(_MODELS) and frame.f_code.co_name == "forward"
        ):
            code = linecache.getline(filename, frame.f_lineno).strip()
            return f"{filename}:{frame.f_lineno}: {code}"
        frame = frame.f_back
    return "unknown"


def module_path() -> str:
    """The path of the module that is running, or "" outside any."""
    modules = module_stack.get()
    if not modules:
        return ""
    return path_of(modules) or type(modules[0]).__name__

"""What a person asks at a stop: which arrays are there, and what does this op compute."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.registry import REGISTRY, FusedOp
from tinyllm.autograd.tensor import Tensor
from tinyllm.debug.tracing import shape_text, table
from tinyllm.system.wording import require_known


def shapes(frame: FrameType | None = None) -> None:
    """Print the arrays of a frame and of its `self`: shape, dtype, least, greatest, norm, and how many are not finite.

    frame: the caller's, if None. In pdb, `import tinyllm.debug as d; d.shapes()` shows those of the frame that it
    stopped in; in a .pdbrc, `alias shapes import tinyllm.debug as d; d.shapes()` makes a command of it.
    """
    frame = sys._getframe(1) if frame is None else frame
    names = dict(frame.f_locals)
    owner = names.pop("self", None)
    names |= {f"self.{name}": value for name, value in getattr(owner, "__dict__", {}).items()}
    lines: list[tuple[str, ...]] = [("name", "shape", "dtype", "least", "greatest", "norm", "not finite")]
    lines += [row for name, value in names.items() if (row := _row(name, value)) is not None]
    print(table(lines, right=(3, 4, 5, 6)))


def _row(name: str, value: Any) -> tuple[str, ...] | None:
    """The line of one name; None for what is no array."""
    value = value.data if isinstance(value, Tensor) else value
    if not (backend.is_array(value) or isinstance(value, np.ndarray)):
        return None
    values = backend.to_numpy(value)
    finite = values[np.isfinite(values)] if values.dtype.kind in "fc" else values
    figures = (
        [f"{f(finite):.4g}" for f in (np.min, np.max)]
        if finite.size and values.dtype.kind != "c"
        else ["", ""]
    )
    norm = f"{np.linalg.norm(finite.astype(float)):.4g}" if values.dtype.kind in "f" else ""
    return (
        name,
        shape_text(values.shape),
        str(values.dtype),
        *figures,
        norm,
        f"{values.size - finite.size or ''}",
    )


def explain(name: str) -> None:
    """Print what the registered op `name` computes: its formula, backward, shapes and source, and where to stop in it.

    Raises InputError for a name that no op has, with the nearest.

    Example:
        >>> explain("negative")
        negative: -x. Shapes: x: (...) -> (...).
        <BLANKLINE>
        ...
    """
    require_known("op", name, REGISTRY)
    op = REGISTRY[name]
    print(f"{name}: {inspect.getdoc(op)}\n")
    if issubclass(op, FusedOp):
        function = op.composition.function
        print(
            f"Fused of several ops; their composition is {_place(function)}:\n\n{inspect.getsource(function)}"
        )
        print(f'Stop in the fused form with break_on("{name}.backward", fast=True).')
        return
    for method in (op.forward, op.backward):
        print(f"{_place(method)}\n{inspect.getsource(method)}")
    print(f'Stop here with break_on("{name}.forward") and break_on("{name}.backward").')
    if op.fast_form is not None:
        print(f"Training runs a fast form, {_place(op.fast_form.backward)}: {inspect.getdoc(op.fast_form)}")


def _place(function: Any) -> str:
    """File and line of a function, from the package on."""
    code = inspect.unwrap(function).__code__
    parts = Path(code.co_filename).parts
    at = len(parts) - 1 - parts[::-1].index("tinyllm") if "tinyllm" in parts else 0
    return f"{'/'.join(parts[at:])}:{code.co_firstlineno}"

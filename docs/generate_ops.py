"""Write docs/ops.md: every registered op with its formula, shapes, source, lines, breakpoint, and fast form.

python docs/generate_ops.py
"""

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from tinyllm import ops
from tinyllm.autograd.registry import REGISTRY, FusedOp
from tinyllm.autograd.tensor import Op

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "ops.md"
GAINS = ROOT / "docs" / "fast_forms.json"
HEAD = """# The ops

Written by `docs/generate_ops.py` from the docstrings; the gains are measured by `benchmarks/speed/fast_forms.py`
(forward and backward at the sizes of the char preset, one thread, time by formula / time of the fast form).

Training runs fast forms. `with tinyllm.use_formulas():`, every breakpoint and `debug.trace` run the formulas.
`debug.break_on("NAME.forward")` and `debug.break_on("NAME.backward")` stop in an op, `debug.explain("NAME")` prints it.

| op | formula | where | lines, forward and backward | fast form | gain |
|---|---|---|---|---|---|
"""


def lines(method: Any) -> int:
    """The lines of a method's body without its docstring."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    assert body[-1].end_lineno is not None
    return body[-1].end_lineno - body[0].lineno + 1


def place(thing: Any) -> str:
    """`file:line` of a class or function, from the package on."""
    path = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(ROOT)
    return f"`{path.as_posix()}:{inspect.getsourcelines(thing)[1]}`"


def row(name: str, op: type[Op], gains: dict[str, float]) -> str:
    """One op's line of the table."""
    text = re.sub(r"\s+", " ", inspect.getdoc(op) or "").replace("|", "\\|")
    fast: Any = op if issubclass(op, FusedOp) else op.fast_form
    if issubclass(op, FusedOp):
        where, size = f"composition: {place(op.composition.function)}", ""
    else:
        where, size = place(op), f"{lines(op.forward)}, {lines(op.backward)}"
    gain = f"{gains[name]:.1f}" if name in gains else ""
    return f"| `{name}` | {text} | {where} | {size} | {place(fast) if fast else ''} | {gain} |\n"


def document() -> str:
    """docs/ops.md as it must be."""
    gains = json.loads(GAINS.read_text(encoding="utf-8"))
    table = "".join(row(name, op, gains) for name, op in sorted(REGISTRY.items()))
    return f"{HEAD}{table}\n## Names and dtypes\n\n{inspect.getdoc(ops)}\n"


if __name__ == "__main__":
    import tinyllm  # noqa: F401 (registers the ops)

    DOCUMENT.write_text(document(), encoding="utf-8")

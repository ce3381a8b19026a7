"""Write the table of floors into docs/architecture.md, from the list that tests/test_layering.py holds.

python docs/generate_architecture.py
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.layering import ROOMS  # noqa: E402

DOCUMENT = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(<!-- floors: .*? -->\n).*?(<!-- end of floors -->)", re.DOTALL)


def floors() -> str:
    """The table: a row for each folder, the topmost first, with what lives there and in which modules."""
    rows = ["| folder | what lives there | in |", "|---|---|---|"]
    for room in reversed(ROOMS):
        folder = ROOT / "tinyllm" / room
        face = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        modules = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")]
        folders = [f"{path.parent.name}/" for path in folder.glob("*/__init__.py")]
        rows.append(f"| `{room}/` | {face.partition(chr(10))[0]} | {', '.join(sorted(modules + folders))} |")
    return "\n".join(rows) + "\n"


def document() -> str:
    """docs/architecture.md with the table as it must be."""
    table = floors()
    return BLOCK.sub(lambda found: found[1] + table + found[2], DOCUMENT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")

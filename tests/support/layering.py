"""The order of the package's folders, and a reader of who imports whom: for tests/test_layering.py and docs/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOMS = (
    "system", "backend", "autograd", "ops", "nn", "optim", "tokenizer", "data", "models", "parallel", "debug",
    "training", "testing", "cli",
)  # fmt: skip
"""The folders of tinyllm/, from the ground up: a module imports only from its own and from those before it."""
FRONT_DOOR = ("__init__.py", "__main__.py", "py.typed")
"""What else stands in tinyllm/. It may import every folder, and only cli imports it."""
OWNERS = {"cupy": "tinyllm.backend", "threadpoolctl": "tinyllm.system.cores"}
"""The only module, or folder of modules, that imports a library."""


@dataclass(frozen=True)
class Module:
    """A module of the package: its dotted name, its file and its syntax tree. A folder's is its `__init__`."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_face(self) -> bool:
        """Whether it is the `__init__` of a folder."""
        return self.path.name == "__init__.py"

    def imports(self) -> Iterator[str]:
        """The full names that are imported anywhere in it: at the top, in functions, for the type checker alone."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}, line {node.lineno}: write absolute imports"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_package(folder: Path) -> dict[str, Module]:
    """All modules below the folder of a package, by name."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return modules


def module_of(full_name: str, modules: dict[str, Module]) -> str | None:
    """The module that `a.b.c` is or is a name of; None outside the package."""
    while full_name and full_name not in modules:
        full_name = full_name.rpartition(".")[0]
    return full_name or None


def arrows(modules: dict[str, Module]) -> dict[str, set[str]]:
    """For each module, those that it imports from."""
    found: dict[str, set[str]] = {}
    for name, module in modules.items():
        targets = {module_of(full_name, modules) for full_name in module.imports()}
        found[name] = {target for target in targets if target is not None and target != name}
    return found


def floor(name: str) -> int:
    """How high a module stands: the index of its folder, above all of them for the front door."""
    room = name.split(".")[1] if "." in name else ""
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def upward(modules: dict[str, Module]) -> list[str]:
    """The imports that do not go down, as text."""
    wrong = []
    for source, targets in arrows(modules).items():
        for target in sorted(targets):
            same_room = source.split(".")[:2] == target.split(".")[:2]
            of_front_door = target == "tinyllm" and source.startswith("tinyllm.cli.")
            if not same_room and not of_front_door and floor(target) >= floor(source):
                wrong.append(f"{source} imports {target}")
    return wrong


def circles(modules: dict[str, Module]) -> list[list[str]]:
    """The groups of modules of which each imports each, through others or not (Tarjan, 1972)."""
    graph = arrows(modules)
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], index[target])
        if lowest[name] == index[name]:
            start = stack.index(name)
            group = stack[start:]
            del stack[start:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def foreign(modules: dict[str, Module]) -> list[str]:
    """The imports of a library by a module that does not own it, as text."""
    wrong = []
    for name, module in modules.items():
        for full_name in module.imports():
            owner = OWNERS.get(full_name.partition(".")[0])
            if owner is not None and name != owner and not name.startswith(f"{owner}."):
                wrong.append(f"{name} imports {full_name}; only {owner} may")
    return wrong


def offered(face: Module) -> dict[str, str]:
    """The names that a folder's `__init__` imports or defines -> the full name of what each is."""
    names = {}
    for node in face.tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = f"{face.name}.{node.name}()"
    return names


def hidden_modules(modules: dict[str, Module]) -> list[str]:
    """The modules that cannot be had by name, because their folder's face offers something else of that name."""
    return [
        f"{face.name}.{name}"
        for face in modules.values()
        if face.is_face
        for name, full_name in offered(face).items()
        if f"{face.name}.{name}" in modules and full_name != f"{face.name}.{name}"
    ]


def incomplete_faces(modules: dict[str, Module]) -> list[str]:
    """The folders whose `__init__` lacks a docstring or `__all__`."""
    return [
        face.name
        for face in modules.values()
        if face.is_face
        and not (
            ast.get_docstring(face.tree)
            and any(ast.unparse(node).startswith("__all__") for node in face.tree.body)
        )
    ]

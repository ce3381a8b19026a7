"""Imports go strictly downward in the ranks of the design."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyllm

PACKAGE = Path(tinyllm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from the lines above its own. Within a folder everything is one subject.
RANKS = (
    ("errors", "storage", "tracers"),
    ("kernels",),
    ("backend", "config", "cores", "files", "interrupts", "lock", "memory", "mode", "progress"),
    ("workers", "philox", "safetensors_reader"),
    ("tensor",),
    ("ops", "transforms"),
    ("nn", "optim", "stability", "tokenizer", "data"),
    ("decoder",),
    ("generate", "checkpoint", "inspection", "interop", "parallel", "debug", "testing", "profiler"),
    ("data_parallel",),
    ("device_steps",),
    (
        "tinyllm",
        "callbacks",
        "resuming",
        "train_config",
        "training_profile",
    ),  # the package itself gathers what is above
    ("incidents",),
    ("recovery",),
    ("train", "profile_report"),
    ("presets", "runs", "cli_tokenizer"),
    ("cli_profile", "cli_replay"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
SIBLINGS = {
    ("checkpoint", "interop"): "the native format is the ecosystem's format",
    ("testing", "generate"): "what holds for every model holds with a cache of keys and values too",
}
OWNERS = {"cupy": "backend", "threadpoolctl": "cores", "mpi4py": "parallel"}


def imports(node: ast.AST) -> Iterator[str]:
    """The full names of what is imported below `node`, except for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: write absolute imports"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def module_of(full_name: str) -> str:
    """The ranked module that tinyllm.x.y... belongs to: x, or the package where x is one of its names."""
    name = full_name.partition(".")[2].partition(".")[0]
    return name if name in RANK else "tinyllm"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_strictly_downward(path: Path) -> None:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    here = "tinyllm" if first == "__init__" else first
    assert here in RANK, f"{here} has no rank yet; give it one in this test, and in the design"
    for full_name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        top = full_name.partition(".")[0]
        assert OWNERS.get(top, here) == here, f"{here} imports {top}; only {OWNERS[top]} may"
        there = module_of(full_name) if top == "tinyllm" else here
        if there != here and (here, there) not in SIBLINGS:
            assert RANK[there] < RANK[here], f"{here} imports {full_name}, which does not stand below it"


def test_the_walk_finds_what_it_should() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from tinyllm.train import Trainer
def late():
    import cupy.cuda
    from tinyllm import checkpoint, __version__
"""
    found = list(imports(ast.parse(source)))
    assert found == ["typing.TYPE_CHECKING", "cupy.cuda", "tinyllm.checkpoint", "tinyllm.__version__"]
    assert [module_of(name) for name in found[2:]] == ["checkpoint", "tinyllm"]
    assert {path.name for path in FILES} >= {"tensor.py", "attention.py", "cli.py"}

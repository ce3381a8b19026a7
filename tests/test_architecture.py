"""What the documents say of the code is so: the table of folders, and every file and name that they mention."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/architecture.md", "CONTRIBUTING.md", "README.md")
MENTION = re.compile(r"\b((?:[\w.]+/)+[\w.]+\.(?:py|md|toml|png|cfg))(?:::([\w.]+))?")


def mentions(document: str) -> list[tuple[str, str]]:
    """(path, dotted name or "") of every file of this repository that a document names, outside of shell examples."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = [(path, name) for path, name in MENTION.findall(text) if not path.startswith("runs/")]
    assert found, f"{document} names no file"
    return found


def missing(path: str, name: str) -> str:
    """What is not there of a mention, "" if all is."""
    places = [ROOT / path, ROOT / "tinyllm" / path]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return f"no file {path}"
    body = ast.parse(file.read_text(encoding="utf-8")).body if name else []
    for part in name.split(".") if name else ():
        nodes = [n for n in body if part in defined(n)]
        if not nodes:
            return f"no {name} in {path}"
        body = getattr(nodes[0], "body", [])
    return ""


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_the_table_of_folders_is_up_to_date() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate_architecture.py"))
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert generator["document"]() == text, "run: python docs/generate_architecture.py"
    assert generator["floors"]() in text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_name_that_is_mentioned_exists(document: str) -> None:
    wrong = [missing(path, name) for path, name in mentions(document)]
    assert not any(wrong), list(filter(None, wrong))


def test_a_name_that_is_gone_is_seen() -> None:
    assert missing("optim/muon.py", "Muon.update") == missing("backend/current.py", "xp") == ""
    assert missing("optim/optimizers.py", "") == "no file optim/optimizers.py"
    assert missing("optim/muon.py", "Moun") == "no Moun in optim/muon.py"
    assert missing("optim/muon.py", "Muon.updated") == "no Muon.updated in optim/muon.py"
    assert ("training/trainer.py", "Trainer.fit") in mentions("docs/architecture.md")

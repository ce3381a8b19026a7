"""Imports go strictly downward and never in a circle; the folders are those of the design, each with a face."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import layering

import tinyllm

PACKAGE = Path(tinyllm.__file__).parent
MODULES = layering.read_package(PACKAGE)


def test_the_package_is_its_folders_and_a_front_door() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found == {*layering.ROOMS, *layering.FRONT_DOOR}


def test_imports_go_strictly_downward() -> None:
    assert not layering.upward(MODULES)


def test_there_is_no_circle() -> None:
    assert not layering.circles(MODULES)


def test_each_library_has_one_owner() -> None:
    assert not layering.foreign(MODULES)


def test_no_face_hides_a_module() -> None:
    assert not layering.hidden_modules(MODULES)


def test_every_face_says_what_it_is_and_offers() -> None:
    assert not layering.incomplete_faces(MODULES)


HEAVY = (
    "cupy",
    "hypothesis",
    "matplotlib",
    "multiprocessing",
    "regex",
    "safetensors",
    "threadpoolctl",
    "tqdm",
)


def test_the_front_door_opens_fast() -> None:
    program = f"import sys, tinyllm; sys.exit(', '.join({{*{HEAVY}}} & {{*sys.modules}}) or 0)"
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", program],
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"import tinyllm imports {done.stderr.splitlines()[-1]}"
        (line,) = [line for line in done.stderr.splitlines() if line.endswith("| tinyllm")]
        seconds.append(int(line.split("|")[1]) / 1e6)
    assert min(seconds) < 0.25, f"import tinyllm takes {seconds} s"


# ---- The checker itself, on copies of the package with one thing wrong -------------------------

TYPE_ONLY = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"
IN_FUNCTION = "\ndef late():\n    {}\n"


def changed(tmp_path: Path, file: str, addition: str) -> dict[str, layering.Module]:
    """The modules of a copy of the package with `addition` at the end of a file."""
    copy = tmp_path / "tinyllm"
    if not copy.exists():
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / file
    path.write_text(path.read_text(encoding="utf-8") + addition, encoding="utf-8")
    return layering.read_package(copy)


def without(tmp_path: Path, file: str, text: str) -> None:
    """Take lines, or a name, out of a file of the copy."""
    path = tmp_path / "tinyllm" / file
    before = path.read_text(encoding="utf-8")
    assert text in before
    path.write_text(before.replace(text, "" if text.endswith("\n") else "_"), encoding="utf-8")


@pytest.mark.parametrize("how", ["\n{}\n", TYPE_ONLY, IN_FUNCTION])
def test_an_arrow_turned_round_is_seen(tmp_path: Path, how: str) -> None:
    turned = how.format("from tinyllm.optim.clipping import clip_scale")
    changed(tmp_path, "autograd/tensor.py", turned)
    without(tmp_path, "optim/clipping.py", "from tinyllm.autograd.tensor import Tensor\n")
    modules = layering.read_package(tmp_path / "tinyllm")
    new = set(layering.upward(modules)) - set(layering.upward(MODULES))
    assert new == {"tinyllm.autograd.tensor imports tinyllm.optim.clipping"}


@pytest.mark.parametrize("how", ["\n{}\n", TYPE_ONLY, IN_FUNCTION])
def test_a_circle_inside_a_folder_is_seen(tmp_path: Path, how: str) -> None:
    modules = changed(tmp_path, "optim/optimizer.py", how.format("from tinyllm.optim.sgd import SGD"))
    assert layering.upward(modules) == layering.upward(MODULES)
    assert ["tinyllm.optim.optimizer", "tinyllm.optim.sgd"] in layering.circles(modules)
    assert ["tinyllm.optim.optimizer", "tinyllm.optim.sgd"] not in layering.circles(MODULES)


def test_a_circle_through_a_face_is_seen(tmp_path: Path) -> None:
    modules = changed(tmp_path, "optim/sgd.py", TYPE_ONLY.format("from tinyllm.optim import SGD"))
    assert ["tinyllm.optim", "tinyllm.optim.sgd"] in layering.circles(modules)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/norm.py", "import cupy.cuda"),
        ("parallel/team.py", "from threadpoolctl import threadpool_info"),
        ("system/lock.py", "import threadpoolctl"),
    ],
)
def test_a_library_in_the_wrong_hands_is_seen(tmp_path: Path, file: str, line: str) -> None:
    assert len(layering.foreign(changed(tmp_path, file, IN_FUNCTION.format(line)))) == 1


def test_what_a_face_lacks_or_hides_is_seen(tmp_path: Path) -> None:
    changed(tmp_path, "parallel/__init__.py", "\ndef team():\n    pass\n")
    changed(tmp_path, "optim/__init__.py", "\nfrom tinyllm.optim.muon import orthogonalise as sgd\n")
    without(tmp_path, "debug/__init__.py", "__all__")
    (tmp_path / "tinyllm/data/__init__.py").write_text("__all__: list[str] = []\n", encoding="utf-8")
    modules = layering.read_package(tmp_path / "tinyllm")
    hidden = set(layering.hidden_modules(modules)) - set(layering.hidden_modules(MODULES))
    assert hidden == {"tinyllm.parallel.team", "tinyllm.optim.sgd"}
    assert set(layering.incomplete_faces(modules)) >= {"tinyllm.debug", "tinyllm.data"}


def test_only_the_command_line_uses_the_front_door(tmp_path: Path) -> None:
    modules = changed(tmp_path, "testing/report.py", IN_FUNCTION.format("from tinyllm import Tensor"))
    assert "tinyllm.testing.report imports tinyllm" in layering.upward(modules)

"""Every numbered example runs: exit code 0, something printed, no warning and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
ARGUMENTS = {"05_train_characters": ("40",)}
"""What keeps an example short; the others take nothing."""


def test_there_are_examples_and_their_arguments_belong_to_them() -> None:
    assert EXAMPLES
    assert set(ARGUMENTS) <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        # Python's own warnings are errors here, so that none goes unseen.
        [sys.executable, "-W", "error", str(path), *ARGUMENTS.get(path.stem, ())],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stdout.splitlines()) >= 3

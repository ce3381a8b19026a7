"""The Python in README runs, and what it shows of a file stands there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
PROGRAM = (ROOT / "examples" / "09_written_for_torch.py").read_text(encoding="utf-8")
NOT_RUN = {
    "from transformers import": "needs transformers, and the run of the first command",
    "from tinyllm import Tensor, debug": "stops in a debugger; tests/debug runs such a session",
}


def test_there_are_blocks_and_those_left_out_are_there() -> None:
    assert len(BLOCKS) >= 5
    for line in NOT_RUN:
        assert sum(line in block for block in BLOCKS) == 1


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if not any(line in b for line in NOT_RUN)], ids=lambda b: b.split("\n")[0]
)
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"np": np, "__name__": "readme"}
    if "check_vjp" in block:  # of the reader's own function
        names["fn"] = lambda x, weight: x @ weight.T
        names["vjp"] = lambda c, x, weight: (c @ weight, c.T @ x)
        names["x"], names["weight"] = np.ones((2, 3)), np.ones((4, 3))
    short = block.replace("steps=200", "steps=12").replace("embedded_corpus()", "embedded_corpus()[:20000]")
    exec(compile(short, "README.md", "exec"), names)
    if "runs/python" in block:
        assert names["logits"].shape == (1, 4, names["tokenizer"].vocab_size)


def test_the_program_for_torch_is_the_one_that_is_tested() -> None:
    (block,) = [block for block in BLOCKS if "import tinyllm as torch" in block]
    imports, classes = block.split("\n\n\n", 1)
    assert imports in PROGRAM
    assert classes.strip() in PROGRAM

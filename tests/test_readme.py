"""The Python in README runs, and what it shows of a file stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
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
    names: dict[str, Any] = {"__name__": "readme"}
    short = block.replace("steps=200", "steps=12").replace("embedded_corpus()", "embedded_corpus()[:20000]")
    exec(compile(short, "README.md", "exec"), names)
    if "runs/python" in block:
        assert names["logits"].shape == (1, 4, names["tokenizer"].vocab_size)


def test_the_line_that_a_breakpoint_shows_stands_there() -> None:
    file, number, line = re.findall(r"^> (\S+)\((\d+)\)\w+\(\)\n-> (.*)$", README, re.MULTILINE)[0]
    assert (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip() == line


def test_the_program_for_torch_is_the_one_that_is_tested() -> None:
    (block,) = [block for block in BLOCKS if "import tinyllm as torch" in block]
    imports, classes = block.split("\n\n\n", 1)
    assert imports in PROGRAM
    assert classes.strip() in PROGRAM

"""Messages name commands as they were started."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllm.system.wording import command_line


def script_in(folder: Path) -> Path:
    """A console script as pip writes it, which says the command that it would print."""
    folder.mkdir(parents=True)
    script = folder / "tinyllm"
    root = Path(command_line.__code__.co_filename).parents[2]
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
        "from tinyllm.system.wording import command_line\nprint(command_line('train', '--out', 'a folder'))\n"
    )
    script.chmod(0o755)
    return script


def said(command: list[str], cwd: Path, path: str = "/usr/bin") -> str:
    """What the script prints when a shell starts it."""
    line = shlex.join(command)
    done = subprocess.run(
        ["sh", "-c", line], cwd=cwd, env={"PATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_script_is_named_as_it_was_typed(tmp_path: Path) -> None:
    script = script_in(tmp_path / ".venv/bin")
    assert said([".venv/bin/tinyllm"], tmp_path) == ".venv/bin/tinyllm train --out 'a folder'"
    assert said([str(script)], tmp_path) == f"{script} train --out 'a folder'"
    assert said(["tinyllm"], tmp_path, f"{script.parent}:/usr/bin") == "tinyllm train --out 'a folder'"


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (["/here/tinyllm/__main__.py", "train"], [".venv/bin/python", "-m", "tinyllm"]),
        (["/usr/bin/ipykernel_launcher.py", "-f", "x"], ["tinyllm"]),
        (["/there/other/__main__.py"], ["tinyllm"]),
        ([""], ["tinyllm"]),
        (["C/tinyllm.exe"], ["C/tinyllm.exe"]),
        (["my folder/tinyllm"], ["my folder/tinyllm"]),
    ],
)
def test_other_ways_to_start(
    started: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", started)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "whatever"])
    monkeypatch.setenv("PATH", "")
    assert shlex.split(command_line("sample", "run")) == [*expected, "sample", "run"]


def test_command_lines_are_one_line_that_bash_reads_back() -> None:
    words = ["\n\n", "a b", "it's", "\t'\\\r$x", "\x1b[0m1", "é\u200b", "<|end|>\n", "", "plain"]
    line = command_line("prepare", *words)
    assert line.isprintable()
    program = line[line.index("prepare") :].replace("prepare", "printf '%s\\0'", 1)
    done = subprocess.run(["bash", "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words

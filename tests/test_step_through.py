"""The guided session of examples/step_through.py, alone and driven through the real pdb."""

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tinyllm.autograd.registry import REGISTRY
from tinyllm.nn.attention import MultiHeadAttention

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "step_through.py"
# Queries and keys are rotated one after the other, so that RoPE stops twice.
LOOKS = (
    ("embedding.forward", "ops/lookup.py", ("p weight.shape", "p self.indices.tolist()", "n", "n")),
    ("blocks.0.attention", "nn/attention.py", ("p x.shape",)),
    ("rope.forward", "ops/rotary.py", ("p x.shape", "n", "n", "p self.cos.shape")),
    ("rope.forward", "ops/rotary.py", ("n",)),
    ("scores.forward", "ops/attention.py", ("p q.shape, k.shape", "n", "n", "p self.scale")),
    ("softmax.forward", "ops/softmaxes.py", (*("n",) * 5, "p self.p.sum(axis=-1).round(6).tolist()")),
    ("attention.forward", "ops/attention.py", ("p p.shape, v.shape", "n")),
    ("swiglu.forward", "ops/activation.py", ("p gate.shape, up.shape", "n")),
    ("cross_entropy.forward", "ops/loss.py", ("p z.shape", *("n",) * 6, "p self.p.shape")),
    ("cross_entropy.backward", "ops/loss.py", ("p gradient", *("n",) * 4, "p weight.shape")),
    ("swiglu.backward", "ops/activation.py", ("n", "p slope.shape")),
    ("attention.backward", "ops/attention.py", ("p gradient.shape", "n", "p gradient_p.shape")),
    ("softmax.backward", "ops/softmaxes.py", ("n", "p mean.shape")),
    ("scores.backward", "ops/attention.py", ("n", "n", "p gradient_k.shape")),
    ("rope.backward", "ops/rotary.py", ("p gradient.shape",)),
    ("rope.backward", "ops/rotary.py", ("p self.sin.shape",)),
    ("embedding.backward", "ops/lookup.py", ("p gradient.shape", "n", "n")),
)
"""Each stop with its file, and what is typed there."""
STOPS = tuple(stop for stop, _, _ in LOOKS)
FRAME = re.compile(r"^(?:\(Pdb\) )*[> ] ?(/[^(]+|[A-Z]:[^(]+)\((\d+)\)(\S+)\(\)", re.MULTILINE)


def session(*arguments: str, commands: tuple[str, ...] = ()) -> str:
    """What the example prints when these commands are typed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        input="".join(f"{command}\n" for command in commands),
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


def frames(text: str) -> list[tuple[str, str]]:
    """(file, function) of each line of a stack that pdb prints, outermost first."""
    return [(Path(file).resolve().as_posix(), function) for file, _, function in FRAME.findall(text)]


def ours(stack: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The frames of the package."""
    package = (ROOT / "tinyllm").as_posix()
    return [frame for frame in stack if frame[0].startswith(package)]


def first_line(stop: str) -> int:
    """The line of the first statement of the function that a stop names."""
    op, _, method = stop.rpartition(".")
    function = getattr(REGISTRY[op], method) if op in REGISTRY else MultiHeadAttention.forward
    source, begin = inspect.getsourcelines(function)
    definition = ast.parse(textwrap.dedent("".join(source))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    statements = definition.body[1 if ast.get_docstring(definition) is not None else 0 :]
    return begin + statements[0].lineno - 1


@pytest.fixture(scope="module")
def parts() -> dict[str, str]:
    """What pdb prints at each stop: where it is, and the arrays of the formula after a step or more."""
    commands = [command for _, _, typed in LOOKS for command in ("where", *typed, "c")]
    pieces = re.split(
        r"^(?:\(Pdb\) )?\n?==== (\S+)\n", session("--stop", commands=tuple(commands)), flags=re.MULTILINE
    )
    assert tuple(pieces[1::2]) == STOPS
    return dict(reversed(list(zip(pieces[1::2], pieces[2::2], strict=True))))  # of two, the first


@pytest.mark.parametrize(("stop", "file"), dict.fromkeys((stop, file) for stop, file, _ in LOOKS))
def test_pdb_stops_in_the_own_frame_of_the_op_and_steps_through_it(
    stop: str, file: str, parts: dict[str, str]
) -> None:
    function = stop.rpartition(".")[2] if stop.rpartition(".")[0] in REGISTRY else "forward"
    expected = ((ROOT / "tinyllm" / file).as_posix(), function)
    found = frames(parts[stop])
    assert found[0] == expected, "the stop itself"
    line = int(FRAME.findall(parts[stop])[0][1])
    assert line == first_line(stop)
    # The stack that `where` prints ends there too, and so does every line that `n` goes on to.
    stack = found[1 : found.index(expected, 1) + 1]
    assert stack[-1] == expected
    assert ours(stack)[-2][1] in ("propagate", "__call__"), "called by the engine itself, and by no wrapper"
    assert set(found[len(stack) + 1 :]) <= {expected, stack[-2]}


@pytest.mark.parametrize("stop", dict.fromkeys(stop for stop in STOPS if stop.endswith(".backward")))
def test_at_most_two_frames_lie_between_a_loss_and_the_backward_of_an_op(
    stop: str, parts: dict[str, str]
) -> None:
    first, *stack = frames(parts[stop])
    stack = stack[: stack.index(first) + 1]
    assert "-> loss.backward()" in parts[stop]
    assert [function for _, function in ours(stack)] == ["backward", "propagate", "backward"]
    calls = [position for position, (file, _) in enumerate(stack) if file == EXAMPLE.as_posix()]
    between = stack[calls[-1] + 1 : -1]
    assert len(between) <= 2


def test_the_names_are_those_of_the_formula(parts: dict[str, str]) -> None:
    T = 5
    weights = str([[[1.0] * T] * 2])
    expected = {
        "embedding.forward": ["(5, 8)", "[[4, 3, 0, 4, 2]]"],
        "blocks.0.attention": [f"(1, {T}, 8)"],
        "rope.forward": ["(1, 2, 5, 4)", "(5, 2)"],
        "scores.forward": ["((1, 2, 5, 4), (1, 2, 5, 4))", "0.5"],
        "softmax.forward": [weights],
        "attention.forward": ["((1, 2, 5, 5), (1, 2, 5, 4))"],
        "swiglu.forward": ["((1, 5, 16), (1, 5, 16))"],
        "cross_entropy.forward": ["(1, 5, 5)"],
        "cross_entropy.backward": ["array(1.)", "(1, 5, 1)"],
        "swiglu.backward": ["(1, 5, 16)"],
        "attention.backward": ["(1, 2, 5, 4)", "(1, 2, 5, 5)"],
        "softmax.backward": ["(1, 2, 5, 1)"],
        "scores.backward": ["(1, 2, 5, 4)"],
        "rope.backward": ["(1, 2, 5, 4)"],
        "embedding.backward": ["(1, 5, 8)"],
    }
    for stop, values in expected.items():
        printed = [
            line.removeprefix("(Pdb) ").replace("np.False_", "False") for line in parts[stop].splitlines()
        ]
        for value in values:
            assert value in printed, f"{value} is not printed at {stop}:\n{parts[stop]}"


@pytest.mark.parametrize("arguments", [("--no-stop",), ()], ids=["no-stop", "no terminal"])
def test_without_a_terminal_it_walks_through_the_same_stops(arguments: tuple[str, ...]) -> None:
    printed = session(*arguments)
    assert tuple(re.findall(r"^==== (\S+)$", printed, re.MULTILINE)) == STOPS
    assert len(re.findall(r"^stopped in \S+,", printed, re.MULTILINE)) == len(STOPS)
    backward = printed.split("==== scores.backward")[1].split("====")[0]
    for name in ("gradient", "self.q", "self.k"):
        assert re.search(rf"^{re.escape(name)}: shape \(1, 2, 5, [45]\)$", backward, re.MULTILINE)
    assert "the fast forms, which training runs, give the same gradient" in printed
    slope, gradient = re.search(r"of losses: (\S+), by backward: (\S+)$", printed, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert abs(float(slope) - float(gradient)) < 1e-7

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

from tinyllm.autograd.tensor import REGISTRY
from tinyllm.nn.attention import MultiHeadAttention

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "step_through.py"
STOPS = (
    "embedding.forward",
    "blocks.0.attention",
    "scaled_dot_product_attention.forward",
    "cross_entropy.forward",
    "cross_entropy.backward",
    "scaled_dot_product_attention.backward",
    "embedding.backward",
)
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
    looks = {
        "embedding.forward": ("p weight.shape", "p self.indices.tolist()", "n", "n"),
        "blocks.0.attention": ("p x.shape", "n", "n", "p q.shape"),
        "scaled_dot_product_attention.forward": ("p q.shape, k.shape, v.shape", "n", "n", "n", "p (B, H, T, K)"),
        "cross_entropy.forward": ("p logits.shape", "n", "n", "n", "n", "p z.shape"),
        "cross_entropy.backward": ("p gradient", "n", "p self.total.shape"),
        "scaled_dot_product_attention.backward": (
            "p self.p.shape", "p self.p.sum(axis=-1).round(6).tolist()", "n", "n", "p (B, H, T)",
        ),
        "embedding.backward": ("p gradient.shape", "n", "n", "p gradient_weight.any()"),
    }  # fmt: skip
    assert tuple(looks) == STOPS
    commands = [command for look in looks.values() for command in ("where", *look, "c")]
    pieces = re.split(
        r"^(?:\(Pdb\) )?\n?==== (\S+)\n", session("--stop", commands=tuple(commands)), flags=re.MULTILINE
    )
    assert tuple(pieces[1::2]) == STOPS
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.mark.parametrize(
    ("stop", "file", "function"),
    [
        ("embedding.forward", "ops/lookup.py", "forward"),
        ("blocks.0.attention", "nn/attention.py", "forward"),
        ("scaled_dot_product_attention.forward", "ops/attention.py", "forward"),
        ("cross_entropy.forward", "ops/loss.py", "forward"),
        ("cross_entropy.backward", "ops/loss.py", "backward"),
        ("scaled_dot_product_attention.backward", "ops/attention.py", "backward"),
        ("embedding.backward", "ops/lookup.py", "backward"),
    ],
)
def test_pdb_stops_in_the_own_frame_of_the_op_and_steps_through_it(
    stop: str, file: str, function: str, parts: dict[str, str]
) -> None:
    expected = ((ROOT / "tinyllm" / file).as_posix(), function)
    found = frames(parts[stop])
    assert found[0] == expected, "the stop itself"
    line = int(FRAME.findall(parts[stop])[0][1])
    assert line == first_line(stop)
    # The stack that `where` prints ends there too, and so does every line that `n` goes on to.
    stack = found[1 : found.index(expected, 1) + 1]
    assert stack[-1] == expected
    assert ours(stack)[-2][1] in ("propagate", "__call__"), "called by the engine itself, and by no wrapper"
    assert set(found[len(stack) + 1 :]) == {expected}


@pytest.mark.parametrize("stop", [stop for stop in STOPS if stop.endswith(".backward")])
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
    expected = {
        "embedding.forward": ["(5, 8)", "[[4, 3, 0, 4, 2]]"],
        "blocks.0.attention": [f"(1, {T}, 8)", f"(1, 2, {T}, 4)"],
        "scaled_dot_product_attention.forward": [
            "((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4))",
            "(1, 2, 5, 4)",
        ],
        "cross_entropy.forward": ["(1, 5, 5)", "(5, 5)"],
        "cross_entropy.backward": ["array(1.)", "(5, 1)"],
        "scaled_dot_product_attention.backward": ["(1, 2, 5, 5)", str([[[1.0] * T] * 2]), "(1, 2, 5)"],
        "embedding.backward": ["(1, 5, 8)", "False"],
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
    backward = printed.split("==== scaled_dot_product_attention.backward")[1].split("====")[0]
    for name in ("gradient", "self.q", "self.k", "self.v", "self.p"):
        assert re.search(rf"^{re.escape(name)}: shape \(1, 2, 5, [45]\)$", backward, re.MULTILINE)
    assert "the reference ops, which are made of primitives alone, give the same gradient" in printed
    slope, gradient = re.search(r"of losses: (\S+), by backward: (\S+)$", printed, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert abs(float(slope) - float(gradient)) < 1e-7

"""Breakpoints by name, anomalies, tables of what ran, and the text of a Tensor."""

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, gradients, no_grad, ops, use_formulas
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.registry import REGISTRY
from tinyllm.autograd.tensor import Op
from tinyllm.debug import AnomalyError, break_on, detect_anomaly, summary, trace
from tinyllm.debug.breakpoints import with_breakpoint
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Linear, Module, MultiHeadAttention
from tinyllm.ops.softmaxes import LogSoftmax, Softmax

CONFIG = ModelConfig(
    vocab_size=11, context_length=8, num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=16
)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9))
B, T = 2, 8


def small_model() -> TransformerLM:
    return TransformerLM(CONFIG, seed=0)


def loss_of(model: Module) -> Tensor:
    return ops.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:])


def vector(*values: float) -> Tensor:
    return Tensor(np.array(values, dtype=np.float64), requires_grad=True)


# ---- break_on ----------------------------------------------------------------------------------


class Stop:
    """What was to be seen in the frame in which `breakpoint()` was called."""

    def __init__(self, frame: FrameType) -> None:
        self.file, self.line = frame.f_code.co_filename, frame.f_lineno
        self.function, self.names = frame.f_code.co_qualname, dict(frame.f_locals)
        self.lines = {line for _, _, line in frame.f_code.co_lines() if line}
        owner = frame.f_locals.get("self")
        self.kept = dict(vars(owner)) if owner is not None else {}
        assert frame.f_back is not None
        self.caller = frame.f_back.f_code.co_name


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[Stop]:
    found: list[Stop] = []

    def hook() -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        found.append(Stop(frame.f_back))

    monkeypatch.setattr(sys, "breakpointhook", hook)
    return found


def lines_of(function: Any) -> set[int]:
    return {line for _, _, line in function.__code__.co_lines() if line}


def test_a_stop_is_in_the_own_frame_of_the_op_with_the_names_of_its_formula(stops: list[Stop]) -> None:
    original = Softmax.backward
    x = vector(1, 2, 3)
    y = ops.softmax(x)
    with break_on("softmax.backward"):
        assert not stops
        y.backward(np.array([1.0, 0.0, 0.0]))
    (stop,) = stops
    assert stop.file == inspect.getsourcefile(Softmax)
    assert stop.line == original.__code__.co_firstlineno, (
        "the line of def: the next one is the first statement"
    )
    assert stop.lines == lines_of(original), "every line is where the file has it"
    assert stop.function.endswith("backward")
    assert stop.caller == "propagate"
    assert np.array_equal(stop.kept["p"], y.data)
    assert stop.names["gradient"].tolist() == [1, 0, 0]
    expected = y.data * (np.array([1.0, 0, 0]) - y.data[0])
    assert np.allclose(x.grad, expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("softmax.forward", ["forward"]),
        ("softmax.backward", ["backward"]),
        ("softmax", ["forward", "backward"]),
    ],
)
def test_an_op_stops_in_the_named_methods(place: str, expected: list[str], stops: list[Stop]) -> None:
    with break_on(place):
        ops.softmax(vector(1, 2)).sum().backward()
    assert [stop.function.rpartition(".")[2] for stop in stops] == expected


def test_the_fast_form_is_stopped_in_when_asked_for(stops: list[Stop]) -> None:
    x, weight = vector(1, 2), vector(3, 4)
    with break_on("rms_norm.forward", fast=True):
        ops.rms_norm(x, weight)
    with break_on("rms_norm.forward"):
        ops.rms_norm(x, weight)
    assert [stop.function.split(".")[0] for stop in stops] == ["FastRootMeanSquareNorm", "RootMeanSquareNorm"]


def test_a_graph_that_was_made_fast_is_stopped_in_by_formula(stops: list[Stop]) -> None:
    y = ops.rms_norm(vector(1, 2), vector(3, 4))
    with break_on("rms_norm.backward"):
        y.sum().backward()
    assert [stop.function for stop in stops] == ["RootMeanSquareNorm.backward"]


def test_what_is_fused_names_its_composition() -> None:
    with (
        pytest.raises(
            ValueError, match=r"'rotary_heads' is fused .*tinyllm\.ops\.heads\.normalised_and_rotated"
        ),
        break_on("rotary_heads.forward"),
    ):
        pass


def test_several_places_and_one_place_twice(stops: list[Stop]) -> None:
    with break_on("softmax", "softmax.forward", "exp.forward"):
        ops.exp(ops.softmax(vector(1, 2)))
    assert len(stops) == 2


class Inheriting(Softmax):
    """An op that has its methods from another."""

    name = "inheriting"


def test_a_method_that_an_op_inherits_stops_in_that_op_alone(
    stops: list[Stop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "inheriting", Inheriting)
    with break_on("inheriting"):
        ops.softmax(Inheriting()(vector(1, 2))).sum().backward()
    assert len(stops) == 2
    assert not {"forward", "backward"} & set(vars(Inheriting))
    Inheriting()(vector(1, 2))
    assert len(stops) == 2


def test_nothing_stays_patched(stops: list[Stop]) -> None:
    model = small_model()
    before = dict(vars(Softmax)), dict(vars(LogSoftmax)), dict(vars(model.blocks[1].attention))
    with break_on("softmax", "log_softmax.backward", "blocks.1.attention"):
        assert dict(vars(Softmax)) != before[0]
        model(TOKENS[:, :4])
        assert "forward" in vars(model.blocks[1].attention)
    assert (dict(vars(Softmax)), dict(vars(LogSoftmax)), dict(vars(model.blocks[1].attention))) == before
    assert len(stops) == 1 + CONFIG.num_layers, "a module, and the softmax of each layer"
    model(TOKENS[:, :4])
    ops.softmax(vector(1))
    assert len(stops) == 1 + CONFIG.num_layers


def test_nothing_stays_patched_after_an_exception(stops: list[Stop]) -> None:
    model = small_model()
    before = dict(vars(Softmax)), dict(vars(model.blocks[0]))

    def fail() -> None:
        with break_on("softmax", "blocks.0"):
            model(TOKENS[:, :4])
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert (dict(vars(Softmax)), dict(vars(model.blocks[0]))) == before


def test_a_module_stops_by_its_path(stops: list[Stop]) -> None:
    model = small_model()
    with break_on("blocks.2.attention"):
        logits = model(TOKENS[:, :-1])
    (stop,) = stops
    assert stop.file == inspect.getsourcefile(MultiHeadAttention)
    assert stop.lines == lines_of(MultiHeadAttention.forward)
    assert stop.names["self"] is model.blocks[2].attention
    assert stop.names["x"].shape == (B, T, 16)
    with use_formulas():
        assert np.array_equal(logits.data, model(TOKENS[:, :-1]).data)


def test_a_module_may_be_named_twice_and_called_again(stops: list[Stop]) -> None:
    model = small_model()
    with break_on("blocks.0", "blocks.0", "norm"):
        model(TOKENS[:, :4])
        model(TOKENS[:, :4])
    assert len(stops) == 4


def test_the_forward_that_somebody_gave_one_module_is_stopped_in_and_stays(stops: list[Stop]) -> None:
    model = small_model()

    def instead(x: Tensor) -> Tensor:
        return x * 2

    model.norm.forward = instead  # type: ignore[method-assign]
    with break_on("norm"):
        model(TOKENS[:, :4])
    (stop,) = stops
    assert stop.function.endswith("instead")
    assert model.norm.forward is instead


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "softmax.backwards",
            "op 'softmax' has no method 'backwards'; there are: forward, backward",
        ),
        ("exp.reference", "op 'exp' has no method 'reference'; there are: forward, backward$"),
    ],
)
def test_an_unknown_method_of_an_op_is_an_error_at_once(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), break_on(place):
        pass


@pytest.mark.parametrize(
    ("place", "near"), [("blocks.0.atention", "blocks.0.attention"), ("sotfmax", "softmax")]
)
def test_an_unknown_place_is_an_error_that_names_the_near_miss(
    place: str, near: str, stops: list[Stop]
) -> None:
    model = small_model()
    with (
        pytest.raises(ValueError, match=f"no module of this TransformerLM; did you mean '{near}'"),
        break_on(place),
    ):
        model(TOKENS[:, :4])
    assert not stops
    model(TOKENS[:, :4])


def captured(value: int) -> Any:
    class Base:
        def f(self, x: int) -> int:
            return x + value

    class Derived(Base):
        def __init__(self) -> None:
            self.__hidden = 1000

        def f(self, x: int, *, scale: int = 10) -> int:
            """With super(), a closure, a private name, a default, and a string with a line at column zero."""
            text = """
no indentation"""
            return super().f(x) * scale + len(text) * 0 + value + self.__hidden

    return Derived


def test_functions_with_closures_super_and_private_names_keep_their_meaning(stops: list[Stop]) -> None:
    cls = captured(5)
    copy = with_breakpoint(cls.f)
    assert copy(cls(), 1) == cls().f(1) == 60 + 5 + 1000
    assert copy(cls(), 1, scale=1) == 6 + 5 + 1000
    assert copy.__doc__ == cls.f.__doc__
    (first, _) = stops
    assert first.lines == lines_of(cls.f)
    assert first.file == __file__


def one_line(x: int) -> int: return x + 1  # fmt: skip


def after_a_docstring(
    x: int,
) -> int:
    """The signature has lines of its own."""

    # and so has a comment
    return (
        x  # the first instruction of the statement
        + 1
    )


def nothing_but_a_docstring(x: int) -> None:
    """No statement."""


def begins_with_a_loop(x: int) -> int:
    while x:
        x -= 1
    return x


def begins_with_try(x: int) -> int:
    try:
        return x
    finally:
        x += 1


@pytest.mark.parametrize(
    ("function", "lines_below_def"),
    [
        (one_line, 0),
        (after_a_docstring, 6),
        (nothing_but_a_docstring, 1),
        (begins_with_a_loop, 1),
        (begins_with_try, 1),
    ],
)
def test_the_next_line_and_the_next_instruction_are_the_functions_first_line(
    function: Any, lines_below_def: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A debugger waits for one or the other: pdb for the next instruction from Python 3.13 on."""
    events: list[tuple[str, int]] = []

    def note(frame: FrameType, event: str, _: Any) -> Any:
        if event in ("line", "opcode"):
            events.append((event, frame.f_lineno))
        return note

    def hook() -> None:
        frame = sys._getframe(1)
        frame.f_trace, frame.f_trace_opcodes = note, True
        sys.settrace(note)

    copy = with_breakpoint(function)
    monkeypatch.setattr(sys, "breakpointhook", hook)
    before = sys.gettrace()
    try:
        result = copy(3)
    finally:
        sys.settrace(before)
    assert result == function(3)
    first_line = function.__code__.co_firstlineno + lines_below_def
    for kind in ("line", "opcode"):
        assert next(line for event, line in events if event == kind) == first_line


@pytest.mark.parametrize(
    "made", ["exec('def f(): return 1', names)", "exec('f = lambda: 1', names)", "names['f'] = (lambda: 1)"]
)
@pytest.mark.parametrize("as_command", [False, True])
def test_a_function_without_a_source_is_an_error(made: str, as_command: bool, tmp_path: Path) -> None:
    """In `python -c` too, whose text Python 3.13 and later take for the source of what exec() makes there."""
    program = (
        "from tinyllm.debug.breakpoints import with_breakpoint\n"
        f"names = {{}}\n{made}\n"
        "try: with_breakpoint(names['f'])\n"
        "except ValueError as error: print(error)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    result = subprocess.run(
        [sys.executable, *(("-c", program) if as_command else (str(script),))], capture_output=True, text=True,
        timeout=60, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    name = "f" if "def f" in made else "<lambda>"
    assert result.stdout == f"{name} has no `def` in a source file, so no breakpoint can be put into it\n"


SESSION = """
import numpy as np
from tinyllm import Tensor, ops
from tinyllm.debug import break_on

def main():
    x = Tensor(np.array([0.0, 0.0]), requires_grad=True)
    loss = ops.softmax(x)[0]
    with break_on("softmax.backward"):
        loss.backward()
    print("gradient", x.grad.tolist())

main()
"""


def test_in_pdb_two_frames_lie_between_backward_and_the_op(tmp_path: Path) -> None:
    script = tmp_path / "session.py"
    script.write_text(SESSION)
    package = Path(inspect.getfile(Tensor)).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    result = subprocess.run(
        [sys.executable, str(script)], input="where\np self.p\np gradient\nnext\np mean\ncontinue\n",
        capture_output=True, text=True, timeout=60, check=True, env={**environment, "PYTHONPATH": str(package.parent)},
    )  # fmt: skip
    printed = result.stdout
    stack = re.findall(r"^[> ] (\S+)\(\d+\)(\w+)\(\)", printed[printed.index("(Pdb)") :], re.MULTILINE)
    stack = stack[: stack.index((str(package / "ops" / "softmaxes.py"), "backward")) + 1]
    assert stack[-4:] == [
        (str(script), "main"),
        (str(package / "autograd" / "tensor.py"), "backward"),
        (str(package / "autograd" / "backward_pass.py"), "propagate"),
        (str(package / "ops" / "softmaxes.py"), "backward"),
    ]
    assert "array([0.5, 0.5])" in printed
    assert "array([1., 0.])" in printed
    assert "array([0.5])" in printed, "after `next`, `mean` is computed"
    assert "gradient [0.25, -0.25]" in printed


# ---- detect_anomaly ----------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    """NumPy warns where these tests look for what it warns of."""
    with np.errstate(all="ignore"):
        yield


def anomaly(run: Any) -> AnomalyError:
    with pytest.raises(AnomalyError) as caught, detect_anomaly():
        run()
    return caught.value


@pytest.mark.usefixtures("quiet")
def test_a_nan_in_forward_names_op_and_line() -> None:
    x = vector(1, -1, 4)
    error = anomaly(lambda: ops.sqrt(ops.log(x) * 2))  # the line that is named
    assert (error.op, error.phase, error.module) == ("log", "forward", "")
    assert re.match(rf"{re.escape(__file__)}:\d+: .*the line that is named", error.line)
    assert "1 NaN of 3 elements" in str(error)
    assert error.line in str(error)


@pytest.mark.usefixtures("quiet")
def test_an_overflow_in_forward() -> None:
    error = anomaly(lambda: ops.exp(vector(1, 1000)))
    assert error.op == "exp"
    assert "1 infinite of 2 elements" in str(error)


@pytest.mark.usefixtures("quiet")
def test_an_anomaly_in_a_model_names_the_module() -> None:
    model = small_model()
    model.blocks[1].feed_forward.down.weight.data[:] = 3e38
    error = anomaly(lambda: model(TOKENS[:, :-1]))
    assert (error.op, error.module) == ("linear", "blocks.1.feed_forward.down")
    assert "layers.py" in error.line, "the line of the model that called the op"


def test_a_parameter_that_holds_a_nan_is_reported_where_it_is_used() -> None:
    model = small_model()
    model.blocks[2].attention.key.weight.data[3, 4] = math.nan
    error = anomaly(lambda: loss_of(model))
    assert (error.op, error.module, error.phase) == ("linear", "blocks.2.attention.key", "forward")
    assert "input 1, a leaf of shape (8, 16), holds 1 NaN of 128 elements" in str(error)


@pytest.mark.usefixtures("quiet")
def test_an_op_is_not_blamed_for_what_it_was_given() -> None:
    y = ops.log(vector(-1, 0, 1))  # before anybody watched
    with detect_anomaly():
        ops.exp(y * 2)


@pytest.mark.usefixtures("quiet")
def test_an_anomaly_in_backward_alone() -> None:
    x = vector(0, 4)
    with detect_anomaly():
        y = ops.sqrt(x)  # made here
        assert y.data.tolist() == [0, 2]
        with pytest.raises(AnomalyError) as caught:
            y.sum().backward()
    error = caught.value
    assert (error.op, error.phase) == ("sqrt", "backward")
    assert "the gradient of input 0, of shape (2,), holds 1 infinite" in str(error)
    assert "made here" in error.line, "where the forward pass called it"


class Faulty(Op):
    """An op whose forward or backward changes the dtype."""

    name = "faulty"

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def forward(self, x: Any) -> Any:
        return x.astype(np.float32) if self.phase == "forward" else x * 1

    def backward(self, gradient: Any) -> Any:
        return gradient.astype(np.float32)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("forward", "inputs of dtype float64 gave an output of dtype float32"),
        ("backward", "a gradient of dtype float64 became float32 for input 0"),
    ],
)
def test_a_change_of_dtype(phase: str, message: str) -> None:
    error = anomaly(lambda: Faulty(phase)(vector(1)).sum().backward())
    assert (error.op, error.phase) == ("faulty", phase)
    assert message in str(error)


def test_a_conversion_that_is_asked_for_is_no_anomaly() -> None:
    with detect_anomaly():
        vector(1).astype(np.float32).sum().backward()


def test_a_mask_of_minus_infinity_is_no_anomaly() -> None:
    x = vector(1, 2, 3)
    with detect_anomaly():
        masked = ops.where(np.array([True, True, False]), x, -np.inf)
        (ops.softmax(masked) * x).sum().backward()
        (ops.softmax(x + Tensor(np.array([0, 0, -np.inf]))) * x).sum().backward()
    assert np.isfinite(x.grad).all()


def test_a_sound_model_raises_nothing_and_computes_the_same() -> None:
    model = small_model()
    plain = gradients(loss_of(model), list(model.parameters()))
    with detect_anomaly():
        watched = gradients(loss_of(model), list(model.parameters()))
        with use_formulas():
            loss_of(model).backward()
        with no_grad():
            loss_of(model)
    assert all(np.array_equal(a, b) for a, b in zip(plain, watched, strict=True))


# ---- observers ---------------------------------------------------------------------------------


class Everything(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []

    def before_forward(self, op: Op, inputs: Any) -> None:
        self.told.append(f"before {op.name}")

    def after_forward(self, op: Op, inputs: Any, output: Any) -> None:
        self.told.append(f"after {op.name}")

    def before_backward(self, op: Op, gradient: Any) -> None:
        self.told.append(f"before {op.name}.backward")

    def after_backward(self, op: Op, gradient: Any, results: Any) -> None:
        self.told.append(f"after {op.name}.backward {len(results)}")

    def enter_module(self, module: Any) -> None:
        self.told.append(f"enter {type(module).__name__}")


def test_an_observer_is_told_everything_in_order_and_only_within_its_context() -> None:
    layer, x, watch = (
        Linear(2, 3, bias=False, rng=np.random.default_rng(0)),
        Tensor(np.ones((1, 2), np.float32)),
        Everything(),
    )
    with observe(watch):
        loss = layer(x).sum()
    loss.backward()
    assert watch.told == ["enter Linear", "before linear", "after linear", "before sum", "after sum"]
    loss, watch.told = layer(x).sum(), []
    with observe(watch):
        loss.backward()
    layer(x)
    assert watch.told == [
        "before sum.backward", "after sum.backward 1", "before linear.backward", "after linear.backward 2",
    ]  # fmt: skip


def test_without_observers_ops_keep_nothing_for_them() -> None:
    y = ops.softmax(vector(1, 2))
    assert y.op is not None
    assert not {"row", "origin"} & set(vars(y.op))
    with detect_anomaly():
        z = ops.softmax(vector(1, 2))
    assert "origin" in vars(z.op)


# ---- trace and summary -------------------------------------------------------------------------


def forward_flops(config: ModelConfig, batch: int, length: int) -> dict[str, int]:
    """By hand, 2 for each multiply-add."""
    D, H, G, K, F, V = (
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size,
        config.vocab_size,
    )  # fmt: skip
    weights = config.num_layers * (D * H * K + 2 * D * G * K + H * K * D + 3 * D * F) + D * V
    scores_and_values = config.num_layers * batch * H * length * (length + 1) // 2 * 2 * K
    return {"linear": 2 * batch * length * weights, "scaled_dot_product_attention": 2 * scores_and_values}


def test_trace_has_a_row_for_each_op_with_shapes_and_bytes() -> None:
    report = trace(small_model(), TOKENS)
    counts = {name: sum(row.op == name for row in report.rows) for name in {row.op for row in report.rows}}
    layers = CONFIG.num_layers
    assert counts["linear"] == 7 * layers + 1
    assert counts["rms_norm"] == 4 * layers + 1
    assert counts["rope"] == 2 * layers
    assert counts["scores"] == counts["softmax"] == counts["attention"] == layers
    assert counts["add"] == 2 * layers
    assert (counts["embedding"], counts["cross_entropy"]) == (1, 1)
    assert report.rows[0].op == "embedding"
    assert report.rows[-1].op == "cross_entropy"
    for row in report.rows:
        assert row.bytes == 4 * math.prod(row.output)
        assert row.dtype == "float32"
        assert row.formula
    (query,) = [row for row in report.rows if row.module == "blocks.1.attention.query"]
    assert (query.inputs, query.output) == (((B, T, 16), (16, 16)), (B, T, 16))
    assert query.formula == "y = x W^T + b"


def test_the_flops_of_a_transformer_are_those_of_the_formula() -> None:
    report = trace(small_model(), TOKENS, fast=True)
    for name, expected in forward_flops(CONFIG, B, T).items():
        assert sum(row.flops for row in report.rows if row.op == name) == expected
    products = sum(forward_flops(CONFIG, B, T).values())
    total = sum(row.flops for row in report.rows)
    assert products < total < 1.5 * products, "the rest is small"
    assert all(row.flops == 0 for row in report.rows if row.op in ("reshape", "transpose"))


def test_trace_times_forward_and_backward() -> None:
    report = trace(small_model(), TOKENS)
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in report.rows)
    assert sum(row.forward_ms for row in report.rows) < 10_000
    targets = np.zeros((B, T), dtype=int)
    assert trace(small_model(), TOKENS[:, :T], targets).rows[-1].inputs == ((B, T, 11),)
    with no_grad():
        assert all(row.backward_ms == 0 for row in trace(small_model(), TOKENS).rows)


def test_trace_stores_no_gradient() -> None:
    model = small_model()
    trace(model, TOKENS)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_of_a_trace_is_aligned() -> None:
    report = trace(small_model(), TOKENS)
    header, *lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 1
    assert {len(line) for line in lines} == {len(header)}
    for name in ("op ", "formula", "shapes", "dtype"):
        column = header.index(name)
        assert all(line[column - 1] == " " for line in lines)
        assert sum(line[column] != " " for line in lines) >= len(report.rows) - 1
    assert lines[-1].startswith("total")
    assert f"{sum(row.flops for row in report.rows):,}" in lines[-1]
    assert "(2,8,16) (16,16) -> (2,8,16)" in str(report)


def test_summary_adds_up() -> None:
    model = small_model()
    text = summary(model)
    lines = text.splitlines()
    numbers = [int(line.split()[-2].replace(",", "")) for line in lines[1:-2]]
    assert sum(numbers) == model.num_parameters() == int(lines[-2].split()[-2].replace(",", ""))
    assert lines[-2].split()[-1] == f"{4 * model.num_parameters():,}"
    assert sum(line.startswith("blocks.1.") for line in lines) == 11
    assert "weight(11,16)" in text
    flops = sum(row.flops for row in trace(model, TOKENS[:1]).rows if row.op != "cross_entropy") / T
    assert f"forward, for each of {T} tokens: {flops:,.0f} FLOPs" in lines[-1]


def test_summary_counts_tied_weights_once() -> None:
    model = TransformerLM(replace(CONFIG, tie_embeddings=True), seed=0)
    lines = summary(model).splitlines()
    numbers = [int(line.split()[-2].replace(",", "")) for line in lines[1:-2]]
    assert sum(numbers) == model.num_parameters()
    (head,) = [line for line in lines if line.startswith("head")]
    assert "(shared)" in head
    assert head.split()[-2] == "0"


# ---- the text of a Tensor ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (lambda: Tensor(1 / 3), "Tensor(0.33333334, shape=(), dtype=float32)"),
        (lambda: vector(1, 2).sum(), "Tensor(3., shape=(), dtype=float64, op=sum)"),
        (lambda: Tensor([[1, 2]], name="x"), "Tensor([[1, 2]], shape=(1, 2), dtype=int64, name='x')"),
        (lambda: Tensor(np.zeros((0, 3))), "Tensor([], shape=(0, 3), dtype=float64)"),
        (
            lambda: vector(1 / 3, -2),
            "Tensor([ 0.3333, -2.    ], shape=(2,), dtype=float64, requires_grad=True)",
        ),
        (
            lambda: vector(1e-7, 2e-6),
            "Tensor([1.e-07, 2.e-06], shape=(2,), dtype=float64, requires_grad=True)",
        ),
    ],
)
def test_repr(tensor: Any, text: str) -> None:
    assert repr(tensor()) == text


def test_the_repr_of_a_large_tensor_is_short() -> None:
    text = repr(Tensor(np.random.default_rng(0).normal(size=(300, 400))))
    assert len(text.splitlines()) == 7
    assert max(map(len, text.splitlines())) < 110


def test_repr_html_is_a_table_with_everything_escaped() -> None:
    x = Tensor(np.arange(3.0), requires_grad=True, name="<x> & y")
    y = (x * 2).sum()
    y.backward()
    table = x._repr_html_()
    assert table.startswith("<table>")
    for part in ("&lt;x&gt; &amp; y", "(3,)", "float64", "[0., 1., 2.]", "[2., 2., 2.]"):
        assert part in table
    assert "<x>" not in table
    assert "sum" in Tensor.sum(x)._repr_html_()
    assert len(Tensor(np.zeros((1000, 1000)))._repr_html_()) < 1500

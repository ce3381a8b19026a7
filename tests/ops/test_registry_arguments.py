"""What forward takes, backward takes: every op, over forms of arguments, shapes, dtypes and repeated calls."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_registry import CASES, cotangent_of, draw, function, generator, leaves

from tinyllm import ops
from tinyllm.autograd.mode import no_grad, use_formulas
from tinyllm.autograd.registry import REGISTRY, FusedOp
from tinyllm.autograd.tensor import Case, Op, Tensor, gradients
from tinyllm.testing import strategies as t

Array = npt.NDArray[Any]
Function = Callable[..., Tensor]
REFUSALS = (TypeError, ValueError, IndexError)


def arrays_of(shapes: list[tuple[int, ...]], low: float = 0.5, high: float = 2.0) -> list[Array]:
    random = np.random.default_rng(0)
    return [np.asarray(random.uniform(low, high, shape)) for shape in shapes]


def check_backward(call: Function, arrays: list[Array]) -> bool:
    """Whether `call` takes these arrays. If so, both ways back give the derivative along a random direction."""
    random = np.random.default_rng(1)
    directions = [random.normal(size=x.shape) for x in arrays]

    def moved(step: float) -> Array:
        return call(*[Tensor(x + step * v) for x, v in zip(arrays, directions, strict=True)]).data

    try:
        output = call(*leaves(arrays))
    except REFUSALS:
        return False
    cotangent = np.asarray(random.normal(size=output.shape))
    step = 1e-6
    expected = float(((moved(step) - moved(-step)) * cotangent).sum()) / (2 * step)
    scale = float(np.abs(cotangent * output.data).sum()) + abs(expected)
    for graph in (False, True):
        tensors = leaves(arrays)
        found = gradients(call(*tensors), tensors, cotangent, create_graph=graph)
        slope = sum(
            float(((x.data if graph else x) * v).sum()) for x, v in zip(found, directions, strict=True)
        )
        assert abs(slope - expected) <= 1e-6 * scale + 1e-9
    return True


# ---- Shapes and arguments of every op ----------------------------------------------------------

PARTS = {"scatter", "scores", "attention"}
"""Ops without a function of their own, whose shapes are checked by the functions that they are parts of."""
CALLS: dict[str, Function] = {
    "power_of_constant": lambda x, exponent: x**exponent,
    "cast": lambda x, dtype: x.astype(dtype),
    "get_item": lambda x, index: x[index],
    "where": lambda a, b, condition: ops.where(condition, a, b),
    "einsum": lambda *xs, terms, result: ops.einsum(f"{','.join(terms)}->{result}", *xs),
    "concatenate": lambda *xs, axis: ops.concatenate(xs, axis),
    "gelu_tanh": lambda x: ops.gelu(x, "tanh"),
    "reshape": lambda x, shape: ops.reshape(x, shape),
    "rotary_heads": lambda x, weight=None, **arguments: ops.rotary_heads(x, weight=weight, **arguments),
    "transpose": lambda x, axes: ops.transpose(x, axes),
    "softmax": lambda x, **arguments: REGISTRY["softmax"](**arguments)(x),
}
"""The functions that call ops, where they have other names or arguments than the op."""


def public(op: type[Op], case: Case) -> Function:
    """The function that users call, as the text that `op` is."""
    is_formula = op.is_formula
    name = op.name

    def call(*inputs: Any) -> Tensor:
        with use_formulas(is_formula):
            return (CALLS.get(name) or getattr(ops, name))(*inputs, **case.arguments)

    return call


def other_shapes(shapes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Shapes near those of a case: an axis of length 1, 0 or 2, of one input or of all, one axis fewer or more."""
    for position, shape in enumerate(shapes):
        for changed in [
            *[(*shape[:i], n, *shape[i + 1 :]) for i in range(len(shape)) for n in (0, 1, 2)],
            shape[1:],
            (2, *shape),
            (1, *shape),
        ]:
            yield (*shapes[:position], changed, *shapes[position + 1 :])
    for n in (0, 1):
        for axis in range(1, 1 + max(map(len, shapes))):
            yield tuple(
                tuple(n if i == len(shape) - axis else length for i, length in enumerate(shape))
                for shape in shapes
            )


@pytest.mark.parametrize(("op", "case"), CASES)
def test_whatever_shapes_forward_takes_backward_takes(op: type[Op], case: Case) -> None:
    if op.name in PARTS:
        return
    random = generator(op, case)
    assert check_backward(public(op, case), draw(op, case))
    for shapes in other_shapes(case.shapes):
        arrays = [np.asarray(random.uniform(max(case.low, -2), min(case.high, 2), shape)) for shape in shapes]
        with np.errstate(all="ignore"):
            check_backward(public(op, case), arrays)


def in_form(value: Any, form: str) -> Any:
    """The same argument with its integers in one of INTEGER_FORMS."""
    if type(value) is tuple:
        parts = tuple(in_form(part, form) for part in value)
        return list(parts) if form == "array" and all(isinstance(part, int) for part in value) else parts
    return t.INTEGER_FORMS[form](value) if type(value) is int else value


@pytest.mark.parametrize("form", sorted(t.INTEGER_FORMS.keys() - {"int"}))
@pytest.mark.parametrize(("op", "case"), [p for p in CASES if p.values[1].arguments])
def test_integers_of_every_kind_are_arguments(op: type[Op], case: Case, form: str) -> None:
    """What an op takes in another form has the derivatives, of first and second order, that the plain integer has."""
    arguments = {name: in_form(value, form) for name, value in case.arguments.items()}
    arrays = draw(op, case)

    def derivatives(arguments: dict[str, Any], graph: bool) -> list[Array]:
        tensors = leaves(arrays)
        output = op(**arguments)(*tensors)
        found = gradients(output, tensors, cotangent_of(output.data), create_graph=graph)
        return [output.data, *[x.data if graph else x for x in found]]

    try:
        op(**arguments)(*[Tensor(x) for x in arrays])
    except REFUSALS:
        return
    for graph in (False, True):
        for one, other in zip(derivatives(arguments, graph), derivatives(case.arguments, graph), strict=True):
            np.testing.assert_array_equal(one, other)


def with_numpys_floats(value: Any) -> Any:
    return np.float64(value) if isinstance(value, float) else value


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "reference"])
@pytest.mark.parametrize(
    ("op", "case"), [p for p in CASES if any(type(v) is float for v in p.values[1].arguments.values())]
)
def test_numpys_floats_are_arguments(op: type[Op], case: Case, fused: bool) -> None:
    """float32 remains float32 beside a float64 of NumPy, which is no Python float to it."""
    if op.name in PARTS:
        return
    call = CALLS.get(op.name) or getattr(ops, op.name)
    arguments = {name: with_numpys_floats(value) for name, value in case.arguments.items()}
    results: list[list[Array]] = []
    with use_formulas(not fused):
        for given_arguments in (case.arguments, arguments):
            tensors = leaves(draw(op, case, np.float32))
            output = call(*tensors, **given_arguments)
            results.append([output.data, *gradients(output, tensors, cotangent_of(output.data))])
    for one, other in zip(*results, strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


# ---- Forms of arguments of functions -----------------------------------------------------------

FORMS = tuple(t.INTEGER_FORMS)
REDUCTIONS: tuple[Function, ...] = (
    ops.sum, ops.mean, ops.var, ops.std, ops.max, ops.min, ops.prod, ops.logsumexp,
)  # fmt: skip
ALONG: tuple[Function, ...] = (ops.softmax, ops.log_softmax, ops.cumsum, ops.flip)


def plain(axis: Any) -> Any:
    """The same axes as Python's integers."""
    if axis is None:
        return None
    return tuple(int(position) for position in axis) if isinstance(axis, (tuple, list)) else int(axis)


def check_same(one: Function, other: Function, arrays: list[Array]) -> None:
    """Values and derivatives to second order are the same bits."""

    def derivatives(call: Function) -> list[Array]:
        tensors = leaves(arrays)
        output = call(*tensors)
        cotangent = cotangent_of(output.data)
        firsts = gradients((output**2 * cotangent).sum(), tensors, create_graph=True)
        seconds = gradients(sum(((first**2).sum() for first in firsts), Tensor(np.float64(0))), tensors)
        return [output.data, *[first.data for first in firsts], *seconds]

    for a, b in zip(derivatives(one), derivatives(other), strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.data(), t.shapes(min_length=1), st.sampled_from(REDUCTIONS), st.booleans())
def test_axes_of_every_kind_of_integer(
    data: st.DataObject, shape: tuple[int, ...], reduction: Function, keepdims: bool
) -> None:
    axis = data.draw(t.reduction_axes(shape, forms=FORMS))
    check_same(
        lambda x: reduction(x, axis, keepdims),
        lambda x: reduction(x, plain(axis), keepdims),
        arrays_of([shape]),
    )


AXIS_FUNCTIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    **{known.__name__: known for known in (*REDUCTIONS, *ALONG)},
    "take_along_axis": lambda x, axis: ops.take_along_axis(x, np.zeros((2, 3, 1), int), axis),
    "gather": lambda x, axis: ops.gather(x, axis, np.ones((1, 2, 1), int)),
    "concatenate": lambda x, axis: ops.concatenate([x, x * 2], axis),
    "stack": lambda x, axis: ops.stack([x, x * 2], axis),
    "split": lambda x, axis: ops.split(x, [1], axis)[1],
    "split evenly": lambda x, axis: ops.split(x, axis * 0 + 3, 1)[0],
    "expand_dims": ops.expand_dims,
    "squeeze": lambda x, axis: ops.squeeze(ops.expand_dims(x, int(axis)), axis),
    "swapaxes": lambda x, axis: ops.swapaxes(x, axis, 0),
    "transpose": lambda x, axis: ops.transpose(x, axis, 0, 2),
    "pad": lambda x, axis: ops.pad(x, axis * 0 + 2),
    "reshape": lambda x, axis: ops.reshape(x, axis * 0 + 6, -1),
    "index": lambda x, axis: x[axis],
    "broadcast_to": lambda x, axis: ops.broadcast_to(x, (axis * 0 + 4, 2, 3, 3)),
    "einsum": lambda x, axis: ops.einsum("ijk,ijk->j", x, x.sum(axis, keepdims=True)),
}


@pytest.mark.parametrize("number", [1, -2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", AXIS_FUNCTIONS)
def test_one_axis_of_every_kind_of_integer(name: str, form: str, number: int) -> None:
    call = AXIS_FUNCTIONS[name]
    axis = t.INTEGER_FORMS[form](number)
    check_same(lambda x: call(x, axis), lambda x: call(x, number), arrays_of([(2, 3, 3)]))


@given(t.einsums())
def test_what_einsum_takes_forward_it_takes_backward(drawn: tuple[str, list[tuple[int, ...]]]) -> None:
    subscripts, shapes = drawn
    arrays = arrays_of(shapes)
    try:
        expected = np.einsum(subscripts, *arrays)
    except ValueError:
        return
    np.testing.assert_allclose(ops.einsum(subscripts, *map(Tensor, arrays)).data, expected, rtol=1e-12)
    assert check_backward(lambda *xs: ops.einsum(subscripts, *xs), arrays)


BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": ops.add,
    "subtract": ops.subtract,
    "multiply": ops.multiply,
    "divide": ops.divide,
    "power": ops.power,
    "maximum": ops.maximum,
    "minimum": ops.minimum,
    "matmul": ops.matmul,
    "where": lambda a, b: ops.where(np.array([True, False]), a, b),
    "where on a Tensor": lambda a, b: ops.where(a > 1, a, b),
    "concatenate": lambda a, b: ops.concatenate([a, b]),
    "stack": lambda a, b: ops.stack([a, b]),
    "einsum": lambda a, b: ops.einsum("i,i->i", a, b),
    "rms_norm": ops.rms_norm,
    "linear": lambda a, b: ops.linear(a, ops.stack([b, b]) if isinstance(b, Tensor) else np.stack([b, b])),
    "+": lambda a, b: a + b,
    "reversed -": lambda a, b: b - a,
    "reversed /": lambda a, b: b / (a + 1 if isinstance(a, Tensor) else a),
    "reversed **": lambda a, b: b ** (a + 1 if isinstance(a, Tensor) else a),
    "@": lambda a, b: a @ b,
    "numpy.multiply": np.multiply,
    "numpy.power": np.power,
}
INTEGERS = ("?", "i1", "u1", "i2", "i4", "u4", "i8", "u8")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integers_beside_a_floating_tensor_are_their_floats(name: str, dtype: str) -> None:
    call = BINARY[name]
    values = np.array([[0.0, 1.0], [2.0, 0.5]], dtype="f4")
    for row, integers in itertools.product(values, ([0, 1], [1, 0])):
        other = np.array(integers, dtype=dtype)
        results: list[list[Array]] = []
        for given_other in (other, Tensor(other), other.astype("f4")):
            x = Tensor(row, requires_grad=True)
            with np.errstate(all="ignore"):
                output = call(x, given_other)
                results.append([output.data, *gradients(output.sum(), [x])])
        for found in results[:2]:
            for one, expected in zip(found, results[2], strict=True):
                assert one.dtype == np.float32
                np.testing.assert_array_equal(one, expected)


NO_NUMBERS: dict[str, Any] = {
    "None": None,
    "a string": "1.5",
    "bytes": b"1",
    "an object": object(),
    "a list with None": [1.0, None],
    "a list of strings": ["1", "2"],
    "an array of strings": np.array(["1", "2"]),
    "an array of objects": np.array([1.0, None]),
    "a date": np.datetime64("2020-01-01"),
    "a dictionary": {},
}
CONDITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "condition": lambda x, other: ops.where(other, x, x),
    "value of pad": lambda x, other: ops.pad(x, 1, other),
    "cotangent": lambda x, other: (x * Tensor([1.0, 1.0], requires_grad=True)).backward(
        [other, other] if other is None else other
    ),
    "Tensor": lambda _, other: Tensor(other),
    "Tensor with a dtype": lambda _, other: Tensor(other, dtype="float32"),
}


@pytest.mark.parametrize("what", NO_NUMBERS)
@pytest.mark.parametrize("name", sorted(BINARY.keys() - {"linear", "rms_norm", "where on a Tensor"}))
def test_what_is_no_number_is_no_operand(name: str, what: str) -> None:
    """On either side of a Tensor."""
    call, other = BINARY[name], NO_NUMBERS[what]
    for operands in ((Tensor([1.0, 2.0]), other), (other, Tensor([1.0, 2.0]))):
        with pytest.raises(TypeError):
            call(*operands)


@pytest.mark.parametrize("what", NO_NUMBERS)
@pytest.mark.parametrize("name", CONDITIONS)
def test_what_is_no_number_is_refused_by_what_it_is(name: str, what: str) -> None:
    other = NO_NUMBERS[what]
    with pytest.raises(TypeError, match="holds real numbers; got"):
        CONDITIONS[name](Tensor([1.0, 2.0]), other)


# ---- float16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True], ids=["backward", "backward as a graph"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_float16_is_rounded_once(op: type[Op], case: Case, graph: bool) -> None:
    """Each result is what float32 makes of the same numbers, to half a unit in the last place of float16."""
    if op.name == "cast":
        return
    arrays = draw(op, case, np.float16)
    results: list[list[Array]] = []
    for dtype in (np.float16, np.float32):
        tensors = leaves([x.astype(dtype) for x in arrays])
        output = function(op, case)(*tensors)
        cotangent = cotangent_of(output.data.astype(np.float16)).astype(dtype)
        found = gradients(output, tensors, cotangent, create_graph=graph)
        results.append([output.data, *[x.data if graph else x for x in found]])
    fused = graph and issubclass(op, FusedOp)  # a composition of ops, each of which rounds
    for narrow, wide in zip(*results, strict=True):
        assert narrow.dtype == np.float16
        scale = np.abs(wide).max(initial=1) if fused else np.abs(wide) + np.abs(wide).max(initial=1) * 1e-4
        limit = np.finfo(np.float16).eps * (8 if fused else 0.51) * scale
        assert (np.abs(narrow.astype(np.float32) - wide) <= limit + 2.0**-25).all()


def half(values: Any) -> Tensor:
    return Tensor(np.asarray(values, dtype=np.float16), requires_grad=True)


def ones(*shape: int) -> Tensor:
    return half(np.ones(shape))


LONG_SUMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, float | None, float | None]] = {
    "sum": (lambda x: x.sum(), ones(4096), 4096, 1),
    "sum over an axis": (lambda x: x.sum(0).sum(), ones(4096, 2), 8192, 1),
    "mean": (lambda x: x.mean(), ones(100_000), 1, 1e-5),
    "mean of pairs": (lambda x: x.mean(), ones(4096, 2), 1, 2.0**-13),
    "numpy.mean": (lambda x: np.mean(x), ones(4096, 2), 1, 2.0**-13),
    "var": (lambda x: x.var(), half(np.tile([-200, 200], 50_000)), 40_000, None),
    "std": (lambda x: x.std(), half(np.tile([-200, 200], 50_000)), 200, None),
    "logsumexp": (lambda x: ops.logsumexp(x), half(np.zeros(100_000)), np.log(1e5), 1e-5),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, np.array(0)),
        half(np.zeros(100_000)),
        np.log(1e5),
        None,
    ),
    "softmax": (lambda x: ops.softmax(x)[0], half(np.zeros(16384)), 2.0**-14, None),
    "cumsum": (lambda x: x.cumsum(0)[-1], ones(4096), 4096, 1),
    "rms_norm": (lambda x: ops.rms_norm(x, ones(4096))[0], half(np.full(4096, 300)), 1, None),
    "layer_norm": (
        lambda x: ops.layer_norm(x, ones(4096), half(np.zeros(4096)))[1],
        half(np.tile([-300, 300], 2048)),
        1,
        None,
    ),
    "matmul": (lambda x: x @ ones(4096), ones(4096), 4096, 1),
    "einsum": (lambda x: ops.einsum("i,i->", x, ones(4096)), ones(4096), 4096, 1),
    "linear": (lambda x: ops.linear(x, ones(1, 4096)).sum(), ones(4096), 4096, 1),
    "bias": (lambda b: (ones(4096, 2) + b).sum(0)[0], half(np.zeros(2)), 4096, None),
    "bias of linear": (lambda b: ops.linear(ones(4096, 2), ones(1, 2), b).sum(), half([0.0]), 8192, 4096),
    "broadcast_to": (lambda b: ops.broadcast_to(b, (4096, 1)).sum(), half([1.0]), 4096, 4096),
    "repeated index": (lambda b: b[np.zeros(4096, int)].sum(), ones(1), 4096, 4096),
    "repeated rows": (lambda b: ops.embedding(b, np.zeros(4096, int)).sum(), ones(1, 1), 4096, 4096),
    "norm": (lambda x: x.norm(), half(np.full(1000, 300)), 300 * 1000**0.5, 1000**-0.5),
    "norm of small numbers": (lambda x: x.norm(), half(np.full(4, 1e-4)), 2e-4, 0.5),
    "norm of order 3": (lambda x: x.norm(3), half(np.full(8, 100)), 200, 0.25),
    "smooth_l1_loss": (lambda x: ops.smooth_l1_loss(x, np.zeros(1), beta=300.0), half([400]), 250, 1),
    "kl_div": (
        lambda x: ops.kl_div(x, np.ones((70_000, 2)), "batchmean"),
        half(np.full((70_000, 2), -1)),
        2,
        None,
    ),
    "nll_loss": (lambda x: ops.nll_loss(x, np.zeros(70_000, int)), half(np.full((70_000, 1), -3)), 3, None),
    "weighted cross_entropy": (
        lambda x: ops.cross_entropy(x, np.zeros(70_000, int), weight=np.ones(2)),
        half(np.ones((70_000, 2))),
        np.log(2),
        None,
    ),
    "smoothed cross_entropy": (
        lambda x: ops.cross_entropy(x, np.zeros(70_000, int), label_smoothing=0.1),
        half(np.ones((70_000, 2))),
        np.log(2),
        None,
    ),
    "weight of a norm": (
        lambda w: ops.rms_norm(ones(4096, 2), w).sum(),
        half([1.0, 1.0]),
        8192,
        4096,
    ),
}
"""A function, its input, the value, and what each element's gradient is, where all have the same."""


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "reference"])
@pytest.mark.parametrize("graph", [False, True], ids=["backward", "backward as a graph"])
@pytest.mark.parametrize("name", LONG_SUMS)
def test_long_sums_of_float16(name: str, graph: bool, fused: bool) -> None:
    call, x, value, slope = LONG_SUMS[name]
    with use_formulas(not fused):
        output = call(x)
        (found,) = gradients(output, [x], create_graph=graph)
    assert output.dtype == found.dtype == np.float16
    np.testing.assert_allclose(output.item(), value, rtol=1e-3)
    if slope is not None:
        expected = np.full(x.shape, slope)
        np.testing.assert_allclose(
            found.data if graph else found, expected, rtol=1e-2 if slope < 1e-4 else 1e-3
        )


# ---- One instance, called twice ----------------------------------------------------------------


@pytest.mark.parametrize("second", ["Tensors", "arrays", "without a graph", "after backward"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_an_instance_called_twice_keeps_its_first_graph(op: type[Op], case: Case, second: str) -> None:
    """The second call is refused, or leaves what backward needs of the first."""
    arrays = draw(op, case)
    others = [x[::-1] * 0.5 + 0.7 if x.ndim else x * 0.5 + 0.7 for x in arrays]
    instance = op(**case.arguments)
    tensors = leaves(arrays)
    with use_formulas(op.is_formula):
        output = instance(*tensors)
        expected = gradients(
            output, tensors, cotangent_of(output.data), retain_graph=second != "after backward"
        )
        try:
            with no_grad() if second == "without a graph" else nullcontext():
                instance(*(others if second == "arrays" else leaves(others)))
        except RuntimeError as error:
            assert "make one for each call" in str(error)  # noqa: PT017 (it need not be raised)
        if second == "after backward":
            return
        found = gradients(output, tensors, cotangent_of(output.data))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)

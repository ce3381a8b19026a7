"""Every registered op has every property that an op must have; a new op is tested once it is registered."""

import contextlib
import copy
import itertools
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tinyllm.ops  # noqa: F401 (registers the ops)
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.registry import REGISTRY
from tinyllm.autograd.tensor import Case, Op, Tensor, gradients
from tinyllm.testing import GradcheckResult, gradcheck, gradient_function
from tinyllm.testing.strategies import PLACES

Array = npt.NDArray[Any]

FORMS = dict(REGISTRY) | {f"{name}-fast": op.fast_form for name, op in REGISTRY.items() if op.fast_form}
"""Every text of an op: its formula, its fast form, and the fused ops."""
CASES = [
    pytest.param(op, case, id=f"{name}-{number}")
    for name, op in FORMS.items()
    for number, case in enumerate(op.cases)
]
FAST_CASES = [parameters for parameters in CASES if not parameters.values[0].is_formula]
OPS = [pytest.param(op, id=name) for name, op in FORMS.items()]
DTYPES = [pytest.param(np.float32, id="float32"), pytest.param(np.float64, id="float64")]


# ---- Inputs ------------------------------------------------------------------------------------


def generator(op: type[Op], case: Case) -> np.random.Generator:
    """Random numbers that depend on the case alone, not on the order of tests."""
    return np.random.default_rng(zlib.crc32(f"{op.name}{case.shapes}".encode()))


def draw(op: type[Op], case: Case, dtype: Any = np.float64) -> list[Array]:
    random = generator(op, case)
    return [np.asarray(random.uniform(case.low, case.high, shape), dtype=dtype) for shape in case.shapes]


def function(op: type[Op], case: Case) -> Callable[..., Tensor]:
    """A fresh op each time it is called, as the text that the class is."""
    is_formula = op.is_formula

    def call(*inputs: Any) -> Tensor:
        with use_formulas(is_formula):
            return op(**case.arguments)(*inputs)

    return call


def leaves(arrays: list[Array]) -> list[Tensor]:
    return [Tensor(x, requires_grad=True) for x in arrays]


def cotangent_of(output: Any, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    return np.asarray(random.standard_normal(output.shape), dtype=output.dtype)


def run(
    op: type[Op], case: Case, arrays: list[Array], cotangent: Array | None = None
) -> tuple[Array, list[Array]]:
    """The values and the gradients for a cotangent, random if None."""
    tensors = leaves(arrays)
    output = function(op, case)(*tensors)
    given = cotangent_of(output.data) if cotangent is None else cotangent
    return output.data, gradients(output, tensors, given)


def assert_near(actual: Any, expected: Any, units: float = 64) -> None:
    """Equal to `units` times the dtype's precision, relative to the largest element (at least 1)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = max(float(np.abs(expected).max(initial=0)), 1.0)
    tolerance = units * float(np.finfo(expected.dtype).eps) * scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def check_gradient(op: type[Op], case: Case) -> GradcheckResult:
    return gradcheck(function(op, case), draw(op, case), seed=generator(op, case))


# ---- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradient_is_the_derivative(op: type[Op], case: Case) -> None:
    result = check_gradient(op, case)
    assert result.complete
    assert result.comparisons == sum(int(np.prod(shape)) for shape in case.shapes)
    assert result.tolerance < 1e-8
    assert case.kinked or result.kinks == ()


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradient_in_float32_is_the_derivative(op: type[Op], case: Case) -> None:
    result = gradcheck(function(op, case), draw(op, case, np.float32), seed=generator(op, case))
    assert result.tolerance < 1e-2


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradient_at_zeros_is_the_derivative(op: type[Op], case: Case) -> None:
    """Where every element is at a kink, a maximum, or the middle of the function; and at a random point near by."""
    zeros = [PLACES["zeros"](x, case.low, case.high) for x in draw(op, case)]
    result = gradcheck(function(op, case), zeros, seed=generator(op, case))
    assert result.tolerance < 1e-5 or result.unjudged  # a remainder jumps there


@pytest.mark.parametrize(("op", "case"), CASES)
def test_second_derivative(op: type[Op], case: Case) -> None:
    arrays = draw(op, case)
    cotangent = cotangent_of(function(op, case)(*[Tensor(x) for x in arrays]).data, 3)
    result = gradcheck(
        gradient_function(function(op, case)), [*arrays, cotangent], max_elements=0, projections=2, seed=1
    )
    assert result.tolerance < 1e-5


@pytest.mark.parametrize(("op", "case"), CASES)
def test_backward_is_linear(op: type[Op], case: Case) -> None:
    arrays = draw(op, case)
    tensors = leaves(arrays)
    output = function(op, case)(*tensors)
    first, second = cotangent_of(output.data, 1), cotangent_of(output.data, 2)
    combined, one, two = (
        gradients(output, tensors, g, retain_graph=True) for g in (3 * first - 0.7 * second, first, second)
    )
    for together, a, b in zip(combined, one, two, strict=True):
        assert_near(together, 3 * a - 0.7 * b, units=256)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_backward_as_a_graph_equals_backward(op: type[Op], case: Case) -> None:
    arrays = draw(op, case)
    output, plain = run(op, case, arrays)
    tensors = leaves(arrays)
    results = gradients(function(op, case)(*tensors), tensors, cotangent_of(output), create_graph=True)
    for result, expected in zip(results, plain, strict=True):
        assert isinstance(result, Tensor)
        assert_near(result.data, expected)


def run_by_formula(op: type[Op], case: Case, arrays: list[Array]) -> tuple[Array, list[Array]]:
    """As `run`, by the formula of a fast form, or the composition of a fused op."""
    tensors = leaves(arrays)
    with use_formulas():
        output = (op.formula or op)(**case.arguments)(*tensors)
        assert not isinstance(output.op, op)
        return output.data, gradients(output, tensors, cotangent_of(output.data))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), FAST_CASES)
def test_fast_form_equals_formula(op: type[Op], case: Case, dtype: Any) -> None:
    arrays = draw(op, case, dtype)
    output, fast = run(op, case, arrays)
    expected_output, expected = run_by_formula(op, case, arrays)
    assert_near(output, expected_output, units=32)
    for one, other in zip(fast, expected, strict=True):
        assert_near(one, other, units=128)


@pytest.mark.parametrize(("op", "case"), FAST_CASES)
def test_graph_of_a_fast_form_goes_back_by_formula(op: type[Op], case: Case) -> None:
    """A breakpoint may be set between the forward and the backward pass."""
    arrays = draw(op, case)
    _, expected = run_by_formula(op, case, arrays)
    tensors = leaves(arrays)
    output = (op.formula or op)(**case.arguments)(*tensors)
    assert isinstance(output.op, op)
    with use_formulas():
        found = gradients(output, tensors, cotangent_of(output.data))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# ---- Corruption --------------------------------------------------------------------------------

CORRUPTIONS: dict[str, Callable[[Array], Any]] = {
    "sign": lambda gradient: -gradient,
    "double": lambda gradient: gradient * 2,
    "half": lambda gradient: gradient * 0.5,
    "one part in a million": lambda gradient: gradient * 1.000001,
    "zero": lambda gradient: gradient * 0,
    "rolled": lambda gradient: np.roll(gradient, 1).reshape(gradient.shape),
    "transposed": lambda gradient: gradient.T.reshape(gradient.shape),
}


@contextlib.contextmanager
def corrupted(op: type[Op], position: int, change: Callable[[Array], Any]) -> Iterator[None]:
    """Within this context the backward of `op` is wrong for the input at `position`."""
    backward = op.backward

    def wrong(self: Op, gradient: Any) -> tuple[Any, ...]:
        results = backward(self, gradient)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(
            change(np.asarray(result)) if i == position and result is not None else result
            for i, result in enumerate(results)
        )

    inherited = "backward" not in vars(op)
    op.backward = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        if inherited:
            del op.backward
        else:
            op.backward = backward  # type: ignore[method-assign]


def has_effect(op: type[Op], case: Case, position: int, change: Callable[[Array], Any]) -> bool:
    """Whether a corruption changes a gradient at all: the transpose of a vector, say, does not."""
    arrays = draw(op, case)
    _, right = run(op, case, arrays)
    with corrupted(op, position, change):
        _, wrong = run(op, case, arrays)
    return any(not np.array_equal(a, b) for a, b in zip(right, wrong, strict=True))


def is_caught(op: type[Op], case: Case) -> bool:
    try:
        check_gradient(op, case)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("op", OPS)
def test_corrupt_backward_is_caught(op: type[Op]) -> None:
    effective: set[str] = set()
    positions = range(max(len(case.shapes) for case in op.cases))
    for position, (name, change) in itertools.product(positions, CORRUPTIONS.items()):
        for case in op.cases:
            if position >= len(case.shapes) or not has_effect(op, case, position, change):
                continue
            effective.add(f"{name} {position}")
            with corrupted(op, position, change):
                assert is_caught(op, case), f"{name} corruption of input {position} passes case {case}"
            break
    required = ("sign", "double", "half", "one part in a million", "zero", "rolled")
    assert {f"{name} {position}" for name in required for position in positions} <= effective


# ---- Shapes, dtypes, memory --------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_cases_cover_the_edges(op: type[Op]) -> None:
    shapes = [shape for case in op.cases for shape in case.shapes]
    assert any(0 in shape for shape in shapes), "no case has an axis of length 0"
    assert any(shape == () or 1 in shape for shape in shapes), (
        "no case has a 0-d input or an axis of length 1"
    )
    assert any(int(np.prod(shape)) > 3 for shape in shapes), "no case is large enough to see an order"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_dtype_is_kept(op: type[Op], case: Case, dtype: Any) -> None:
    output, found = run(op, case, draw(op, case, dtype))
    assert (output.dtype == dtype) or op.changes_dtype
    assert {gradient.dtype for gradient in found} == {np.dtype(dtype)}


def strided(x: Array) -> Array:
    """The same values, every second element of a larger memory along each axis."""
    wide = np.full(tuple(2 * n for n in x.shape), np.nan, dtype=x.dtype)
    view = wide[(slice(None, None, 2),) * x.ndim + (...,)]
    view[...] = x
    return view


def transposed(x: Array) -> Array:
    return np.array(x.T, order="C").T


def negative(x: Array) -> Array:
    """The same values behind negative strides."""
    backwards = (*((slice(None, None, -1),) * x.ndim), ...)
    return np.array(x[backwards], order="C")[backwards]


def read_only(x: Array) -> Array:
    result = x.copy()
    result.flags.writeable = False
    return result


@pytest.mark.parametrize("arrange", [strided, transposed, negative, read_only])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_memory_layout_does_not_matter(op: type[Op], case: Case, arrange: Callable[[Array], Array]) -> None:
    arrays = draw(op, case)
    output, expected = run(op, case, arrays)
    other_output, found = run(op, case, [arrange(x) for x in arrays], arrange(cotangent_of(output)))
    assert_near(other_output, output, units=8)
    for gradient, known in zip(found, expected, strict=True):
        assert_near(gradient, known, units=16)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_nothing_given_is_changed(op: type[Op], case: Case) -> None:
    arrays = [read_only(x) for x in draw(op, case)]
    before = [x.copy() for x in arrays]
    arguments = copy.deepcopy(case.arguments)
    output = function(op, case)(*leaves(arrays))
    values = output.data.copy()
    cotangent = read_only(cotangent_of(output.data))
    given = cotangent.copy()
    # Straight through the op: the engine would pass a copy of the cotangent.
    assert output.op is not None
    output.op.backward(cotangent)
    for now, then in zip([*arrays, cotangent, output.data], [*before, given, values], strict=True):
        np.testing.assert_array_equal(now, then)
    assert not any(x.flags.writeable for x in [*arrays, cotangent])
    np.testing.assert_equal(case.arguments, arguments)


def arrays_in(value: Any) -> list[Array]:
    """The arrays that an op keeps, in tuples, too."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, (tuple, list)):
        return [array for part in value for array in arrays_in(part)]
    return []


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradients_own_their_memory(op: type[Op], case: Case) -> None:
    tensors = leaves(draw(op, case))
    output = function(op, case)(*tensors)
    assert output.op is not None
    kept = [array for value in vars(output.op).values() for array in arrays_in(value)]
    cotangent = cotangent_of(output.data)
    output.backward(cotangent, retain_graph=True)
    kept += [array for value in vars(output.op).values() for array in arrays_in(value)]
    found = [x.grad for x in tensors]
    others = [x.data for x in tensors] + [output.data, cotangent, *kept]
    for position, gradient in enumerate(found):
        assert isinstance(gradient, np.ndarray)
        assert gradient.flags.writeable
        for other in found[position + 1 :] + others:
            assert not np.shares_memory(gradient, other)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_one_tensor_for_every_input_accumulates(op: type[Op], case: Case) -> None:
    """An input that is used again gets the sum of both gradients, in an array of its own."""
    arrays = draw(op, case)
    tensors = leaves(arrays)
    output = function(op, case)(*tensors)
    again = function(op, case)(*tensors)
    cotangent = cotangent_of(output.data)
    _, once = run(op, case, arrays, cotangent)
    (output + again).backward(cotangent)
    for x, gradient in zip(tensors, once, strict=True):
        assert isinstance(x.grad, np.ndarray)
        assert x.grad.dtype == x.dtype
        assert_near(x.grad, 2 * gradient)
        assert not np.shares_memory(x.grad, x.data)


# ---- Memory is freed ---------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case"), CASES)
def test_graph_is_freed_by_backward(op: type[Op], case: Case) -> None:
    tensors = leaves(draw(op, case))
    inner = [x * 1 for x in tensors]
    output = function(op, case)(*inner)
    loss = output.sum() if output.dtype == tensors[0].dtype else output.astype(tensors[0].dtype).sum()
    assert output.op is not None
    watched: list[weakref.ref[Any]] = [weakref.ref(x) for x in (*inner, output)]
    watched += [weakref.ref(x.op) for x in (*inner, output)]
    arguments = {id(array) for value in case.arguments.values() for array in arrays_in(value)}
    given = {id(x.data) for x in tensors}
    saved = [array for value in vars(output.op).values() for array in arrays_in(value)]
    # What the caller passed and cached constant tables outlive the graph; a table is known by its second use.
    second = function(op, case)(*inner)
    assert second.op is not None
    cached = {id(array) for value in vars(second.op).values() for array in arrays_in(value)}
    saved_ids = [array for array in saved if id(array) not in arguments | given | cached]
    watched += [weakref.ref(array) for array in saved_ids]
    del inner, output, second, saved, saved_ids
    loss.backward()
    assert [reference() for reference in watched] == [None] * len(watched)

"""What every registered op does with infinities that do not count, and with buffers that its caller uses again."""

import array
import collections
import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_registry import CASES, arrays_in, cotangent_of, draw, leaves

from tinyllm import ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.tensor import Case, Op, Tensor, gradients
from tinyllm.testing import strategies as t

Array = npt.NDArray[Any]

# Arithmetic, and the same NaN in PyTorch: a row of length 1 is subtracted from itself; attention multiplies by
# probabilities, which are 0 where a mask hides a key, and rotation by the sine of an angle, which is 0 at position 0;
# the remainder by the quotient, which is 0 where a < b.
SUBTRACT = {"softmax", "log_softmax", "logsumexp", "layer_norm", "cross_entropy"}
MULTIPLY = {"scaled_dot_product_attention", "rope", "rotary_heads", "remainder"}
MASKED = [
    parameters
    for parameters in CASES
    if parameters.values[0].name not in MULTIPLY
    and not (parameters.values[0].name == "softmax" and "mask" in parameters.values[1].arguments)
    and not (parameters.values[0].name in SUBTRACT and 1 in parameters.values[1].shapes[0][-1:])
]


def gradients_for(
    op: type[Op], case: Case, arrays: list[Array], cotangent: Array, graph: bool
) -> list[Array]:
    tensors = leaves(arrays)
    output = op(**case.arguments)(*tensors)
    found = gradients(output, tensors, cotangent, create_graph=graph)
    return [x.data if isinstance(x, Tensor) else x for x in found]


# ---- Infinities --------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True], ids=["backward", "backward as a graph"])
@pytest.mark.parametrize(("op", "case"), MASKED)
def test_no_infinite_cotangent_passes_where_the_derivative_is_zero(
    op: type[Op], case: Case, graph: bool
) -> None:
    arrays = draw(op, case)
    shape = op(**case.arguments)(*[Tensor(x) for x in arrays]).shape
    for position in np.ndindex(shape):
        unit = np.zeros(shape)
        unit[position] = 1
        slopes = gradients_for(op, case, arrays, unit, graph)
        unit[position] = np.inf
        with np.errstate(all="ignore"):
            found = gradients_for(op, case, arrays, unit, graph)
        for slope, infinite in zip(slopes, found, strict=True):
            np.testing.assert_array_equal(infinite[slope == 0], 0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "reference"])
@pytest.mark.parametrize(("op", "case"), MASKED)
def test_what_does_not_count_may_be_infinite(op: type[Op], case: Case, fused: bool) -> None:
    """Where another large number changes nothing, infinity changes nothing."""

    def results() -> list[Array]:
        tensors = leaves(arrays)
        output = op(**case.arguments)(*tensors)
        return [output.data, *gradients(output, tensors, cotangent)]

    arrays = draw(op, case)
    cotangent = cotangent_of(op(**case.arguments)(*[Tensor(x) for x in arrays]).data)
    with use_formulas(not fused), np.errstate(all="ignore"):
        expected = results()
        for x, sign in itertools.product(arrays, (1, -1)):
            for position in np.ndindex(x.shape):
                before = x[position]
                for large in (1e3, 1e4, np.inf):
                    x[position] = sign * large
                    found = results()
                    if large < np.inf and not all(map(np.array_equal, found, expected)):
                        break
                    for one, other in zip(found, expected, strict=True):
                        np.testing.assert_array_equal(one, other)
                x[position] = before


# ---- Buffers -----------------------------------------------------------------------------------


def overwrite(x: Array) -> None:
    x[...] = ~x if x.dtype == bool else x == 0


@pytest.mark.parametrize("graph", [False, True], ids=["backward", "backward as a graph"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_arguments_may_be_overwritten_before_backward(op: type[Op], case: Case, graph: bool) -> None:
    arrays = draw(op, case)
    cotangent = cotangent_of(op(**case.arguments)(*[Tensor(x) for x in arrays]).data)
    expected = gradients_for(op, case, arrays, cotangent, graph)
    arguments = copy.deepcopy(case.arguments)
    tensors = leaves(arrays)
    output = op(**arguments)(*tensors)
    for value in arguments.values():
        for x in arrays_in(value):
            overwrite(x)
    for x, known in zip(gradients(output, tensors, cotangent, create_graph=graph), expected, strict=True):
        np.testing.assert_array_equal(x.data if graph else x, known)


INTEGERS = np.array([[1, 0], [2, 2]])
BOOLEANS = np.arange(12).reshape(3, 4) % 2 == 0

FUNCTIONS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Array]] = {
    "index": (lambda x, i: x[i], INTEGERS),
    "index part": (lambda x, i: x[1:, i], INTEGERS),
    "number": (lambda x, i: x[i, 1], np.array(1)),
    "bounds of a slice": (lambda x, i: x[i : i + 2], np.array(1)),
    "step of a slice": (lambda x, i: x[::i], np.array(2)),
    "boolean index": (lambda x, i: x[i], BOOLEANS),
    "boolean part": (lambda x, i: x[:, i], BOOLEANS[0]),
    "embedding": (ops.embedding, INTEGERS),
    "embedding of bytes": (ops.embedding, INTEGERS.astype(np.uint8)),
    "gather": (lambda x, i: ops.gather(x, 1, i), np.array([[3, 0], [1, 1], [0, 2]])),
    "take_along_axis": (lambda x, i: ops.take_along_axis(x, i, axis=0), np.array([[2, 0, 1, 1]])),
    "targets": (lambda x, i: ops.cross_entropy(x, i), np.array([3, -100, 0])),
    "where": (lambda x, c: ops.where(c, x, x * 3), BOOLEANS),
    "factor": (lambda x, c: x * c, BOOLEANS),
    "power": (lambda x, n: (x * x + 1) ** n, INTEGERS[1, :1]),
    "mask of attention": (
        lambda x, m: ops.scaled_dot_product_attention(*[x.reshape(1, 1, 3, 4)] * 3, mask=m),
        BOOLEANS[:, :3],
    ),
}


@pytest.mark.parametrize("wrap", [lambda x: x, Tensor], ids=["array", "Tensor"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_may_be_overwritten_before_backward(name: str, wrap: Callable[[Array], Any]) -> None:
    """Derivatives of first and second order are those of the integers that forward was given."""
    function, integers = FUNCTIONS[name]
    x = Tensor(np.random.default_rng(0).normal(size=(3, 4)), requires_grad=True)

    def derivatives(change: Callable[[Array], None]) -> list[Array]:
        buffer = integers.copy()
        output = (function(x, wrap(buffer)).tanh() ** 3).sum()
        change(buffer)
        (first,) = gradients(output, [x], create_graph=True)
        (second,) = gradients((first * first).sum(), [x])
        return [first.data, second]

    for found, expected in zip(derivatives(overwrite), derivatives(lambda _: None), strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- Indices -----------------------------------------------------------------------------------


def check_index(shape: tuple[int, ...], index: Any, in_arrays: Any = None) -> None:
    """First and second derivative of sum(w x[index]^3), by NumPy's unbuffered addition at the same index in arrays."""
    given_index, index = index, index if in_arrays is None else in_arrays
    random = np.random.default_rng(0)
    x = Tensor(random.normal(size=shape), requires_grad=True)
    direction = random.normal(size=shape)
    taken = x.data[index]
    weights = random.normal(size=np.shape(taken))

    def scattered(values: Array) -> Array:
        result = np.zeros(shape)
        np.add.at(result, index, values)
        return result

    (first,) = gradients((x[given_index] ** 3 * weights).sum(), [x], create_graph=True)
    np.testing.assert_allclose(first.data, scattered(3 * taken**2 * weights), rtol=1e-12, atol=1e-14)
    (second,) = gradients((first * direction).sum(), [x])
    expected = scattered(6 * taken * weights * direction[index])
    np.testing.assert_allclose(second, expected, rtol=1e-12, atol=1e-14)


@given(st.data(), t.shapes(min_length=1))
def test_every_index_has_the_derivatives_of_its_array(data: st.DataObject, shape: tuple[int, ...]) -> None:
    check_index(shape, data.draw(t.indices(shape, forms=tuple(t.INDEX_FORMS))))


SEQUENCES: dict[str, Any] = {
    "tuple": (1, 1, -1),
    "nested tuples": ((1, 1), (0, 1)),
    "list of a list": [[1, 1]],
    "array.array": array.array("b", [1, 1, 0]),
    "unsigned bytes": bytearray([1, 1, 0]),
    "memoryview": memoryview(array.array("q", [1, 1, 0])),
    "deque": collections.deque([1, 1, 0]),
    "UserList": collections.UserList([1, 1, 0]),
    "range": range(2),
    "short integers": np.array([1, 1, 0], dtype=np.int8),
    "Tensors": (Tensor(1), Tensor(1), np.int16(0)),
    "Tensor": Tensor([1, 1, 0]),
    "booleans": (True, False, True),
    "nothing": (),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_sequence_is_an_array_in_an_index(name: str) -> None:
    part = SEQUENCES[name]
    same = np.asarray(part, dtype=None if len(part) else int)
    for here, plain in (
        ((part, slice(None)), (same, slice(None))),
        ((slice(None), part), (slice(None), same)),
        ((..., part, None), (..., same, None)),
        ((part, 1), (same, 1)),
    ):
        check_index((3, 3), here, plain)
    if not isinstance(part, tuple):  # which has a part for each axis
        check_index((3, 2), part, same)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_narrow_integers_count_rows_beyond_their_range(kind: Any) -> None:
    """The number of rows does not fit into the dtype of the indices."""
    for function in (ops.embedding, lambda weight, i: weight[i], lambda weight, i: weight[i, :]):
        weight = Tensor(np.zeros((300, 2)), requires_grad=True)
        function(weight, np.array([3, 100, 3], dtype=kind)).sum().backward()
        assert weight.grad[3, 0] == 2
        assert weight.grad[100, 1] == 1
        assert weight.grad.sum() == 6

"""The gradient laboratory on many functions: no right backward is refused, and no wrong one passes.

At random points, at zeros and equal elements, at tiny inputs, and at what hypothesis draws, in float64 and float32.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from functions import ON_ONE_SIDE, RIGHT, SHARED, WRONG, Array, Right, Wrong
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from tinyllm.testing import GradientError, check_vjp, gradcheck
from tinyllm.testing import strategies as t

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])


def random_inputs(right: Right, dtype: Any) -> list[Array]:
    rng = np.random.default_rng(zlib.crc32(str(right.shapes).encode()))
    return [
        *(rng.uniform(right.low, right.high, shape).astype(dtype) for shape in right.shapes),
        *right.constants,
    ]


def equal_inputs(right: Right, dtype: Any, value: float, other: float | None = None) -> list[Array]:
    """All elements the same, or every second `other`, and no number outside the domain."""
    first, second = (max(v, right.low) for v in (value, value if other is None else other))
    inputs = [np.resize(np.array([first, second], dtype), shape) for shape in right.shapes]
    return [*inputs, *right.constants]


POINTS: dict[str, Callable[[Right, Any], list[Array]]] = {
    "random": random_inputs,
    "zeros": lambda right, dtype: equal_inputs(right, dtype, 0.0),
    "one and minus one": lambda right, dtype: equal_inputs(right, dtype, 1.0, -1.0),
    "tiny": lambda right, dtype: equal_inputs(right, dtype, 1e-12),
    "mixed": lambda right, dtype: [
        np.where(np.arange(x.size).reshape(x.shape) % 2, x, max(right.low, 0)).astype(dtype) if x.dtype == dtype else x
        for x in random_inputs(right, dtype)
    ],
}  # fmt: skip


def test_there_are_many() -> None:
    assert len(RIGHT) >= 60
    assert len(WRONG) >= 60


@DTYPES
@pytest.mark.parametrize("name", RIGHT)
def test_no_right_backward_is_refused(name: str, dtype: Any) -> None:
    right = RIGHT[name]
    for point in POINTS.values():
        check_vjp(right.function, right.backward, point(right, dtype))


@DTYPES
@pytest.mark.parametrize("wrong", [*WRONG, *ON_ONE_SIDE], ids=lambda wrong: wrong.name)
def test_no_wrong_backward_passes(wrong: Wrong, dtype: Any) -> None:
    right = RIGHT[wrong.name]
    for place, point in POINTS.items():
        with pytest.raises(GradientError) as caught:
            check_vjp(right.function, wrong.backward, point(right, dtype))
        if place == "random":
            assert re.search(wrong.cause, caught.value.cause), caught.value


@DTYPES
@pytest.mark.parametrize("wrong", SHARED, ids=lambda wrong: wrong.name)
def test_a_gradient_is_not_given_to_each_of_several_equal_elements(wrong: Wrong, dtype: Any) -> None:
    right = RIGHT[wrong.name]
    pairs = [(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (0.0, 0.0)]
    for first, second in pairs[
        : 3 if wrong.name == "largest magnitude" else 4
    ]:  # at 0 it has a kink whatever moves
        with pytest.raises(GradientError) as caught:
            check_vjp(right.function, wrong.backward, equal_inputs(right, dtype, first, second))
        assert re.search(wrong.cause, caught.value.cause), caught.value


def drawn(data: st.DataObject, right: Right) -> list[Array]:
    dtype = data.draw(t.floating_dtypes())
    arrays = [data.draw(t.arrays(shape, dtype, right.low, right.high)) for shape in right.shapes]
    return [*arrays, *right.constants]


@given(st.data(), st.sampled_from(sorted(RIGHT)))
def test_no_right_backward_is_refused_where_hypothesis_goes(data: st.DataObject, name: str) -> None:
    check_vjp(RIGHT[name].function, RIGHT[name].backward, drawn(data, RIGHT[name]))


@given(st.data(), st.sampled_from(WRONG))
def test_no_wrong_backward_passes_where_hypothesis_goes(data: st.DataObject, wrong: Wrong) -> None:
    with pytest.raises(GradientError):
        check_vjp(RIGHT[wrong.name].function, wrong.backward, drawn(data, RIGHT[wrong.name]))


# ---- Any number of any dtype -------------------------------------------------------------------

EVERYWHERE: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "square": (lambda x: x * x, lambda g, x: 2 * g * x),
    "add 5": (lambda x: x + 5, lambda g, x: g),
    "sine": (np.sin, lambda g, x: g * np.cos(x)),
    "exp": (np.exp, lambda g, x: g * np.exp(x)),
    "x |x|": (lambda x: x * np.abs(x), lambda g, x: 2 * g * np.abs(x)),
    "relu": (lambda x: np.maximum(x, 0), lambda g, x: g * (x > 0)),
    "log (1 + x^2)": (lambda x: np.log1p(x * x), lambda g, x: 2 * g * x / (1 + x * x)),
    "softmax": (lambda x: RIGHT["softmax"].function(x), lambda g, x: RIGHT["softmax"].backward(g, x)),
    "centred": (lambda x: x - x.mean(), lambda g, x: g - g.mean()),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where numbers overflow
@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("name", EVERYWHERE)
@given(data=st.data())
def test_right_at_every_number_and_twice_the_gradient_is_not(
    name: str, width: Any, data: st.DataObject
) -> None:
    function, backward = EVERYWHERE[name]
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    x = data.draw(numpy_strategies.arrays(f"f{width // 8}", st.integers(2, 3), elements=numbers))
    if not np.isfinite(function(x)).all() or not np.isfinite(backward(np.ones_like(x), x)).all():
        return
    check_vjp(function, backward, x)
    if name not in ("relu", "softmax", "exp"):  # whose gradients are zero in places, and so is twice as much
        with pytest.raises(GradientError):
            check_vjp(function, lambda g, x: 2 * backward(g, x), x)


TINY: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "x + 5": (lambda x: x + 5, [1e-12]),
    "log (x + 1)": (lambda x: (x + 1).log(), [1e-10]),
    "log (x + 1) further down": (lambda x: (x + 1).log(), [1e-17, -1e-14]),
    "log": (lambda x: x.log(), [1e-10, 1e-100]),
    "cube": (lambda x: x * x * x, [1e-120]),
    "exp": (lambda x: x.exp(), [-730.0]),
    "reciprocal": (lambda x: 1 / x, [1e-10, 3.0, -1e-80]),
    "absolute": (lambda x: x.abs(), [1e-9, 1e-100, -1e-5]),
    "cube above zero": (lambda x: x.relu() ** 3, [2e-8, 1e-9, 0.0, -1.0]),
    "beside a large number": (lambda x: x + 1e12, [1e-3, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_steps_and_tolerances_have_a_floor(name: str) -> None:
    function, x = TINY[name]
    gradcheck(function, np.array(x))
    gradcheck(function, np.array(x), method="central differences")


def test_a_wrong_gradient_at_a_tiny_input_is_found_there() -> None:
    for function, slope in ((np.log, lambda x: 1 / x), (lambda x: np.log(1 + x), lambda x: 1 / (1 + x))):
        for x in (np.array([1e-10]), np.array([1e-3, 1e-7])):
            check_vjp(function, lambda g, x: g * slope(x), x, nearby=False)  # noqa: B023
            with pytest.raises(GradientError, match=r"1\.01 times"):
                check_vjp(function, lambda g, x: 1.01 * g * slope(x), x, nearby=False)  # noqa: B023


@pytest.mark.parametrize("x", [[0.0, 0.0, 0.0], [1.0, 0.0, -2.0]])
def test_a_second_derivative_that_does_not_exist_is_a_kink(x: list[float]) -> None:
    for function in (lambda x: x.relu() ** 2, lambda x: x.relu() * x.relu(), lambda x: x * x.abs()):
        result = gradcheck(function, np.array(x), order=2, method="central differences")
        assert {index for name, index in result.kinks if name == "arguments[0]"} == {
            (i,) for i, value in enumerate(x) if value == 0
        }


def test_a_staircase_is_not_taken_for_a_slope() -> None:
    gradcheck(lambda x, y: x % y, [np.full(2, 0.5), np.full(2, 0.5)], order=2)
    gradcheck(lambda x, y: x % y, [np.zeros(2), np.full(2, 0.5)], order=2)


# ---- What cannot be judged is said -------------------------------------------------------------


def only_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def narrow(*inputs: Array) -> Any:
        if any(x.dtype != np.float32 for x in inputs):
            raise TypeError("float32 alone")
        return function(*inputs)

    return narrow


def test_a_large_value_hides_no_gradient() -> None:
    """The function's value is 8e6, known to 0.5 in float32, and the gradient of b is 1."""
    inputs = [np.ones(8, "f4"), np.ones(3, "f4")]
    function = RIGHT["large sum beside"].function
    for f in (function, only_float32(function)):
        check_vjp(f, lambda g, x, b: (g * np.float32(2e6) * x, g * np.ones_like(b)), inputs)
        for factor in (0, 2):
            with pytest.raises(GradientError, match=r"argument 1 \(.*\): (zero gradient|.* 2.0 times)"):
                check_vjp(f, lambda g, x, b: (g * 2e6 * x, factor * g * np.ones_like(b)), inputs)  # noqa: B023


def test_a_backward_that_is_wrong_in_float32_alone() -> None:
    def backward(g: Array, x: Array) -> Array:
        return 2 * g * x * (1 if x.dtype == np.float64 else np.float32(1.01))

    check_vjp(lambda x: x * x, backward, np.array([1.0, 2.0]))
    for size, cause in ((3, r"1\.0(1|0999998) times"), (5000, "wrong in float32 alone")):
        with pytest.raises(GradientError, match=cause):
            check_vjp(lambda x: x * x, backward, np.linspace(1, 2, size, dtype=np.float32))


def test_a_tolerance_above_the_gradient_is_said() -> None:
    def hidden(x: Array) -> Array:
        return np.tanh(x) + 1e20

    x = np.array([0.5, 2.0])
    with pytest.raises(
        GradientError, match=r"cannot be judged: rounding allows an error of .*, and the gradient is"
    ):
        check_vjp(hidden, lambda g, x: g * (1 - np.tanh(x) ** 2), x)
    result = check_vjp(
        lambda x: np.where([True, False], np.tanh(x), hidden(x)), lambda g, x: g * (1 - np.tanh(x) ** 2), x
    )
    assert result.unjudged == (("x", (1,)),)
    assert check_vjp(np.tanh, lambda g, x: g * (1 - np.tanh(x) ** 2), x).unjudged == ()


# ---- Equal elements in order -------------------------------------------------------------------


def order_of(x: Array) -> Array:
    return np.argsort(x, kind="stable")


IN_ORDER: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "sorted": (np.sort, lambda g, x: g[np.argsort(order_of(x))]),
    "sorted downwards": (lambda x: -np.sort(-x), lambda g, x: g[np.argsort(order_of(-x))]),
    "squares of the two largest": (
        lambda x: np.sort(x)[-2:] ** 2,
        lambda g, x: np.concatenate([np.zeros(len(x) - 2), 2 * np.sort(x)[-2:] * g])[np.argsort(order_of(x))],
    ),
}
TIES = [[0, 0, 0, 0, 0], [1, 1, 1, 0, 2], [-1, 1, 1, -1, 1], [0, 0, 1, 1, 1]]


@DTYPES
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", IN_ORDER)
def test_equal_elements_may_be_taken_in_an_order(name: str, ties: list[int], dtype: Any) -> None:
    """One that moves takes a place far from its own, so that its gradient is not between its one-sided derivatives."""
    function, backward = IN_ORDER[name]
    for seed in range(3):
        check_vjp(function, lambda g, x: backward(g, x).astype(x.dtype), np.array(ties, dtype), seed=seed)


@DTYPES
@pytest.mark.parametrize("nearby", [True, False])
@pytest.mark.parametrize("ties", TIES[:3])
def test_an_order_excuses_no_other_mistake(ties: list[int], nearby: bool, dtype: Any) -> None:
    for wrong in (lambda g, x: 3 * IN_ORDER["sorted"][1](g, x), lambda g, x: g * 0 + g.sum()):
        with pytest.raises(GradientError):
            check_vjp(np.sort, wrong, np.array(ties, dtype), nearby=nearby)
    for kinked in (np.abs, lambda x: np.maximum(x, 0)):
        with pytest.raises(GradientError):
            check_vjp(kinked, lambda g, x: 1.5 * g, np.zeros(5, dtype), nearby=nearby)


# ---- Reports -----------------------------------------------------------------------------------


def test_a_report_counts_the_wrong_elements() -> None:
    def backward(g: Array, x: Array) -> Array:
        return g * np.where(np.arange(12).reshape(3, 4) % 5 == 0, -1, 1) * np.cos(x)

    with pytest.raises(GradientError, match="3 of 12 elements are wrong; the worst: index"):
        check_vjp(np.sin, backward, random_inputs(RIGHT["cosine"], np.float64))


def test_a_report_says_where_it_looked() -> None:
    zeros = [np.zeros(3), np.zeros(3)]
    with pytest.raises(GradientError, match="two are exchanged") as caught:
        check_vjp(np.multiply, lambda g, x, y: (g * x, g * y), zeros)
    assert "found near the given inputs, where zeros or equal elements hide it (nearby=False" in str(
        caught.value
    )
    check_vjp(np.multiply, lambda g, x, y: (g * x, g * y), zeros, nearby=False)
    # Where the function takes no other inputs, there is nothing else to look at.
    check_vjp(only_zeros, lambda g, x: 0 * g, np.zeros(3))


def only_zeros(x: Array) -> Array:
    if np.abs(x).max() > 0.2:
        raise ValueError("outside the domain")
    return x * x


def test_a_function_that_returns_several_arrays() -> None:
    for check in (
        lambda: check_vjp(lambda x: (x, x), lambda g, x: g, np.ones(2)),
        lambda: gradcheck(lambda x: [x, x], np.ones(2)),  # type: ignore[arg-type, return-value]
    ):
        with pytest.raises(TypeError, match=r"returns a (tuple|list) of 2.*lambda \*x: fn\(\*x\)\[0\]"):
            check()

"""The checks themselves: right gradients pass, wrong ones fail with the cause by name."""

import doctest
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.testing import (
    GradientError,
    check_vjp,
    compare,
    differences,
    gradcheck,
    gradient_function,
    numeric,
    numerical_gradient,
)
from tinyllm.testing import gradcheck as gradcheck_function

Array = npt.NDArray[Any]

RANDOM = np.random.default_rng(0)
A = RANDOM.uniform(-2, 2, (3, 4))
B = RANDOM.uniform(-2, 2, (4, 3))
SQUARE = RANDOM.uniform(-2, 2, (3, 3))
BIAS = RANDOM.uniform(-2, 2, 4)


def softmax(x: Array) -> Array:
    exponentials = np.exp(x)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def failure(fn: Callable[..., Any], vjp: Callable[..., Any], *inputs: Array) -> GradientError:
    with pytest.raises(GradientError) as caught:
        check_vjp(fn, vjp, inputs)
    return caught.value


# ---- Derivatives -------------------------------------------------------------------------------


def test_numerical_gradient_of_known_functions() -> None:
    x = np.array([0.3, 1.7])
    for method in ("auto", "complex step", "central differences"):
        (found,) = numerical_gradient(np.sin, [x], cotangent=[2.0, -1.0], method=method)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, [2 * np.cos(0.3), -np.cos(1.7)], rtol=1e-10)
    a, b = numerical_gradient(lambda a, b: a @ b, [A, B])
    np.testing.assert_allclose(a, np.ones((3, 3)) @ B.T, rtol=1e-13)
    np.testing.assert_allclose(b, A.T @ np.ones((3, 3)), rtol=1e-13)


def test_numerical_gradient_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        numerical_gradient(np.sin, [A], method="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cotangent has shape \(2,\), fn returns shape \(3, 4\)"):
        numerical_gradient(np.sin, [A], cotangent=[1.0, 2.0])


@pytest.mark.parametrize("x", [0.05, 1.0, 30.0, 1e-4, 1e5])
def test_error_bound_of_central_differences_holds(x: float) -> None:
    functions: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
        (np.sin, np.cos), (np.log, lambda v: 1 / v), (np.sqrt, lambda v: 0.5 / np.sqrt(v)), (np.tanh,
        lambda v: 1 / np.cosh(v) ** 2), (lambda v: v**3, lambda v: 3 * v**2),
    ]  # fmt: skip
    for f, slope in functions:
        with np.errstate(over="ignore"):
            exact = float(slope(x))
        found = differences.central_differences(f, [np.array([x])], 0, 0, np.ones(1))
        assert abs(found.value - exact) <= found.error + 1e-15 * abs(exact) + 1e-16 * abs(float(f(x)))
        assert found.error <= 1e-6 * max(abs(exact), abs(float(f(x)))) / min(x, 1.0)
        assert not found.kink


def test_central_differences_are_extrapolated() -> None:
    calls: list[float] = []

    def f(x: Array) -> Array:
        calls.append(float(x))
        return np.sin(x)

    found = differences.central_differences(f, [np.array(1.0)], 0, 0, np.array(1.0))
    assert abs(found.value - np.cos(1.0)) < found.error < 1e-11
    assert len(calls) <= 11  # five steps are enough where f is smooth


def test_steps_outside_the_domain_are_left_out() -> None:
    with np.errstate(invalid="ignore"):
        found = differences.central_differences(np.log, [np.array([1e-3, 1.0])], 0, 0, np.ones(2))
    assert abs(found.value - 1000) < found.error < 1e-3
    assert np.isnan(differences.central_differences(np.sqrt, [np.zeros(1)], 0, 0, np.ones(1)).value)


def test_any_memory_order_is_moved_in() -> None:
    order_f = np.asfortranarray(A)
    (found,) = numerical_gradient(lambda x: x * x, [order_f])
    np.testing.assert_allclose(found, 2 * A)
    gradcheck(lambda x: x * x, np.asfortranarray(A))


@pytest.mark.parametrize(
    ("fn", "method"),
    [
        (np.exp, "complex step"),
        (lambda x: np.where(x > 0.1, x, x * x), "complex step"),
        (lambda x: np.abs(x) * x, "central differences"),  # complex magnitudes are real
        (lambda x: np.sqrt(x * np.conj(x)) * x, "central differences"),  # right values, wrong derivative
        (lambda x: np.array([float(v) for v in x.ravel()]).reshape(x.shape) ** 2, "central differences"),
        (lambda x: x.astype(np.float64) ** 2, "central differences"),  # drops the imaginary part
    ],
)
def test_complex_step_only_where_analytic(fn: Callable[[Array], Array], method: str) -> None:
    def vjp(cotangent: Array, x: Array) -> Array:
        (gradient,) = numerical_gradient(fn, [x], cotangent, "central differences")
        return gradient

    assert check_vjp(fn, vjp, A, rtol=1e-8).method == method


# ---- What passes -------------------------------------------------------------------------------


def test_right_gradients_pass() -> None:
    result = check_vjp(lambda a, b: a @ b, lambda c, a, b: (c @ b.T, a.T @ c), [A, B])
    assert result.method == "complex step"
    assert result.complete
    assert result.comparisons == 24
    assert 0 < result.tolerance < 1e-12
    assert result.max_error < result.tolerance
    assert gradcheck(lambda x, y: (x @ y).tanh(), [A, Tensor(B)]).comparisons == 24
    assert gradcheck(lambda x: x * 2.0, 3.0).comparisons == 1


def test_integer_inputs_are_constants() -> None:
    indices = np.array([2, 0, 0])
    result = check_vjp(
        lambda table, i: table[i],
        lambda c, table, i: (np.add.reduce([np.eye(3)[i].T @ c]), None),
        [A, indices],
    )
    assert result.comparisons == 12
    gradcheck(lambda table, i: table[i.data], [A, indices])
    with pytest.raises(TypeError, match="nothing to differentiate by"):
        gradcheck(lambda x: x, np.array([1, 2]))


@pytest.mark.parametrize(
    ("fn", "x", "kinks"),
    [
        (ops.relu, [-1.0, 0.0, 2.0], {1}),
        (ops.absolute, [0.0, 1.0, 1e-9, 1e-4], {0}),
        (ops.max, [1.0, 3.0, 3.0], {1, 2}),
        (lambda x: ops.clip(x, -1.0, 1.0), [-1.0, 0.5, 1.0], {0, 2}),
        (lambda x: ops.maximum(x, 0.5), [0.5, 2.0], {0}),
    ],
)
def test_kinks_are_found_and_pass(fn: Callable[..., Tensor], x: list[float], kinks: set[int]) -> None:
    result = gradcheck(fn, np.array(x), method="central differences")
    assert {index for _, (index,) in result.kinks} == kinks


def test_gradient_outside_both_sides_of_a_kink_fails() -> None:
    def vjp(cotangent: Array, x: Array) -> Array:
        return cotangent * np.where(x == 0, 1.5, x > 0)

    error = failure(lambda x: np.maximum(x, 0), vjp, np.array([1.0, 0.0, -1.0]))
    assert error.index == (1,)


def test_float32_is_compared_with_float64() -> None:
    x = A.astype(np.float32)
    right = check_vjp(lambda x: x**2, lambda c, x: 2 * c * x, x)
    assert right.method == "complex step"
    assert right.tolerance < 1e-4
    assert "1.001" in failure(lambda x: x**2, lambda c, x: np.float32(2.002) * c * x, x).cause
    # A function that only runs in float32 gets what float32 can tell.
    only = check_vjp(lambda x: np.float32(x) ** 2, lambda c, x: 2 * c * x, x)
    assert only.method == "central differences"
    assert "1.005" in failure(lambda x: np.float32(x) ** 2, lambda c, x: np.float32(2.01) * c * x, x).cause


def test_second_order() -> None:
    assert gradcheck(lambda x, y: ops.softmax(x @ y), [A, B], order=2).comparisons == 33
    with pytest.raises(ValueError, match="order=3"):
        gradcheck(ops.exp, A, order=3)
    found = gradient_function(lambda x, y: x * y)(Tensor([2.0]), Tensor([3.0]), Tensor([10.0]))
    np.testing.assert_array_equal(found.numpy(), [30.0, 20.0])


def test_same_seed_same_result() -> None:
    first = gradcheck(ops.gelu, A, seed=3)
    assert first == gradcheck(ops.gelu, A, seed=np.random.default_rng(3))
    assert first != gradcheck(ops.gelu, A, seed=4)


# ---- What fails, and the cause -----------------------------------------------------------------


def test_sign() -> None:
    error = failure(lambda a, b: a @ b, lambda c, a, b: (c @ b.T, -(a.T @ c)), A, B)
    assert error.cause == "sign flipped"
    assert (error.argument, error.position) == ("b", 1)
    assert error.index is not None
    assert error.analytic == pytest.approx(-error.numeric)
    assert "ratio -1" in str(error)
    assert "argument 1 (b)" in str(error)
    assert str(error.index) in str(error)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.000001, 0.999999, 3.0, -2.0])
def test_constant_factor(factor: float) -> None:
    error = failure(np.sin, lambda c, x: factor * c * np.cos(x), A)
    assert f"{abs(factor)} times" in error.cause
    assert ("sign" in error.cause) == (factor < 0)


def test_mean_in_place_of_sum_and_uses_not_counted() -> None:
    error = failure(lambda x, b: x * b, lambda c, x, b: (c * b, (c * x).mean(0)), A, BIAS)
    assert "1/3: a mean where a sum belongs, over 3 elements" in error.cause
    error = failure(lambda x: x.mean(0), lambda c, x: c * np.ones_like(x), A)
    assert "3: the 1/3 of a mean over 3 elements is missing" in error.cause
    error = failure(lambda x: x * x, lambda c, x: c * x, A)
    assert "used twice when only one use is counted" in error.cause


def test_transposed() -> None:
    error = failure(lambda a: a @ SQUARE, lambda c, a: (c @ SQUARE.T).T, SQUARE)
    assert "transposed: the gradient is right with its axes in the order (1, 0)" in error.cause
    error = failure(np.exp, lambda c, x: (c * np.exp(x)).T.reshape(x.shape), A)
    assert "reshaped where axes had to be exchanged" in error.cause
    assert "(4, 3), the input (3, 4); transposed" in failure(np.exp, lambda c, x: (c * np.exp(x)).T, A).cause


def test_rolled_reversed_and_exchanged() -> None:
    error = failure(np.exp, lambda c, x: np.roll(c * np.exp(x), 2, axis=1), A)
    assert "shifted by 2 along axis 1" in error.cause
    assert "reversed along axis 0" in failure(np.exp, lambda c, x: (c * np.exp(x))[::-1], A).cause
    error = failure(lambda a, b: a * b, lambda c, a, b: (c * a, c * b), A, A + 1)
    assert "this is the gradient of argument 1 (b)" in error.cause


def test_broadcast_not_summed() -> None:
    error = failure(lambda x, b: x + b, lambda c, x, b: (c, c), A, BIAS)
    assert "not summed over broadcast axes: sum it over (0,)" in error.cause
    error = failure(lambda x, b: x * b, lambda c, x, b: (c * b, (c * x)[2]), A, BIAS)
    assert error.cause == "not summed over broadcast axis 0 of the output: it holds only slice 2"


def test_mean_not_subtracted() -> None:
    assert "mean not subtracted" in failure(softmax, lambda c, x: c * softmax(x), A).cause


def test_zero_and_not_finite() -> None:
    assert failure(np.sin, lambda c, x: 0 * c, A).cause.startswith("zero gradient")
    error = failure(np.sin, lambda c, x: np.where(x == x[1, 2], np.nan, c), A)
    assert (error.cause, error.index) == ("NaN at index (1, 2)", (1, 2))
    assert failure(np.sin, lambda c, x: c * np.inf, A).cause == "infinite at index (0, 0)"
    with pytest.raises(GradientError, match="zero gradient"):
        gradcheck(lambda x: x.detach() * x.detach(), A)


def test_wrong_number_shape_and_dtype() -> None:
    assert failure(np.multiply, lambda c, a, b: c, A, A).cause == "1 gradients for 2 inputs"
    assert failure(np.sin, lambda c, x: None, A).cause == "no gradient (None)"
    assert "it needs a reshape" in failure(np.sin, lambda c, x: c.ravel(), A).cause
    assert "has dtype float32, the input float64" in failure(np.sin, lambda c, x: np.float32(c), A).cause


def test_changes_in_place() -> None:
    def change_input(cotangent: Array, x: Array) -> Array:
        gradient = 2 * cotangent * x
        x *= 2
        return gradient

    def change_cotangent(cotangent: Array, x: Array) -> Array:
        cotangent *= 2 * x
        return cotangent.copy()

    def change_forward(x: Array) -> Array:
        x *= 2
        return x * x

    assert "the backward changed its argument" in failure(lambda x: x * x, change_input, A.copy()).cause
    assert "changed its cotangent" in failure(lambda x: x * x, change_cotangent, A).cause
    assert "the function changed its argument" in failure(change_forward, lambda c, x: c, A.copy()).cause


def test_functions_that_cannot_be_checked() -> None:
    random = np.random.default_rng(0)
    assert (
        "different values for the same inputs"
        in failure(lambda x: x + random.normal(), lambda c, x: c, A).cause
    )
    with np.errstate(divide="ignore"):
        assert "not finite" in failure(lambda x: 1 / (x * 0), lambda c, x: c, A).cause
    with pytest.raises(TypeError, match="returns dtype int64"):
        check_vjp(lambda x: np.argmax(x, axis=0), lambda c, x: x, A)
    with pytest.raises(TypeError, match="not a Tensor; use check_vjp"):
        gradcheck(lambda x: x.data, A)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of"):
        gradcheck(ops.exp, A, method="guess")  # type: ignore[arg-type]
    with pytest.raises(GradientError, match="no numerical derivative"):
        check_vjp(np.sqrt, lambda c, x: c, np.zeros(3), nearby=False)


def test_names_of_arguments() -> None:
    def fn(first: Array, *rest: Array) -> Array:
        return first * rest[0] * rest[1]

    error = failure(fn, lambda c, x, y, z: (c * y * z, c * x * z, -c * x * y), A, A, A)
    assert (error.argument, error.position) == ("rest[1]", 2)
    # NumPy tells the names of its functions' arguments only in part.
    assert failure(np.multiply, lambda c, a, b: (c * b, -c * a), A, A).position == 1


# ---- Large inputs ------------------------------------------------------------------------------

LARGE = np.random.default_rng(1).uniform(-2, 2, (250, 400))


@pytest.mark.parametrize(
    "fn", [ops.relu, ops.gelu, ops.softmax, lambda x: (x * x).mean(), lambda x: ops.max(x, axis=0)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_inputs_pass_by_projections(fn: Callable[..., Tensor], dtype: Any) -> None:
    start = time.perf_counter()
    result = gradcheck(fn, LARGE.astype(dtype))
    assert not result.complete
    # In float32 a direction may say too little, and a sample of elements is compared as well.
    assert result.comparisons == 4 or dtype == np.float32
    assert time.perf_counter() - start < 20


def test_large_inputs_by_central_differences() -> None:
    fn = lambda x: x.astype(np.float64) * (x > 0)  # noqa: E731 (casts complex numbers away)
    result = check_vjp(fn, lambda c, x: c * (x > 0), LARGE[:50])
    assert result.method == "central differences"
    with pytest.raises(GradientError, match=r"1\.001 times"):
        check_vjp(fn, lambda c, x: 1.001 * c * (x > 0), LARGE[:50])


def test_one_wrong_element_of_many_is_found() -> None:
    def vjp(cotangent: Array, x: Array) -> Array:
        gradient = 2 * cotangent * x
        gradient[123, 45] += 0.01
        return gradient

    assert failure(lambda x: x * x, vjp, LARGE).index == (123, 45)


@pytest.mark.parametrize(
    ("vjp", "cause"),
    [
        (lambda c, x: -2 * c * x, "sign flipped"),
        (lambda c, x: 2.000002 * c * x, "1.000001 times"),
        (lambda c, x: (2 * c * x)[::-1, ::-1].T.reshape(x.shape), "no simple way"),
        (lambda c, x: np.roll(2 * c * x, 1, axis=1), "shifted by 1 along axis 1"),
    ],
)
def test_large_inputs_fail_with_the_cause(vjp: Callable[..., Any], cause: str) -> None:
    assert cause in failure(lambda x: x * x, vjp, LARGE).cause


def test_docstrings_hold() -> None:
    modules = [compare, differences, numeric, __import__("sys").modules[gradcheck_function.__module__]]
    results = [doctest.testmod(m, optionflags=doctest.ELLIPSIS, raise_on_error=False) for m in modules]
    assert sum(result.attempted for result in results) > 8
    assert sum(result.failed for result in results) == 0


def test_a_running_sum_the_wrong_way_is_named() -> None:
    x = np.random.default_rng(3).normal(size=(3, 4))
    with pytest.raises(GradientError, match="wrong end along axis 1"):
        check_vjp(lambda x: x.cumsum(axis=1), lambda u, x: u.cumsum(axis=1), x)
    check_vjp(lambda x: x.cumsum(axis=1), lambda u, x: u[:, ::-1].cumsum(axis=1)[:, ::-1], x)


def test_overwritten_rows_are_named_with_the_index_that_repeats_them() -> None:
    table, rows = np.random.default_rng(4).normal(size=(5, 2)), np.array([3, 1, 3, 0, 1])

    def overwrites(u: np.ndarray, table: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, None]:
        gradient = np.zeros_like(table)
        gradient[rows] = u
        return gradient, None

    with pytest.raises(GradientError, match=r"rows 1, 3 of 5.*argument 1 \(rows\).*overwrite each other"):
        check_vjp(lambda table, rows: table[rows], overwrites, [table, rows])

"""Forward mode: its rules against differences, jvp against backward, and both against each other in every nesting."""

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import gradients, ops
from tinyllm.autograd import forward_mode, grad, hvp, jvp, no_grad, use_formulas, vjp
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.models import ModelConfig, TransformerLM

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from test_registry import CASES, DTYPES, cotangent_of, draw, function, leaves

Array = np.ndarray[Any, Any]


def along(f: Callable[..., Tensor], xs: list[Array], vs: list[Array]) -> Array:
    """The derivative of f along vs in float64, by central differences extrapolated to step 0: to about 1e-9."""

    def difference(h: float) -> Array:
        with use_formulas():
            above, below = (
                f(*[Tensor(x + side * h * v) for x, v in zip(xs, vs, strict=True)]) for side in (1, -1)
            )
        return (above.data - below.data) / (2 * h)

    return (4 * difference(5e-5) - difference(1e-4)) / 3


def directions(xs: list[Array], seed: int = 5) -> list[Array]:
    random = np.random.default_rng(seed)
    return [np.asarray(random.standard_normal(x.shape), dtype=x.dtype) for x in xs]


def near(actual: Any, expected: Any, units: float, dtype: Any) -> None:
    """Equal to `units` of the dtype's precision, relative to the largest element, or to 1."""
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=units * float(np.finfo(dtype).eps) * scale)


# ---- Every op ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case"), CASES)
def test_jvp_is_the_derivative(op: type[Op], case: Any) -> None:
    xs = draw(op, case)
    vs = directions(xs)
    output, tangent = jvp(function(op, case), xs, vs)
    expected = function(op, case)(*[Tensor(x) for x in xs]).data
    near(output.data, expected, 64, np.float64)
    assert tangent.dtype == output.dtype == expected.dtype
    slopes = along(function(op, case), xs, vs)
    np.testing.assert_allclose(
        tangent.data, slopes, rtol=1e-7, atol=1e-7 * max(1, np.abs(slopes).max(initial=0))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_jvp_and_backward_are_transposed(op: type[Op], case: Any, dtype: Any) -> None:
    xs = draw(op, case, dtype)
    vs = directions(xs)
    output, tangent = jvp(function(op, case), xs, vs)
    assert output.dtype == tangent.dtype
    assert output.dtype == dtype or op.changes_dtype
    u, inputs = cotangent_of(output), leaves(xs)
    pulled = gradients(function(op, case)(*inputs), inputs, u)
    terms = [g * v for g, v in zip(pulled, vs, strict=True)]
    size = 1 + sum(float(np.abs(term).sum()) for term in terms)
    forward, backward = float((u * tangent.data).sum()), sum(float(term.sum()) for term in terms)
    assert abs(forward - backward) <= 256 * np.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_hessians_forward_over_reverse_and_reverse_over_forward(op: type[Op], case: Any, dtype: Any) -> None:
    xs = draw(op, case, dtype)
    vs = directions(xs)
    u = cotangent_of(function(op, case)(*[Tensor(x) for x in xs]))

    def scalar(*inputs: Any) -> Tensor:
        return (function(op, case)(*inputs) * u).sum()

    for i, expected in enumerate(hvp(scalar, xs, vs)):
        for found in (
            jvp(grad(scalar, i), xs, vs)[1],
            grad(lambda *inputs: jvp(scalar, inputs, vs)[1], i)(*xs),
        ):
            assert found.dtype == dtype
            near(found.data, expected.data, 1024, dtype)


# ---- Every rule --------------------------------------------------------------------------------

BINARY_RANGES = {np.power: (0.5, 2.0), np.divide: (0.5, 2.0)}
UNARY_RANGES = {
    **dict.fromkeys((np.sqrt, np.cbrt, np.log, np.log2, np.log10, np.reciprocal, np.log1p), (0.5, 2.0)),
    **dict.fromkeys((np.arcsin, np.arccos), (-0.8, 0.8)),
}


@pytest.mark.parametrize("ufunc", forward_mode.DERIVATIVES, ids=lambda ufunc: ufunc.__name__)
def test_rule_of_a_function_of_elements(ufunc: np.ufunc) -> None:
    random = np.random.default_rng(0)
    low, high = (BINARY_RANGES if ufunc.nin == 2 else UNARY_RANGES).get(ufunc, (-2.0, 2.0))
    xs = [random.uniform(low, high, shape) for shape in ((3, 4), (4,))[: ufunc.nin]]
    compute: Callable[..., Tensor] = lambda *inputs: Tensor(ufunc(*[x.data for x in inputs]))  # noqa: E731
    for moves in ((1, 1), (1, 0), (0, 1)) if ufunc.nin == 2 else ((1,),):
        vs = [v * move for v, move in zip(directions(xs), moves, strict=True)]
        slopes = along(compute, xs, vs)
        np.testing.assert_allclose(jvp(compute, xs, vs)[1].data, slopes, rtol=1e-7, atol=1e-7)
        if moves != (1, 1):  # the other operand is an array on either side
            still = [None if move else x for x, move in zip(xs, moves, strict=True)]
            alone = functools.partial(_beside, ufunc, still)
            place = moves.index(1)
            found = jvp(alone, [xs[place]], [vs[place]])[1]
            np.testing.assert_allclose(found.data, slopes, rtol=1e-7, atol=1e-7)


def _beside(ufunc: np.ufunc, still: list[Any], x: Tensor) -> Tensor:
    return Tensor(ufunc(*[x.data if operand is None else operand for operand in still]))


_SQUARE = np.random.default_rng(1).uniform(0.5, 2.0, (3, 3))
WHOLE: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(axis=(0, 2), keepdims=True), "mean": lambda x: np.mean(x, axis=1),
    "max": lambda x: x.max(axis=-1), "min": lambda x: np.min(x), "prod": lambda x: x.prod(axis=(0, -1)),
    "prod of all": lambda x: x.prod(), "prod with zeros": lambda x: (x - x[0, :1, :1]).prod(axis=1),
    "prod kept": lambda x: np.prod(x, axis=1, keepdims=True), "prod of none": lambda x: x[:, :0].prod(axis=1),
    "cumsum": lambda x: x.cumsum(axis=1), "cumprod": lambda x: np.cumprod(x - x[:, :, :1], axis=-1),
    "cumprod of all": lambda x: x.cumprod(), "diff": np.diff, "reshape": lambda x: x.reshape(3, -1),
    "ravel": lambda x: x.ravel(), "transpose": lambda x: x.transpose(2, 0, 1), "T": lambda x: x.T * 2,
    "swapaxes": lambda x: x.swapaxes(0, -1), "moveaxis": lambda x: np.moveaxis(x, 0, 2),
    "squeeze": lambda x: x[:1].squeeze(axis=0), "expand_dims": lambda x: np.expand_dims(x, (0, 2)),
    "broadcast_to": lambda x: np.broadcast_to(x, (2, *x.shape)), "flip": lambda x: np.flip(x, 1),
    "roll": lambda x: np.roll(x, 2, axis=2), "repeat": lambda x: x.repeat(2, axis=1),
    "tile": lambda x: np.tile(x, 2), "diagonal": lambda x: x.diagonal(axis1=1, axis2=2),
    "trace": lambda x: x.trace(axis1=1, axis2=2), "diag": lambda x: np.diag(x[0, 0]), "tril": np.tril,
    "triu": lambda x: np.triu(x, 1), "take": lambda x: x.take(np.array([1, 1, 0]), axis=1),
    "take_along_axis": lambda x: np.take_along_axis(x, np.argsort(_SQUARE)[None], axis=1),
    "concatenate": lambda x: np.concatenate([x, _SQUARE[None], 2 * x]), "stack": lambda x: np.stack((x, -x), axis=1),
    "vstack": lambda x: np.vstack([x, x]), "hstack": lambda x: np.hstack([x, x * x]),
    "einsum": lambda x: np.einsum("bij,jk,bkl->bil", x, _SQUARE, x), "dot": lambda x: x.dot(_SQUARE),
    "inner": lambda x: np.inner(x, x), "outer": lambda x: np.outer(_SQUARE, x), "matmul": lambda x: _SQUARE @ x @ x,
    "tensordot": lambda x: np.tensordot(x, _SQUARE, axes=1), "pad": lambda x: np.pad(x, 1, constant_values=3.0),
    "where": lambda x: np.where(x > 1, x * x, 2.0), "where of a constant": lambda x: np.where(x > 1, _SQUARE, x),
    "clip": lambda x: x.clip(0.9, None), "clip by itself": lambda x: np.clip(x, x.mean(), x.max() - 0.1),
    "sort": lambda x: np.sort(x, axis=1), "index": lambda x: x[..., [0, 0, 2], 1:],
    "mask": lambda x: x[_SQUARE[None] > 1],
    "astype": lambda x: x.astype("float64"), "rows": lambda x: sum(row * row for row in x[0]),
    "shapes": lambda x: x * (x.size + x.ndim + len(x) + np.ones_like(x) + np.zeros_like(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_rule_of_a_function_of_arrays(name: str) -> None:
    x = np.random.default_rng(2).uniform(0.5, 2.0, (1, 3, 3))
    compute: Callable[[Any], Tensor] = lambda x: Tensor(WHOLE[name](x.data))  # noqa: E731
    vs = directions([x])
    output, tangent = jvp(compute, [x], vs)
    np.testing.assert_array_equal(output.data, compute(Tensor(x)).data)
    np.testing.assert_allclose(tangent.data, along(compute, [x], vs), rtol=1e-7, atol=1e-7)


def test_every_rule_is_tested() -> None:
    functions = {*forward_mode.FUNCTIONS, *forward_mode.LINEAR, *forward_mode.MULTILINEAR}
    assert {function.__name__ for function in functions} <= {name.split(" ")[0] for name in WHOLE}


def test_what_is_constant_in_pieces_has_no_tangent() -> None:
    x = np.array([-1.5, 0.5, 2.5])
    for rounded in (np.sign, np.floor, np.ceil, np.rint, np.trunc, lambda x: x // 2, lambda x: x > 0,
                     lambda x: x.argmax(), np.argsort, np.isfinite):  # fmt: skip
        output, tangent = jvp(lambda x, f=rounded: Tensor(f(x.data) * 1.0), [x], [np.ones(3)])
        np.testing.assert_array_equal(output.data, rounded(x) * 1.0)
        assert not tangent.data.any()
        assert tangent.shape == output.shape


# ---- Dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_astype_carries_the_tangent(dtype: str) -> None:
    output, tangent = jvp(lambda x: (x.astype(dtype) * 3).sum(), [[2.0]], [[1.0]])
    assert (output.item(), tangent.item(), tangent.dtype) == (6.0, 3.0, np.dtype(dtype))
    there_and_back = jvp(lambda x: (x * x).astype(dtype).astype("float32"), [3.0], [1.0])[1]
    assert (there_and_back.item(), there_and_back.dtype) == (6.0, np.float32)


def test_integers_and_booleans_have_no_tangent() -> None:
    tangents = jvp(lambda x: x.astype("int64") * x + (x > 1) * x, [np.array([2.5, -1.5])], [np.ones(2)])[1]
    np.testing.assert_array_equal(tangents.data, [2 + 1, -1 + 0])
    output, tangent = jvp(lambda x: x * x, [3], [2])  # given, they are numbers
    assert (output.item(), tangent.item(), tangent.dtype) == (9.0, 12.0, np.float32)


def test_complex_numbers_are_refused() -> None:
    for values in (1j, [1.0, 2j], np.ones(2, "complex64")):
        with pytest.raises(TypeError, match="complex"):
            Tensor(values)
        with pytest.raises(TypeError, match="complex"):
            Tensor([1.0, 2.0]) * values
        with pytest.raises(TypeError, match="complex"):
            jvp(lambda x: x, [np.ones(np.shape(values))], [values])


# ---- Edges of the domain -----------------------------------------------------------------------


def test_outside_the_domain_is_nan() -> None:
    for f in (ops.log, ops.sqrt, ops.rsqrt, lambda x: ops.log1p(x - 1), lambda x: x**0.5):
        with np.errstate(invalid="ignore"):
            output, tangent = jvp(f, [-1.0], [1.0])
        assert np.isnan([output.item(), tangent.item()]).all()


def test_powers_of_zero() -> None:
    zeros, ones = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    exponents = np.array([0.0, 1.0, 2.0], "f4")
    np.testing.assert_array_equal(jvp(lambda x: x**exponents, [zeros], [ones])[1].data, [0, 1, 0])
    for n, slope in ((0, 0.0), (1, 1.0), (2, 0.0)):
        assert jvp(lambda x, n=n: x**n, [0.0], [1.0])[1].item() == slope
    np.testing.assert_array_equal(jvp(lambda b: Tensor(zeros) ** b, [exponents], [ones])[1].data, [0, 0, 0])
    assert jvp(lambda b: 0.0**b, [2.0], [1.0])[1].item() == 0


def test_what_a_mask_leaves_out_does_not_move() -> None:
    """However steep the function is there, as in backward: a tangent of 0 stays 0."""
    x = np.array([-2.0, 0.0, 4.0])
    for f, slopes in (
        (lambda x: ops.relu(x).sqrt(), [0, 0, 0.25]),
        (lambda x: ops.log(ops.relu(x)), [0, 0, 0.25]),
        (lambda x: 1 / ops.relu(x), [0, 0, -1 / 16]),
        (lambda x: ops.relu(x) ** 0.5, [0, 0, 0.25]),
        (lambda x: ops.rsqrt(ops.relu(x)), [0, 0, -1 / 16]),
        (lambda x: ops.exp(ops.where(x > 0, x, np.inf)), [0, 0, np.exp(4)]),
    ):
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(jvp(f, [x], [np.ones(3)])[1].data, slopes, rtol=1e-15)


# ---- Kinks -------------------------------------------------------------------------------------

TIES = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 0.5])
KINKED: dict[str, Callable[..., Tensor]] = {
    "relu": ops.relu,
    "absolute": ops.absolute,
    "clip": lambda x: ops.clip(x, -1, 0.5),
    "clip above": lambda x: ops.clip(x, None, 1),
    "maximum": lambda x: ops.maximum(x, TIES),
    "minimum": lambda x: ops.minimum(x, np.abs(TIES)),
    "maximum of itself": lambda x: ops.maximum(x, x),
    "max": lambda x: ops.stack([x.max(), x.abs().max(), (x * 0).max()]),
    "min": lambda x: ops.stack([x.min(), x.abs().min(), (x * 0).min()]),
    "max of rows": lambda x: x.reshape(3, 2).max(axis=0),
    "where": lambda x: ops.where(x >= 0.5, x, -x),
}


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("formulas", [False, True])
def test_jvp_and_backward_take_the_same_side_at_kinks(name: str, formulas: bool) -> None:
    """Element by element and exactly: column j of the Jacobian by jvp, row i by backward."""
    f = KINKED[name]
    columns = np.stack([jvp(f, [TIES], [unit])[1].data for unit in np.eye(6)], axis=1)
    for i, row in enumerate(columns):
        x = Tensor(TIES, requires_grad=True)
        with use_formulas(formulas):
            np.testing.assert_array_equal(gradients(f(x), [x], np.eye(len(columns))[i])[0], row)


def test_sides_at_kinks() -> None:
    for f, x, slope in (
        (ops.relu, 0.0, 0), (ops.absolute, 0.0, 0), (lambda x: ops.clip(x, 0, 1), 1.0, 1),
        (lambda x: ops.clip(x, 0, 1), 0.0, 1), (lambda x: ops.maximum(x, 2.0), 2.0, 0.5),
        (lambda x: ops.minimum(2.0, x), 2.0, 0.5), (lambda x: ops.stack([x, x, x * 0]).max(), 1.0, 1),
        (lambda x: ops.stack([x, Tensor(1.0), Tensor(1.0), x]).max(), 1.0, 0.5),
    ):  # fmt: skip
        assert jvp(f, [x], [1.0])[1].item() == slope


# ---- Saturation --------------------------------------------------------------------------------

SATURATING: dict[str, tuple[Callable[[Any], Tensor], float, float]] = {
    "sigmoid": (ops.sigmoid, 0, 0), "tanh": (ops.tanh, 0, 0), "silu": (ops.silu, 0, 1),
    "swiglu": (lambda x: ops.swiglu(x, Tensor(np.ones(x.shape, x.dtype))), 0, 1),
    "gelu": (ops.gelu, 0, 1), "erf": (ops.erf, 0, 0), "softplus": (ops.softplus, 0, 1), "elu": (ops.elu, 0, 1),
    "logaddexp": (lambda x: ops.logaddexp(x, x * 0), 0, 1), "log_sigmoid": (ops.log_sigmoid, 1, 0),
    "gelu_tanh": (lambda x: ops.gelu(x, "tanh"), 0, 1),
    "softmax": (lambda x: ops.softmax(ops.stack([x, x * 0]), 0)[0], 0, 0),
    "log_softmax": (lambda x: ops.log_softmax(ops.stack([x, x * 0]), 0)[0], 1, 0),
    "logsumexp": (lambda x: ops.logsumexp(ops.stack([x, x * 0]), 0), 0, 1),
}  # fmt: skip
"""Functions with their slopes far to the left and far to the right, where the second and third derivatives are 0."""


@pytest.mark.parametrize("formulas", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", SATURATING)
def test_derivatives_of_saturated_functions(name: str, dtype: str, formulas: bool) -> None:
    function, left, right = SATURATING[name]
    x = np.array([-1000, -100, 100, 1000], dtype)
    f: Callable[[Any], Tensor] = lambda x: function(x).sum()  # noqa: E731
    v = np.ones(4, dtype)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-40)  # e^-100 is 4e-44
    with use_formulas(formulas), warnings.catch_warnings():
        warnings.simplefilter("error")
        slopes = [left, left, right, right]
        same(jvp(function, [x], [v])[1].data, slopes)
        same(grad(f)(x).data, slopes)
        for second in (
            hvp(f, [x], [v])[0],
            jvp(grad(f), [x], [v])[1],
            grad(lambda x: jvp(f, [x], [v])[1])(x),
        ):
            same(second.data, np.zeros(4))
            assert second.dtype == dtype
        same(grad(lambda x: (hvp(f, [x], [v])[0] * v).sum())(x).data, np.zeros(4))


def test_sigmoid_is_smooth_through_zero() -> None:
    x = np.array([-1e-3, -0.0, 0.0, 1e-3])
    s = 1 / (1 + np.exp(-x))
    derivatives = [s, s * (1 - s), s * (1 - s) * (1 - 2 * s), s * (1 - s) * (1 - 6 * s + 6 * s * s)]
    f: Callable[[Any], Tensor] = ops.sigmoid
    for expected in derivatives:
        np.testing.assert_allclose(f(x).data, expected, rtol=0, atol=1e-15)
        f = lambda x, f=f: jvp(f, [x], [np.ones(4)])[1]  # noqa: E731
    assert jvp(ops.sigmoid, [-800.0], [1.0])[1].item() == jvp(ops.sigmoid, [-800.0], [1.0])[0].item() == 0


def test_the_tanh_form_of_gelu_of_very_large_numbers() -> None:
    x = np.array([-1e30, -1e14, 1e14, 1e30], "f4")
    for formulas in (False, True):
        with use_formulas(formulas), warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(grad(lambda x: ops.gelu(x, "tanh").sum())(x).data, [0, 0, 1, 1])
            leaf = Tensor(x, requires_grad=True)
            ops.gelu(leaf, "tanh").backward(np.ones(4, "f4"))
            np.testing.assert_array_equal(leaf.grad, [0, 0, 1, 1])


# ---- Nesting -----------------------------------------------------------------------------------


def test_perturbations_stay_apart() -> None:
    inner: Callable[[Any], Tensor] = lambda x: jvp(lambda y: x + y, [1.0], [1.0])[1]  # noqa: E731
    assert jvp(lambda x: (x * inner(x)).sum(), [3.0], [1.0])[1].item() == 1
    # d/dx x (d/dy x y^2 at y = 2) = d/dx 4 x^2
    assert jvp(lambda x: x * jvp(lambda y: x * y * y, [2.0], [1.0])[1], [3.0], [1.0])[1].item() == 24
    # The same with reverse mode inside, outside, and for both.
    assert jvp(lambda x: x * grad(lambda y: x * y * y)(2.0), [3.0], [1.0])[1].item() == 24
    assert grad(lambda x: x * jvp(lambda y: x * y * y, [2.0], [1.0])[1])(3.0).item() == 24
    assert grad(lambda x: x * grad(lambda y: x + y)(x))(2.0).item() == 1
    assert jvp(lambda x: x * grad(lambda y: x + y)(x), [2.0], [1.0])[1].item() == 1
    # An input that the function closes over as well is a constant there.
    x = Tensor(3.0, requires_grad=True)
    assert jvp(lambda y: x * y, [x], [1.0])[1].item() == grad(lambda y: x * y)(x).item() == 3


def test_third_derivatives_in_every_nesting() -> None:
    by_jvp: Callable[[Any], Any] = lambda f: lambda x: jvp(f, [x], [1.0])[1]  # noqa: E731
    for first in (by_jvp, grad):
        for second in (by_jvp, grad):
            for third in (by_jvp, grad):
                assert third(second(first(lambda x: x**4 + 1 / x)))(2.0).item() == 48 - 6 / 16


def test_backward_through_jvp_reaches_what_the_function_closes_over() -> None:
    w = Tensor([2.0, 3.0], requires_grad=True)
    output, tangent = jvp(lambda x: (ops.tanh(x * w) * w).sum(), [[0.5, -0.2]], [[1.0, 2.0]])
    (output + tangent).backward()
    ws, xs, vs = Tensor([2.0, 3.0]), Tensor([0.5, -0.2]), np.array([1.0, 2.0], "f4")

    def expected(w: Tensor) -> Tensor:
        y = ops.tanh(xs * w)
        return (y * w + (1 - y * y) * w * w * vs).sum()

    np.testing.assert_allclose(w.grad, grad(expected)(ws).data, rtol=1e-6)
    v = Tensor(1.5, requires_grad=True)
    jvp(lambda x: x**3, [2.0], [v])[1].backward()
    assert v.grad == 12


def test_derivatives_inside_jvp_of_every_kind() -> None:
    def f(x: Any) -> Tensor:
        return (x * x * x).sum()

    x, v = np.array([1.0, 2.0]), np.array([1.0, -1.0])

    def by_backward(x: Tensor) -> Tensor:
        leaf = Tensor(x, requires_grad=True)
        f(leaf).backward()
        return Tensor(leaf.grad)

    def by_gradients(x: Tensor) -> Tensor:
        leaf = Tensor(x, requires_grad=True)
        middle = leaf * 1
        return Tensor(gradients(f(middle), [middle, leaf])[0])

    for slope in (grad(f), lambda x: vjp(f, x)[1](1.0)[0], by_backward, by_gradients):
        np.testing.assert_allclose(jvp(slope, [x], [v])[1].data, 6 * x * v, rtol=1e-15)
    np.testing.assert_allclose(
        jvp(lambda x: hvp(f, [x], [np.ones(2)])[0], [x], [v])[1].data, 6 * v, rtol=1e-15
    )
    with no_grad():
        assert jvp(lambda x: x * x, [3.0], [1.0])[1].item() == 6
        assert (
            grad(lambda x: x * x)(3.0).item()
            == jvp(grad(lambda x: x * x * x / 3), [3.0], [1.0])[1].item()
            == 6
        )
        assert hvp(lambda x: x * x * x, [3.0], [1.0])[0].item() == 18
    with use_formulas(False):
        assert jvp(lambda x: use_formulas_off(x), [3.0], [1.0])[1].item() == pytest.approx(1.08810411)


def use_formulas_off(x: Tensor) -> Tensor:
    with use_formulas(False):
        return ops.silu(x)


# ---- What loses a tangent ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lose",
    [float, int, lambda x: x.item(), lambda x: x.numpy(), np.asarray, lambda x: np.array(x.data),
     lambda x: x.data.tolist(), lambda x: float(x.data), bool, lambda x: np.add(x.data, 1, out=np.zeros(()))],
)  # fmt: skip
def test_making_plain_numbers_of_a_tangent_is_refused(lose: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="jvp"):
        jvp(lambda x: x * lose(x * 2), [3.0], [1.0])


def test_data_carries_its_tangent_and_detach_drops_it() -> None:
    assert jvp(lambda x: Tensor(x.data * x.data), [3.0], [1.0])[1].item() == 6
    assert jvp(lambda x: x * x.detach(), [3.0], [1.0])[1].item() == 3
    assert jvp(lambda x: x * float(x.detach()), [3.0], [1.0])[1].item() == 3
    assert jvp(lambda x: x * 2 if x > 2 else x, [3.0], [1.0])[1].item() == 2
    assert "3." in repr(jvp(lambda x: (repr(x), repr(x.data), x)[2], [3.0], [1.0]))
    # What backward does not see and forward does is what the dot-product test is for.
    x = Tensor(3.0, requires_grad=True)
    assert gradients(x * Tensor(x.data), [x])[0] == 3
    assert jvp(lambda x: x * Tensor(x.data), [3.0], [1.0])[1].item() == 6


def test_functions_without_a_rule_say_so() -> None:
    with pytest.raises(TypeError, match=r"jvp has no rule for numpy\.i0; .*through"):
        jvp(lambda x: Tensor(np.i0(x.data)), [1.0], [1.0])
    with pytest.raises(TypeError, match=r"no rule for numpy\.add\.reduce"):
        jvp(lambda x: Tensor(np.add.reduce(x.data)), [[1.0]], [[1.0]])
    sinc = lambda x: Tensor(x.data.through(np.sinc, lambda x: (np.cos(np.pi * x) - np.sinc(x)) / x))  # noqa: E731
    assert jvp(sinc, [0.5], [2.0])[1].item() == pytest.approx(-8 / np.pi, rel=1e-6)


def test_outputs_that_do_not_depend_on_the_inputs() -> None:
    for constant in (Tensor([1.0, 2.0]), np.ones(2, "f4"), 3.0):
        output, tangent = jvp(lambda x, constant=constant: constant, [3.0], [1.0])
        assert tangent.shape == output.shape
        assert not tangent.data.any()
    with pytest.raises(ValueError, match=r"inputs have shapes \[\(2,\)\], tangents \[\(\)\]"):
        jvp(lambda x: x, [[1.0, 2.0]], [1.0])


# ---- A model -----------------------------------------------------------------------------------


def test_the_whole_model() -> None:
    """Along all parameters at once: the loss, its tangent in float32, and the Hessian in both orders."""
    shape = {"vocab_size": 7, "context_length": 5, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    model = TransformerLM(ModelConfig(**shape, hidden_size=8, intermediate_size=12), seed=1)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 7, (2, 6))
    named = dict(model.named_parameters())

    def loss(*weights: Any) -> Tensor:
        kept = [parameter.data for parameter in named.values()]
        try:
            for parameter, weight in zip(named.values(), weights, strict=True):
                parameter.data = weight.data
            return ops.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        finally:
            for parameter, data in zip(named.values(), kept, strict=True):
                parameter.data = data

    weights = [parameter.data for parameter in named.values()]
    vs = [random.normal(size=w.shape).astype("f4") for w in weights]
    with no_grad():
        output, tangent = jvp(loss, weights, vs)
    assert output.dtype == tangent.dtype == np.float32
    expected = ops.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    assert output.item() == pytest.approx(expected.item(), rel=1e-6)
    slopes = gradients(expected, list(named.values()))
    products = [float((g * v).sum()) for g, v in zip(slopes, vs, strict=True)]
    assert tangent.item() == pytest.approx(sum(products), abs=1e-4 * sum(map(abs, products)))
    wide = [w.astype("f8") for w in weights]
    assert along(loss, wide, vs) == pytest.approx(sum(products), abs=1e-4 * sum(map(abs, products)))


def test_a_sum_of_exponentials_at_infinity_and_a_product_of_one() -> None:
    a, b = np.array([np.inf, -np.inf, 0.0]), np.array([0.0, 1.0, np.inf])
    ones, zeros = np.ones(3), np.zeros(3)
    slopes = [jvp(ops.logaddexp, [a, b], tangents)[1].data for tangents in ([ones, zeros], [zeros, ones])]
    np.testing.assert_array_equal(slopes, [[1, 0, 0], [0, 1, 1]])
    for axis in (None, 0, -1):
        assert jvp(lambda x, axis=axis: x.prod(axis), [3.0], [2.0])[1].item() == 2.0
    assert jvp(lambda x: x.round() * x, [1.25], [1.0])[1].item() == 1.0

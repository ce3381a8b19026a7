"""Functions, losses and forms of attention against NumPy and numbers worked out by hand, and what holds for all."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm import ops
from tinyllm.autograd import hessian
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.testing import gradcheck
from tinyllm.testing import strategies as t

Array = npt.NDArray[Any]
INF, NAN = math.inf, math.nan


def value(tensor: Any) -> Array:
    return np.asarray(tensor.data)


def slopes(function: Callable[..., Tensor], *arrays: Any) -> list[Array]:
    """The gradients of the sum of the outputs."""
    xs = [Tensor(np.asarray(x, dtype=np.float64), requires_grad=True) for x in arrays]
    return gradients(function(*xs).sum(), xs)


# ---- Values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "oracle", "low"),
    [
        (ops.softplus, lambda x: math.log1p(math.exp(x)), -3),
        (ops.log_sigmoid, lambda x: -math.log1p(math.exp(-x)), -3),
        (ops.log2, math.log2, 0.1),
        (ops.log10, math.log10, 0.1),
        (ops.tan, math.tan, -3),
        (ops.leaky_relu, lambda x: x if x > 0 else 0.01 * x, -3),
        (lambda x: ops.leaky_relu(x, 0.3), lambda x: x if x > 0 else 0.3 * x, -3),
        (ops.elu, lambda x: x if x > 0 else math.expm1(x), -3),
        (lambda x: ops.elu(x, 0.5), lambda x: x if x > 0 else 0.5 * math.expm1(x), -3),
        (ops.squared_relu, lambda x: max(x, 0) ** 2, -3),
    ],
)
def test_functions_of_one_argument(
    function: Callable[[Any], Tensor], oracle: Callable[[float], float], low: float
) -> None:
    points = np.linspace(low, 6, 61)
    expected = np.array([oracle(float(x)) for x in points])
    np.testing.assert_allclose(value(function(Tensor(points))), expected, rtol=4e-15, atol=1e-15)
    for dtype in (np.float16, np.float32):
        narrow = points.astype(dtype)
        found = value(function(Tensor(narrow)))
        assert found.dtype == dtype
        exact = np.array([oracle(float(x)) for x in narrow])
        np.testing.assert_allclose(found, exact, rtol=8 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps)
    if function is not ops.squared_relu:
        np.testing.assert_allclose(value(function([1, 2])), [oracle(1), oracle(2)], rtol=1e-6)


def test_logarithms_are_exact_at_powers() -> None:
    np.testing.assert_array_equal(value(ops.log2(2.0 ** np.arange(-5, 6))), np.arange(-5, 6))
    np.testing.assert_array_equal(value(ops.log10(10.0 ** np.arange(6))), np.arange(6))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nothing_overflows(dtype: Any) -> None:
    x = np.array([-INF, -1000, 0, 1000, INF], dtype=dtype)
    ln2, linear = math.log(2), [0, 0, 0.5, 1, 1]
    cases = {
        "softplus": (ops.softplus, [0, 0, ln2, 1000, INF], linear),
        "log_sigmoid": (ops.log_sigmoid, [-INF, -1000, -ln2, 0, 0], linear[::-1]),
        "logaddexp": (lambda x: ops.logaddexp(x, 0.0), [0, 0, ln2, 1000, INF], linear),
        "elu": (ops.elu, [-1, -1, 0, 1000, INF], [0, 0, 1, 1, 1]),
        "leaky_relu": (lambda x: ops.leaky_relu(x, 0.5), [-INF, -500, 0, 1000, INF], [0.5, 0.5, 0.5, 1, 1]),
        "huber_loss": (
            lambda x: ops.huber_loss(x, np.zeros(5), "none"),
            [INF, 999.5, 0, 999.5, INF],
            [-1, -1, 0, 1, 1],
        ),
        "binary_cross_entropy_with_logits": (
            lambda x: ops.binary_cross_entropy_with_logits(x, [0, 0, 1, 1, 1], reduction="none"),
            [0, 0, ln2, 0, 0],
            [0, 0, -0.5, 0, 0],
        ),
        "against all odds": (
            lambda x: ops.binary_cross_entropy_with_logits(x, [1, 1, 0, 0, 0], reduction="none"),
            [INF, 1000, ln2, 1000, INF],
            [-1, -1, 0.5, 1, 1],
        ),
    }
    for name, (function, values, derivatives) in cases.items():
        leaf = Tensor(x, requires_grad=True)
        with np.errstate(over="raise", invalid="raise"):
            output = function(leaf)
            (found,) = gradients(output, [leaf], np.ones(5, dtype))
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose(value(output), values, rtol=2 * eps, err_msg=name)
        np.testing.assert_allclose(found, derivatives, rtol=2 * eps, err_msg=name)


def test_second_derivatives_of_a_loss_that_is_square_near_0() -> None:
    """1 below delta (divided by beta, of smooth_l1_loss), at 0 too, and 0 beyond it."""
    x = np.array([-3.0, -0.25, 0.0, 0.25, 3.0])
    for loss, scale in ((ops.huber_loss, 1), (lambda x, y, r: ops.smooth_l1_loss(x, y, r, beta=0.5), 0.5)):
        second = hessian(lambda x, loss=loss: loss(x, np.zeros(5), "sum"), x)
        np.testing.assert_array_equal(value(second), np.diag([0, 1, 1, 1, 0]) / scale)


def test_smooth_l1_loss_does_not_overflow_on_the_way() -> None:
    loss = ops.smooth_l1_loss(np.array([3e200]), np.array([0.0]), beta=1e200)
    np.testing.assert_allclose(value(loss), 2.5e200)


def test_logaddexp_of_infinities() -> None:
    a, b = [-INF, -INF, INF, 3.0, -1e20], [-INF, 1.0, -INF, INF, 1.0]
    np.testing.assert_array_equal(value(ops.logaddexp(a, b)), [-INF, 1, INF, INF, 1])
    of_a, of_b = slopes(ops.logaddexp, a[1:], b[1:])
    np.testing.assert_array_equal([of_a, of_b], [[0, 1, 0, 0], [1, 0, 1, 1]])
    # A share is precise where it is small: e^-40 / (1 + e^-40).
    np.testing.assert_allclose(
        slopes(ops.logaddexp, [40.0, 0.0], [0.0, 40.0])[1][0], math.exp(-40), rtol=1e-14
    )
    np.testing.assert_allclose(slopes(ops.log_sigmoid, [40.0])[0], math.exp(-40), rtol=1e-14)


def test_second_derivative_of_softplus_at_zero() -> None:
    """It is 1/4, where max(x, 0) and |x| have none."""
    for function in (ops.softplus, lambda x: ops.logaddexp(x, 0.0), lambda x: -ops.log_sigmoid(x)):
        x = Tensor(np.zeros(2), requires_grad=True)
        (first,) = gradients(function(x).sum(), [x], create_graph=True)
        np.testing.assert_array_equal(gradients(first.sum(), [x]), [[0.25, 0.25]])


def test_numpy_functions() -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.4, (3, 4))
    for function in (
        np.log2,
        np.log10,
        np.tan,
        lambda a: np.logaddexp(a, x.T[:1, :1]),
        lambda a: np.cumprod(a, axis=1),
    ):
        found = function(Tensor(x))
        assert isinstance(found, Tensor)
        np.testing.assert_allclose(value(found), function(x), rtol=1e-14)


# ---- Running products, rows --------------------------------------------------------------------


def test_running_product() -> None:
    x = np.random.default_rng(0).uniform(-2, 2, (3, 4, 2))
    for axis in (0, 1, -1):
        np.testing.assert_array_equal(value(ops.cumprod(x, axis)), np.cumprod(x, axis))
    # y = (2, 0, 0): dy_1 = dx_1, dy_2 = x_1 dx_2, and y_3 = x_1 x_2 x_3 with x_2 = 0 has only x_1 x_3 dx_2.
    np.testing.assert_array_equal(slopes(lambda a: ops.cumprod(a, 0), [2.0, 0.0, 3.0]), [[1, 2 + 6, 0]])
    np.testing.assert_array_equal(slopes(lambda a: ops.cumprod(a, 0), [0.0, 5.0, 0.0]), [[1 + 5 + 0, 0, 0]])
    with pytest.raises(IndexError, match="axis 2 is out of range for 2 axes"):
        ops.cumprod(np.ones((2, 2)), 2)


def test_one_hot() -> None:
    found = ops.one_hot([[0, 2], [1, 1]])
    np.testing.assert_array_equal(value(found), np.eye(3)[[[0, 2], [1, 1]]])
    assert found.dtype == np.int64
    assert ops.one_hot(np.zeros((2, 0), dtype=int), 4).shape == (2, 0, 4)
    weight = np.random.default_rng(0).standard_normal((3, 2))
    np.testing.assert_array_equal(value(ops.one_hot([2, 0]).astype(weight.dtype) @ weight), weight[[2, 0]])
    with pytest.raises(ValueError, match=r"indices span \[-1, 3\]; expected \[0, 3\)"):
        ops.one_hot([-1, 3], 3)
    with pytest.raises(ValueError, match=r"indices span \[-1, 3\]; expected \[0, 4\)"):
        ops.one_hot([-1, 3])
    with pytest.raises(TypeError, match="indices are integers; got dtype float64"):
        ops.one_hot([0.0])
    with pytest.raises(ValueError, match="num_classes says how many"):
        ops.one_hot(np.zeros(0, dtype=int))


def test_scatter_add_by_loops() -> None:
    random = np.random.default_rng(0)
    for axis, shape in ((0, (4, 2)), (1, (3, 5)), (-1, (2, 1)), (0, (0, 0))):
        x, source = random.standard_normal((3, 4)), random.standard_normal((5, 6))
        indices = random.integers(0, x.shape[axis], shape)
        expected = x.copy()
        for place in np.ndindex(shape):
            target = list(place)
            target[axis] = indices[place]
            expected[tuple(target)] += source[place]
        before = x.copy()
        np.testing.assert_allclose(value(ops.scatter_add(x, axis, indices, source)), expected, rtol=1e-14)
        np.testing.assert_array_equal(x, before)
        gradcheck(lambda a, b: ops.scatter_add(a, axis, indices, b), [x, source])  # noqa: B023
    with pytest.raises(ValueError, match=r"no axis may be longer than that of source \(1, 2\)"):
        ops.scatter_add(np.zeros((3, 2)), 0, [[0], [1]], np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"axis 0 apart, than that of x \(3, 2\)"):
        ops.scatter_add(np.zeros((3, 2)), 0, [[0, 1, 1]], np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"indices of shape \(2,\)"):
        ops.scatter_add(np.zeros((3, 2)), 0, [0, 1], np.ones((1, 2)))
    with pytest.raises(IndexError, match="index 3 is out of bounds for axis 0 with size 3"):
        ops.scatter_add(np.zeros((3, 2)), 0, [[0, 3]], np.ones((1, 2)))
    with pytest.raises(TypeError, match="indices are integers; got dtype float64"):
        ops.scatter_add(np.zeros(3), 0, [0.0], np.ones(1))


def test_padding_gets_no_gradient() -> None:
    table, indices = np.arange(6.0).reshape(3, 2), np.array([2, 0, 2])
    for padding_idx in (2, -1):
        (found,) = slopes(lambda w: ops.embedding(w, indices, padding_idx), table)  # noqa: B023
        np.testing.assert_array_equal(found, [[1, 1], [0, 0], [0, 0]])
        np.testing.assert_array_equal(value(ops.embedding(table, indices, padding_idx)), table[indices])
    for shape in ((3,), (3, 2, 2), ()):
        with pytest.raises(ValueError, match=r"embedding: weight has shape .*; it needs \(V, D\)"):
            ops.embedding(np.ones(shape), indices)
    with pytest.raises(IndexError, match=r"padding_idx=3, the table has rows \[0, 3\)"):
        ops.embedding(table, indices, 3)


def test_norms_without_parameters() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    np.testing.assert_array_equal(value(ops.rms_norm(x)), value(ops.rms_norm(x, ones)))
    np.testing.assert_array_equal(value(ops.layer_norm(x)), value(ops.layer_norm(x, ones, zeros)))
    np.testing.assert_array_equal(
        value(ops.layer_norm(x, ones * 3)), value(ops.layer_norm(x, ones * 3, zeros))
    )
    assert ops.rms_norm(x).dtype == ops.layer_norm(Tensor(x)).dtype == np.float32


# ---- Losses ------------------------------------------------------------------------------------


def test_integers_are_numbers() -> None:
    """As logits, as what is looked at, and as masks' scores; the result has one floating-point dtype."""
    logits, targets = np.array([[1, 2, 3], [0, 1, 0]]), np.array([0, 2])
    for loss in (ops.cross_entropy, ops.nll_loss):
        found = loss(logits, targets, weight=[1, 2, 3], reduction="sum")
        expected = value(loss(logits.astype(np.float32), targets, weight=[1, 2, 3], reduction="sum"))
        np.testing.assert_array_equal(value(found), expected)
    assert value(ops.binary_cross_entropy_with_logits([0, 0], [1, 0])) == pytest.approx(math.log(2))
    assert value(ops.mse_loss([1, 2], [3, 2])) == 2
    q = np.ones((2, 3), dtype=int)
    np.testing.assert_array_equal(value(ops.scaled_dot_product_attention(q, q, q)), q)
    np.testing.assert_allclose(value(ops.rms_norm(q)), q, rtol=1e-5)


def test_distances_by_hand() -> None:
    x, y = [3.0, -0.5, 1.0], [1.0, 0.0, 1.0]  # differences 2, -0.5, 0
    none, total = "none", "sum"
    np.testing.assert_array_equal(value(ops.mse_loss(x, y, none)), [4, 0.25, 0])
    np.testing.assert_array_equal(value(ops.l1_loss(x, y, none)), [2, 0.5, 0])
    np.testing.assert_array_equal(value(ops.smooth_l1_loss(x, y, none)), [1.5, 0.125, 0])
    np.testing.assert_array_equal(value(ops.smooth_l1_loss(x, y, none, beta=2.0)), [1, 0.0625, 0])
    np.testing.assert_array_equal(value(ops.smooth_l1_loss(x, y, none, beta=0)), [2, 0.5, 0])
    np.testing.assert_array_equal(value(ops.huber_loss(x, y, none, delta=2.0)), [2, 0.125, 0])
    for loss in (ops.mse_loss, ops.l1_loss, ops.smooth_l1_loss, ops.huber_loss):
        each = value(loss(x, y, none))
        assert value(loss(x, y, total)) == each.sum()
        assert value(loss(x, y)) == pytest.approx(each.mean(), rel=1e-6)


def test_cross_entropy_with_weights_and_smoothing_by_hand() -> None:
    # p = (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4); a third row is ignored.
    logits = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    targets, weight = np.array([0, 2, -100]), [1.0, 2.0, 3.0]
    ln2 = math.log(2)
    losses = np.array([1 * ln2, 3 * 2 * ln2, 0])
    for function in (ops.nll_loss, ops.cross_entropy):
        each = value(function(logits, targets, weight=weight, reduction="none"))
        np.testing.assert_allclose(each, losses, atol=1e-15)
        assert value(function(logits, targets, weight=weight, reduction="sum")) == pytest.approx(7 * ln2)
        assert value(function(logits, targets, weight=weight)) == pytest.approx(7 * ln2 / (1 + 3))
        assert value(function(logits, np.full(3, -100), weight=weight)) == 0
    # A tenth of the mean over all classes: (1 + 2 + 2) / 3 ln 2, with weights (1 + 4 + 6) / 3 and (2 + 2 + 6) / 3.
    for w, expected in ((None, [0.9 + 0.5 / 3, 1.8 + 0.5 / 3]), (weight, [0.9 + 1.1 / 3, 5.4 + 1.0 / 3])):
        each = value(ops.cross_entropy(logits, targets, reduction="none", weight=w, label_smoothing=0.1))
        np.testing.assert_allclose(each, np.array([*expected, 0]) * ln2, atol=1e-15)
        mean = value(ops.cross_entropy(logits, targets, weight=w, label_smoothing=0.1))
        assert mean == pytest.approx(sum(expected) * ln2 / (2 if w is None else 4))
    # z = ln sum e^logits = 1 where 1 is added to all logits.
    found = ops.cross_entropy(logits + 1, targets, weight=weight, reduction="none", z_loss=0.5)
    np.testing.assert_allclose(value(found), [*(losses[:2] + 0.5), 0], rtol=1e-14)


def test_cross_entropy_against_probabilities_by_hand() -> None:
    logits, ln2 = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]), math.log(2)
    q = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    for given_q in (q, q.tolist(), Tensor(q)):
        np.testing.assert_allclose(
            value(ops.cross_entropy(logits, given_q, reduction="none")), [1.5 * ln2, ln2], rtol=1e-14
        )
    assert value(ops.cross_entropy(logits, q)) == pytest.approx(1.25 * ln2)
    assert value(ops.cross_entropy(logits, q, weight=[1, 2, 3])) == pytest.approx((2.5 + 2) / 2 * ln2)
    hidden = np.array([[0.0, 0.0, -INF]])  # a class that cannot be, and is not
    np.testing.assert_allclose(value(ops.cross_entropy(hidden, q[:1])), ln2)
    np.testing.assert_allclose(
        slopes(lambda x: ops.cross_entropy(x, q[:1]), hidden), [[[0, 0, 0]]], atol=1e-15
    )


def test_binary_cross_entropy_by_hand() -> None:
    logits, ln2 = np.array([0.0, math.log(3), math.log(3)]), math.log(2)  # sigmoid 1/2, 3/4, 3/4
    y = np.array([0.3, 1.0, 0.0])
    loss = ops.binary_cross_entropy_with_logits
    each = np.array([ln2, math.log(4 / 3), 2 * ln2])
    np.testing.assert_allclose(value(loss(logits, y, reduction="none")), each, rtol=1e-15)
    found = loss(logits, y, weight=[1, 2, 0], reduction="sum", pos_weight=10.0)
    assert value(found) == pytest.approx((0.3 * 10 + 0.7) * ln2 + 2 * 10 * math.log(4 / 3))
    assert value(loss(logits, y)) == pytest.approx(each.mean())


def test_divergence_by_hand() -> None:
    p, q = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    terms = np.array([[math.log(2), 0], [math.log(2) / 2, math.log(2 / 3) / 2]])
    with np.errstate(divide="ignore"):
        log_q = np.log(q)
    for target, is_log in ((q, False), (log_q, True)):
        found = {
            r: value(ops.kl_div(np.log(p), target, r, is_log)) for r in ("none", "sum", "mean", "batchmean")
        }
        np.testing.assert_allclose(found["none"], terms, rtol=1e-14)
        for reduction, divisor in (("sum", 1), ("mean", 4), ("batchmean", 2)):
            assert found[reduction] == pytest.approx(terms.sum() / divisor)
    # What neither can happen nor does counts for nothing.
    for log_p, target, is_log in ((-INF, 0.0, False), (-INF, -INF, True)):
        assert value(ops.kl_div([log_p], [target], "sum", is_log)) == 0
        assert np.isfinite(slopes(lambda a, b: ops.kl_div(a, b, "sum", is_log), [log_p], [target])).all()  # noqa: B023
    with pytest.raises(ValueError, match="divides by the length of the first axis"):
        ops.kl_div(0.0, 1.0, "batchmean")


def test_losses_refuse_what_does_not_fit() -> None:
    for loss in (ops.mse_loss, ops.l1_loss, ops.smooth_l1_loss, ops.huber_loss, ops.kl_div,
                 ops.binary_cross_entropy_with_logits):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{loss.__name__}|huber.*\(3, 1\) and the target \(3,\)"):
            loss(np.zeros((3, 1)), np.zeros(3))
        with pytest.raises(ValueError, match="reduction='max'; choose 'mean', 'sum' or 'none'"):
            loss(np.zeros(3), np.zeros(3), reduction="max")
    with pytest.raises(ValueError, match="delta=0"):
        ops.huber_loss([0.0], [0.0], delta=0)
    logits = np.zeros((2, 4, 3))
    for loss in (ops.cross_entropy, ops.nll_loss):
        name = loss.__name__
        with pytest.raises(
            ValueError, match=rf"{name}.*the last axis here.*give logits.transpose\(0, 2, 1\)"
        ):
            loss(logits, np.zeros((2, 3), dtype=int))
        with pytest.raises(ValueError, match=rf"{name}: target 3 is outside \[0, 3\)"):
            loss(logits, np.full((2, 4), 3))
        with pytest.raises(TypeError, match=rf"{name}: ignore_index is an integer; got ndarray; weights"):
            loss(logits, np.zeros((2, 4), dtype=int), ignore_index=np.ones(3))
        with pytest.raises(ValueError, match=f"{name}: reduction='max'; choose 'mean', 'sum' or 'none'"):
            loss(logits, np.zeros((2, 4), dtype=int), reduction="max")
        with pytest.raises(ValueError, match=rf"{name}: weight has shape \(4,\); 3 classes need \(3,\)"):
            loss(logits, np.zeros((2, 4), dtype=int), weight=np.ones(4))
    with pytest.raises(
        TypeError, match=r"got dtype float64 \(probabilities need the shape of the logits, \(2, 4, 3\)\)"
    ):
        ops.cross_entropy(logits, np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"label_smoothing=1.5; it needs a number in \[0, 1\]"):
        ops.cross_entropy(logits, np.zeros((2, 4), dtype=int), label_smoothing=1.5)


# ---- Attention ---------------------------------------------------------------------------------


def drawn_qkv(*leading: int) -> list[Array]:
    random = np.random.default_rng(0)
    return [random.standard_normal((*leading, n, 4)) for n in (3, 5, 5)]


def test_leading_axes_are_those_of_each_alone() -> None:
    """(T, K), (H, T, K) and (B, ..., H, T, K) are stacks of (B, H, T, K)."""
    q, k, v = drawn_qkv(2, 3, 2)
    expected = np.array([value(ops.scaled_dot_product_attention(q[i], k[i], v[i], True)) for i in range(2)])
    np.testing.assert_allclose(value(ops.scaled_dot_product_attention(q, k, v, True)), expected, rtol=1e-14)
    for place in ((1, 2), (0, 1, 1)):
        found = ops.scaled_dot_product_attention(q[place], k[place], v[place], True)
        np.testing.assert_allclose(value(found), expected[place], rtol=1e-14)


@pytest.mark.parametrize("leading", [(), (2,), (3, 2), (2, 3, 2)])
def test_a_mask_of_infinities_is_a_boolean_mask(leading: tuple[int, ...]) -> None:
    arrays = drawn_qkv(*leading)
    seen = np.random.default_rng(1).random((*leading, 3, 5)) < 0.5
    seen[..., 1, :] = False  # a query that sees no key
    cotangent = np.random.default_rng(2).standard_normal((*leading, 3, 4))
    for mask in (seen, seen[(0,) * len(leading)], seen[(slice(1),) * len(leading)]):
        for causal in (False, True):
            found = []
            for given_mask in (mask, np.where(mask, 0.0, -INF), np.where(mask, 0.0, -INF).tolist()):
                xs = [Tensor(x, requires_grad=True) for x in arrays]
                out = ops.scaled_dot_product_attention(*xs, causal=causal, mask=given_mask)
                found.append([value(out), *gradients(out, xs, cotangent)])
            for one, *others in zip(*found, strict=True):
                for other in others:
                    np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-14)
            assert not found[1][0][..., 1, :].any()


def test_an_additive_mask_is_an_input() -> None:
    """Its gradient is the derivative, also where it broadcasts; one of -infinity everywhere has none."""
    q, k, v = drawn_qkv(2)
    for shape in ((2, 3, 5), (3, 5), (2, 1, 5), (5,)):
        bias = np.random.default_rng(1).standard_normal(shape)
        gradcheck(lambda *x: ops.scaled_dot_product_attention(*x[:3], mask=x[3]), [q, k, v, bias])
    (found,) = slopes(lambda m: ops.scaled_dot_product_attention(q, k, v, mask=m), np.full((3, 5), -INF))
    np.testing.assert_array_equal(found, 0)
    distance = -np.abs(np.subtract.outer(np.arange(3) + 2, np.arange(5))).astype(np.float64)  # as ALiBi
    p = np.exp(q @ k.swapaxes(-1, -2) / 2 + distance)
    found = value(ops.scaled_dot_product_attention(q, k, v, mask=distance))
    np.testing.assert_allclose(found, p / p.sum(-1, keepdims=True) @ v, rtol=1e-13)
    narrow = [x.astype(np.float32) for x in (q, k, v)]
    assert ops.scaled_dot_product_attention(*narrow, mask=distance).dtype == np.float32


# ---- What holds for all ------------------------------------------------------------------------

TARGETS = np.array([2, -100, 0, 1])

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{
        name: getattr(ops, name)
        for name in ("softplus", "log_sigmoid", "leaky_relu", "elu", "squared_relu", "logaddexp", "tan")
    },
    "log2": lambda x: ops.log2(ops.softplus(x) + 1),
    "log10": lambda x: ops.log10(ops.softplus(x) + 1),
    "mse_loss": lambda x, y: ops.mse_loss(x, y, "none"),
    "l1_loss": lambda x, y: ops.l1_loss(x, y, "sum"),
    "smooth_l1_loss": lambda x, y: ops.smooth_l1_loss(x, y, "none"),
    "huber_loss": lambda x, y: ops.huber_loss(x, y, "sum", 0.5),
    "binary_cross_entropy_with_logits": lambda x, y: ops.binary_cross_entropy_with_logits(
        x, ops.sigmoid(y), reduction="none"
    ),
    "kl_div": lambda x, y: ops.kl_div(x, ops.sigmoid(y), "none"),
    "kl_div of logarithms": lambda x, y: ops.kl_div(x, y, "none", log_target=True),
}


def operand_count(function: Callable[..., Tensor]) -> int:
    return 2 if function in (FUNCTIONS[name] for name in PAIRED) else 1


PAIRED = [
    name for name in FUNCTIONS if name.endswith(("loss", "logits", "logarithms", "kl_div", "logaddexp"))
]


@given(st.data())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_forward_accepts_backward_accepts(name: str, data: st.DataObject) -> None:
    """Any shape, empty ones too, dtype and layout; the gradients as a graph are the same."""
    function = FUNCTIONS[name]
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = data.draw(t.shapes())
    drawn = t.arrays(shape, dtype, -4.0, 4.0, tuple(t.LAYOUTS))
    xs = [Tensor(data.draw(drawn), requires_grad=True) for _ in range(operand_count(function))]
    output = function(*xs)
    assert output.dtype == dtype
    cotangent = np.random.default_rng(0).standard_normal(output.shape).astype(dtype)
    as_graph = gradients(output, xs, cotangent, create_graph=True)
    for x, gradient, other in zip(xs, gradients(output, xs, cotangent), as_graph, strict=True):
        assert gradient.shape == x.shape
        assert gradient.dtype == dtype
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(other.data, gradient)


Y, ROW = np.array([[0.3, 0.0, 1.0], [0.5, 0.2, 0.3]]), np.array([1.0, 0.5, 2.0])
BUFFERS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Array]] = {
    "mse_loss": (ops.mse_loss, Y),
    "huber_loss": (ops.huber_loss, Y),
    "binary_cross_entropy_with_logits": (ops.binary_cross_entropy_with_logits, Y),
    "its weight": (lambda x, w: ops.binary_cross_entropy_with_logits(x, Y, w), ROW),
    "its weight of positives": (lambda x, w: ops.binary_cross_entropy_with_logits(x, Y, pos_weight=w), ROW),
    "kl_div": (ops.kl_div, Y),
    "kl_div of logarithms": (lambda x, y: ops.kl_div(x, y, log_target=True), Y),
    "probabilities": (ops.cross_entropy, Y),
    "weight of classes": (lambda x, w: ops.cross_entropy(x, np.array([0, 2]), weight=w), ROW),
    "classes": (lambda x, i: ops.cross_entropy(x, i, label_smoothing=0.1), np.array([0, 2])),
    "log-probabilities": (lambda x, i: ops.nll_loss(ops.log_softmax(x), i), np.array([0, 2])),
    "embedding with padding": (lambda x, i: ops.embedding(x, i, 0), np.array([0, 1, 1])),
    "scatter_add": (lambda x, i: ops.scatter_add(x, 1, i, x * x), np.array([[2, 0], [1, 1]])),
    "additive mask": (lambda x, m: ops.scaled_dot_product_attention(x, x, x, mask=m), Y[:, :2]),
    "factor": (lambda x, a: x * a, ROW),
    "part of a factor": (lambda x, a: x * a[:2, None], ROW),
    "factor that is no NumPy array": (lambda x, a: x * memoryview(a), Y),
    "divisor": (lambda x, a: x / (a + 1), ROW),
    "dividend": (lambda x, a: a / (x + 9), ROW),
    "exponent": (lambda x, a: (x + 9) ** a, ROW),
    "matrix": (lambda x, a: x @ a, ROW),
    "weight of a layer": (ops.linear, Y),
    "weight of a norm": (ops.rms_norm, ROW),
    "factor of einsum": (lambda x, a: ops.einsum("ij,j->i", x, a), ROW),
    "bound": (lambda x, a: ops.clip(x, None, a), ROW),
    "other side of a maximum": (ops.maximum, ROW),
    "with an integer Tensor": (lambda x, a: ops.einsum("ij,j,j->i", x, a, Tensor([1, 2, 3])), ROW),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_may_be_overwritten_before_backward(name: str) -> None:
    """Derivatives of first and second order are those of what forward was given."""
    function, given_values = BUFFERS[name]

    def derivatives(overwritten: bool) -> list[Array]:
        x = Tensor(np.random.default_rng(0).normal(size=(2, 3)), requires_grad=True)
        buffer = given_values.copy()
        output = (function(x, buffer).tanh() ** 3).sum()
        if overwritten:
            buffer[...] = 1 - buffer
        (first,) = gradients(output, [x], create_graph=True)
        return [first.data, *gradients((first * first).sum(), [x])]

    for found, known in zip(derivatives(True), derivatives(False), strict=True):
        np.testing.assert_array_equal(found, known)


LARGE = [-INF, -1e300, -1000.0, -1.0, 0.0, 1.0, 1000.0, 1e300, INF]
AT_INFINITY = {
    **{
        name: FUNCTIONS[name]
        for name in FUNCTIONS
        if name not in ("binary_cross_entropy_with_logits", "kl_div")
    },
    "binary_cross_entropy_with_logits": lambda x, y: ops.binary_cross_entropy_with_logits(
        x, np.clip(y.data, 0, 1), reduction="none"
    ),
    "kl_div": lambda x, y: ops.kl_div(x, np.clip(y.data, 0, 1), "none"),
    "against probabilities": lambda x, y: ops.cross_entropy(
        ops.stack([x, y, 0 * y.data + 1], -1),
        np.broadcast_to([0.0, 0.5, 0.5], (*x.shape, 3)),
        reduction="none",
    ),
}


@pytest.mark.parametrize("name", AT_INFINITY)
def test_gradients_are_finite_where_the_function_is(name: str) -> None:
    """At infinities and large numbers of either sign, by themselves and as a graph."""
    function = AT_INFINITY[name]
    count = 1 if name in FUNCTIONS and name not in PAIRED else 2
    for place in np.stack(np.meshgrid(*[LARGE] * count), -1).reshape(-1, count):
        xs = [Tensor(np.array([x]), requires_grad=True) for x in place]
        with np.errstate(all="ignore"):
            output = function(*xs)
            if not np.isfinite(value(output)).all():
                continue
            for create_graph in (True, False):
                found = gradients(output.sum(), xs, create_graph=create_graph)
                for gradient in found:
                    assert np.isfinite(gradient.data if create_graph else gradient).all(), (place, found)


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "formulas"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 2.0]], ids=["", "weighted"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_ignored_rows_count_for_nothing(
    z_loss: float, weight: Any, smoothing: float, reduction: Any, reference: bool
) -> None:
    """Whatever they hold: the loss and the gradients of the other rows have the same bits, and theirs are 0."""
    arguments: dict[str, Any] = {"reduction": reduction, "weight": weight}
    more: dict[str, Any] = {**arguments, "z_loss": z_loss, "label_smoothing": smoothing}
    logits = np.random.default_rng(0).standard_normal((4, 3))

    def run(row: Any, create_graph: bool) -> list[Array]:
        values = logits.copy()
        values[1] = row
        x = Tensor(values, requires_grad=True)
        results = []
        for loss in (ops.cross_entropy(x, TARGETS, **more), ops.nll_loss(x, TARGETS, **arguments)):
            (found,) = gradients(loss, [x], np.ones(loss.shape), create_graph=create_graph)
            results += [value(loss), value(found) if create_graph else found]
        return results

    with use_formulas(reference), np.errstate(all="raise", under="ignore"):  # nor is anyone warned
        expected = run(0.0, False)
        assert not expected[1][1].any()
        assert not expected[3][1].any()
        for row in (INF, -INF, NAN, 1e300, [INF, -INF, NAN]):
            for create_graph in (False, True):
                for found, known in zip(run(row, create_graph), expected, strict=True):
                    np.testing.assert_allclose(found, known, rtol=1e-14, atol=1e-16)

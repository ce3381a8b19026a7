"""Values of functions against NumPy, the math module, published vectors and numbers worked out by hand."""

import math
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.backend.philox import Key, keep_mask, philox_4x32, random_words
from tinyllm.ops.fast.loss import CHUNK_ELEMENTS

Array = npt.NDArray[Any]

X = np.random.default_rng(0).uniform(-3, 3, (3, 4, 5))
quick = settings(deadline=None, max_examples=60)


def value(tensor: Tensor) -> Array:
    return np.asarray(tensor.data)


# ---- Element by element ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "oracle", "low"),
    [
        (ops.exp, math.exp, -3), (ops.expm1, math.expm1, -3), (ops.log, math.log, 0.1),
        (ops.log1p, math.log1p, -0.9), (ops.sqrt, math.sqrt, 0), (ops.tanh, math.tanh, -3),
        (ops.sin, math.sin, -3), (ops.cos, math.cos, -3), (ops.erf, math.erf, -6),
        (ops.absolute, abs, -3), (ops.square, lambda x: x * x, -3), (ops.negative, lambda x: -x, -3),
        (ops.rsqrt, lambda x: 1 / math.sqrt(x), 0.1), (ops.relu, lambda x: max(x, 0.0), -3),
        (ops.sigmoid, lambda x: 1 / (1 + math.exp(-x)), -3),
        (ops.silu, lambda x: x / (1 + math.exp(-x)), -3),
        (ops.gelu, lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2, -3),
        (lambda x: ops.clip(x, -1.0, 2.0), lambda x: min(max(x, -1.0), 2.0), -3),
        (lambda x: ops.power(x, 2.5), lambda x: x**2.5, 0.1),
        (lambda x: ops.power(3.0, x), lambda x: 3.0**x, -3),
        (
            lambda x: ops.gelu(x, "tanh"),
            lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
            -3,
        ),
    ],
)  # fmt: skip
def test_functions_of_one_argument(
    function: Callable[[Any], Tensor], oracle: Callable[[float], float], low: float
) -> None:
    points = np.linspace(low, 6, 61)
    expected = np.array([oracle(float(x)) for x in points])
    np.testing.assert_allclose(value(function(Tensor(points))), expected, rtol=4e-15, atol=1e-15)
    narrow = value(function(Tensor(points.astype(np.float32))))
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, expected, rtol=3e-5, atol=1e-6)


def test_error_function_in_the_tails() -> None:
    for x in (0.0, 1e-300, 1e-8, 0.46874, 0.46876, 3.9999, 4.0001, 5.9, 30.0, math.inf):
        assert value(ops.erf(np.array(x))) == pytest.approx(math.erf(x), rel=4e-16, abs=0)
        assert value(ops.erf(np.array(-x))) == pytest.approx(-math.erf(x), rel=4e-16, abs=0)


def test_extreme_arguments_stay_finite() -> None:
    x = Tensor(np.array([-1e4, -200.0, 200.0, 1e4]), requires_grad=True)
    np.testing.assert_allclose(value(ops.sigmoid(x)), [0, math.exp(-200), 1, 1], rtol=1e-14)
    for function in (ops.sigmoid, ops.silu, ops.gelu, ops.tanh, ops.softmax, ops.log_softmax, ops.logsumexp):
        output = function(x)
        assert np.isfinite(value(output)).all()
        (gradient,) = gradients(output.sum(), [x])
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("function", "oracle"),
    [
        (ops.add, np.add), (ops.subtract, np.subtract), (ops.multiply, np.multiply), (ops.divide, np.divide),
        (ops.maximum, np.maximum), (ops.minimum, np.minimum),
        (lambda a, b: ops.where(a > 0, a, b), lambda a, b: np.where(a > 0, a, b)),
        (lambda a, b: ops.power(ops.absolute(a), b), lambda a, b: np.abs(a) ** b),
        (lambda a, b: ops.swiglu(*(a + 0 * b, b + 0 * a)), lambda a, b: a / (1 + np.exp(-a)) * b),
    ],
)  # fmt: skip
def test_functions_of_two_arguments_broadcast(
    function: Callable[[Any, Any], Tensor], oracle: Callable[[Any, Any], Any]
) -> None:
    b = np.random.default_rng(1).uniform(0.5, 2, (4, 1))
    np.testing.assert_allclose(value(function(Tensor(X), Tensor(b))), oracle(X, b), rtol=1e-14)


def test_gradients_at_ties_and_kinks() -> None:
    a, b = Tensor(np.array([1.0, 2.0]), requires_grad=True), Tensor(np.array([1.0, 1.0]), requires_grad=True)
    np.testing.assert_array_equal(gradients(ops.maximum(a, b).sum(), [a, b]), [[0.5, 1], [0.5, 0]])
    np.testing.assert_array_equal(gradients(ops.minimum(a, b).sum(), [a, b]), [[0.5, 0], [0.5, 1]])
    x = Tensor(np.array([0.0, -1.0, 1.0, 1.0]), requires_grad=True)
    assert gradients(ops.relu(x).sum(), [x])[0].tolist() == [0, 0, 1, 1]
    assert gradients(ops.absolute(x).sum(), [x])[0].tolist() == [0, -1, 1, 1]
    assert gradients(ops.max(x), [x])[0].tolist() == [0, 0, 0.5, 0.5]
    assert gradients(ops.clip(x, -1.0, 0.0).sum(), [x])[0].tolist() == [1, 1, 0, 0]


# ---- Reductions --------------------------------------------------------------------------------

AXES: list[Any] = [None, 0, -1, (0, 2), (1,), (-1, 0), ()]


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "var", "std"])
def test_reductions_as_in_numpy(name: str, axis: Any, keepdims: bool) -> None:
    found = getattr(ops, name)(Tensor(X), axis, keepdims)
    expected = getattr(np, name)(X, axis=axis, keepdims=keepdims)
    assert found.shape == expected.shape
    np.testing.assert_allclose(value(found), expected, rtol=1e-12, atol=1e-14)
    method = getattr(Tensor(X), name)(axis, keepdims)
    np.testing.assert_array_equal(value(method), value(found))


def test_statistics_with_correction_and_edges() -> None:
    np.testing.assert_allclose(value(ops.var(X, 1, correction=1)), np.var(X, axis=1, ddof=1))
    np.testing.assert_allclose(value(ops.std(X, correction=1)), np.std(X, ddof=1))
    np.testing.assert_allclose(value(ops.cumsum(X, 1)), np.cumsum(X, 1))
    assert value(ops.sum(np.zeros((0, 3)))) == 0
    assert value(ops.prod(np.zeros((0, 3)))) == 1
    assert Tensor(X).argmax() == X.argmax()
    with pytest.raises(ValueError, match="has no elements"):
        ops.mean(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="divides by 0"):
        ops.var(np.ones(1), correction=1)
    with pytest.raises(IndexError):
        ops.mean(X, 3)


def test_product_has_the_right_gradient_at_zeros() -> None:
    x = Tensor(np.array([[2.0, 0.0, 3.0], [0.0, 5.0, 0.0], [1.0, 2.0, 3.0]]), requires_grad=True)
    (found,) = gradients(ops.prod(x, 1).sum(), [x])
    np.testing.assert_array_equal(found, [[0, 6, 0], [0, 0, 0], [6, 3, 2]])


@pytest.mark.parametrize("axis", [None, 0, (0, 2)])
def test_logsumexp_by_hand(axis: Any) -> None:
    np.testing.assert_allclose(value(ops.logsumexp(X, axis)), np.log(np.exp(X).sum(axis=axis)), rtol=1e-14)
    np.testing.assert_allclose(value(ops.logsumexp(X + 1e4, axis)), np.log(np.exp(X).sum(axis=axis)) + 1e4)


# ---- Shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "oracle"),
    [
        (lambda x: ops.reshape(x, 5, -1), lambda x: x.reshape(5, -1)),
        (lambda x: ops.reshape(x, (12, 5)), lambda x: x.reshape(12, 5)),
        (lambda x: ops.transpose(x), lambda x: x.T),
        (lambda x: ops.transpose(x, 1, -1, 0), lambda x: x.transpose(1, -1, 0)),
        (lambda x: ops.swapaxes(x, 0, -1), lambda x: x.swapaxes(0, -1)),
        (lambda x: ops.broadcast_to(x, (2, 3, 4, 5)), lambda x: np.broadcast_to(x, (2, 3, 4, 5))),
        (lambda x: ops.expand_dims(x, (0, 2)), lambda x: np.expand_dims(x, (0, 2))),
        (lambda x: ops.squeeze(x[:1, :, :1]), lambda x: x[0, :, 0]),
        (lambda x: ops.squeeze(x[:1], 0), lambda x: x[0]),
        (lambda x: ops.concatenate([x, x[:, 1:]], 1), lambda x: np.concatenate([x, x[:, 1:]], 1)),
        (lambda x: ops.stack([x, x], -1), lambda x: np.stack([x, x], -1)),
        (lambda x: ops.split(x, 2, 1)[1], lambda x: np.split(x, 2, 1)[1]),
        (lambda x: ops.split(x, [1, 3], 2)[1], lambda x: np.split(x, [1, 3], 2)[1]),
        (lambda x: ops.pad(x, 2, 7.0), lambda x: np.pad(x, 2, constant_values=7)),
        (lambda x: ops.pad(x, (1, 0)), lambda x: np.pad(x, (1, 0))),
        (lambda x: ops.flip(x), lambda x: np.flip(x)),
        (lambda x: ops.flip(x, (0, -1)), lambda x: np.flip(x, (0, -1))),
        (lambda x: ops.tril(x, 1), lambda x: np.tril(x, 1)),
        (lambda x: ops.triu(x, -1), lambda x: np.triu(x, -1)),
    ],
)
def test_shapes_as_in_numpy(function: Callable[[Any], Tensor], oracle: Callable[[Any], Any]) -> None:
    np.testing.assert_array_equal(value(function(Tensor(X))), oracle(X))


def test_shape_errors_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"axis 0 of shape \(3, 4, 5\) does not have length 1"):
        ops.squeeze(X, 0)
    with pytest.raises(ValueError, match="length 4 does not divide into 3 equal parts"):
        ops.split(X, 3, 1)
    repeated: list[Callable[[], Tensor]] = [
        lambda: ops.flip(X, (0, 0)),
        lambda: ops.flip(X, [1, -2]),
        lambda: ops.expand_dims(X, (0, 0)),
        lambda: ops.squeeze(X[:1], (0, 0)),
    ]
    for call in repeated:
        with pytest.raises(ValueError, match=r"names an axis of . twice"):
            call()
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.concatenate([])
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.stack([])
    with pytest.raises(ValueError, match=r"reshape\(float64\[3, 4, 5\]\)"):
        ops.reshape(Tensor(X), 7, -1)


def test_take_along_axis_and_gather() -> None:
    order = np.argsort(X, axis=1)
    np.testing.assert_array_equal(value(ops.take_along_axis(Tensor(X), order, 1)), np.sort(X, axis=1))
    np.testing.assert_array_equal(value(ops.gather(Tensor(X), 1, order)), np.sort(X, axis=1))
    for axis in (5, 3, -4):
        for function in (ops.take_along_axis, lambda x, i, axis: ops.gather(x, axis, i)):
            with pytest.raises(IndexError, match=f"axis {axis} is out of range for 3 axes"):
                function(Tensor(X), order, axis)


# ---- Matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 2)), ((3, 4), (4, 2)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (5, 4, 2)), ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((0, 4), (4, 2)), ((2, 0), (0, 3)),
    ],
)  # fmt: skip
def test_matmul_in_all_of_numpys_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    left, right = random.standard_normal(a), random.standard_normal(b)
    found = Tensor(left) @ Tensor(right)
    assert found.shape == np.matmul(left, right).shape
    np.testing.assert_allclose(value(found), np.matmul(left, right), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)]), ("ij,jk", [(2, 3), (3, 4)]), ("ij,kj->", [(2, 3), (4, 3)]),
        ("ba", [(2, 3)]), ("ii", [(3, 3)]), ("ii->i", [(3, 3)]), ("iij->j", [(3, 3, 2)]), ("iii->i", [(2, 2, 2)]),
        ("ijij->ji", [(2, 3, 2, 3)]), ("...ij,...jk->...ik", [(5, 2, 3), (3, 4)]), ("i...,i...", [(3, 2), (3, 2)]),
        ("...ij->...ji", [(2, 3, 4)]), ("...,...->...", [(2, 3), (3,)]), ("b...i,i->b...", [(2, 4, 3), (3,)]),
        ("bqhd,bkhd->bhqk", [(2, 3, 2, 4), (2, 5, 2, 4)]), ("i,j,k->kij", [(2,), (3,), (4,)]), (",i->i", [(), (3,)]),
        ("ij->", [(2, 3)]), ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]), (" i j , j k -> i k ", [(2, 3), (3, 4)]),
        ("...ii->...", [(2, 3, 3)]), ("ij,ij->ij", [(2, 3), (2, 3)]), ("i...->...", [(2, 3, 4)]),
    ],
)  # fmt: skip
def test_einsum_as_in_numpy(subscripts: str, shapes: list[tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape) for shape in shapes]
    tensors = [Tensor(x, requires_grad=True) for x in arrays]
    found, expected = ops.einsum(subscripts, *tensors), np.einsum(subscripts, *arrays)
    assert found.shape == expected.shape
    np.testing.assert_allclose(value(found), expected, rtol=1e-13, atol=1e-14)
    # It is linear in each operand: <gradient, operand> is the sum of the output.
    for x, gradient in zip(arrays, gradients(found.sum(), tensors), strict=True):
        assert float((gradient * x).sum()) == pytest.approx(float(expected.sum()), rel=1e-12)


@quick
@given(st.data())
def test_einsum_of_any_two_operands(data: st.DataObject) -> None:
    lengths = {label: data.draw(st.integers(1, 3)) for label in string.ascii_lowercase[:4]}
    terms = [data.draw(st.text("abcd", min_size=0, max_size=4)) for _ in range(2)]
    used = sorted(set("".join(terms)))
    result = "".join(data.draw(st.permutations(used))[: data.draw(st.integers(0, len(used)))])
    random = np.random.default_rng(0)
    arrays = [random.standard_normal([lengths[label] for label in term]) for term in terms]
    subscripts = f"{','.join(terms)}->{result}"
    found = ops.einsum(subscripts, *map(Tensor, arrays))
    np.testing.assert_allclose(value(found), np.einsum(subscripts, *arrays), rtol=1e-12, atol=1e-12)


def test_einsum_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="names 2 operands; got 1"):
        ops.einsum("ij,jk->ik", X[0])
    with pytest.raises(ValueError, match="does not fit an operand with 3 axes"):
        ops.einsum("ij->j", X)
    with pytest.raises(ValueError, match="repeats a label or names an unknown one"):
        ops.einsum("ij->ik", X[0])
    with pytest.raises(ValueError, match="label 'i' has lengths"):
        ops.einsum("ii->i", X[0])


def test_linear_by_hand() -> None:
    found = ops.linear(
        Tensor([[1.0, 2.0]]), Tensor([[3.0, 4.0], [5.0, 6.0], [0.0, 1.0]]), Tensor([10.0, 20.0, 30.0])
    )
    assert value(found).tolist() == [[21.0, 37.0, 32.0]]
    with pytest.raises(ValueError, match=r"x has shape \(2,\) and weight \(2, 3\)"):
        ops.linear(Tensor([1.0, 2.0]), Tensor(np.zeros((2, 3), np.float32)))


# ---- Softmax and loss --------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_by_hand(axis: int) -> None:
    expected = np.exp(X) / np.exp(X).sum(axis=axis, keepdims=True)
    np.testing.assert_allclose(value(ops.softmax(X, axis)), expected, rtol=1e-13)
    np.testing.assert_allclose(value(ops.log_softmax(X, axis)), np.log(expected), rtol=1e-12)
    np.testing.assert_allclose(value(ops.softmax(X + 1e4, axis)), expected, rtol=1e-10)


def test_cross_entropy_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    targets = np.array([0, 2])
    expected = [math.log(2), -math.log(0.8)]
    np.testing.assert_allclose(value(ops.cross_entropy(logits, targets, reduction="none")), expected)
    assert value(ops.cross_entropy(logits, targets)) == pytest.approx(sum(expected) / 2)
    assert value(ops.cross_entropy(logits, targets, reduction="sum")) == pytest.approx(sum(expected))
    x = Tensor(logits, requires_grad=True)
    (found,) = gradients(ops.cross_entropy(x, targets), [x])
    np.testing.assert_allclose(found, [[-0.25, 0.125, 0.125], [0.05, 0.05, -0.1]], rtol=1e-12)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_extreme_logits(dtype: Any, reference: bool) -> None:
    x = Tensor(np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=dtype), requires_grad=True)
    with use_formulas(reference):
        losses = ops.cross_entropy(x, np.array([0, 0]), reduction="none")
        assert value(losses).tolist() == [0.0, 2e4]
        (found,) = gradients(losses.sum(), [x])
    assert found.tolist() == [[0, 0, 0], [-1, 1, 0]]


@pytest.mark.parametrize("reference", [False, True])
def test_cross_entropy_with_z_loss_by_hand(reference: bool) -> None:
    logits = np.log([[0.5, 0.25, 0.25], [1.0, 2.0, 5.0]])  # sums of e^logits: 1 and 8
    targets, square = np.array([0, -100]), math.log(8) ** 2
    x = Tensor(logits, requires_grad=True)
    with use_formulas(reference):
        first = value(ops.cross_entropy(logits, targets, reduction="none", z_loss=0.1))
        np.testing.assert_allclose(first, [math.log(2), 0], atol=1e-15)
        loss = ops.cross_entropy(x, np.array([0, 2]), reduction="sum", z_loss=0.1)
        (found,) = gradients(loss, [x])
    assert value(loss) == pytest.approx(math.log(2) - math.log(5 / 8) + 0.1 * square)
    p = np.array([1.0, 2.0, 5.0]) / 8
    np.testing.assert_allclose(found[0], [-0.5, 0.25, 0.25], rtol=1e-12)
    np.testing.assert_allclose(found[1], p - [0, 0, 1] + 0.2 * math.log(8) * p, rtol=1e-12)


@pytest.mark.parametrize("reference", [False, True])
def test_cross_entropy_ignores_targets(reference: bool) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 3))
    targets = np.array([0, -100, 2, -100])
    x, kept = Tensor(logits, requires_grad=True), Tensor(logits[::2], requires_grad=True)
    with use_formulas(reference):
        found, expected = ops.cross_entropy(x, targets), ops.cross_entropy(kept, targets[::2])
        np.testing.assert_allclose(value(found), value(expected), rtol=1e-14)
        gradient, known = gradients(found, [x])[0], gradients(expected, [kept])[0]
        np.testing.assert_allclose(gradient[::2], known, rtol=1e-14)
        assert not gradient[1::2].any()
        assert value(ops.cross_entropy(x, np.full(4, -100))) == 0
        assert value(ops.cross_entropy(x, np.array([0, 1, 1, 1]), ignore_index=1)) == pytest.approx(
            float(value(ops.logsumexp(logits[0])) - logits[0, 0])
        )


def test_cross_entropy_in_chunks() -> None:
    V = CHUNK_ELEMENTS // 3
    logits = np.random.default_rng(0).standard_normal((7, V))  # three rows a chunk: two chunks and a rest
    targets = np.arange(7) * 1000
    targets[4] = -100
    kept = targets >= 0
    x = Tensor(logits, requires_grad=True)
    loss = ops.cross_entropy(x, targets)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert value(loss) == pytest.approx(float(-np.log(p[kept, targets[kept]]).mean()))
    (found,) = gradients(loss, [x])
    p[kept, targets[kept]] -= 1
    np.testing.assert_allclose(found, p * kept[:, None] / 6, rtol=1e-10, atol=1e-16)


def test_cross_entropy_refuses_wrong_targets() -> None:
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"target 3 is outside \[0, 3\)"):
        ops.cross_entropy(logits, np.array([0, 3]))
    with pytest.raises(TypeError, match="targets are integers; got dtype float64"):
        ops.cross_entropy(logits, np.zeros(2))
    with pytest.raises(ValueError, match=r"so targets need \(2,\); got \(3,\)"):
        ops.cross_entropy(logits, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="choose 'mean', 'sum' or 'none'"):
        ops.cross_entropy(logits, np.array([0, 1]), reduction="max")  # type: ignore[arg-type]


# ---- Normalisation, rotation, embedding --------------------------------------------------------


def test_norms_by_hand() -> None:
    found = ops.rms_norm(Tensor([[3.0, 4.0]]), Tensor([1.0, 2.0]), eps=0.0)
    np.testing.assert_allclose(value(found), [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-6)
    weight, bias = np.arange(5.0), np.arange(5.0) * 2
    mean, variance = X.mean(-1, keepdims=True), X.var(-1, keepdims=True)
    expected = (X - mean) / np.sqrt(variance + 1e-5) * weight + bias
    np.testing.assert_allclose(value(ops.layer_norm(X, weight, bias)), expected, rtol=1e-4, atol=1e-5)
    wide = ops.layer_norm(Tensor(X), Tensor(weight), Tensor(bias))
    np.testing.assert_allclose(value(wide), expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"need shape \(5,\); got \(4,\)"):
        ops.rms_norm(Tensor(X), Tensor(np.ones(4)))


def test_rope_is_a_rotation_by_position() -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 8))
    found = value(ops.rope(Tensor(x), offset=3))
    for t in range(6):
        for i in range(4):
            angle = (t + 3) * 10000 ** (-2 * i / 8)
            rotated = complex(x[1, t, i], x[1, t, i + 4]) * complex(math.cos(angle), math.sin(angle))
            assert complex(found[1, t, i], found[1, t, i + 4]) == pytest.approx(rotated, rel=1e-12)
    # Products of queries and keys depend on the distance of their positions alone.
    q, k = Tensor(np.tile(x[0, :1], (6, 1))), Tensor(np.tile(x[1, :1], (6, 1)))
    scores = value(ops.rope(q) @ ops.rope(k).T)
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-12)
    with pytest.raises(ValueError, match="even K"):
        ops.rope(Tensor(np.zeros((2, 3))))


def test_embedding_adds_up_repeated_rows() -> None:
    table = Tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
    found = ops.embedding(table, np.array([[2, 0], [2, 2]]))
    np.testing.assert_array_equal(value(found), table.data[[[2, 0], [2, 2]]])
    cotangent = np.arange(8.0).reshape(2, 2, 2)
    (gradient,) = gradients(found, [table], cotangent)
    np.testing.assert_array_equal(gradient, [[2, 3], [0, 0], [10, 13]])
    with pytest.raises(IndexError, match=r"indices span \[-1, 3\], the table has rows \[0, 3\)"):
        ops.embedding(table, np.array([-1, 3]))
    with pytest.raises(TypeError, match="indices are integers"):
        ops.embedding(table, np.array([0.0]))


# ---- Attention ---------------------------------------------------------------------------------


def attention_by_loops(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    """One query at a time. q: (B, H, T, K), k, v: (B, G, S, K), allowed: (T, S)."""
    B, H, T, K = q.shape
    result = np.zeros((B, H, T, v.shape[-1]))
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for t in range(T):
                weights = [
                    math.exp(float(q[b, h, t] @ k[b, g, s]) / math.sqrt(K)) if allowed[t, s] else 0.0
                    for s in range(k.shape[2])
                ]
                for s, weight in enumerate(weights):
                    if sum(weights):
                        result[b, h, t] += weight / sum(weights) * v[b, g, s]
    return result


@pytest.mark.parametrize("reference", [False, True])
def test_attention_by_loops(reference: bool) -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape) for shape in [(2, 4, 3, 6), (2, 2, 5, 6), (2, 2, 5, 3)])
    # The last of the 3 queries sees all 5 keys.
    causal = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=bool)
    mask = np.array([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]], dtype=bool)
    with use_formulas(reference):
        for keywords, allowed in (
            ({}, np.ones((3, 5), bool)),
            ({"causal": True}, causal),
            ({"mask": mask}, mask),
            ({"mask": mask, "causal": True}, mask & causal),
        ):
            found = ops.scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), **keywords)  # type: ignore[arg-type]
            np.testing.assert_allclose(
                value(found), attention_by_loops(q, k, v, allowed), rtol=1e-12, atol=1e-14
            )


def test_attention_refuses_what_does_not_fit() -> None:
    q = Tensor(np.zeros((1, 3, 2, 4)))
    k = Tensor(np.zeros((1, 2, 2, 4)))
    attention = ops.scaled_dot_product_attention
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 key heads"):
        attention(q, k, k)
    with pytest.raises(ValueError, match=r"at least the axes \(T, K\); got shapes \(4,\)"):
        attention(q[0, 0, 0], k, k)
    with pytest.raises(ValueError, match="before the last three do not broadcast"):
        attention(np.zeros((2, 1, 2, 4)), *[np.zeros((3, 1, 2, 4))] * 2)
    with pytest.raises(ValueError, match=r"needs q \(B, H, T, K\)"):
        attention(q, q, k)
    with pytest.raises(ValueError, match="none may be 0; got"):
        attention(q, k[:, :0], k[:, :0])
    with pytest.raises(
        TypeError, match=r"the mask is boolean.*or of floating-point numbers.*got dtype int64"
    ):
        attention(q, q, q, mask=np.zeros((2, 2), dtype=int))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 2, 2\); it needs to broadcast to \(1, 3, 2, 2\)"):
        attention(q, q, q, mask=np.zeros((2, 1, 2, 2)))
    with pytest.raises(TypeError, match="causal is True or False; got ndarray; a mask is mask="):
        attention(q, q, q, np.ones((1, 1), dtype=bool))
    for p in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="needs 0 <= dropout_p < 1"):
            attention(q, q, q, dropout_p=p, dropout_key=Key(0))
    for shape in ((1, 0, 2, 4), (1, 2, 0, 4), (1, 2, 2, 0)):
        with pytest.raises(ValueError, match="none may be 0; got"):
            attention(*[np.zeros(shape)] * 3)
    with pytest.raises(ValueError, match="needs dropout_key"):
        attention(q, q, q, dropout_p=0.1)


# ---- Random numbers and dropout ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """The known-answer vectors that its authors publish with Random123."""
    words = philox_4x32(*[np.array([word], dtype=np.uint64) for word in counter], *key)
    assert tuple(int(word[0]) for word in words) == expected


def test_random_words_follow_the_key() -> None:
    assert random_words(4, Key(0)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    np.testing.assert_array_equal(random_words(100, Key(5))[:37], random_words(37, Key(5)))
    keys = [Key(1), Key(2), Key(1 << 32), Key(1 + (1 << 32)), Key(1, 1), Key(1, 0, 1), Key(1, 0, 0, 1)]
    assert len({random_words(8, key).tobytes() for key in keys}) == len(keys)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_fraction_and_the_mean(p: float) -> None:
    x = Tensor(np.ones(100_000), requires_grad=True)
    found = value(ops.dropout(x, p, Key(3)))
    kept = float((found != 0).mean())
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / x.size) + 1e-12
    np.testing.assert_allclose(found[found != 0], 1 / (1 - p))
    (gradient,) = gradients(ops.dropout(x, p, Key(3)).sum(), [x])
    np.testing.assert_array_equal(gradient, found)


def test_dropout_has_the_same_bits_for_the_same_key() -> None:
    x = Tensor(np.ones((50, 8)))
    np.testing.assert_array_equal(
        value(ops.dropout(x, 0.5, Key(1, 2))), value(ops.dropout(x, 0.5, Key(1, 2)))
    )
    assert (value(ops.dropout(x, 0.5, Key(1, 2))) != value(ops.dropout(x, 0.5, Key(1, 3)))).any()
    with use_formulas():
        reference = value(ops.dropout(x, 0.5, Key(1, 2)))
    np.testing.assert_array_equal(reference, value(ops.dropout(x, 0.5, Key(1, 2))))
    assert keep_mask((3, 2), 0.5, Key(0)).ravel().tolist() == [
        word >= 2**31 for word in random_words(6, Key(0)).tolist()
    ]
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="needs 0 <= p < 1"):
            ops.dropout(x, p, Key(0))


@pytest.mark.parametrize(
    "shapes", [((1,), (4,)), ((4,), (1,)), ((4,), (1, 2)), ((2, 1), (4,)), ((2, 3), (2, 3))], ids=str
)
def test_matmul_broadcasts_no_inner_axis(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"matmul: shapes .* do not go with \d rows"):
        ops.matmul(*[Tensor(np.ones(shape)) for shape in shapes])

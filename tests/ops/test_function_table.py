"""Every function that people reach for: its values, gradients, dtypes, and its names as a method and in NumPy."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.function_table import ENTRIES, Entry

from tinyllm import ops
from tinyllm.autograd.operators import Operators
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.backend.philox import Key
from tinyllm.ops.by_dim import BY_DIM
from tinyllm.testing import gradcheck, gradient_function

Array = npt.NDArray[Any]

CASES = [
    pytest.param(entry, shapes, id=f"{entry}-{number}-{'-'.join(map(str, shapes))}")
    for number, entry in enumerate(ENTRIES)
    for shapes in entry.shapes
]


def draw(entry: Entry, shapes: tuple[tuple[int, ...], ...], dtype: Any = np.float64) -> list[Array]:
    random = np.random.default_rng([len(entry.name), *[n for shape in shapes for n in shape]])
    if np.dtype(dtype).kind == "f":
        return [np.asarray(random.uniform(entry.low, entry.high, shape), dtype) for shape in shapes]
    low = max(1 if entry.low > 0 else -3, 0 if np.dtype(dtype).kind in "bu" else -3)
    return [np.asarray(random.integers(low, 2 if dtype is bool else 4, shape), dtype) for shape in shapes]


def parts(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def ours(entry: Entry, *inputs: Any) -> list[Tensor]:
    found = parts(entry.call(getattr(ops, entry.name), *inputs))
    assert all(isinstance(part, Tensor) for part in found)
    return found


def differentiable(entry: Entry) -> Callable[..., Tensor]:
    """The function with one output: its differentiable parts, flat and one after the other."""

    def call(*inputs: Any) -> Tensor:
        floats = [part.reshape(-1) for part in ours(entry, *inputs) if part.dtype.kind == "f"]
        return ops.concatenate(floats)

    return call


@pytest.mark.parametrize(("entry", "shapes"), CASES)
def test_values_are_those_of_numpy(entry: Entry, shapes: tuple[tuple[int, ...], ...]) -> None:
    arrays = draw(entry, shapes)
    expected = parts(entry.expected(*arrays))
    found = ours(entry, *[Tensor(x) for x in arrays])
    assert len(found) == len(expected)
    for part, value in zip(found, expected, strict=True):
        assert part.shape == np.shape(value)
        np.testing.assert_allclose(part.data, value, rtol=1e-13, atol=1e-13)
        assert part.dtype == np.asarray(value).dtype
    for part in ours(entry, *[Tensor(x.astype(np.float32)) for x in arrays]):
        assert part.dtype != np.float64, "nothing becomes float64 silently"


@pytest.mark.parametrize(("entry", "shapes"), CASES)
def test_gradients_are_the_derivatives_to_second_order(
    entry: Entry, shapes: tuple[tuple[int, ...], ...]
) -> None:
    arrays = draw(entry, shapes)
    if not entry.gradient:
        assert not any(
            part.requires_grad for part in ours(entry, *[Tensor(x, requires_grad=True) for x in arrays])
        )
        return
    fn = differentiable(entry)
    assert gradcheck(fn, arrays, seed=1).tolerance < 1e-7
    cotangent = np.random.default_rng(3).standard_normal(fn(*[Tensor(x) for x in arrays]).shape)
    gradcheck(gradient_function(fn), [*arrays, cotangent], max_elements=0, projections=2, seed=1)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, bool])
@pytest.mark.parametrize(("entry", "shapes"), CASES)
def test_integers_and_booleans_follow_the_rule(
    entry: Entry, shapes: tuple[tuple[int, ...], ...], dtype: Any
) -> None:
    arrays = draw(entry, shapes, dtype)
    found = ours(entry, *[Tensor(x) for x in arrays])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = parts(entry.expected(*[x if dtype == np.int64 else x.astype(np.int64) for x in arrays]))
    for number, (part, value) in enumerate(zip(found, expected, strict=True)):
        expected_here = np.asarray(value).astype(part.dtype)  # a bool of a sum is whether any is true
        np.testing.assert_allclose(part.data.astype(float), expected_here.astype(float), rtol=2e-6, atol=2e-6)
        if number == 0 and entry.integers == "same":
            assert part.dtype == (np.int64 if dtype is bool and entry.name in MIXED else dtype)
        elif number == 0:
            assert part.dtype == entry.integers


MIXED = {
    "power",
    "remainder",
    "floor_divide",
    "clip",
    "masked_fill",
    "relu",
    "floor",
    "ceil",
    "round",
    "sign",
}
"""What makes integers of booleans."""


@pytest.mark.parametrize(
    ("entry", "shapes"),
    [case for case in CASES if case.values[0].numpy is None],
)
def test_numpys_function_on_tensors_is_ours(entry: Entry, shapes: tuple[tuple[int, ...], ...]) -> None:
    tensors = [Tensor(x, requires_grad=True) for x in draw(entry, shapes)]
    mine = ours(entry, *tensors)
    try:
        theirs = parts(entry.call(getattr(np, entry.name), *tensors))
    except TypeError as error:
        pytest.fail(f"numpy.{entry.name} does not take a Tensor: {error}")
    for a, b in zip(mine, theirs, strict=True):
        assert isinstance(b, Tensor)
        assert a.requires_grad == b.requires_grad
        np.testing.assert_array_equal(a.data, b.data)


PAIR = ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "remainder", "floor_divide", "matmul",
        "dot", "inner", "outer", "tensordot", "isclose", "allclose", "array_equal", "linear", "swiglu",
        "logaddexp", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "kl_div",
        "binary_cross_entropy_with_logits")  # fmt: skip
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: lambda f, x: f(x, x) for name in PAIR},
    **{name: lambda f, x: f([x, x]) for name in ("concatenate", "stack", "vstack", "hstack")},
    "astype": lambda f, x: f(x, x.dtype), "broadcast_to": lambda f, x: f(x, (2, 2, 2)), "chunk": lambda f, x: f(x, 2),
    "clip": lambda f, x: f(x, 0, 1), "cross_entropy": lambda f, x: f(x, [0, 1]),
    "nll_loss": lambda f, x: f(x, [0, 1]), "cumprod": lambda f, x: f(x, 0), "one_hot": lambda f, x: f([0, 1], 2),
    "scatter_add": lambda f, x: f(x, 0, np.array([[0, 1]]), x), "pad": lambda f, x: f(x, 1),
    "dropout": lambda f, x: f(x, 0.5, Key(1, 2)), "einsum": lambda f, x: f("ij,jk->ik", x, x),
    "embedding": lambda f, x: f(x, [0]), "expand_dims": lambda f, x: f(x, 0),
    "gather": lambda f, x: f(x, 0, np.array([[0, 1]])), "getitem": lambda f, x: f(x, 0),
    "layer_norm": lambda f, x: f(x, x[0], x[0]), "masked_fill": lambda f, x: f(x, x > 0, 0),
    "merge_heads": lambda f, x: f(x.reshape(1, 1, 2, 2)), "moveaxis": lambda f, x: f(x, 0, 1),
    "repeat": lambda f, x: f(x, 2, axis=0), "reshape": lambda f, x: f(x, 4), "rms_norm": lambda f, x: f(x, x[0]),
    "roll": lambda f, x: f(x, 1), "rotary_heads": lambda f, x: f(x.reshape(1, 2, 2), 2),
    "scaled_dot_product_attention": lambda f, x: f(*[x.reshape(1, 1, 2, 2)] * 3), "split": lambda f, x: f(x, 2),
    "split_heads": lambda f, x: f(x.reshape(1, 2, 2), 2), "swapaxes": lambda f, x: f(x, 0, 1),
    "squeeze": lambda f, x: f(x), "take_along_axis": lambda f, x: f(x, np.array([[0, 1]]), 0),
    "expand": lambda f, x: f(x, 2, -1, 2),
    "tile": lambda f, x: f(x, 2), "topk": lambda f, x: f(x, 1), "where": lambda f, x: f(x > 0, x, 0),
}  # fmt: skip
"""How to call what takes more than one array."""
REFUSES_BOOLEANS = {"negative", "subtract"}
"""As NumPy does."""


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
@pytest.mark.parametrize("name", ops.__all__)
def test_integers_become_nothing_but_what_the_rule_says(name: str, dtype: str) -> None:
    values = np.array([[1, 0], [1, 1]] if dtype == "bool" else [[1, 2], [3, 1]], dtype=dtype)
    function, call = getattr(ops, name), CALLS.get(name, lambda f, x: f(x))
    if dtype == "bool" and name in REFUSES_BOOLEANS:
        with pytest.raises(TypeError):
            call(function, Tensor(values))
        return
    with np.errstate(all="ignore"):  # ln 0, division by 0
        found, real = (parts(call(function, Tensor(x))) for x in (values, values.astype(np.float64)))
    for result, expected in zip(found, real, strict=True):
        assert isinstance(result, bool) or result.dtype in (dtype, np.int64, np.float32, np.bool_)
        if dtype.startswith("int"):
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


# ---- Names -------------------------------------------------------------------------------------


def test_every_method_is_there_and_says_what_it_does() -> None:
    names = set(inspect.get_annotations(Operators)) - {"data", "op", "requires_grad"}
    assert len(names) > 80
    for name in names:
        method = getattr(Tensor, name)
        assert callable(method), name
        assert inspect.getdoc(method), name


def test_a_method_is_the_function() -> None:
    x = Tensor([[3.0, 1.0, 2.0]])
    for method, function in (
        (x.softmax(0), ops.softmax(x, 0)), (x.log_softmax(), ops.log_softmax(x)), (x.sin(), ops.sin(x)),
        (x.gelu("tanh"), ops.gelu(x, "tanh")), (x.matmul(x.T), ops.matmul(x, x.T)), (x.pow(2), x * x),
        (x.unsqueeze(0), ops.expand_dims(x, 0)), (x.view(3, 1), x.reshape(3, 1)), (x.norm(), (x * x).sum().sqrt()),
        (x.clamp(min=2), ops.maximum(x, 2)), (x.permute(1, 0), x.T), (x.mT, x.T), (x.mul(x).sub(1), x * x - 1),
    ):  # fmt: skip
        np.testing.assert_array_equal(method.data, function.data)
    assert (x == x).float().dtype == np.float32
    assert x.double().dtype == np.float64
    assert x.long().dtype == np.int64


TAKING_AN_AXIS = [
    name
    for name in ops.__all__
    if "axis" in inspect.signature(getattr(ops, name)).parameters
    and name not in BY_DIM
    and name != "rope"  # the axis of positions, which torch does not have
]
AXIS_CALLS: dict[str, Callable[..., Any]] = {
    "take_along_axis": lambda f, **words: f(X, np.array([[0], [1]]), **words),
    "scatter_add": lambda f, **words: f(X, index=np.array([[0], [1]]), src=X, **words),
    "gather": lambda f, **words: f(X, indices=np.array([[0], [1]]), **words),
    "topk": lambda f, **words: f(X, 2, **words),
    "chunk": lambda f, **words: f(X, 2, **words),
    "roll": lambda f, **words: f(X, 1, **words),
    "repeat": lambda f, **words: f(X, 2, **words),
    "concatenate": lambda f, **words: f([X, X], **words),
    "stack": lambda f, **words: f([X, X], **words),
    "squeeze": lambda f, **words: f(X[:, :1], **words),
}
X = Tensor(np.random.default_rng(0).normal(size=(2, 4)))


@pytest.mark.parametrize("name", TAKING_AN_AXIS)
def test_torchs_dim_is_the_axis(name: str) -> None:
    call = AXIS_CALLS.get(name, lambda f, **words: f(X, **words))
    function = getattr(ops, name)
    for axis in (1, -1):
        mine, theirs = parts(call(function, axis=axis)), parts(call(function, dim=axis))
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    with pytest.raises(TypeError, match=r"under two names"):
        function(X, axis=1, dim=1)


def test_words_of_torch_and_numpy_for_other_arguments() -> None:
    np.testing.assert_array_equal(X.sum(dim=1, keepdim=True).data, X.data.sum(1, keepdims=True))
    np.testing.assert_array_equal(X.flip(dims=(0, 1)).data, X.data[::-1, ::-1])
    np.testing.assert_array_equal(X.clip(a_min=0, a_max=1).data, X.data.clip(0, 1))
    np.testing.assert_allclose(X.var(ddof=1).item(), X.data.var(ddof=1), rtol=1e-15)
    np.testing.assert_allclose(X.std(dim=1, unbiased=True).data, X.data.std(1, ddof=1), rtol=1e-15)
    np.testing.assert_allclose(X.norm(p=1, dim=0).data, np.abs(X.data).sum(0), rtol=1e-15)
    np.testing.assert_array_equal(ops.flatten(X, start_dim=0, end_dim=1).data, X.data.ravel())
    np.testing.assert_array_equal(X.diagonal(dim1=1, dim2=0).data, X.data.diagonal(0, 1, 0))


def test_dim_means_what_torch_means_by_it() -> None:
    """Where the two libraries differ: pairs, lengths of parts, and n - 1."""
    x = X.data
    for name in ("max", "min"):
        found = getattr(X, name)(dim=1)
        np.testing.assert_array_equal(found.values.data, getattr(x, name)(1))
        np.testing.assert_array_equal(found.indices.data, getattr(x, f"arg{name}")(1))
        assert getattr(X, name)(dim=0, keepdim=True).indices.shape == (1, 4)
        assert isinstance(getattr(X, name)(axis=1), Tensor)
    values, positions = X.sort(dim=0, descending=True)
    np.testing.assert_array_equal(values.data, np.sort(x, 0)[::-1])
    np.testing.assert_array_equal(positions.data, np.argsort(-x, 0))
    for sections, lengths in ((3, [3, 1]), (2, [2, 2]), (9, [4]), ([1, 3], [1, 3])):
        parts = X.split(sections, dim=1)
        assert [part.shape for part in parts] == [(2, n) for n in lengths]
        np.testing.assert_array_equal(np.concatenate([part.data for part in parts], 1), x)
    assert [part.shape for part in X.split(2, axis=1)] == [(2, 2)] * 2
    with pytest.raises(ValueError, match=r"split: the lengths \[1, 2\] are those of 3 elements, not of 4"):
        X.split([1, 2], dim=1)
    np.testing.assert_allclose(X.var(dim=1).data, x.var(1, ddof=1), rtol=1e-15)
    np.testing.assert_allclose(X.std(dim=0, keepdim=True).data, x.std(0, ddof=1, keepdims=True), rtol=1e-15)
    np.testing.assert_allclose(X.var(dim=1, unbiased=False).data, x.var(1), rtol=1e-15)
    # The gradient of torch's max(dim=) goes to the one that it names.
    tied = Tensor([[1.0, 3.0, 3.0]], requires_grad=True)
    tied.max(dim=1).values.sum().backward()
    np.testing.assert_array_equal(tied.grad, [[0, 1, 0]])


def test_torchs_repeat_is_called_tile() -> None:
    for call in (lambda: X.repeat(2), lambda: X.repeat(2, 1), lambda: X.repeat((2, 1))):
        with pytest.raises(TypeError, match=r"axis=.*tile"):
            call()


def test_two_axes_of_more_are_exchanged_by_transpose() -> None:
    x = Tensor(np.arange(24.0).reshape(2, 3, 4))
    for axes in ((1, 2), (-2, -1), (0, 2), (2, 0), (1, 1)):
        np.testing.assert_array_equal(x.transpose(*axes).data, x.data.swapaxes(*axes))
    for axes in ((0, 1), (-2, -1)):  # of a matrix, they are an order too, which NumPy follows
        with pytest.raises(ValueError, match=r"swapaxes\("):
            X.transpose(*axes)
    for wrong in (((0, 1),), (0, 3)):
        with pytest.raises((ValueError, IndexError), match=r"axes|axis 3"):
            x.transpose(*wrong)
    np.testing.assert_array_equal(X.transpose(1, 0).data, X.data.T)
    np.testing.assert_array_equal(X.transpose((0, 1)).data, X.data)
    np.testing.assert_array_equal(X.permute(0, 1).data, X.data)
    np.testing.assert_array_equal(x.swapaxes(1, 2).data, x.data.swapaxes(1, 2))
    y = x.swapaxes(0, 1).contiguous().view(3, 8)
    np.testing.assert_array_equal(y.data, x.data.swapaxes(0, 1).reshape(3, 8))
    assert (X.numel(), X.tolist()) == (8, X.data.tolist())


def test_what_numpy_takes_positionally_and_we_do_not_is_refused() -> None:
    with pytest.raises(TypeError, match="by its name"):
        np.sum(X, 1, np.float32)
    with pytest.raises(ValueError, match="norm of matrices"):
        np.linalg.norm(X, 2)
    with pytest.raises(ValueError, match="only 'constant'"):
        np.pad(X, 1, "edge")


def test_more_of_numpys_functions_take_tensors() -> None:
    x, y = X.data, np.array([2, 0, 2])
    random = np.random.default_rng(1).normal(size=2)
    for found, expected in (
        (np.linalg.norm(X), np.linalg.norm(x)), (np.linalg.norm(X, axis=1), np.linalg.norm(x, axis=1)),
        (np.linalg.norm(X, "fro"), np.linalg.norm(x)), (np.diff(X, 2), np.diff(x, 2)),
        (np.diff(X, axis=0), np.diff(x, axis=0)), (np.average(X, 0, random), np.average(x, 0, random)),
        (np.average(X), np.average(x)), (np.reciprocal(X), 1 / x), (np.full_like(X, 3), np.full_like(x, 3)),
        (np.count_nonzero(X > 0), np.count_nonzero(x > 0)), (np.unique(Tensor(y)), np.unique(y)),
        (np.rint(X), np.rint(x)), (np.bincount(Tensor(y)), np.bincount(y)), (np.ndim(X), 2), (np.size(X), 8),
        (np.where(X > 0)[1], np.where(x > 0)[1]), (np.zeros_like(X, dtype=int), np.zeros((2, 4), int)),
        (np.bitwise_xor(Tensor(y), 1), y ^ 1), (np.cumsum(X), np.cumsum(x)), (np.isin(Tensor(y), [2]), y == 2),
        (np.take(X, [1, -1], axis=-1), x[:, [1, -1]]), (np.take(X, y), x.ravel()[y]), (np.diag(X, 1), np.diag(x, 1)),
        (np.diag(X[0]), np.diag(x[0])), (np.diag(X[0], 2), np.diag(x[0], 2)), (np.diag(X[0], -1), np.diag(x[0], -1)),
    ):  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    for mine, theirs in zip(np.array_split(X, 3, axis=1), np.array_split(x, 3, axis=1), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert np.allclose(X, x)
    assert not np.allclose(X, x + 1)
    assert np.array_equal(X, X)
    assert not np.array_equal(X, X[:1])


# ---- Operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bool, np.int64])
def test_logic(dtype: Any) -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 2 if dtype is bool else 9, (3, 4)).astype(dtype) for _ in range(2))
    for other in (b, Tensor(b)):
        np.testing.assert_array_equal((Tensor(a) & other).data, a & b)
        np.testing.assert_array_equal((Tensor(a) | other).data, a | b)
        np.testing.assert_array_equal((Tensor(a) ^ other).data, a ^ b)
        np.testing.assert_array_equal((other & Tensor(a)).data, a & b)
    np.testing.assert_array_equal((~Tensor(a)).data, ~a)
    assert (True & Tensor([True, False])).data.tolist() == [True, False]
    with pytest.raises(TypeError):
        Tensor([1.0]) & Tensor([1.0])


def test_the_accuracy_idiom() -> None:
    logits = Tensor(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    y = np.random.default_rng(1).integers(0, 3, 50)
    expected = float((logits.data.argmax(-1) == y).mean())
    for accuracy in ((logits.argmax(-1) == y).mean(), (y == logits.argmax(-1)).float().mean()):
        assert accuracy.dtype == np.float32
        assert accuracy.item() == np.float32(expected)
    assert (logits > 0).sum().item() == int((logits.data > 0).sum())


def test_one_number_is_written_as_a_number() -> None:
    loss = Tensor([1.0, 2.0], requires_grad=True).sum()
    assert f"{loss:.3f}|{loss:8.2e}|{Tensor(7):>3d}|{Tensor([[0.5]]):.0%}" == "3.000|3.00e+00|  7|50%"
    assert f"{loss}" == str(loss)
    with pytest.raises(TypeError, match=r"shape \(2,\).*'\.3f'"):
        f"{Tensor([1.0, 2.0]):.3f}"


def test_a_mask_holds_booleans() -> None:
    scores = Tensor([[1, 2], [3, 4]]).masked_fill(np.array([[False, True], [False, False]]), -np.inf)
    assert scores.dtype == np.float32
    assert scores.data.tolist() == [[1, -np.inf], [3, 4]]
    for mask in (np.eye(2), np.eye(2, dtype=int), [0, 1]):
        with pytest.raises(TypeError, match="booleans"):
            ops.masked_fill(X[:, :2], mask, 0)


def test_numbers_on_the_left() -> None:
    x = Tensor([3.0, -4.0], requires_grad=True)
    assert +x is x
    np.testing.assert_array_equal((7 % x).data, 7 % x.data)
    np.testing.assert_array_equal((7 // x).data, 7 // x.data)
    assert (Tensor([7, -7]) // 2).data.tolist() == [3, -4]
    assert (Tensor([7, -7]) % 4).data.tolist() == [3, 1]


def test_numpys_numbers_beside_integers_make_no_float64() -> None:
    counts = Tensor([1, 2])
    for result in (
        counts * np.sqrt(2),
        np.float64(0.5) + counts,
        counts / np.float64(3),
        counts ** np.float64(0.5),
    ):
        assert result.dtype == np.float32
    assert (counts * np.array([0.5, 0.5])).dtype == np.float64  # an array asks for its dtype


# ---- In place ----------------------------------------------------------------------------------


def test_a_parameter_changes_in_place_within_no_grad_alone() -> None:
    from tinyllm import no_grad

    array = np.array([1.0, 2.0], dtype=np.float32)
    p = held = Tensor(array, requires_grad=True)
    loss = (p * p).sum()
    with pytest.raises(RuntimeError, match="no_grad"):
        p += 1
    with no_grad():
        p -= 0.5 * np.array([2.0, 4.0])
        p *= 3
    assert p is held
    assert p.requires_grad
    assert p.dtype == np.float32
    assert p.data.tolist() == [0.0, 0.0]
    assert array.tolist() == [1.0, 2.0], "the array that the caller holds is not written to"
    loss.backward()
    assert p.grad.tolist() == [2.0, 4.0], "the graph is that of the values that it was made of"
    with no_grad(), pytest.raises(ValueError, match=r"\(2,\) cannot become \(3, 2\)"):
        p += np.ones((3, 2))


def test_elsewhere_an_operator_in_place_names_another_tensor() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    total = start = Tensor(0.0)
    for _ in range(3):
        total += (x * x).sum()
    assert start.item() == 0
    (found,) = gradients(total, [x])
    assert found.tolist() == [6.0, 12.0]
    y = x * 2
    y *= x
    assert gradients(y.sum(), [x])[0].tolist() == [4.0, 8.0]
    with pytest.raises(TypeError, match=r"masked_fill"):
        x[0] = 1.0


def test_two_losses_over_a_shared_part() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    shared = x * x
    first, second = shared.sum(), (shared * shared).sum()
    first.backward()
    with pytest.raises(RuntimeError, match=r"add them.*retain_graph=True"):
        second.backward()
    x.grad = None
    shared = x * x
    first, second = shared.sum(), (shared * shared).sum()
    first.backward(retain_graph=True)
    second.backward()
    separate = x.grad
    x.grad = None
    shared = x * x
    (shared.sum() + (shared * shared).sum()).backward()
    np.testing.assert_array_equal(separate, x.grad)
    np.testing.assert_array_equal(x.grad, 2 * x.data + 4 * x.data**3)


# ---- Axes and shapes of any integers -----------------------------------------------------------


def integers(*values: int) -> list[Any]:
    """The same integers in every form that people have them in."""
    forms: list[Any] = [
        tuple(values),
        list(values),
        np.array(values),
        tuple(map(np.int32, values)),
        Tensor(values),
    ]
    return [
        *forms,
        *[kind(values[0]) for kind in (int, np.int64, np.uint8, np.array, Tensor) if len(values) == 1],
    ]


@pytest.mark.parametrize(
    "name", ["sum", "mean", "var", "std", "max", "min", "prod", "logsumexp", "any", "all", "flip"]
)
@pytest.mark.parametrize("axes", [(1,), (0, 2)])
def test_axes_are_integers_of_any_kind(name: str, axes: tuple[int, ...]) -> None:
    function = getattr(ops, name)
    values = np.random.default_rng(0).normal(size=(2, 3, 4))
    cotangent = np.random.default_rng(1).normal(size=function(Tensor(values), axes).shape)
    found = []
    for form in integers(*axes):
        x = Tensor(values, requires_grad=True)
        y = function(x, form)
        found.append([y.data, *(gradients(y, [x], cotangent) if y.requires_grad else ())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_lengths_are_integers_of_any_kind() -> None:
    x = Tensor(np.arange(6.0))
    for form in integers(2, 3):
        assert x.reshape(form).shape == (2, 3)
        assert ops.broadcast_to(Tensor(1.0), form).shape == (2, 3)
        assert x.tile(form).shape == (2, 18)
        assert ops.pad(x, form).shape == (11,)
        assert [part.shape for part in ops.split(x, form)] == [(2,), (1,), (3,)]
    for one in integers(2)[5:]:
        assert x.reshape(one, 3).shape == (2, 3)
        assert ops.pad(x, one).shape == (10,)
        assert len(ops.split(x, one)) == 2
        assert x.repeat(one, axis=0).shape == (12,)
    assert all(type(n) is int for n in x.reshape(np.array([2, 3])).shape)


def test_a_running_product_is_of_a_scalar_or_of_all_elements_too() -> None:
    x = Tensor(np.array([[2.0, 3.0], [5.0, 7.0]]), requires_grad=True)
    np.testing.assert_array_equal(x.cumprod().data, [2, 6, 30, 210])
    for axis in (0, -1):
        assert Tensor(3.0).cumprod(axis).shape == Tensor(3.0).cumsum(axis).shape == ()


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "var", "logsumexp", "softmax", "log_softmax",
                                  "cumsum", "argmax", "any", "flip", "sort", "argsort", "squeeze"])  # fmt: skip
@pytest.mark.parametrize("axis", [0, -1])
def test_a_scalar_has_axes_0_and_minus_1(name: str, axis: int) -> None:
    x = Tensor(3.0, requires_grad=True)
    y = getattr(ops, name)(x, axis)
    assert y.shape == ()
    if y.requires_grad:
        y.backward()
        assert x.grad.shape == ()
    with pytest.raises((IndexError, ValueError)):
        getattr(ops, name)(x, 1)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "var", "std", "logsumexp", "any",
                                  "all", "flip", "squeeze", "vector_norm"])  # fmt: skip
@pytest.mark.parametrize("axis", [(0,), [-1], np.array([0]), ()])
def test_the_axes_of_a_scalar_may_be_a_sequence(name: str, axis: Any) -> None:
    x = Tensor(3.0, requires_grad=True)
    y = getattr(ops, name)(x, axis=axis)
    assert y.shape == ()
    if y.requires_grad:
        y.backward()
        assert x.grad.shape == ()

"""The engine: graphs, accumulation, modes, errors, and what Tensors do with Python and NumPy."""

import contextvars
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from support.strict_device import strict_device

import tinyllm
from tinyllm import ops
from tinyllm.autograd import jvp
from tinyllm.autograd.backward_pass import propagate
from tinyllm.autograd.mode import enable_grad, is_grad_enabled, no_grad, use_formulas
from tinyllm.autograd.registry import REGISTRY, register
from tinyllm.autograd.tensor import Case, Op, Tensor, gradients


def leaf(values: Any, dtype: Any = np.float64) -> Tensor:
    return Tensor(np.asarray(values, dtype=dtype), requires_grad=True)


# ---- Tensors -----------------------------------------------------------------------------------


def test_making_tensors() -> None:
    assert Tensor(1.5).dtype == np.float32
    assert Tensor([1, 2]).dtype == np.int64
    assert Tensor(np.float64(1.5)).dtype == np.float64
    assert Tensor(np.zeros(2), dtype="float32").dtype == np.float32
    array = np.zeros((2, 3))
    tensor = Tensor(array, name="weight")
    assert tensor.data is array
    assert Tensor(tensor).data is array
    assert (tensor.shape, tensor.ndim, tensor.size, len(tensor)) == ((2, 3), 2, 6, 2)
    assert tensor.is_leaf
    assert tensor.grad is None


def test_tensors_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"holds real numbers; got int 10+ with dtype object"):
        Tensor(10**20)
    with pytest.raises(TypeError, match="got no dtype"):
        Tensor([1.0]).astype(None)
    with pytest.raises(TypeError, match=r"holds real numbers; got list .* with dtype object"):
        Tensor([None])
    with pytest.raises(TypeError, match=r"needs a floating-point dtype; got int64.*dtype='float32'"):
        Tensor([1, 2], requires_grad=True)
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        Tensor(1.0).retain_grad()
    with pytest.raises(RuntimeError, match=r"call \.detach\(\)\.numpy\(\)"):
        leaf(1.0).numpy()


def test_python_conversions() -> None:
    assert float(Tensor(2.5)) == 2.5
    assert int(Tensor([3])) == 3
    assert Tensor([[7]]).item() == 7
    assert [10, 20, 30][Tensor(1)] == 20
    assert bool(Tensor([1.0])) is True
    assert bool(Tensor(0)) is False
    assert isinstance(Tensor(2.5).item(), float)
    np.testing.assert_array_equal(np.asarray(Tensor([1.0, 2.0])), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(2,\) is neither true nor false"):
        bool(Tensor([1, 2]))
    with pytest.raises(ValueError, match="exactly one element"):
        Tensor([1, 2]).item()
    with pytest.raises(TypeError, match="no length"):
        len(Tensor(1.0))
    with pytest.raises(TypeError, match="only an integer Tensor"):
        [1, 2][Tensor(1.0)]  # type: ignore[call-overload]


def test_repr_says_what_matters() -> None:
    assert repr(Tensor([1.0, 2.0])) == "Tensor([1., 2.], shape=(2,), dtype=float32)"
    x = Tensor([1.0], requires_grad=True, name="x")
    assert repr(x) == "Tensor([1.], shape=(1,), dtype=float32, requires_grad=True, name='x')"
    assert "op=multiply" in repr(x * 2)
    assert len(repr(Tensor(np.zeros(100_000)))) < 200


def test_detach_shares_values_without_a_graph() -> None:
    x = leaf([1.0, 2.0])
    y = (x * 2).detach()
    assert not y.requires_grad
    assert y.is_leaf
    assert np.shares_memory(x.detach().data, x.data)


# ---- Backward ----------------------------------------------------------------------------------


def test_gradients_accumulate_over_uses() -> None:
    x = leaf(3.0)
    (x * x + x * 2 + x).backward()
    assert x.grad == 9.0
    assert isinstance(x.grad, np.ndarray)


def test_gradients_accumulate_over_backward_passes() -> None:
    x = leaf([1.0, 2.0])
    (x * x).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [5.0, 7.0])
    assert x.grad is first


def test_the_same_tensor_twice_in_one_op() -> None:
    x = leaf([2.0, 3.0])
    (x * x).backward(np.array([1.0, 10.0]))
    np.testing.assert_array_equal(x.grad, [4.0, 60.0])
    y = leaf([[1.0, 2.0], [3.0, 4.0]])
    (y @ y).sum().backward()
    np.testing.assert_array_equal(y.grad, [[7.0, 11.0], [9.0, 13.0]])


def test_diamonds() -> None:
    x = leaf(2.0)
    left, right = x * 3, x * x
    (left * right + left).backward()  # 3x^3 + 3x
    assert x.grad == 9 * 4 + 3
    y = leaf(1.0)
    value = y
    for _ in range(60):  # 2^60 paths: each op must run once
        value = value + value
    value.backward()
    assert y.grad == 2.0**60


def test_only_what_requires_a_gradient_gets_one() -> None:
    x, constant = leaf([1.0, 2.0]), Tensor(np.array([3.0, 4.0]))
    (x * constant).sum().backward()
    np.testing.assert_array_equal(x.grad, [3.0, 4.0])
    assert constant.grad is None


def test_interior_gradients_are_kept_on_request() -> None:
    x = leaf([1.0, 2.0])
    y = x * 2
    z = y * y
    y.retain_grad()
    (z.sum() + y.sum()).backward()
    np.testing.assert_array_equal(y.grad, [5.0, 9.0])
    np.testing.assert_array_equal(x.grad, [10.0, 18.0])
    assert z.grad is None
    assert not np.shares_memory(x.grad, y.grad)
    scalar = leaf(2.0) * 3
    scalar.retain_grad()
    (scalar + scalar).backward()
    assert isinstance(scalar.grad, np.ndarray)


def test_output_that_is_a_leaf() -> None:
    x = leaf([1.0, 2.0])
    cotangent = np.array([5.0, 6.0])
    x.backward(cotangent)
    np.testing.assert_array_equal(x.grad, cotangent)
    assert not np.shares_memory(x.grad, cotangent)


def test_backward_twice() -> None:
    x = leaf([1.0, 2.0])
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_array_equal(x.grad, [4.0, 8.0])
    with pytest.raises(RuntimeError, match=r"freed by an earlier backward pass.*retain_graph=True"):
        y.backward()
    shared = x * x
    shared.sum().backward()
    with pytest.raises(RuntimeError, match="graph behind multiply was freed"):
        (shared * 2).sum().backward()


def test_cotangents() -> None:
    x = leaf([1.0, 2.0])
    (x * x).backward(Tensor(np.array([1.0, 0.5])))
    np.testing.assert_array_equal(x.grad, [2.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(2,\) needs gradient=.*\.sum\(\)"):
        (x * x).backward()
    with pytest.raises(ValueError, match=r"gradient= has shape \(3,\), the Tensor has shape \(2,\)"):
        (x * x).backward(np.zeros(3))
    with pytest.raises(RuntimeError, match="requires a gradient"):
        Tensor(1.0).backward()


def test_gradients_stores_nothing() -> None:
    x, y, unused = leaf([1.0, 2.0]), leaf(3.0), leaf([[1.0]])
    product = x * y
    found = gradients((product * product).sum(), [x, unused, product, y])
    np.testing.assert_array_equal(found[0], [18.0, 36.0])
    np.testing.assert_array_equal(found[1], [[0.0]])
    np.testing.assert_array_equal(found[2], [6.0, 12.0])
    assert found[3] == 30.0
    assert [tensor.grad for tensor in (x, y, unused, product)] == [None] * 4
    assert all(isinstance(gradient, np.ndarray) for gradient in found)


def test_gradients_of_interior_tensors_own_their_memory() -> None:
    x = leaf([1.0, 2.0])
    left, right = x * 1, x * 2
    total = left + right  # whose backward hands one array to both
    found = gradients(total, [left, right, total, x], np.ones(2))
    for position, gradient in enumerate(found):
        assert isinstance(gradient, np.ndarray)
        assert not any(np.shares_memory(gradient, other) for other in found[position + 1 :])
    scalar = leaf(2.0) * 3
    assert isinstance(gradients(scalar + scalar, [scalar])[0], np.ndarray)


def test_gradients_of_gradients() -> None:
    x = leaf([1.0, 2.0])
    (first,) = gradients((x**4).sum(), [x], create_graph=True)
    (second,) = gradients(first.sum(), [x], create_graph=True)
    (third,) = gradients(second.sum(), [x])
    np.testing.assert_allclose(first.data, [4.0, 32.0])
    np.testing.assert_allclose(second.data, [12.0, 48.0])
    np.testing.assert_allclose(third, [24.0, 48.0])
    with no_grad():
        assert not (first * 1).requires_grad


def test_gradients_of_gradients_within_no_grad() -> None:
    x, row = leaf([1.0, 2.0]), leaf([[3.0], [5.0]])
    loss = (x * x + x * x).sum() + (x * row * row).sum()
    with no_grad():
        slopes = gradients(loss, [x, row], create_graph=True)
    (found,) = gradients(slopes[0].sum(), [row], retain_graph=True)
    np.testing.assert_allclose(found, [[12.0], [20.0]])  # slope of x: 4 x + sum of squares of row
    np.testing.assert_allclose(gradients(slopes[1].sum(), [x])[0], [16.0, 16.0])


def test_second_derivative_of_a_fused_op_outside_reference_mode() -> None:
    x = leaf([0.3, -1.0])
    (slope,) = gradients(ops.silu(x).sum(), [x], create_graph=True)
    (found,) = gradients(slope.sum(), [x])
    s = 1 / (1 + np.exp(-x.data))
    np.testing.assert_allclose(found, s * (1 - s) * (2 + x.data * (1 - 2 * s)), rtol=1e-12)


def test_second_derivative_with_an_input_given_twice_to_a_fused_op() -> None:
    x = leaf([0.3, -1.0])
    (slope,) = gradients(ops.swiglu(x, x).sum(), [x], create_graph=True)
    (expected,) = gradients((ops.silu(leaf(x.data)) * 1).sum(), [x])
    np.testing.assert_array_equal(expected, 0)
    s = 1 / (1 + np.exp(-x.data))
    np.testing.assert_allclose(slope.data, 2 * x.data * s + x.data**2 * s * (1 - s), rtol=1e-12)


def test_propagate_stops_where_told() -> None:
    x = leaf(2.0)
    middle = x * 3
    found = {id(t): g for t, g in propagate(middle * middle, np.array(1.0), stop=frozenset({id(middle)}))}
    assert found[id(middle)] == 12.0
    assert id(x) not in found


# ---- Long chains and memory --------------------------------------------------------------------


def chain(x: Tensor, length: int) -> Tensor:
    y = x
    for _ in range(length):
        y = y + 1.0
    return y


def test_chain_of_100_000_ops() -> None:
    x = leaf(0.0)
    y = chain(x, 100_000)
    assert y.item() == 100_000
    y.backward()
    assert x.grad == 1.0


def test_long_chain_is_deleted_without_recursion() -> None:
    x = leaf(0.0)
    y = chain(x, 100_000)
    assert y.op is not None
    last, first = weakref.ref(y.op), weakref.ref(y)
    del y
    assert (last(), first()) == (None, None)


def test_memory_is_freed_without_the_garbage_collector() -> None:
    x = leaf(np.ones(4))
    gc.disable()
    try:
        hidden = ops.tanh(x * 2)
        array, tensor, op = weakref.ref(hidden.data), weakref.ref(hidden), weakref.ref(hidden.op)
        loss = hidden.sum()
        del hidden
        assert tensor() is not None
        loss.backward()
        assert (array(), tensor(), op()) == (None, None, None)
    finally:
        gc.enable()


# ---- Modes -------------------------------------------------------------------------------------


def test_no_grad_and_enable_grad_nest() -> None:
    x = leaf(1.0)
    with no_grad():
        assert not is_grad_enabled()
        assert not (x * 2).requires_grad
        with enable_grad():
            assert (x * 2).requires_grad
        assert not is_grad_enabled()
    assert (x * 2).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert is_grad_enabled()


def test_use_formulas_nests() -> None:
    x = leaf(1.0)

    def name() -> str:
        op = ops.silu(x).op
        assert op is not None
        assert op.name == "silu"
        return type(op).__name__

    assert name() == "FastSilu"
    with use_formulas():
        assert name() == "Silu"
        with no_grad():
            assert not ops.silu(x).requires_grad
        with use_formulas(False):
            assert name() == "FastSilu"
        assert name() == "Silu"
    assert name() == "FastSilu"


def test_modes_belong_to_their_thread() -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(is_grad_enabled())
        with enable_grad():
            seen.append(is_grad_enabled())

    with no_grad():
        context = contextvars.copy_context()
        for target in (look, lambda: context.run(look)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert not is_grad_enabled()
    assert seen == [True, True, False, True]


def test_threads_differentiate_at_once() -> None:
    x = leaf(np.linspace(-1, 1, 50))
    expected = gradients((ops.tanh(x) * x).sum(), [x])[0]
    found: list[Any] = [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = gradients((ops.tanh(x) * x).sum(), [x])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradient in found:
        np.testing.assert_array_equal(gradient, expected)


# ---- Dtypes ------------------------------------------------------------------------------------


def test_dtypes_do_not_mix() -> None:
    a, b = leaf([1.0], np.float32), leaf([1.0], np.float64)
    for mix in (lambda: a + b, lambda: ops.where(np.array([True]), a, b), lambda: ops.concatenate([a, b])):
        with pytest.raises(TypeError, match=r"float32 and float64; nothing is promoted.*\.astype"):
            mix()
    assert (a.astype(np.float64) + b).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_and_arrays_take_the_tensors_dtype(dtype: Any) -> None:
    x = leaf([1.0, 2.0], dtype)
    others: list[Any] = [
        2,
        2.5,
        np.float64(2.5),
        np.float32(2.5),
        np.arange(1, 3),
        np.array([0.5, 1.0]),
        True,
    ]
    others += [np.array([1.0, 2.0], dtype=np.float32), Tensor([1, 2]), Tensor([True, True])]
    for other in others:
        for result in (x + other, other + x, x * other, other - x, x / other, ops.maximum(x, other)):
            assert isinstance(result, Tensor)
            assert result.dtype == dtype
            assert result.requires_grad


def test_tensors_of_integers() -> None:
    x = Tensor([1, 2, 3])
    assert (x + 1).dtype == np.int64
    assert (x + 1).numpy().tolist() == [2, 3, 4]
    assert x.sum().item() == 6
    assert ops.exp(x).dtype == np.float32
    assert x.astype(np.float32).dtype == np.float32
    assert not (x * 2).requires_grad


def test_astype_passes_gradients() -> None:
    x = leaf([1.0, 2.0], np.float32)
    (x.astype(np.float64) * 3).sum().backward()
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad, [3.0, 3.0])
    assert not x.astype(np.int64).requires_grad
    assert x.astype(np.float32) is x


# ---- NumPy's functions on Tensors --------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        np.exp, np.negative, np.sqrt, np.tanh, np.square, np.sin, np.absolute, np.sum, np.transpose,
        lambda x: np.add(x, 1.0), lambda x: np.multiply(2.0, x), lambda x: np.sum(x, axis=1, keepdims=True),
        lambda x: np.reshape(x, (3, 2)), lambda x: np.where(np.array([True, False, True]), x, 0.0),
        lambda x: np.concatenate([x, x], axis=1), lambda x: np.stack([x, x]), lambda x: np.clip(x, 0.5, 1.0),
        lambda x: np.einsum("ij,kj->ik", x, x), lambda x: np.swapaxes(x, 0, 1), lambda x: np.mean(x, axis=0),
        lambda x: np.matmul(x, np.ones((3, 1))), lambda x: np.array([1.0, 2.0, 3.0]) * x,
        lambda x: np.broadcast_to(x, (4, 2, 3)), lambda x: np.pad(x, ((1, 0), (0, 2))),
        lambda x: np.cumsum(x, axis=0), lambda x: np.max(x, axis=1), lambda x: np.expand_dims(x, 0),
    ],
)  # fmt: skip
def test_numpy_functions_build_the_graph(function: Callable[[Any], Any]) -> None:
    values = np.arange(1.0, 7.0).reshape(2, 3) / 3
    x = leaf(values)
    result = function(x)
    assert isinstance(result, Tensor)
    np.testing.assert_allclose(result.data, function(values), rtol=1e-15)
    result.sum().backward()
    assert x.grad is not None


def test_numpy_functions_without_a_tensor_form_are_refused() -> None:
    x = leaf([1.0, 2.0])
    for refused in (lambda: np.arctan(x), lambda: np.median(x), lambda: np.add(x, 1.0, out=np.zeros(2))):
        with pytest.raises(TypeError):
            refused()
    with pytest.raises(RuntimeError, match="detach"):
        np.asarray(x)


def test_comparisons_carry_no_gradient() -> None:
    x = leaf([1.0, 2.0, 3.0])
    results = [x == 2, x != 2, x < 2, x <= 2, x > 2, x >= 2, np.less(x, 2), np.array(2) > x]
    expected = [[0, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]]
    for result, values in zip(results, expected, strict=True):
        assert isinstance(result, Tensor)
        assert result.dtype == bool
        assert not result.requires_grad
        assert result.numpy().tolist() == [bool(v) for v in values]
    assert (x == leaf([1.0, 0.0, 3.0])).numpy().tolist() == [True, False, True]
    assert len({x, leaf([1.0])}) == 2
    assert (x > 0).all()
    assert not (x > 5).any()


# ---- Indexing and iteration --------------------------------------------------------------------

X = np.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "index",
    [
        0, -1, (1, 2, 3), slice(None), (slice(None), 1), (..., 1), (..., None), None, slice(None, None, -1),
        (slice(0, 2), slice(2, 0, -1), slice(None, None, 2)), [1, 0, 1], ([0, 1], [2, 2]),
        np.array([True, False]), X > 7, (0, np.array([True, False, True])), np.array(1), np.int64(1), [],
        (slice(None), [0, 0, 2], 1), (np.array([[0], [1]]), np.array([2, 1])), True, False, (None, 1, ..., None, 0),
        slice(5, 9), np.zeros((0,), dtype=int), (1, slice(None), np.array([3, 3, 3])),
    ],
)  # fmt: skip
def test_indexing_as_in_numpy(index: Any) -> None:
    x = leaf(X)
    result = x[index]
    np.testing.assert_array_equal(result.data, X[index])
    cotangent = np.random.default_rng(0).standard_normal(result.shape)
    result.backward(cotangent)
    expected = np.zeros_like(X)
    np.add.at(expected, index if not isinstance(index, list) or index else np.zeros(0, int), cotangent)
    np.testing.assert_allclose(x.grad, expected, atol=1e-15)


def test_tensors_as_indices_and_refused_indices() -> None:
    x = leaf(X)
    np.testing.assert_array_equal(x[Tensor([1, 1])].data, X[[1, 1]])
    np.testing.assert_array_equal(x[Tensor(X) > 5].data, X[X > 5])
    with pytest.raises(IndexError, match=r"get_item\(float64\[2, 3, 4\]\).*out of bounds"):
        x[2]
    with pytest.raises(IndexError, match="integers or booleans; got dtype float64"):
        x[np.array([0.5])]


def test_iteration_yields_rows_with_a_graph() -> None:
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    first, second = x
    (first * 2 + second).sum().backward()
    np.testing.assert_array_equal(x.grad, [[2.0, 2.0], [1.0, 1.0]])
    with pytest.raises(TypeError):
        list(leaf(1.0))


# ---- Ops that break the contract ---------------------------------------------------------------


class Broken(Op):
    """y = x, with a backward that returns whatever it was given."""

    name = "broken"
    result: ClassVar[Any] = None

    def forward(self, *inputs: Any) -> Any:
        return inputs[0] * 1

    def backward(self, gradient: Any) -> Any:
        return type(self).result


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ((np.zeros(3), np.zeros(3)), RuntimeError, r"broken: backward returned 2 gradients for 1 inputs"),
        (
            np.zeros(2),
            ValueError,
            r"broken: backward made a gradient of shape \(2,\) for input 0 of shape \(3,\)",
        ),
        (np.zeros(()), ValueError, r"broken: .* shape \(\) for input 0 of shape \(3,\)"),
        (np.zeros(3, np.float32), TypeError, r"broken: .* dtype float32 for input 0 of dtype float64"),
    ],
)
def test_wrong_backward_is_named(result: Any, error: type[Exception], message: str) -> None:
    Broken.result = result
    x = leaf(np.ones(3))
    y = Broken()(x)
    with pytest.raises(error, match=message):
        y.backward(np.ones(3))


def test_broadcasting_is_summed_out_by_the_engine() -> None:
    Broken.result = np.arange(12.0).reshape(4, 3)
    x = leaf(np.ones((1, 3)))
    Broken()(x).backward(np.ones((1, 3)))
    np.testing.assert_array_equal(x.grad, [[18.0, 22.0, 26.0]])
    Broken.result = np.ones((2, 4, 3))
    scalar = leaf(1.0)
    Broken()(scalar).backward()
    assert scalar.grad == 24.0


def test_forward_that_changes_dtype_is_named() -> None:
    class Promote(Op):
        name = "promote"

        def forward(self, x: Any) -> Any:
            return x.astype(np.float64)

    with pytest.raises(TypeError, match=r"promote: forward made float64 out of float32\[2\]"):
        Promote()(leaf([1.0, 2.0], np.float32))


def test_ops_that_define_nothing_say_so() -> None:
    class Empty(Op):
        """Nothing."""

    with pytest.raises(TypeError, match=r"Empty defines no forward"):
        Empty()(np.ones(2))
    with pytest.raises(TypeError, match=r"Empty defines no backward"):
        Empty().backward(np.ones(2))


def test_registration() -> None:
    class Exp(Op):
        cases = (Case(((2,),)),)

    with pytest.raises(ValueError, match="'exp' is registered already"):
        register(Exp)

    class NoCases(Op):
        """An op that nothing tests."""

    with pytest.raises(ValueError, match="'no_cases' gives no cases"):
        register(NoCases)
    assert "no_cases" not in REGISTRY

    class TwoWordsRMS(Op):
        cases = (Case(((2,),)),)

    try:
        assert register(TwoWordsRMS) is TwoWordsRMS
        assert TwoWordsRMS.name == "two_words_rms"
    finally:
        REGISTRY.pop("two_words_rms", None)


def test_errors_of_numpy_name_the_op_and_its_inputs() -> None:
    with pytest.raises(ValueError, match=r"add\(float64\[2\], float64\[3\]\): .*broadcast"):
        leaf([1.0, 2.0]) + leaf([1.0, 2.0, 3.0])


def test_no_warning_from_an_ordinary_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = leaf(np.full((2, 3), -200.0), np.float32)
        (ops.sigmoid(x) + ops.silu(x) + ops.softmax(x)).sum().backward()
        assert np.isfinite(x.grad).all()


def test_integers_and_booleans_meet_floats_in_float32_and_each_other_as_in_numpy() -> None:
    assert (Tensor([1, 2]) + 1.5).dtype == np.float32
    assert (Tensor([True, False]) + 1).dtype == np.int64
    assert (Tensor([True, False]) * Tensor([1.0, 2.0])).dtype == np.float32
    assert (Tensor([1, 2]) * np.array([0.5, 0.25])).dtype == np.float64
    assert (Tensor(np.ones(2)) + Tensor([1, 2])).dtype == np.float64
    np.testing.assert_array_equal((Tensor([1, 2]) + 1.5).data, [2.5, 3.5])


# ---- What programs written for torch do with Tensors ------------------------------------------


def test_items_are_assigned_to_what_no_graph_and_no_other_tensor_holds() -> None:
    given = np.arange(6.0).reshape(2, 3).copy()
    x = Tensor(given)
    x[:, 0::2] = Tensor([[1.0, 2.0]])
    x[x == 4] = -np.inf
    x[Tensor([1]), -1] = 7
    np.testing.assert_array_equal(x.data, [[1, 1, 2], [1, -np.inf, 7]])
    np.testing.assert_array_equal(given.ravel(), range(6))
    y = x.clone()
    y[0, 0] = 5
    assert x.data[0, 0] == 1

    # A graph that holds x has the gradient of the x that it was made of.
    w, factor = leaf([2.0, 3.0]), Tensor(np.array([5.0, 7.0]))
    loss = (w * factor).sum()
    factor[0] = 100
    loss.backward()
    np.testing.assert_array_equal(w.grad, [5, 7])

    with no_grad():
        w[0] = 1
    np.testing.assert_array_equal(w.data, [1, 3])


@pytest.mark.parametrize(
    "assign",
    [
        lambda x, w: w.__setitem__(0, 1),
        lambda x, w: x.__setitem__(0, w),
        lambda x, w: (w * 2).__setitem__(0, 1),
        lambda x, w: x[0].__setitem__(0, 1),
        lambda x, w: x.T.__setitem__(0, 1),
    ],
    ids=["a leaf", "a value with a graph", "a node", "a row", "a transposed"],
)
def test_an_assignment_that_would_be_lost_is_refused(assign: Callable[..., None]) -> None:
    with pytest.raises(TypeError, match="not changed in place"):
        assign(Tensor(np.zeros((2, 2))), leaf([1.0, 2.0]))


def test_inside_jvp_no_item_is_assigned() -> None:
    def assigned(x: Tensor) -> Tensor:
        y = x * 2
        y[0] = 1
        return y

    def assigned_from(x: Tensor) -> Tensor:
        y = Tensor(np.zeros(2))
        y[0] = x[0]
        return y

    for function in (assigned, assigned_from):
        with pytest.raises((TypeError, ValueError)):
            jvp(function, np.ones(2), np.ones(2))


def test_torchs_words_for_axes_dtypes_and_devices() -> None:
    x = Tensor([[1.0, 0.0, 2.0]])
    assert (x.dim(), x.t().shape, x.device) == (2, (3, 1), "cpu")
    assert [x.bool().dtype, x.int().dtype, x.type("float64").dtype] == [np.bool_, np.int32, np.float64]
    assert x.to("cpu") is x.cpu() is x.to(device="cpu") is x.to(None, non_blocking=True) is x
    assert x.to(np.float64).dtype == x.to("cpu", "float64").dtype == x.to(leaf(0.0)).dtype == np.float64
    assert x.to("cpu", dtype=np.int64).dtype == np.int64
    for elsewhere in (
        lambda: x.to("cuda:0"),
        lambda: x.to(device="mps"),
        lambda: tinyllm.zeros(2, device="cuda"),
    ):
        with pytest.raises(ValueError, match=r"all arrays are on 'cpu'.*use_backend"):
            elsewhere()
    assert tinyllm.zeros(2, device=tinyllm.device("cpu")).shape == (2,)
    assert not tinyllm.cuda.is_available()
    layer = tinyllm.nn.Linear(2, 2)
    assert layer.to("cpu") is layer
    assert layer.to(np.float64).weight.dtype == np.float64
    with strict_device():
        assert tinyllm.cuda.is_available()
        assert tinyllm.ones(2, device="cuda:0").to("cuda").device == "cuda"
        with pytest.raises(ValueError, match="all arrays are on 'cuda'"):
            tinyllm.ones(2).to("cpu")

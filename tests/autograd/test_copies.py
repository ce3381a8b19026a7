"""What belongs to one Tensor alone: copies, pickles, `.grad`, cotangents, and the arrays that `gradients` returns."""

import copy
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinyllm import gradients, nn, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.autograd.transforms import vjp
from tinyllm.nn import Parameter

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "pickle by protocol 0": lambda x: pickle.loads(pickle.dumps(x, protocol=0)),
}


class Named(Tensor):
    """A Tensor with an attribute of its own."""

    label: str


@pytest.mark.parametrize("kind", [Tensor, Parameter, Named])
@pytest.mark.parametrize("form", COPIES)
def test_a_leaf_is_copied_with_its_gradient(form: str, kind: type[Tensor]) -> None:
    x = kind(np.array([1.0, 2.0]))
    x.requires_grad, x.name = True, "x"
    if isinstance(x, Named):
        x.label = "mine"
    (x * x).sum().backward()
    other = COPIES[form](x)
    assert type(other) is kind
    assert (other.requires_grad, other.name, other.is_leaf, other.retains_grad) == (True, "x", True, False)
    assert getattr(other, "label", None) == ("mine" if kind is Named else None)
    np.testing.assert_array_equal(other.data, x.data)
    assert np.shares_memory(other.data, x.data) == (form == "copy")
    (other * 3).sum().backward()
    np.testing.assert_array_equal(other.grad, [5, 7])
    np.testing.assert_array_equal(x.grad, [2, 4])


@pytest.mark.parametrize("form", COPIES)
def test_a_tensor_in_a_graph_is_not_copied(form: str) -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x
    for _ in range(5000):  # deeper than Python recurses
        y = y * 1
    for inside in (y, [y], {"loss": y}, y.op):
        with pytest.raises(RuntimeError, match=r"made by multiply is part of a graph.* copy x\.detach\(\)"):
            COPIES[form](inside) if inside is y else copy.deepcopy(inside)
    np.testing.assert_array_equal(COPIES[form](y.detach()).data, [1, 2])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_shared_tensors_stay_shared_in_a_copy() -> None:
    layer = nn.Linear(2, 2, bias=False, rng=np.random.default_rng(0))
    tied = {"a": layer, "b": layer.weight}
    for form in ("deepcopy", "pickle"):
        other = COPIES[form](tied)
        assert other["a"].weight is other["b"]
        assert other["b"] is not layer.weight
        np.testing.assert_array_equal(other["b"].data, layer.weight.data)


# ---- .grad -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((3, 2), "f4"), np.zeros(1, "f4"), np.float32(0), np.zeros(2), np.zeros(2, "f2"), np.zeros(2, int),
        [0.0, 0.0],
    ],
)  # fmt: skip
def test_grad_is_of_the_same_shape_and_dtype(value: Any) -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(ValueError, match=r"\.grad of a Tensor of shape \(2,\) and dtype float32.* got shape"):
        x.grad = value
    assert x.grad is None


def test_grad_can_be_set_and_changed() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    given = np.array([1.0, 1.0], dtype=np.float32)
    x.grad = given
    assert x.grad is given
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [3, 5])
    x.grad *= 2
    x.grad = x.grad / 2
    x.grad = Tensor(x.grad)
    np.testing.assert_array_equal(x.grad, [3, 5])
    assert isinstance(x.grad, np.ndarray)
    scalar = Tensor(2.0, requires_grad=True)
    scalar.grad = np.float32(1)
    (scalar * 3).backward()
    assert scalar.grad == 4
    x.grad = None
    assert x.grad is None


# ---- Cotangents --------------------------------------------------------------------------------


@pytest.mark.parametrize("cotangent", [[1j, 0], np.array([1 + 0j, 0]), np.array([1, 0], dtype=np.complex64)])
def test_complex_cotangents_are_refused(cotangent: Any) -> None:
    def output() -> Tensor:
        return Tensor([1.0, 2.0], requires_grad=True) * 2

    refusals: list[Callable[[], Any]] = [
        lambda: output().backward(cotangent),
        lambda: gradients(output(), [], cotangent),
        lambda: gradients(output(), [], cotangent, create_graph=True),
        lambda: vjp(lambda x: x * 2, [1.0, 2.0])[1](cotangent),
        lambda: Tensor(cotangent, dtype="float32"),
    ]
    for call in refusals:
        with pytest.raises(
            TypeError, match=r"holds real numbers; got .* dtype complex.* to be converted to float32"
        ):
            call()


def test_a_cotangent_takes_the_dtype_of_the_output() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    for graph in (False, True):
        (found,) = gradients(x * x, [x], Tensor(np.array([1.0, 2.0])), create_graph=graph)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.data if graph else found, [2, 8])


# ---- Arrays of their own -----------------------------------------------------------------------


def test_what_is_asked_for_twice_is_two_arrays() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    unused = Tensor([1.0, 1.0], requires_grad=True)
    found = gradients(y.sum(), [x, x, y, y, unused, unused, x])
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert not np.shares_memory(one, other)
    np.testing.assert_array_equal(found, [[2, 4], [2, 4], [1, 1], [1, 1], [0, 0], [0, 0], [2, 4]])


# ---- Products ----------------------------------------------------------------------------------


def test_a_product_with_zeros_takes_memory_for_its_elements() -> None:
    n = 20_000
    x = Tensor(np.ones(n), requires_grad=True)
    x.data[7] = 0
    tracemalloc.start()
    (found,) = gradients(x.prod(), [x], create_graph=True)
    (second,) = gradients(found[7], [x])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 8 * n
    np.testing.assert_array_equal(np.flatnonzero(found.data), [7])
    np.testing.assert_array_equal(np.flatnonzero(second == 0), [7])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-200, 1e-200, 2.0], [2e-200, 2e-200, 0]),
        ([1e200, 1e200, 1e-300], [1e-100, 1e-100, np.inf]),
        ([np.inf, 2.0], [2, np.inf]),
        ([3.0], [1]),
        ([5e-324, 4.0], [4, 5e-324]),
    ],
)
def test_a_product_that_does_not_divide_back(values: list[float], expected: list[float]) -> None:
    x = Tensor(np.array(values), requires_grad=True)
    with np.errstate(over="ignore"):
        for graph in (False, True):
            (found,) = gradients(ops.prod(x), [x], create_graph=graph)
            np.testing.assert_allclose(found.data if graph else found, expected, rtol=1e-15)

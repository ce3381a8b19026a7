"""Powers at base 0, and sums and products at their edges: values, gradients and second derivatives of PyTorch."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinyllm import gradients, ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.tensor import Tensor

torch = pytest.importorskip("torch", reason="needs the interop-test extra")

INF, NAN = np.inf, np.nan
BASES = [0.0, -0.0, 1e-310, 0.5, 2.0, -2.0, INF, NAN]
EXPONENTS = [0.0, 1.0, 2.0, 3.0, 0.5, -1.0, -2.0, INF]
PAIRS = np.array(list(itertools.product(BASES, EXPONENTS))).T

Function = Callable[..., Any]
CASES: dict[str, tuple[Function, Function, list[Any]]] = {
    "power": (lambda a, b: a**b, lambda a, b: a**b, list(PAIRS)),
    "number to a power": (lambda b: 0**b, lambda b: 0**b, [EXPONENTS]),
    "negative number to a power": (lambda b: (-2.0) ** b, lambda b: (-2.0) ** b, [EXPONENTS]),
    "power of an array": (
        lambda b: np.array([0.0, 2.0]) ** b, lambda b: torch.tensor([0.0, 2.0]) ** b, [[0.0, 3.0]]
    ),
    **{
        f"power {n!r} of {type(n).__name__}": (
            lambda a, n=n: a**n,
            lambda a, n=n: a ** (torch.tensor(n.data) if isinstance(n, Tensor) else n.item()),
            [BASES],
        )
        for n in (np.int64(0), np.float64(0), np.int8(2), np.float32(1), np.float64(-1), Tensor(0), Tensor(2))
    },
    "logsumexp": (
        lambda x: ops.logsumexp(x, 1),
        lambda x: torch.logsumexp(x, 1),
        [[[-INF, -INF], [-INF, 1.0], [INF, 1e5], [INF, -INF], [INF, INF], [NAN, 1.0], [1e308, 1.0], [0.0, 0.0]]],
    ),
    "std": (
        lambda x: x.std(1),
        lambda x: x.std(1, correction=0),
        [[[3.0, 3.0, 3.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [1.0, NAN, 1.0]]],
    ),
    "std with correction": (
        lambda x: x.std(correction=1),
        lambda x: x.std(correction=1),
        [[[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]],
    ),
    "prod": (
        lambda x: x.prod(1),
        lambda x: x.prod(1),
        [[[0.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0, 1.0, 2.0], [1.0, -2.0, 3.0, 0.5, 7.0]]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, reference: bool) -> None:
    ours, theirs, values = CASES[name]
    xs = [Tensor(np.array(value), requires_grad=True) for value in values]
    peers = [torch.tensor(np.array(value), requires_grad=True) for value in values]
    with np.errstate(all="ignore"), use_formulas(reference):
        output = ours(*xs)
        given = np.random.default_rng(0).normal(size=output.shape)
        found = gradients(output, xs, given, retain_graph=True)
        as_graph = gradients(output, xs, given, create_graph=True)
    their_output = theirs(*peers)
    their_output.backward(torch.tensor(given))
    np.testing.assert_allclose(output.data, their_output.detach().numpy(), rtol=1e-14)
    for gradient, graph, peer in zip(found, as_graph, peers, strict=True):
        np.testing.assert_allclose(gradient, peer.grad.numpy(), rtol=1e-13)
        np.testing.assert_allclose(graph.data, peer.grad.numpy(), rtol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_second_derivative(name: str) -> None:
    """Where PyTorch's is a number. At b = 0 it takes d a^b/da for a constant 0, which it is not: that is left out."""
    ours, theirs, values = CASES[name]
    random = np.random.default_rng(1)
    xs = [Tensor(np.array(value), requires_grad=True) for value in values]
    peers = [torch.tensor(np.array(value), requires_grad=True) for value in values]
    with np.errstate(all="ignore"):
        output = ours(*xs)
        cotangent = random.normal(size=output.shape)
        firsts = gradients(output, xs, cotangent, create_graph=True)
    their_firsts = torch.autograd.grad(
        theirs(*peers), peers, torch.tensor(cotangent), create_graph=True, materialize_grads=True
    )
    for first, their_first in zip(firsts, their_firsts, strict=True):
        if not their_first.requires_grad:
            continue
        direction = random.normal(size=first.shape)
        with np.errstate(all="ignore"):
            seconds = gradients(first, xs, direction, retain_graph=True)
        expected = torch.autograd.grad(
            their_first, peers, torch.tensor(direction), retain_graph=True, materialize_grads=True
        )
        for second, known in zip(seconds, expected, strict=True):
            counts = ~np.isnan(known.numpy())
            if name == "power":
                counts &= (PAIRS[1] != 0) & (PAIRS[0] != INF)
            np.testing.assert_allclose(second[counts], known.numpy()[counts], rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_gather(dim: int, as_tensor: bool) -> None:
    """The index may be smaller than x along other axes, and longer along `dim`; elements repeat."""
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 4, 2))
    for lengths in [(3, 4, 2), (2, 3, 1), (1, 1, 1), (0, 2, 2)]:
        shape = list(lengths)
        shape[dim] = 5
        index = random.integers(0, values.shape[dim], shape)
        x = Tensor(values, requires_grad=True)
        peer = torch.tensor(values, requires_grad=True)
        output = ops.gather(x, dim, Tensor(index) if as_tensor else index)
        expected = torch.gather(peer, dim, torch.tensor(index))
        np.testing.assert_array_equal(output.data, expected.detach().numpy())
        given = random.normal(size=shape)
        output.backward(given)
        expected.backward(torch.tensor(given))
        np.testing.assert_allclose(x.grad, peer.grad.numpy(), rtol=1e-14, atol=1e-15)


def test_gather_refuses_what_torch_refuses() -> None:
    x = Tensor(np.zeros((2, 3)))
    for dim, index in [(0, np.zeros((1, 4), int)), (1, np.zeros((3, 1), int)), (1, np.zeros(2, int))]:
        with pytest.raises(ValueError, match="gather: index of shape"):
            ops.gather(x, dim, index)
        with pytest.raises(RuntimeError):
            torch.gather(torch.zeros(2, 3), dim, torch.tensor(index))
    for dim, index in [(2, np.zeros((1, 1), int)), (0, np.full((1, 1), 2))]:
        with pytest.raises(IndexError):
            ops.gather(x, dim, index)

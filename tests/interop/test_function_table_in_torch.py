"""Every function that people reach for, against PyTorch: values, and gradients of a random cotangent."""

from typing import Any

import numpy as np
import pytest
from support.function_table import ENTRIES, Entry

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor, gradients

torch = pytest.importorskip("torch", reason="needs the interop-test extra")

CASES = [
    pytest.param(entry, shapes, id=f"{entry}-{number}-{'-'.join(map(str, shapes))}")
    for number, entry in enumerate(ENTRIES)
    for shapes in entry.shapes
    if entry.torch is not None
]


@pytest.mark.parametrize(("entry", "shapes"), CASES)
def test_values_and_gradients_are_those_of_torch(entry: Entry, shapes: tuple[tuple[int, ...], ...]) -> None:
    random = np.random.default_rng(len(entry.name))
    arrays = [random.uniform(entry.low, entry.high, shape) for shape in shapes]
    check(entry.call, getattr(ops, entry.name), entry.torch, arrays)


def check(call: Any, function: Any, peer: Any, arrays: list[Any]) -> None:
    """Values, and the gradients of random cotangents of all differentiable parts together."""
    random = np.random.default_rng(1)
    ours = [Tensor(x, requires_grad=True) for x in arrays]
    theirs = [torch.tensor(x, requires_grad=True) for x in arrays]
    mine, others = call(function, *ours), peer(torch, *theirs)
    mine, others = ([x] if not isinstance(x, (list, tuple)) else list(x) for x in (mine, others))
    assert len(mine) == len(others)
    total: Any = Tensor(np.zeros(()))
    other_total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(mine, others, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a.detach().data, b.detach().numpy(), rtol=1e-13, atol=1e-13)
        if a.requires_grad:
            cotangent = random.standard_normal(a.shape)
            total, other_total = (
                total + (a * cotangent).sum(),
                other_total + (b * torch.tensor(cotangent)).sum(),
            )
    if not total.requires_grad:
        return
    found = gradients(total, ours)
    expected = torch.autograd.grad(other_total, theirs, allow_unused=True)
    for a, x, b in zip(found, arrays, expected, strict=True):
        np.testing.assert_allclose(a, np.zeros_like(x) if b is None else b.numpy(), rtol=1e-12, atol=1e-12)


TIES = np.array([[0.0, 1.0, 1.0], [-1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
ON_EDGES = {
    "clip, bounds equal to elements": (
        lambda f, x, low, high: f(x, low, high), ops.clip, lambda t, x, low, high: t.clamp(x, low, high),
        [TIES, np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0])]),
    "clip, the largest is a bound": (
        lambda f, x: f(x, 0, x.max()), ops.clip, lambda t, x: t.clamp(x, t.zeros((), dtype=x.dtype), x.max()),
        [np.array([3.0, -1.0, 2.0])]),
    "clip, low above high": (
        lambda f, x, low, high: f(x, low, high), ops.clip, lambda t, x, low, high: t.clamp(x, low, high),
        [TIES, np.array(1.5), np.array(0.5)]),
    "norm of zeros": (
        lambda f, x: f(x, axis=1), ops.vector_norm, lambda t, x: t.linalg.vector_norm(x, dim=1), [TIES]),
    "norm of zeros, to the third": (
        lambda f, x: f(x, 3, axis=1), ops.vector_norm, lambda t, x: t.linalg.vector_norm(x, 3, dim=1), [TIES]),
    "largest of equals": (
        lambda f, x: f(x, np.inf, axis=1), ops.vector_norm, lambda t, x: t.linalg.vector_norm(x, np.inf, dim=1),
        [TIES[:2]]),
    "sort of equals": (lambda f, x: f(x, 1), ops.sort, lambda t, x: x.sort(dim=1, stable=True).values, [TIES]),
    "sort of equals, downwards": (
        lambda f, x: f(x, 1, descending=True), ops.sort,
        lambda t, x: x.sort(dim=1, descending=True, stable=True).values, [TIES]),
    "remainder of negatives": (
        lambda f, x: f(x, -0.3), ops.remainder, lambda t, x: t.remainder(x, -0.3), [TIES]),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_EDGES)
def test_ties_and_zeros_are_taken_as_in_torch(name: str) -> None:
    check(*ON_EDGES[name])

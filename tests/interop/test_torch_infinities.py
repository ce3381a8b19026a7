"""Values and derivatives, to second order, where infinities and NaN meet what a mask leaves out, against PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinyllm import gradients, jvp, ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.tensor import Tensor

torch = pytest.importorskip("torch", reason="needs the interop-test extra")

INF, NAN = np.inf, np.nan
LINE = [-INF, NAN, 0.0, INF, -1.0, 2.0, 0.5, 1.0]
OTHER = np.array([0.0, NAN, 0.0, INF, 1.0, 2.0, -INF, 3.0])
SQUARE = [[0.0, INF], [NAN, 4.0]]
CHOSEN = np.array([True, False, False, True, False, True, False, False])
TARGETS = np.array([-100, 1])
LOGITS = [[-INF, 1.0, 2.0], [0.0, 1.0, 2.0]]

Function = Callable[[Any], Any]
CASES: dict[str, tuple[Function, Function, Any]] = {
    "relu": (ops.relu, torch.relu, LINE),
    "sqrt of relu": (lambda x: ops.relu(x).sqrt(), lambda x: torch.relu(x).sqrt(), [-INF, -2.0, 0.0, 4.0]),
    "sqrt of clip": (
        lambda x: ops.clip(x, 0, 1) ** 0.5,
        lambda x: x.clip(0, 1) ** 0.5,
        [-INF, -1.0, 0.25, INF],
    ),
    "clip": (lambda x: ops.clip(x, 0, 1), lambda x: x.clip(0, 1), LINE),
    "clip above": (lambda x: ops.clip(x, None, 1), lambda x: x.clip(max=1), LINE),
    "log of where": (
        lambda x: ops.log(ops.where(CHOSEN, x, 0.0)),
        lambda x: torch.log(torch.where(torch.tensor(CHOSEN), x, 0.0)),
        [1.0, INF, NAN, 2.0, -INF, 3.0, 0.0, -1.0],
    ),
    "where": (
        lambda x: ops.where(CHOSEN, 1.0, x),
        lambda x: torch.where(torch.tensor(CHOSEN), 1.0, x),
        LINE,
    ),
    "sqrt of tril": (lambda x: ops.tril(x).sqrt(), lambda x: torch.tril(x).sqrt(), [[1.0, INF], [4.0, 4.0]]),
    "tril": (ops.tril, torch.tril, SQUARE),
    "triu": (lambda x: ops.triu(x, 1), lambda x: torch.triu(x, 1), SQUARE),
    "maximum": (
        lambda x: ops.maximum(x, OTHER),
        lambda x: torch.maximum(x, torch.tensor(OTHER)),
        LINE,
    ),
    "minimum": (
        lambda x: ops.minimum(OTHER, x),
        lambda x: torch.minimum(torch.tensor(OTHER), x),
        LINE,
    ),
    "max": (lambda x: x.max(), lambda x: x.max(), [1.0, -INF, 2.0, 2.0]),
    "max of NaN": (lambda x: x.max(), lambda x: x.max(), [1.0, NAN, 2.0, NAN]),
    "min": (lambda x: x.min(), lambda x: x.min(), [1.0, INF, -INF, 2.0]),
    "sqrt of max": (lambda x: x.max().sqrt(), lambda x: x.max().sqrt(), [-1.0, 0.0, -2.0]),
    "abs": (ops.absolute, torch.abs, [-INF, 0.0, INF, -1.0]),
    "power 0": (lambda x: x**0, lambda x: x**0, LINE),
    "rows": (
        lambda w: ops.embedding(w, np.array([1, 1, 0])).log(),
        lambda w: torch.nn.functional.embedding(torch.tensor([1, 1, 0]), w).log(),
        [[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]],
    ),
    "index": (
        lambda x: x[np.array([1, 1, 0])].log(),
        lambda x: x[torch.tensor([1, 1, 0])].log(),
        [[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]],
    ),
    "cross entropy": (
        lambda x: ops.cross_entropy(x, TARGETS),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor(TARGETS)),
        LOGITS,
    ),
    "cross entropy of each": (
        lambda x: ops.cross_entropy(x, TARGETS, reduction="none"),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor(TARGETS), reduction="none"),
        LOGITS,
    ),
}


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("cotangent", [1.0, INF])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, cotangent: float, reference: bool) -> None:
    ours, theirs, values = CASES[name]
    x = Tensor(np.array(values), requires_grad=True)
    peer = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    with np.errstate(all="ignore"), use_formulas(reference):
        output = ours(x)
        given = np.full(output.shape, cotangent)
        found = gradients(output, [x], given, retain_graph=True)[0]
        as_graph = gradients(output, [x], given, create_graph=True)[0].data
    their_output = theirs(peer)
    their_output.backward(torch.tensor(given))
    np.testing.assert_allclose(output.data, their_output.detach().numpy(), rtol=1e-14)
    for gradient in (found, as_graph):
        np.testing.assert_allclose(gradient, peer.grad.numpy(), rtol=1e-14)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"power 0"}))  # whose gradient is a constant
def test_second_derivative(name: str) -> None:
    ours, theirs, values = CASES[name]
    direction = np.random.default_rng(0).normal(size=np.shape(values))
    x = Tensor(np.array(values), requires_grad=True)
    peer = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    with np.errstate(all="ignore"):
        (first,) = gradients((ours(x) ** 2).sum(), [x], create_graph=True)
        (second,) = gradients((first * direction).sum(), [x])
    (their_first,) = torch.autograd.grad((theirs(peer) ** 2).sum(), peer, create_graph=True)
    (their_second,) = torch.autograd.grad((their_first * torch.tensor(direction)).sum(), peer)
    np.testing.assert_allclose(second, their_second.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name: str) -> None:
    """Column by column the Jacobian of PyTorch's backward, but for NaN: zero cotangents of what is infinitely steep."""
    ours, theirs, values = CASES[name]
    x = np.array(values)
    units = np.eye(x.size).reshape((-1, *x.shape))
    with np.errstate(all="ignore"):
        columns = [jvp(ours, [x], [unit])[1].data.reshape(-1) for unit in units]
    expected = (
        torch.func.jacrev(theirs)(torch.tensor(values, dtype=torch.float64)).numpy().reshape(-1, x.size)
    )
    found = np.stack(columns, axis=-1)
    assert not np.isnan(found)[np.isfinite(expected)].any()
    np.testing.assert_allclose(
        np.where(np.isnan(expected), 0, found), np.nan_to_num(expected, posinf=INF), rtol=1e-14
    )


def test_ignored_rows_may_hold_anything() -> None:
    """PyTorch gives an ignored row of NaN a gradient of NaN; the loss is that of the other row alone."""
    x = Tensor(np.array([[INF, NAN, -INF], LOGITS[1]]), requires_grad=True)
    (expected,) = gradients(ops.cross_entropy(x[1], np.array(1), z_loss=0.1), [x])
    for reduction in ("mean", "sum", "none"):
        for create_graph in (False, True):
            loss = ops.cross_entropy(x, TARGETS, reduction=reduction, z_loss=0.1)
            given = np.ones(loss.shape)
            (found,) = gradients(loss, [x], given, create_graph=create_graph)
            np.testing.assert_allclose(found.data if create_graph else found, expected, rtol=1e-14)
            assert loss.data.reshape(-1)[-1] == pytest.approx(
                1.4076059644443806 + 0.1 * 2.4076059644443806**2
            )

"""Blocks that are computed once more in backward: the same gradients, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, gradients, jvp, ops, use_formulas
from tinyllm.debug import AnomalyError, break_on, detect_anomaly
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Linear, Module, Parameter, dropout_position
from tinyllm.nn.recomputation import recompute
from tinyllm.training.objectives.next_token import NextToken

DOCUMENTS = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]])
SHAPE: dict[str, Any] = {
    "vocab_size": 13,
    "context_length": 8,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
}
Names = list[str]


def model_of(**settings: Any) -> TransformerLM:
    return TransformerLM(ModelConfig(**(SHAPE | settings)), seed=3)


def batch_of(arrays: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    return (rng.integers(0, 13, (2, 8)), rng.integers(0, 13, (2, 8)), DOCUMENTS)[:arrays]


def loss_of(model: TransformerLM, recompute: bool, arrays: int = 3) -> Tensor:
    model.recompute = recompute
    with dropout_position(5, 7):
        return NextToken()(model, batch_of(arrays))[0]


def bits_of(tensors: Any) -> list[bytes]:
    return [getattr(x, "data", x).tobytes() for x in tensors]


@pytest.mark.parametrize("formulas", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("arrays", "dropout"), [(2, 0.3), (3, 0.0), (3, 0.3)])
def test_gradients_have_the_same_bits(formulas: bool, tied: bool, arrays: int, dropout: float) -> None:
    """By `backward()` and by `gradients()`."""
    model, found = model_of(tie_embeddings=tied, dropout=dropout), []
    parameters = list(model.parameters())
    with use_formulas(formulas):
        for recompute in (False, True):
            loss = loss_of(model, recompute, arrays)
            found.append(bits_of([loss, *gradients(loss, parameters)]))
            for parameter in parameters:
                parameter.grad = None
            loss_of(model, recompute, arrays).backward()
            found.append(bits_of([loss, *(parameter.grad for parameter in parameters)]))
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_derivatives_are_those_without(dropout: float) -> None:
    """Of the sum of the cubes of all gradients, in double precision."""
    model = model_of(dropout=dropout).astype(np.float64)
    parameters = list(model.parameters())

    def second(recompute: bool) -> list[Any]:
        found = gradients(loss_of(model, recompute), parameters, create_graph=True)
        return list(gradients(sum(((x**3).sum() for x in found), Tensor(np.zeros(()))), parameters))

    for got, wanted in zip(second(True), second(False), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11 * np.abs(wanted).max())
        assert np.abs(wanted).max() > 0


def test_the_derivative_along_a_direction() -> None:
    """By forward mode, which runs the block on dual numbers, against central differences."""
    model = model_of(dropout=0.3).astype(np.float64)
    rng = np.random.default_rng(2)
    x, v = rng.standard_normal((2, 2, 5, 16))

    def through(x: Tensor) -> Tensor:
        with dropout_position(5, 7):
            return recompute(model.blocks[1], x)

    output, tangent = jvp(through, [x], [v])
    h = 1e-5
    difference = (through(Tensor(x + h * v)).data - through(Tensor(x - h * v)).data) / (2 * h)
    np.testing.assert_allclose(output.data, through(Tensor(x)).data, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(tangent.data, difference, rtol=1e-6, atol=1e-8)


def test_hooks_inside_are_told_what_they_are_told_without() -> None:
    """Backward hooks once; forward hooks in both passes, of the same values."""
    model = model_of(dropout=0.3)
    layer = model.blocks[1].feed_forward
    outputs: list[bytes] = []
    inward: list[list[bytes]] = []
    layer.register_forward_hook(lambda module, inputs, output: outputs.extend(bits_of([output])))
    layer.register_full_backward_hook(
        lambda module, given, outward: inward.append(bits_of([*given, *outward]))
    )
    for again in (False, True):
        loss_of(model, again).backward()
    assert len(outputs) == 3
    assert len(set(outputs)) == 1
    assert len(inward) == 2
    assert inward[0] == inward[1]


def test_what_a_backward_hook_inside_returns_counts() -> None:
    model = model_of()
    model.blocks[0].feed_forward.register_full_backward_hook(
        lambda module, given, outward: (0 * given[0],) * len(given)
    )
    found = []
    for again in (False, True):
        loss = loss_of(model, again)
        found.append(gradients(loss, [model.blocks[0].feed_forward_norm.weight, model.embedding.weight]))
    assert not found[1][0].any()
    assert bits_of(found[0]) == bits_of(found[1])


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr("sys.breakpointhook", lambda: found.append(1))
    return found


@pytest.mark.parametrize(
    ("place", "forward", "backward"),
    [
        ("softmax.forward", 2, 2),  # a block each, and once more
        ("softmax.backward", 0, 2),
        ("blocks.1.attention", 1, 1),
        ("blocks.1", 1, 1),
    ],
)
def test_breakpoints_inside_stop_in_both_passes(
    stops: list[int], place: str, forward: int, backward: int
) -> None:
    model = model_of()
    with break_on(place):
        loss = loss_of(model, True)
        assert len(stops) == forward
        loss.backward()
    assert len(stops) == forward + backward


def test_a_breakpoint_for_backward_alone_stops_inside(stops: list[int]) -> None:
    loss = loss_of(model_of(), True)
    with break_on("softmax.backward"):
        loss.backward()
    assert len(stops) == 2


def test_an_anomaly_inside_is_named_by_its_op_and_module() -> None:
    model = model_of()
    model.blocks[1].feed_forward_norm.weight.data[3] = np.inf
    with pytest.raises(AnomalyError) as raised, detect_anomaly():
        loss_of(model, True)
    assert (raised.value.op, raised.value.module) == ("rms_norm", "blocks.1.feed_forward_norm")


class Replaceable(Module):
    """x W^T, of a weight that a test replaces."""

    def __init__(self) -> None:
        self.linear = Linear(3, 3, False, rng=np.random.default_rng(0))

    def forward(self, x: Tensor) -> Tensor:
        return ops.tanh(self.linear(x))


def test_a_weight_that_was_replaced_before_backward_is_refused() -> None:
    """Computed once more, the module would be another one, and the first weight would get no gradient."""
    module = Replaceable()
    out = recompute(module, Tensor(np.ones((2, 3), np.float32), requires_grad=True))
    module.linear.weight = Parameter(np.ones((3, 3), np.float32))
    with pytest.raises(RuntimeError, match="recompute: Replaceable has other parameters"):
        out.sum().backward()


def test_a_module_called_twice_has_the_derivatives_of_both_calls() -> None:
    """Its weight leads to the input of the second call too, and counts there once."""
    module, found = Replaceable(), []
    module.linear.weight.data = module.linear.weight.data.astype(np.float64)
    x = Tensor(np.random.default_rng(1).standard_normal((2, 3)), requires_grad=True)
    weight = module.linear.weight
    for call in (recompute, lambda module, x: module(x)):
        first = gradients(call(module, call(module, x)).sum(), [x, weight], create_graph=True)
        second = gradients((first[0] ** 3).sum() + (first[1] ** 3).sum(), [x, weight])
        found.append([part.data for part in first] + second)
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)

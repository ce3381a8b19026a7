"""Documents that stand in one window are kept apart: each has the loss and the gradients that it has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyllm import ops, use_formulas
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn.attention import Documents
from tinyllm.training.objectives.next_token import NextToken

LENGTHS = [[3, 1, 5, 2], [7, 4]]
DOCUMENTS = np.array([np.repeat(np.arange(len(row)), row) for row in LENGTHS])


def model_of(**settings: Any) -> TransformerLM:
    shape = {
        "vocab_size": 13,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
    }
    return TransformerLM(ModelConfig(**(shape | {"context_length": 16} | settings)), seed=3)


def batch_of(seed: int) -> tuple[Any, Any]:
    tokens = np.random.default_rng(seed).integers(0, 13, (2, 12))
    return tokens[:, :-1], tokens[:, 1:]


def gradients_of(model: TransformerLM, losses: list[Any]) -> list[Any]:
    for parameter in model.parameters():
        parameter.grad = None
    for loss in losses:
        loss.backward()
    return [parameter.grad.data for parameter in model.parameters()]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("formulas", [False, True])
def test_a_packed_window_has_the_loss_and_gradients_of_its_documents_alone(
    qk_norm: bool, formulas: bool
) -> None:
    model, objective = model_of(qk_norm=qk_norm), NextToken()
    inputs, targets = batch_of(1)
    with use_formulas(formulas):
        together, count = objective(model, (inputs, targets, DOCUMENTS))
        found = gradients_of(model, [together])
        alone = []
        for row, lengths in enumerate(LENGTHS):
            for end, length in zip(np.cumsum(lengths), lengths, strict=True):
                part = (slice(row, row + 1), slice(end - length, end))
                alone.append(objective(model, (inputs[part], targets[part]))[0])
        expected = gradients_of(model, alone)
    assert count == inputs.size
    np.testing.assert_allclose(together.data, sum(loss.data for loss in alone), rtol=1e-5)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())


def test_one_document_is_the_window_without_documents() -> None:
    model, (inputs, _) = model_of(), batch_of(2)
    np.testing.assert_allclose(
        model(inputs, documents=np.zeros_like(inputs)).data, model(inputs).data, rtol=1e-4, atol=1e-5
    )


def test_positions_begin_again_with_each_document() -> None:
    kept = Documents.of(DOCUMENTS)
    assert kept.positions.tolist() == [[t for n in row for t in range(n)] for row in LENGTHS]


def test_each_loss_of_a_batch_of_three_keeps_documents_apart() -> None:
    model, (inputs, targets) = model_of(), batch_of(3)
    losses = NextToken().each_loss(model, (inputs, targets, DOCUMENTS))
    alone = NextToken().each_loss(model, (inputs[:1, 4:9], targets[:1, 4:9]))
    np.testing.assert_allclose(losses[:1, 4:9], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (np.zeros((2, 10), int), "of the shape of tokens"),
        (np.zeros((2, 11)), "float64"),
        (np.tile(np.arange(11)[::-1], (2, 1)), "fall along a row"),
    ],
)
def test_documents_that_cannot_be_are_refused(documents: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model_of()(batch_of(1)[0], documents=documents)


def test_documents_and_a_cache_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="with a cache"):
        model(batch_of(1)[0], model.new_cache(), documents=DOCUMENTS)


@pytest.mark.parametrize("positions", [np.array([4, 0, 9]), np.array([[0, 1, 0], [5, 0, 1]])])
def test_rope_takes_the_position_of_each_token(positions: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8))
    z = x[..., :4] + 1j * x[..., 4:]  # a rotation is a product of complex numbers
    turned = z * np.exp(1j * positions[..., None] * 50.0 ** (-np.arange(4) / 4))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(ops.rope(x, positions, 50.0).numpy(), expected, rtol=1e-12, atol=1e-12)
    heads = ops.rotary_heads(x, 4, offset=positions, theta=50.0).numpy()  # (2, 2, 3, 4)
    split = x.reshape(2, 3, 2, 4)
    z = split[..., :2] + 1j * split[..., 2:]
    turned = z * np.exp(1j * positions[..., None, None] * 50.0 ** (-np.arange(2) / 2))
    expected = np.concatenate([turned.real, turned.imag], axis=-1).swapaxes(1, 2)
    np.testing.assert_allclose(heads, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [ops.rope, lambda x, offset: ops.rotary_heads(x, 8, offset=offset)])
def test_positions_of_another_shape_are_refused(function: Any) -> None:
    x = np.ones((2, 3, 8))
    for positions in (np.arange(4), np.zeros((3, 3), int), np.zeros((1, 2, 3), int)):
        with pytest.raises(ValueError, match=r"need \(3,\) or \(2, 3\)"):
            function(x, positions)
    with pytest.raises(TypeError, match="an array of them"):
        function(x, np.zeros(3))

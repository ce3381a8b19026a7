"""Blocks that are computed once more in backward: the same gradients, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyllm import use_formulas
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.training.objectives.next_token import NextToken

DOCUMENTS = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]])


def gradients_of(model: TransformerLM, batch: tuple[Any, ...], recompute: bool) -> list[Any]:
    model.recompute = recompute
    for parameter in model.parameters():
        parameter.grad = None
    with dropout_position(5, 7):
        loss, _ = NextToken()(model, batch)
    loss.backward()
    return [loss.data, *(parameter.grad.data for parameter in model.parameters())]


@pytest.mark.parametrize("formulas", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("arrays", "dropout"), [(2, 0.3), (3, 0.0), (3, 0.3)])
def test_gradients_have_the_same_bits(formulas: bool, tied: bool, arrays: int, dropout: float) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
    }
    config = ModelConfig(vocab_size=13, context_length=8, tie_embeddings=tied, dropout=dropout, **shape)
    model = TransformerLM(config, seed=3)
    rng = np.random.default_rng(1)
    batch = (rng.integers(0, 13, (2, 8)), rng.integers(0, 13, (2, 8)), DOCUMENTS)[:arrays]
    with use_formulas(formulas):
        expected, found = gradients_of(model, batch, False), gradients_of(model, batch, True)
    for wanted, got in zip(expected, found, strict=True):
        assert np.array_equal(wanted, got)

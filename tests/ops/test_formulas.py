"""Formulas are short, every op of a model's mathematics is stopped in by its textbook name, and docs/ops.md is so."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.autograd.registry import REGISTRY, FusedOp
from tinyllm.autograd.tensor import Op
from tinyllm.debug import break_on
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.system.settings import from_mapping

ROOT = Path(__file__).parents[2]
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate_ops.py"))
MATHEMATICS = (
    "embedding", "rms_norm", "linear", "split_heads", "rope", "scores", "softmax", "attention", "merge_heads", "swiglu",
    "add", "cross_entropy",
)  # fmt: skip
FORMULAS = [pytest.param(op, id=name) for name, op in REGISTRY.items() if not issubclass(op, FusedOp)]


@pytest.mark.parametrize("op", FORMULAS)
def test_a_formula_has_at_most_fifteen_lines(op: type[Op]) -> None:
    assert GENERATOR["lines"](op.forward) <= 15
    assert GENERATOR["lines"](op.backward) <= 15


def test_the_document_of_ops_is_up_to_date() -> None:
    text = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert text == GENERATOR["document"](), "run: python docs/generate_ops.py"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_op_of_a_model_is_stopped_in_by_its_textbook_name(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[tuple[str, str]] = []

    def note(*_: Any, **__: Any) -> None:
        frame = sys._getframe(1)
        stops.append((frame.f_locals["self"].name, frame.f_code.co_name))

    monkeypatch.setattr(sys, "breakpointhook", note)
    config = from_mapping(ModelConfig, {**PRESETS[preset]["model"], "vocab_size": 11, "num_layers": 2})
    model = TransformerLM(config, seed=0)
    tokens = np.array([[1, 5, 2, 7]])
    places = [f"{name}.{method}" for name in MATHEMATICS for method in ("forward", "backward")]
    with break_on(*places):
        ops.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    assert {f"{name}.{method}" for name, method in stops} == set(places)
    assert stops[0] == ("embedding", "forward")
    assert stops[-1] == ("embedding", "backward")
    assert stops.count(("scores", "forward")) == stops.count(("scores", "backward")) == 2

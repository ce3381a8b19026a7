"""Presets: what their models have, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tinyllm.models import ModelConfig
from tinyllm.models.presets import PRESETS
from tinyllm.system.settings import from_mapping
from tinyllm.training.config import TrainConfig

# vocabulary, context, layers, heads, width, width inside the feed-forward; and of "char", tied or not
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "char": (0, 64, 4, 4, 128, 344),
    "mini-10m": (16_384, 512, 8, 4, 256, 688),
    "mini-30m": (32_768, 512, 10, 6, 384, 1024),
    "mini-50m": (32_768, 1024, 10, 8, 512, 1536),
}
COUNTS = {
    "char": {65: 808_576},
    "mini-10m": {16_384: 10_523_904, 50_257: 19_195_392},
    "mini-30m": {32_768: 30_286_976, 50_257: 37_002_752},
    "mini-50m": {32_768: 50_867_968, 50_257: 59_822_336},
}
STEPS = {
    "char": ("char", 12, 2000, 3e-3),
    "mini-10m": ("bpe", 8, 1500, 2e-3),
    "mini-30m": ("bpe", 8, 3000, 1.5e-3),
    "mini-50m": ("bpe", 4, 5000, 1e-3),
}


def shape_of(preset: str, **changed: Any) -> ModelConfig:
    return from_mapping(ModelConfig, {**PRESETS[preset]["model"], **changed})


def test_every_preset_is_in_the_tables() -> None:
    assert set(PRESETS) == set(SHAPES) == set(COUNTS) == set(STEPS)


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(preset: str) -> None:
    shape = shape_of(preset)
    found = (shape.vocab_size, shape.context_length, shape.num_layers, shape.num_heads, shape.hidden_size)
    assert (*found, shape.intermediate_size) == SHAPES[preset]
    assert shape.tie_embeddings == (preset != "char")
    train = from_mapping(TrainConfig, PRESETS[preset]["train"])
    assert (train.tokenizer, train.batch_size, train.steps, train.learning_rate) == STEPS[preset]
    assert (train.optimizer, train.warmup_steps, train.log_every) == ("muon", 100, 1)


@pytest.mark.parametrize(("preset", "vocab_size"), [(name, size) for name in COUNTS for size in COUNTS[name]])
def test_parameters(preset: str, vocab_size: int) -> None:
    shape = shape_of(preset, vocab_size=vocab_size)
    _, _, layers, heads, width, inner = SHAPES[preset]
    embeddings = vocab_size * width * (1 if shape.tie_embeddings else 2)
    # Four projections, three of the feed-forward, two norms, and those of queries and keys.
    block = 4 * width * width + 3 * width * inner + 2 * width + 2 * (width // heads)
    assert embeddings + layers * block + width == COUNTS[preset][vocab_size]
    assert shape.num_parameters == COUNTS[preset][vocab_size]

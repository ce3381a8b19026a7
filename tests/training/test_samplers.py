"""The batches that settings ask for, and runs that go on with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.token_parts import TokenParts, in_parts

from tinyllm.data import (
    Mixture,
    PackedWindows,
    RandomOffsets,
    RandomWindows,
    SequentialWindows,
    StridedWindows,
)
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.checkpoints.resuming import TextDigests
from tinyllm.training.config import TrainConfig
from tinyllm.training.samplers import build_sampler
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=9, context_length=8, num_layers=1, num_heads=1, hidden_size=8)
TRAIN = TrainConfig(
    steps=3, batch_size=4, warmup_steps=1, threads=1, eval_batch_size=3, seed=3, sample_tokens=0
)
TOKENS = np.random.default_rng(0).integers(0, 9, 400).astype(np.uint16)
STARTS = np.array([0, 3, 50, 51, 200])


def with_documents() -> TokenParts:
    return in_parts(TOKENS, 100, document_starts=STARTS)


def train(tokens: Any, config: TrainConfig = TRAIN, run: Path | None = None) -> Trainer:
    if run is not None:
        run.mkdir(exist_ok=True)
    model = TransformerLM(MODEL, config.seed)
    return Trainer(model, CharTokenizer("abcdefghi"), tokens, TOKENS[:100], config, run)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, RandomWindows(TOKENS, 8, 8, 3)),
        ({"sampling": "offsets"}, RandomOffsets(TOKENS, 8, 8, 3)),
        ({"sampling": "packed"}, PackedWindows(TOKENS, 8, 8, 3)),
        ({"sampling": "sliding"}, StridedWindows(TOKENS, 8, 8, 3, stride=8)),
        ({"sampling": "sliding", "stride": 3}, StridedWindows(TOKENS, 8, 8, 3, stride=3)),
        ({"separate_documents": True}, RandomWindows(TOKENS, 8, 8, 3, document_starts=STARTS)),
    ],
    ids=["windows", "offsets", "packed", "sliding", "stride", "documents"],
)
def test_settings_choose_the_sampler(settings: dict[str, Any], expected: Any) -> None:
    sampler = build_sampler(with_documents(), 8, replace(TRAIN, gradient_accumulation=2, **settings))
    assert type(sampler) is type(expected)
    for step in range(3):
        np.testing.assert_array_equal(sampler.batch(step), expected.batch(step))


def test_several_texts_are_mixed() -> None:
    texts = [TOKENS[:100], TOKENS[100:]]
    sampler = build_sampler(texts, 8, replace(TRAIN, weights=(1.0, 7.0)))
    alone = [RandomWindows(text, 8, 4, 3) for text in texts]
    expected = Mixture(alone, [1, 7])
    assert sampler.identity() == expected.identity()
    np.testing.assert_array_equal(sampler.batch(5), expected.batch(5))
    assert build_sampler(texts, 8, TRAIN).identity() == Mixture(alone, [100, 300]).identity()


@pytest.mark.parametrize(
    ("tokens", "settings", "words"),
    [
        (TOKENS, {"separate_documents": True}, "training text does not say where its documents begin"),
        ([TOKENS, TOKENS], {"separate_documents": True}, "training text 1 does not say"),
        (TOKENS, {"weights": (1.0,)}, "1 weights for one text"),
        ([TOKENS, TOKENS], {"weights": (1.0,)}, "1 weights for 2 sources"),
        (TOKENS, {"stride": 4}, "stride is for --sampling sliding, and sampling is 'windows'"),
        ([TOKENS, TOKENS[:8]], {}, "training text 2 is too short: 8 tokens"),
        ([], {}, "needs sources"),
    ],
    ids=["no documents", "of a mixture", "one text", "weights", "stride", "short", "none"],
)
def test_what_does_not_go_together_is_refused(tokens: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_sampler(tokens, 8, replace(TRAIN, **settings))


def test_weights_out_of_range() -> None:
    for weight in (0.0, -1.0, float("inf")):
        with pytest.raises(InputError, match="weights="):
            TrainConfig(weights=(1.0, weight))


def test_validation_keeps_documents_apart_too() -> None:
    class Documented(np.ndarray):  # type: ignore[type-arg]
        document_starts = STARTS

    trainer = Trainer(
        TransformerLM(MODEL, 3), CharTokenizer("abcdefghi"), with_documents(), TOKENS.view(Documented),
        replace(TRAIN, separate_documents=True),
    )  # fmt: skip
    expected = SequentialWindows(TOKENS, 8, 3, document_starts=STARTS)
    for mine, other in zip(trainer.validation, expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert len(trainer.sampler.batch(0)) == 3


def test_a_mixed_run_goes_on_with_the_same_texts_alone(tmp_path: Path) -> None:
    texts = [TOKENS[:150], in_parts(TOKENS[150:], 20)]
    config = replace(TRAIN, weights=(1.0, 3.0), steps=6)
    whole = train(texts, config)
    whole.fit()
    train(texts, replace(config, steps=3, schedule="linear"), tmp_path / "run").fit()
    resumed = train(texts, config, tmp_path / "run")
    resumed.resume()
    for step in range(3, 6):
        np.testing.assert_array_equal(resumed.sampler.batch(step), whole.sampler.batch(step))
    for other in ([texts[1], texts[0]], [TOKENS[:150], in_parts(TOKENS[150:], 20, digest="x")], TOKENS):
        weights = (1.0, 3.0) if isinstance(other, list) else ()
        with pytest.raises(InputError, match=r"training tokens have another SHA-256|weights was"):
            train(other, replace(config, weights=weights), tmp_path / "run").resume()


def test_digests_are_those_that_tokens_know() -> None:
    parts = in_parts(TOKENS, 7, digest="0123")
    digests = TextDigests(
        None, {"training": RandomWindows(parts, 8, 4, 0), "validation": SequentialWindows(TOKENS, 8, 4)}
    )
    assert digests.state_dict()["training"] == "0123"
    assert len(digests.state_dict()["validation"]) == 64
    assert parts.read == 0
    with pytest.raises(InputError, match="its training tokens have another SHA-256"):
        digests.load_state_dict({**digests.state_dict(), "training": "4567"})


def test_a_run_of_an_earlier_version_goes_on_only_where_its_order_is_ours(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = train(TOKENS, run=run)
    state = trainer._collect()
    new = {"stride", "separate_documents", "weights"}
    state.values["train"] = {name: value for name, value in state.values["train"].items() if name not in new}
    for number, dropped in enumerate([set(), {"order", "first_draw"}]):
        sampler = {name: value for name, value in trainer.sampler.state_dict().items() if name not in dropped}
        state.values["sampler"] = {**sampler, "step": 2}
        folder = checkpoint.save(
            run / f"checkpoints/step-0000000{number}", trainer.model, trainer.tokenizer, state
        )
        keeping.link_to(run, "latest", folder)
        resumed = train(TOKENS, run=run)
        if dropped:
            with pytest.raises(InputError, match="is of an earlier version of tinyllm"):
                resumed.resume()
        else:
            resumed.resume()
            assert resumed.sampler.step == 2

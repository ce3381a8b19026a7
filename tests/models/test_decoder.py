"""The Decoder computes what the model computes, and leaves the work to the modules where someone watches them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyllm import generate, no_grad, use_formulas
from tinyllm.debug import detect_anomaly
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.generation.decoder import _MOST, Decoder, supports
from tinyllm.nn import Linear, MultiHeadAttention
from tinyllm.system import cores
from tinyllm.system.cores import threads_allowed

CONFIG = ModelConfig(
    vocab_size=13, context_length=600, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16
)
VARIANTS = {
    "qwen": CONFIG,
    "llama": replace(CONFIG, qk_norm=False, num_kv_heads=4),
    "one key head": replace(CONFIG, num_kv_heads=1, head_dim=6),
    "no positions": replace(CONFIG, position_encoding="none"),
    "dropout": replace(CONFIG, dropout=0.5, tie_embeddings=True),
}


def make(config: ModelConfig = CONFIG) -> TransformerLM:
    model = TransformerLM(config, seed=1).eval()
    rng = np.random.default_rng(2)
    for (
        parameter
    ) in model.parameters():  # the weights of norms are all ones at first, which would hide a mistake
        parameter.data += rng.normal(0, 0.3, parameter.shape).astype(np.float32)
    return model


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_every_logit_is_the_model_s(config: ModelConfig, packed: bool) -> None:
    model = make(config)
    chunks = [_MOST + 7, 1, 1, 5, 1, _MOST - 3, 1]
    tokens = np.random.default_rng(0).integers(0, 13, sum(chunks))
    with no_grad():
        expected = model(tokens[None]).numpy()[0]
    decoder = Decoder(model)
    if packed:
        decoder.pack()
    for chunk in chunks:
        got = decoder(tokens[decoder.length : decoder.length + chunk])
        # float32 rounding of sums over 16 features, through two layers.
        np.testing.assert_allclose(got, expected[decoder.length - 1], rtol=0, atol=2e-5 * np.ptp(expected))
    assert decoder.length == len(tokens)
    # The last logits differ from those at other positions by far more than the tolerance.
    assert np.abs(expected[:-1] - got).max(axis=1).min() > 1e-3


@pytest.fixture
def prompt_of_three_parts() -> Any:
    return np.random.default_rng(0).integers(0, 13, 2 * _MOST + 9)


def test_parts_read_at_once_wait_for_those_before(
    prompt_of_three_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(make())
    with threads_allowed(1):
        expected = decoder(prompt_of_three_parts)
    remember = Decoder._remember

    def slow_at_first(self: Decoder, layer: Any, x: Any, here: slice) -> Any:
        if here.start == 0:
            time.sleep(0.05)
        return remember(self, layer, x, here)

    monkeypatch.setattr(Decoder, "_remember", slow_at_first)
    monkeypatch.setattr(cores, "physical_cores", lambda: 3)
    decoder = Decoder(make())
    for layer in decoder.layers:  # so that looking too early shows
        layer.keys[...] = layer.values[...] = np.nan
    assert np.array_equal(decoder(prompt_of_three_parts), expected)


def test_a_part_that_fails_leaves_nobody_waiting(
    prompt_of_three_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Decoder, layer: Any, x: Any, here: slice) -> Any:
        raise MemoryError("no memory for the first part")

    remember = Decoder._remember
    monkeypatch.setattr(Decoder, "_remember", lambda *args: (remember if args[-1].start else failing)(*args))
    monkeypatch.setattr(cores, "physical_cores", lambda: 3)
    decoder = Decoder(make())
    with pytest.raises(MemoryError, match="first part"):
        decoder(prompt_of_three_parts)
    assert decoder.length == 0


def test_a_decoder_begins_anew_at_length_0() -> None:
    decoder = Decoder(make())
    first = decoder([1, 2, 3])
    decoder.length = 0
    assert np.array_equal(decoder([1, 2, 3]), first)
    assert not np.array_equal(decoder([1, 2, 3]), first)


def test_a_decoder_refuses_what_it_has_no_room_for() -> None:
    decoder = Decoder(make(), capacity=4)
    decoder([1, 2, 3])
    with pytest.raises(ValueError, match="room for 4 tokens; got 5"):
        decoder([1, 2])
    with pytest.raises(IndexError, match="13"):
        decoder([13])


class Windowed(MultiHeadAttention):
    """What a user may write."""


def subclassed(model: TransformerLM) -> AbstractContextManager[Any]:
    model.blocks[1].attention.__class__ = Windowed
    return ExitStack()


def with_bias(model: TransformerLM) -> AbstractContextManager[Any]:
    model.blocks[0].feed_forward.up = Linear(16, 48, np.random.default_rng(0), bias=True)
    return ExitStack()


def hooked(model: TransformerLM) -> AbstractContextManager[Any]:
    model.blocks[1].register_forward_hook(lambda module, inputs, output: None)
    return ExitStack()


@contextmanager
def debugged(model: TransformerLM) -> Iterator[None]:
    previous = sys.gettrace()
    sys.settrace(lambda frame, event, argument: None)
    try:
        yield
    finally:
        sys.settrace(previous)


@pytest.mark.parametrize(
    "watch",
    [subclassed, with_bias, hooked, debugged, lambda model: detect_anomaly(), lambda model: use_formulas()],
)
def test_the_modules_run_where_someone_watches_or_changed_them(
    watch: Callable[[TransformerLM], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    forward = TransformerLM.hidden
    monkeypatch.setattr(TransformerLM, "hidden", lambda *args: called.append(1) or forward(*args))
    model = make()
    assert supports(model)
    assert len(list(generate(model, [1, 2], 3))) == 3
    assert len(called) == 1  # to compare with
    called.clear()
    with watch(model):
        assert not supports(model)
        assert len(list(generate(model, [1, 2], 3))) == 3
    assert len(called) == 3


def test_a_module_that_was_changed_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    before = list(generate(model, [1, 2, 3], 20))
    forward = MultiHeadAttention.forward
    monkeypatch.setattr(MultiHeadAttention, "forward", lambda *args: forward(*args) * 3)
    changed = list(generate(model, [1, 2, 3], 20))
    assert changed == list(generate(model, [1, 2, 3], 20, use_cache=False))
    assert changed != before

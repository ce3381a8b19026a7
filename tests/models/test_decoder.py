"""The Decoder computes what the model computes, and leaves the work to the modules where someone watches them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, generate, no_grad, ops, use_formulas
from tinyllm.debug import detect_anomaly
from tinyllm.models import ModelConfig, TransformerBlock, TransformerLM
from tinyllm.models.generation.decoder import _MOST, Decoder, is_watched
from tinyllm.nn import (
    Embedding,
    KeyValueCache,
    LayerNorm,
    Linear,
    Module,
    MultiHeadAttention,
    Parameter,
    PositionEncoding,
    RotaryEmbedding,
)
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
    write = KeyValueCache.write

    def slow_at_first(self: KeyValueCache, start: int, keys: Any, values: Any) -> None:
        if start == 0:
            time.sleep(0.05)
        write(self, start, keys, values)

    monkeypatch.setattr(cores, "physical_cores", lambda: 3)
    decoder = Decoder(make())
    unwritten = np.full((1, 2, decoder.capacity, 4), np.nan, dtype=np.float32)
    for cache in decoder.caches:  # so that looking too early shows
        cache.write(0, unwritten, unwritten)
    monkeypatch.setattr(KeyValueCache, "write", slow_at_first)
    assert np.array_equal(decoder(prompt_of_three_parts), expected)


def test_a_part_that_fails_leaves_nobody_waiting(
    prompt_of_three_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = KeyValueCache.write

    def failing_at_first(self: KeyValueCache, start: int, keys: Any, values: Any) -> None:
        if start == 0:
            raise MemoryError("no memory for the first part")
        write(self, start, keys, values)

    monkeypatch.setattr(KeyValueCache, "write", failing_at_first)
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


@contextmanager
def hooked(model: TransformerLM) -> Iterator[None]:
    remove = model.blocks[1].register_forward_hook(lambda module, inputs, output: None)
    yield
    remove()


@contextmanager
def debugged(model: TransformerLM) -> Iterator[None]:
    previous = sys.gettrace()
    sys.settrace(lambda frame, event, argument: None)
    try:
        yield
    finally:
        sys.settrace(previous)


@pytest.mark.parametrize(
    "watch", [hooked, debugged, lambda model: detect_anomaly(), lambda model: use_formulas()]
)
def test_the_modules_are_called_where_someone_watches(
    watch: Callable[[TransformerLM], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    forward = TransformerLM.hidden
    monkeypatch.setattr(TransformerLM, "hidden", lambda *args: called.append(1) or forward(*args))
    model = make()
    assert not is_watched(model)
    assert len(list(generate(model, [1, 2], 3))) == 3
    assert len(called) == 1  # to compare with
    called.clear()
    with watch(model):
        assert is_watched(model)
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


# ---- Models with modules of a user's own -------------------------------------------------------


class LowRankLinear(Linear):
    """A linear layer and a product of two thin matrices (LoRA)."""

    def __init__(self, base: Linear) -> None:
        outputs, inputs = base.weight.shape
        rng = np.random.default_rng(4)
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up = Linear(inputs, 2, bias=False, rng=rng), Linear(2, outputs, bias=False, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Windowed(MultiHeadAttention):
    """Each token sees itself and the one before alone."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        offset = 0 if cache is None else cache.length
        q = self.heads(self.query(x), self.query_norm, offset)
        k = self.heads(self.key(x), self.key_norm, offset)
        v = ops.split_heads(self.value(x), self.head_dim)
        if cache is not None:
            k, v = map(Tensor, cache.append(k.data, v.data))
        T, S = q.shape[2], k.shape[2]
        near = np.tri(T, S, S - T, dtype=bool) & ~np.tri(T, S, S - T - 2, dtype=bool)
        return self.output(ops.merge_heads(ops.scaled_dot_product_attention(q, k, v, mask=near)))


class Scaled(TransformerBlock):
    """A block whose branches count half; its parts are those of the package."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache) * 0.5
        return x + self.feed_forward(self.feed_forward_norm(x)) * 0.5


class Learned(PositionEncoding):
    """A table of positions, added to embeddings."""

    def __init__(self) -> None:
        self.table = Embedding(600, 16, rng=np.random.default_rng(5), std=1.0)

    def embed(self, hidden: Tensor, offset: int) -> Tensor:
        return hidden + self.table(np.arange(offset, offset + hidden.shape[1]))


class Reversed(RotaryEmbedding):
    """Rotations the other way round."""

    def heads(self, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0) -> Tensor:
        x = PositionEncoding.heads(self, x, head_dim, offset, weight, eps)
        half = head_dim // 2
        mirrored = ops.rope(ops.concatenate([x[..., half:], x[..., :half]], axis=-1), offset, self.theta)
        return ops.concatenate([mirrored[..., half:], mirrored[..., :half]], axis=-1)


class Convolution(Module):
    """Reads the token before too, and keeps nothing: no cache knows of it."""

    def __init__(self, feed_forward: Module) -> None:
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        before = ops.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return self.feed_forward(x + before)


class Opposite(TransformerLM):
    """Other logits from the same hidden states."""

    def forward(self, tokens: Any, cache: Any = None) -> Tensor:
        return -super().forward(tokens, cache)


def low_rank(model: TransformerLM) -> None:
    for block in model.blocks:
        block.attention.query = LowRankLinear(block.attention.query)
        block.feed_forward.down = LowRankLinear(block.feed_forward.down)


def windowed(model: TransformerLM) -> None:
    model.blocks[1].attention.__class__ = Windowed


def scaled(model: TransformerLM) -> None:
    model.blocks[0].__class__ = Scaled


def with_biases(model: TransformerLM) -> None:
    for block in model.blocks:
        for part, names in ((block.attention, ("key", "output")), (block.feed_forward, ("up", "down"))):
            for name in names:
                layer = getattr(part, name)
                layer.bias = Parameter(
                    np.linspace(-1, 1, layer.weight.shape[0], dtype=np.float32) * layer.weight.data[:, 0]
                )


def another_norm(model: TransformerLM) -> None:
    model.norm = LayerNorm(16)
    model.blocks[0].attention_norm = LayerNorm(16)


def learned_positions(model: TransformerLM) -> None:
    model.position = Learned()
    for block in model.blocks:
        block.attention.position = model.position


def reversed_positions(model: TransformerLM) -> None:
    for block in model.blocks:
        block.attention.position.__class__ = Reversed


def unequal_norms(model: TransformerLM) -> None:
    model.blocks[0].attention.query_norm = None
    model.blocks[1].attention.key_norm.eps = 0.5


def opposite(model: TransformerLM) -> None:
    model.__class__ = Opposite


def convolved(model: TransformerLM) -> None:
    model.blocks[1].feed_forward = Convolution(model.blocks[1].feed_forward)


OWN = [
    low_rank,
    windowed,
    scaled,
    with_biases,
    another_norm,
    learned_positions,
    reversed_positions,
    unequal_norms,
]


@pytest.mark.parametrize("change", [*OWN, opposite, convolved])
def test_a_model_with_modules_of_a_user_decodes_as_it_computes(
    change: Callable[[TransformerLM], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "physical_cores", lambda: 3)
    model = make()
    prompt = np.random.default_rng(0).integers(0, 13, 230).tolist()
    plain = list(generate(model, prompt, 40, temperature=0))
    change(model)
    text = list(prompt)
    for token in generate(model, prompt, 40, temperature=0):
        with no_grad():
            assert token == int(model(np.array([text])).data[0, -1].argmax())
        text.append(token)
    assert text[len(prompt) :] != plain, "the change changes nothing"


@pytest.mark.parametrize("change", OWN)
@pytest.mark.parametrize("packed", [False, True])
def test_a_decoder_gives_the_logits_of_a_model_with_modules_of_a_user(
    change: Callable[[TransformerLM], None], packed: bool
) -> None:
    model = make()
    change(model)
    tokens = np.random.default_rng(0).integers(0, 13, 20)
    with no_grad():
        expected = model(tokens[None]).numpy()[0]
    decoder = Decoder(model)
    if packed:
        decoder.pack()
    for chunk in (7, 1, 1, 10, 1):
        got = decoder(tokens[decoder.length : decoder.length + chunk])
        np.testing.assert_allclose(got, expected[decoder.length - 1], rtol=0, atol=2e-5 * np.ptp(expected))


def test_what_infers_by_forward_runs_in_one_thread(
    prompt_of_three_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "physical_cores", lambda: 3)
    model = make()
    windowed(model)
    lengths = []
    forward = Windowed.forward
    monkeypatch.setattr(
        Windowed, "forward", lambda self, x, cache: lengths.append(x.shape[1]) or forward(self, x, cache)
    )
    Decoder(model)(prompt_of_three_parts)
    assert lengths == [len(prompt_of_three_parts)]

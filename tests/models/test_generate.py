"""Sampling: cached equals uncached, the settings mean what they say, seeds fix the tokens."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import InputError, generate, generate_text, no_grad
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.generation.sampling import next_token, until
from tinyllm.nn import KeyValueCache
from tinyllm.nn.cache import EndlessCache
from tinyllm.tokenizer import CharTokenizer

CONFIG = ModelConfig(
    vocab_size=13, context_length=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16
)
VARIANTS = {
    "qwen": CONFIG,
    "llama": replace(CONFIG, qk_norm=False, num_kv_heads=4),
    "no positions": replace(CONFIG, position_encoding="none"),
    "dropout": replace(CONFIG, dropout=0.5, tie_embeddings=True),
}


def make(config: ModelConfig = CONFIG, seed: int = 1) -> TransformerLM:
    model = TransformerLM(config, seed)
    # A larger head than at the start of training, so that tokens differ much in probability.
    model.head.weight.data *= 10
    return model


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    return make()


# ---- The cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 1, 9], [15, 1], [2, 3, 4, 7]])
def test_cached_logits_agree_with_uncached_ones(config: ModelConfig, chunks: list[int]) -> None:
    model = make(config).eval()
    tokens = np.random.default_rng(0).integers(0, 13, (3, 16))
    with no_grad():
        expected = model(tokens).numpy()
        cache = model.new_cache()
        at = 0
        for chunk in chunks:
            got = model(tokens[:, at : at + chunk], cache).numpy()
            np.testing.assert_allclose(got, expected[:, at : at + chunk], rtol=0, atol=1e-5)
            at += chunk
            assert [layer.length for layer in cache] == [at] * config.num_layers
    # The logits differ by far more than the tolerance, so agreement means something.
    assert np.ptp(expected) > 1


def test_cache_refuses_more_than_its_capacity(model: TransformerLM) -> None:
    cache = model.new_cache(capacity=4)
    with no_grad():
        model(np.zeros((1, 3), dtype=int), cache)
        with pytest.raises(ValueError, match="room for 4 tokens; got 5"):
            model(np.zeros((1, 2), dtype=int), cache)


def test_cache_keeps_what_it_is_given() -> None:
    rng = np.random.default_rng(0)
    cache = KeyValueCache(5)
    keys, values = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 3, 5, 7))
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        k, v = cache.append(keys[:, :, part], values[:, :, part])
        assert np.array_equal(k, keys[:, :, : part.stop])
        assert np.array_equal(v, values[:, :, : part.stop])


# ---- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5], list(range(13)) * 3])
def test_same_seed_same_tokens_with_and_without_cache(model: TransformerLM, prompt: list[int]) -> None:
    # 50 tokens go past the context of 16 several times.
    with_cache = list(generate(model, prompt, 50, seed=7))
    assert with_cache == list(generate(model, prompt, 50, seed=7))
    assert with_cache == list(generate(model, prompt, 50, seed=7, use_cache=False))
    assert with_cache != list(generate(model, prompt, 50, seed=8))
    assert len(with_cache) == 50
    assert all(type(token) is int and 0 <= token < 13 for token in with_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_temperature_zero_is_greedy_and_the_window_goes_on_from_its_newest_half(
    model: TransformerLM, use_cache: bool
) -> None:
    """Against a loop that calls the model on what generate() says it sees."""
    window = [1, 2, 3]
    expected = []
    for _ in range(40):
        with no_grad():
            token = int(model(np.array([window])).numpy()[0, -1].argmax())
        expected.append(token)
        window.append(token)
        if len(window) > 16:
            window = window[-8:]
    assert list(generate(model, [1, 2, 3], 40, temperature=0, use_cache=use_cache)) == expected


PROMPTS = {"short": [1, 2, 3], "longer than the context": list(range(13)) * 3}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_each_token_sees_all_before_it_if_asked(
    model: TransformerLM, prompt: list[int], watched: bool
) -> None:
    """Against the model called on all tokens; past its context, and past twice the room of the cache."""
    seen, config = list(prompt), model.config
    model.config = replace(config, context_length=200)  # or the model would refuse them
    for _ in range(90):
        with no_grad():
            seen.append(int(model(np.array([seen])).numpy()[0, -1].argmax()))
    model.config = config
    expected = seen[len(prompt) :]
    remove = model.norm.register_forward_hook(lambda *_: None) if watched else None
    assert list(generate(model, prompt, 90, temperature=0, window="all")) == expected
    if remove is not None:
        remove()
    assert list(generate(model, prompt, 90, temperature=0, window="all", use_cache=False)) == expected


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_window_slides_if_asked(prompt: list[int], watched: bool) -> None:
    """With one layer keys depend on their own token alone, so the model called on the newest tokens says the same."""
    model = make(replace(CONFIG, num_layers=1))
    seen = list(prompt)
    for _ in range(90):
        with no_grad():
            seen.append(int(model(np.array([seen[-16:]])).numpy()[0, -1].argmax()))
    if watched:
        model.norm.register_forward_hook(lambda *_: None)
    assert list(generate(model, prompt, 90, temperature=0, window="slide")) == seen[len(prompt) :]


def test_windows_that_cannot_be(model: TransformerLM) -> None:
    with pytest.raises(InputError, match="'slide' is of what the cache holds"):
        generate(model, [1], 5, window="slide", use_cache=False)
    with pytest.raises(InputError, match="it must be one of restart, slide, all"):
        generate(model, [1], 5, window="newest")  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_an_endless_cache_gives_the_newest(window: int | None) -> None:
    rng = np.random.default_rng(0)
    cache = EndlessCache(6, window)
    keys, values = rng.standard_normal((2, 3, 40, 4)), rng.standard_normal((2, 3, 40, 7))
    for start, end in [
        (0, 1 if window == 1 else 4),
        *((i, i + 1) for i in range(1 if window == 1 else 4, 40)),
    ]:
        k, v = cache.append(keys[:, :, start:end], values[:, :, start:end])
        first = 0 if window is None else max(0, end - window)
        assert np.array_equal(k, keys[:, :, first:end])
        assert np.array_equal(v, values[:, :, first:end])
        assert cache.length == end
    if window is not None:
        assert cache.capacity <= 12


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(st.text("ab", max_size=3), max_size=12), stop=st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_the_stop(pieces: list[str], stop: str) -> None:
    assert "".join(until(pieces, stop)) == "".join(pieces).partition(stop)[0]


def test_what_cannot_belong_to_the_stop_is_given_at_once() -> None:
    pieces = until(iter(["xy", "ab", "c", "END!", "never"]), "bcEND")
    assert [next(pieces) for _ in range(2)] == ["xy", "a"]
    assert "".join(pieces) == ""


def test_long_prompt_is_cut_to_the_newest_context(model: TransformerLM) -> None:
    newest = list(np.random.default_rng(1).integers(0, 13, 16))
    assert list(generate(model, [5] * 40 + newest, 9, seed=1)) == list(generate(model, newest, 9, seed=1))


def test_context_of_one_token() -> None:
    model = make(replace(CONFIG, context_length=1))
    assert len(list(generate(model, [1, 2], 5))) == 5


def test_tokens_stream_and_the_prompt_is_not_changed(model: TransformerLM) -> None:
    prompt = [1, 2]
    stream = generate(model, prompt, 10**9)
    first = [next(stream) for _ in range(3)]
    assert first == list(generate(model, prompt, 3))
    assert prompt == [1, 2]
    assert list(generate(model, prompt, 0)) == []


def test_training_flag_and_gradients_are_left_alone() -> None:
    model = make(replace(CONFIG, dropout=0.5))
    for mode in (True, False):
        model.train(mode)
        stream = generate(model, [1], 5)
        next(stream)
        assert all(module.training is mode for _, module in model.named_modules())  # between tokens too
        list(stream)
        assert all(module.training is mode for _, module in model.named_modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_flag_is_restored_after_an_error(model: TransformerLM) -> None:
    model.train()
    with pytest.raises(IndexError):
        list(generate(model, [99], 5))
    assert model.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": []}, "the prompt is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_refused_at_the_call(
    model: TransformerLM, wrong: dict[str, Any], message: str
) -> None:
    arguments = {"tokens": [1], "max_new_tokens": 3, **wrong}
    with pytest.raises(InputError, match=message) as error:
        generate(model, **arguments)  # nothing is drawn yet
    assert "\n" not in str(error.value)


def test_text_in_text_out() -> None:
    tokenizer = CharTokenizer("abcdefghijklm")
    model = make()
    pieces = list(generate_text(model, tokenizer, "cab", 20, seed=3))
    assert "".join(pieces) == tokenizer.decode(list(generate(model, [2, 0, 1], 20, seed=3)))
    with pytest.raises(InputError, match="'Z'"):
        generate_text(model, tokenizer, "aZ", 5)
    with pytest.raises(InputError, match="prompt is empty"):
        generate_text(model, tokenizer, "", 5)


def test_text_stays_in_the_vocabulary_of_the_tokenizer() -> None:
    """A model may have more ids than its tokenizer; those are never drawn."""
    model = make(replace(CONFIG, vocab_size=40))
    text = "".join(generate_text(model, CharTokenizer("abc"), "a", 200, temperature=5.0))
    assert len(text) == 200
    assert set(text) <= set("abc")
    assert max(generate(model, [0], 200, temperature=5.0)) >= 3


# ---- next_token --------------------------------------------------------------------------------


def allowed(logits: Any, temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """The tokens that may be drawn and their probabilities, by the definitions and plain loops."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    tokens = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k is not None:
        tokens = tokens[:top_k]
    total = math.fsum(weights[i] for i in tokens)
    p = {i: weights[i] / total for i in tokens}
    if top_p is not None:
        nucleus: list[int] = []
        while math.fsum(p[i] for i in nucleus) < top_p and len(nucleus) < len(tokens):
            nucleus.append(tokens[len(nucleus)])
        total = math.fsum(p[i] for i in nucleus)
        p = {i: p[i] / total for i in nucleus}
    return p


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.05, 1),
)
def test_draws_follow_the_definitions(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(9) * 2).astype(np.float32)
    expected = allowed(logits.astype(np.float64).tolist(), temperature, top_k, top_p)
    n = 1500
    counts = np.bincount([next_token(logits, rng, temperature, top_k, top_p) for _ in range(n)], minlength=9)
    assert set(np.flatnonzero(counts)) <= expected.keys()
    # Pearson's statistic over tokens that are expected at least five times. With k terms its mean is below
    # k and its deviation about sqrt(2k): eight deviations.
    often = [i for i, p in expected.items() if n * p >= 5]
    statistic = sum((counts[i] - n * expected[i]) ** 2 / (n * expected[i]) for i in often)
    assert statistic < len(often) + 8 * math.sqrt(2 * len(often)) + 1e-6


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), top_k=st.none() | st.integers(1, 12), top_p=st.none() | st.floats(0.01, 1))
def test_each_part_of_the_unit_interval_gives_its_token(
    seed: int, top_k: int | None, top_p: float | None
) -> None:
    """With the random number given, the token is that of the inverse distribution function."""
    logits = np.random.default_rng(seed).standard_normal(7)
    expected = allowed(logits.tolist(), 0.7, top_k, top_p)

    class Fixed(np.random.Generator):
        def __init__(self, value: float) -> None:
            super().__init__(np.random.PCG64(0))
            self.value = value

        def random(self, *args: Any, **kwargs: Any) -> Any:
            return self.value

    below = 0.0
    for token in sorted(expected, key=lambda i: -logits[i]):
        middle = below + expected[token] / 2
        assert next_token(logits, Fixed(middle), 0.7, top_k, top_p) == token
        below += expected[token]
    last = min(expected, key=lambda i: logits[i])
    assert next_token(logits, Fixed(1 - 2**-53), 0.7, top_k, top_p) == last


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-12])
def test_tiny_temperatures_take_the_most_likely_token(temperature: float) -> None:
    logits = np.array([1.0, 5.0, -3.0, 4.9], dtype=np.float32)
    rng = np.random.default_rng(0)
    assert {next_token(logits, rng, temperature) for _ in range(20)} == {1}


def test_masked_and_extreme_logits() -> None:
    rng = np.random.default_rng(0)
    masked = np.array([-np.inf, 0.0, -np.inf, 0.0], dtype=np.float32)
    assert {next_token(masked, rng) for _ in range(50)} == {1, 3}
    assert next_token(np.array([1e30, -1e30, 3e38], dtype=np.float32), rng) == 2
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match=r"largest logit is (nan|inf)"):
            next_token(np.array([0.0, bad, 1.0]), rng)

"""Checks of models: the invariants, the equations in plain NumPy, initial weights, tied embeddings, dropout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Dropout, Linear, dropout_position
from tinyllm.testing import invariants
from tinyllm.testing.mutants.check_formulas import rotated, softmax_of
from tinyllm.testing.mutants.check_ops import close
from tinyllm.testing.mutants.checking import check

V = 11


def small_model(seed: int = 3, **settings: Any) -> TransformerLM:
    """Two layers, four query heads on two key heads; every setting may be given."""
    shape = {"vocab_size": V, "context_length": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
             "hidden_size": 16, "intermediate_size": 24}  # fmt: skip
    return TransformerLM(ModelConfig(**{**shape, **settings}), seed=seed)


def _register(name: str, function: Callable[..., None], **settings: Any) -> None:
    check(name)(lambda: function(small_model(**settings), V))


_register("model: causality", invariants.check_causality)
_register("model: every position sees the past", invariants.check_sees_the_past)
_register("model: order of the batch", invariants.check_batch_permutation)
_register("model: padding", invariants.check_padding)
_register("model: cached equals uncached", invariants.check_cached_decoding)
_register("model: initial loss near log V", invariants.check_initial_loss, hidden_size=64, num_layers=4)
_register("model: every parameter learns", invariants.check_every_parameter_learns)
_register("model: forward mode", invariants.check_model_forward_mode)


@check("model: RoPE shift")
def rope_shift() -> None:
    """Scores depend on the distance, as the model's own position encoding turns queries and keys."""
    model = small_model()
    K = model.config.head_dim
    invariants.check_rope_shift(lambda x, offset: model.position.heads(x.reshape(1, -1, K), K, offset), K)


# ---- The equations -----------------------------------------------------------------------------


def by_equations(weights: dict[str, Array], config: ModelConfig, text: Array) -> Array:
    """The logits (T, V) of one text (T,), from the papers' equations: vector by vector, in float64."""
    K, eps = config.head_dim, config.norm_eps
    group = config.num_heads // config.num_kv_heads

    def norm(x: Array, name: str) -> Array:
        scaled: Array = x / math.sqrt(float((x * x).mean()) + eps) * weights[f"{name}.weight"]
        return scaled

    def head(vector: Array, h: int) -> Array:
        return vector[h * K : (h + 1) * K]

    stream = [weights["embedding.weight"][token] for token in text]
    for layer in range(config.num_layers):
        at = f"blocks.{layer}"
        W = {part: weights[f"{at}.attention.{part}.weight"] for part in ("query", "key", "value", "output")}
        x = [norm(vector, f"{at}.attention_norm") for vector in stream]

        def turned(part: str, t: int, h: int, x: Any = x, W: Any = W, at: str = at) -> Array:
            vector = head(W[part] @ x[t], h)
            if config.qk_norm:
                vector = norm(vector, f"{at}.attention.{part}_norm")
            return rotated(vector, t, config.rope_theta)

        for t in range(len(text)):
            attended = []
            for h in range(config.num_heads):
                q = turned("query", t, h)
                p = softmax_of([q @ turned("key", s, h // group) / math.sqrt(K) for s in range(t + 1)])
                attended.append(sum(p[s] * head(W["value"] @ x[s], h // group) for s in range(t + 1)))
            stream[t] = stream[t] + W["output"] @ np.concatenate(attended)
        gate, up, down = (weights[f"{at}.feed_forward.{part}.weight"] for part in ("gate", "up", "down"))
        for t, vector in enumerate(stream):
            y = norm(vector, f"{at}.feed_forward_norm")
            z = gate @ y
            stream[t] = vector + down @ (z / (1 + np.exp(-z)) * (up @ y))
    last = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    return np.array([last @ norm(vector, "norm") for vector in stream])


def _against_equations(**settings: Any) -> None:
    model = small_model(**settings).astype(np.float64)
    rng = np.random.default_rng(4)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # ones would hide whether a norm uses its weight, and where
            parameter.data[...] = rng.uniform(0.5, 1.5, parameter.shape)
    tokens = rng.integers(0, V, (2, 5))
    weights = {name: np.array(array) for name, array in model.state_dict().items()}
    expected = np.array([by_equations(weights, model.config, text) for text in tokens])
    close(model(tokens).data, expected, "logits of the model and of the equations")


check("model against its equations")(
    functools.partial(_against_equations, rope_theta=50.0, norm_eps=0.01, num_layers=2)
)
check("tied model without QK-norm against its equations")(
    functools.partial(_against_equations, tie_embeddings=True, qk_norm=False, num_layers=1)
)


@check("a tied head is the embedding")
def tied() -> None:
    """A tied model has one matrix for embedding and head: one parameter, whose gradient has both parts."""
    model = small_model(tie_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    assert "head.weight" not in names, f"a tied head is no parameter of its own; the parameters are {names}"
    assert model.head.weight is model.embedding.weight, "the tied head is not the embedding's matrix"
    expected = small_model().num_parameters() - V * model.config.hidden_size
    assert model.num_parameters() == expected, f"{model.num_parameters()} parameters, expected {expected}"


# ---- Learning, over several steps --------------------------------------------------------------


@check("training by hand")
def training_by_hand() -> None:
    """Three steps of gradient descent through .backward() and zero_grad() equal those of gradients from scratch."""
    rng = np.random.default_rng(9)
    x, y = rng.standard_normal((6, 4)), rng.standard_normal((6, 2))
    layer = Linear(4, 2, rng=rng).astype(np.float64)
    assert layer.bias is not None
    W, b = layer.weight.data.copy(), layer.bias.data.copy()
    for _ in range(3):
        layer.zero_grad()
        ((layer(Tensor(x)) - Tensor(y)) ** 2).sum().backward()
        residual = x @ W.T + b - y
        W -= 0.01 * 2 * residual.T @ x
        b -= 0.01 * 2 * residual.sum(axis=0)
        for parameter in layer.parameters():
            parameter.data -= 0.01 * parameter.grad
    close(layer.weight.data, W, "the weight after three steps")
    close(layer.bias.data, b, "the bias after three steps")


# ---- Initial weights ---------------------------------------------------------------------------


@check("initial weights keep the variance")
def initial_weights() -> None:
    """A layer's output has the variance of its input, for wide, narrow and square layers."""
    rng = np.random.default_rng(10)
    for inputs, outputs in ((256, 64), (64, 256), (128, 128)):
        layer = Linear(inputs, outputs, False, rng=rng, init_scale=1.0)
        y = layer(Tensor(rng.standard_normal((200, inputs)).astype(np.float32))).data
        assert 0.8 < float(y.std()) < 1.2, f"{inputs} inputs of deviation 1 give {float(y.std()):.2f}"


@check("initial weights differ from layer to layer")
def distinct_weights() -> None:
    """No two weight matrices begin alike."""
    arrays = [p for p in small_model(num_kv_heads=4).parameters() if p.ndim == 2]
    for i, one in enumerate(arrays):
        for other in arrays[:i]:
            n = min(one.size, other.size)
            same = np.mean(one.data.reshape(-1)[:n] * 2 == other.data.reshape(-1)[:n] * 2)
            correlation = np.corrcoef(one.data.reshape(-1)[:n], other.data.reshape(-1)[:n])[0, 1]
            assert same < 0.1, "two weight matrices begin with the same numbers"
            assert abs(correlation) < 6 / math.sqrt(n), f"two weight matrices correlate: {correlation:.2f}"


@check("initial variance does not grow with depth")
def residual_variance() -> None:
    """What the blocks add to the residual stream does not grow with their number."""
    tokens = np.random.default_rng(11).integers(0, V, (8, 8))

    def added(layers: int) -> float:
        model = small_model(num_layers=layers, hidden_size=64)
        with no_grad():
            x = start = model.embedding(tokens)
            for block in model.blocks:
                x = block(x)
        return float((x - start).data.var())

    few, many = added(2), added(16)
    assert many < 2 * few, (
        f"16 blocks add a variance of {many:.2f}, 2 blocks {few:.2f}; expected about the same"
    )


# ---- Dropout -----------------------------------------------------------------------------------


@check("dropout is off in evaluation")
def evaluation() -> None:
    """In evaluation a model with dropout is the one without; in training it is another."""
    tokens = np.random.default_rng(12).integers(0, V, (2, 6))
    plain, model = small_model(), small_model(dropout=0.5)
    with dropout_position(1, 2):
        close(model.eval()(tokens).data, plain(tokens).data, "logits in evaluation", 1e-6)
        trained = model.train()(tokens).data
    assert np.abs(trained - plain(tokens).data).max() > 0.01, "dropout changed nothing in training"


@check("dropout masks differ")
def masks_differ() -> None:
    """Each layer, step and micro-batch has a mask of its own; the same place has the same mask."""
    ones = Tensor(np.ones(2000, dtype=np.float32))

    def mask(stream: int, step: int, micro_batch: int) -> Array:
        with dropout_position(7, step, micro_batch):
            kept: Array = Dropout(0.5, stream=stream)(ones).data > 0
        return kept

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4)]
    masks = [mask(*place) for place in places]
    for i, one in enumerate(masks):
        assert np.array_equal(one, mask(*places[i])), "the same place gives another mask"
        for j in range(i):
            same = float((one == masks[j]).mean())
            assert abs(same - 0.5) < 0.1, (
                f"masks at {places[i]} and {places[j]} agree in {same:.2f} of places"
            )

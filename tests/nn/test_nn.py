"""Modules and the language model: what they compute, and what they refuse."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyllm import InputError, Tensor, gradients, nn, no_grad, ops, use_formulas
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import (
    Dropout,
    LayerNorm,
    Linear,
    Module,
    MultiHeadAttention,
    Parameter,
    RMSNorm,
    dropout_position,
)
from tinyllm.optim import AdamW

EPS32 = float(np.finfo(np.float32).eps)

TINY = ModelConfig(vocab_size=11, context_length=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16)
VARIANTS = {
    "gqa": TINY,
    "llama": replace(TINY, qk_norm=False, num_kv_heads=4),
    "tied": replace(TINY, tie_embeddings=True),
    "no positions": replace(TINY, position_encoding="none"),
    "wide heads": replace(TINY, head_dim=6, num_kv_heads=1),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tokens(config: ModelConfig, batch: int = 2, length: int | None = None, seed: int = 3) -> Any:
    return rng(seed).integers(0, config.vocab_size, (batch, length or config.context_length))


def in_float64(model: TransformerLM, seed: int = 5) -> TransformerLM:
    """The model with random float64 weights everywhere, so that no norm is left at one."""
    generator = rng(seed)
    for parameter in model.parameters():
        scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim == 2 else 0.3
        noise = generator.standard_normal(parameter.shape) * scale
        parameter.data = noise + (parameter.ndim == 1)
    return model


# ---- Module ------------------------------------------------------------------------------------


class Leaf(Module):
    def __init__(self, n: int) -> None:
        self.weight = Parameter(np.arange(n, dtype=np.float32))
        self.buffer = Tensor(np.ones(3, dtype=np.float32))
        self.number = 5


class Tree(Module):
    def __init__(self) -> None:
        self.first = Leaf(2)
        self.scale = Parameter(np.ones((1, 3), dtype=np.float32))
        self.leaves = [Leaf(1), Leaf(4)]
        self.pair = (Parameter(np.zeros(5, dtype=np.float32)), None)
        self.none = None
        self.first_again = self.first
        self.tied = Leaf(9)
        self.tied.weight = self.leaves[1].weight


def test_parameters_are_found_by_path_and_tied_ones_once() -> None:
    tree = Tree()
    # Own parameters first, then those of each submodule in the order of assignment.
    assert sorted(name for name, _ in tree.named_parameters()) == [
        "first.weight",
        "leaves.0.weight",
        "leaves.1.weight",
        "pair.0",
        "scale",
    ]
    for name, parameter in tree.named_parameters():
        found: Any = tree
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found is parameter
    assert tree.num_parameters() == 2 + 1 + 4 + 5 + 3
    assert [id(p) for p in tree.parameters()] == [id(p) for _, p in tree.named_parameters()]
    once = ["", "first", "leaves.0", "leaves.1", "tied"]
    assert [name for name, _ in tree.named_modules()] == once
    paths = {name for name, _ in tree.named_modules(remove_duplicate=False)}
    assert paths == {*once, "first_again"}


def test_train_eval_and_zero_grad_reach_everything() -> None:
    tree = Tree()
    assert tree.training
    assert tree.eval() is tree
    assert not any(module.training for _, module in tree.named_modules())
    assert tree.train() is tree
    assert all(module.training for _, module in tree.named_modules())
    for parameter in tree.parameters():
        parameter.grad = np.ones(parameter.shape, dtype=np.float32)
    tree.zero_grad()
    assert all(parameter.grad is None for parameter in tree.parameters())


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(TypeError, match="Tree defines no forward"):
        Tree()(1)


def test_state_dict_round_trip_copies_values() -> None:
    a, b = TransformerLM(TINY, seed=1), TransformerLM(TINY, seed=2)
    state = {name: array.copy() for name, array in a.state_dict().items()}
    before = {name: id(parameter.data) for name, parameter in b.named_parameters()}
    b.load_state_dict(state)
    for name, parameter in b.named_parameters():
        assert parameter.data.tobytes() == state[name].tobytes()
        assert id(parameter.data) == before[name]
        assert not np.shares_memory(parameter.data, state[name])
    assert np.shares_memory(a.state_dict()["norm.weight"], a.norm.weight.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attention.key.weight"), "^missing: 'blocks.1.attention.key.weight'$"),
        (
            lambda s: s.update({"blocks.1.atention.key.weight": s.pop("blocks.1.attention.key.weight")}),
            r"unknown: 'blocks.1.atention.key.weight' \(did you mean 'blocks.1.attention.key.weight'\?\)$",
        ),
        (lambda s: s.update({"zzz": np.zeros(1)}), "'zzz'$"),
        (lambda s: s.update({"norm.weight": np.zeros(15)}), r"'norm.weight' has shape \(15,\), .* \(16,\)"),
        (
            lambda s: s.update({"head.weight": s["head.weight"].T}),
            r"'head.weight' has shape \(16, 11\), .* \(11, 16\)",
        ),
        (lambda s: s.update({"head.weight": s["head.weight"] * 1j}), "^'head.weight' is of complex"),
        (lambda s: s.update({"head.weight": s["head.weight"].astype(str)}), "^'head.weight' is of <U"),
        (
            lambda s: s.update({"head.weight": s["head.weight"].astype(int)}),
            "is of int64; weights must be floating",
        ),
        (
            lambda s: s.update({"head.weight": s["head.weight"].tolist()}),
            r"^'head.weight' is \[\[.*, not an array$",
        ),
        (lambda s: s.update({"head.weight": None}), "^'head.weight' is None, not an array$"),
        (
            lambda s: [
                s.pop("embedding.weight"),
                s.update({"x": s["norm.weight"], "norm.weight": np.ones(3)}),
            ],
            r"^missing: 'embedding.weight'; unknown: 'x'; 'norm.weight' has shape \(3,\)",  # all at once
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if "attention" in name],
            "^missing: 'blocks.0.attention_norm.weight', .*', .*' and 11 more$",
        ),
        (
            lambda s: s.update({name: np.ones((), np.float32) for name in s}),
            "'embedding.weight' .*; 22 more that do not fit$",
        ),
    ],
)
def test_load_state_dict_refuses_and_changes_nothing(change: Any, message: str) -> None:
    model = TransformerLM(TINY, seed=1)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        model.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())


class Fails:
    """What says to be an array and cannot be converted: a bfloat16 tensor of torch is one."""

    dtype, shape = np.dtype(np.float32), (11, 16)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("unsupported ScalarType BFloat16")


@pytest.mark.parametrize("fails", ["conversion", "overflow", "read-only"])
def test_load_state_dict_that_fails_on_the_last_changes_nothing(fails: str) -> None:
    model = TransformerLM(TINY, seed=1)
    state: dict[str, Any] = {name: array + 1 for name, array in model.state_dict().items()}
    assert list(state)[-1] == "head.weight"
    expected: type[Exception] = TypeError
    if fails == "conversion":
        state["head.weight"] = Fails()
    elif fails == "overflow":
        state["head.weight"] = state["head.weight"] + np.float64(1e300)
        expected = FloatingPointError
    else:
        model.head.weight.data = np.broadcast_to(np.float32(2), (11, 16))
        expected = InputError
    before = {name: array.copy() for name, array in model.state_dict().items()}
    with np.errstate(over="raise"), pytest.raises(expected):
        model.load_state_dict(state)
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())


def test_load_state_dict_takes_other_layouts_dtypes_and_tensors() -> None:
    model, other = TransformerLM(TINY, seed=1), TransformerLM(TINY, seed=2)
    state: dict[str, Any] = dict(model.named_parameters())
    state["embedding.weight"] = np.asfortranarray(model.embedding.weight.data)
    state["norm.weight"] = model.norm.weight.data.astype(">f8")
    other.load_state_dict(state)
    for name, array in model.state_dict().items():
        assert other.state_dict()[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("norm", "weight"),
        ("embedding", "weight"),
        ("head", "bias"),
        ("blocks.1.attention.query_norm", "weight"),
        ("blocks.0.feed_forward.up", "weight"),
    ],
)
@pytest.mark.parametrize("kind", ["array", "numbers", "Tensor", "product"])
def test_what_is_no_parameter_is_refused_in_its_place(owner: str, name: str, kind: str) -> None:
    """It would be neither trained nor saved."""
    model = TransformerLM(TINY, seed=1)
    module = dict(model.named_modules())[owner]
    values = getattr(module, name).data if name == "weight" else np.zeros(11, dtype=np.float32)
    new = {
        "array": values,
        "numbers": values.tolist(),
        "Tensor": Tensor(values),
        "product": Parameter(values) * 2,
    }
    setattr(module, name, new[kind])
    message = f"^{owner}.{name} is of class .*where a Parameter must stand"
    for action in (
        model.state_dict,
        model.num_parameters,
        lambda: model.astype(np.float64),
        lambda: list(model.parameters()),
    ):
        with pytest.raises(InputError, match=message):
            action()
    if kind in ("array", "numbers"):
        with pytest.raises(InputError, match=message):
            model(tokens(TINY))
    setattr(module, name, Parameter(values))
    assert f"{owner}.{name}" in model.state_dict()


@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": False}, {"tie_embeddings": True}, {"head_dim": 6, "num_kv_heads": 1}]
)
def test_a_config_knows_the_shapes_of_its_parameters(settings: dict[str, Any]) -> None:
    config = replace(TINY, **settings)
    shapes = config.parameter_shapes()
    model = TransformerLM(config)
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert (
        sum(math.prod(shape) for shape in shapes.values()) == config.num_parameters == model.num_parameters()
    )


def test_numbers_of_numpy_in_a_config_are_plain_ones() -> None:
    config = ModelConfig(
        vocab_size=np.arange(5).max() + 1,
        hidden_size=np.uint16(8),
        num_heads=np.int32(2),
        norm_eps=np.float32(0.5),
    )  # type: ignore[arg-type]
    assert {type(value) for value in vars(config).values()} == {int, float, bool, str}


def test_the_current_config_says_whether_the_head_is_tied_now() -> None:
    model = TransformerLM(TINY)
    assert model.current_config == TINY
    model.head.weight = model.embedding.weight
    assert model.current_config == replace(TINY, tie_embeddings=True)
    tied = TransformerLM(replace(TINY, tie_embeddings=True))
    tied.head.weight = Parameter(tied.embedding.weight.data.copy())
    assert tied.current_config == TINY


# ---- Layers ------------------------------------------------------------------------------------


def test_linear_is_x_weight_transposed_plus_bias() -> None:
    layer = Linear(5, 3, rng=rng())
    assert layer.weight.shape == (3, 5)
    assert layer.bias is not None
    bound = 1 / math.sqrt(5)
    assert all(0 < np.abs(p.data).max() < bound for p in layer.parameters())
    layer.bias.data[...] = [1, 2, 3]
    x = rng(1).standard_normal((2, 4, 5)).astype(np.float32)
    weight, bias = layer.weight.data.astype(np.float64), layer.bias.data.astype(np.float64)
    exact = np.einsum("bti,oi->bto", x, weight) + bias
    out = layer(Tensor(x)).data
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, exact, atol=8 * EPS32 * np.abs(exact).max())
    assert "bias" not in dict(Linear(5, 3, bias=False, rng=rng()).named_parameters())


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_follow_their_formula(norm: Any) -> None:
    layer = norm(6, eps=0.25)
    layer.weight.data[...] = rng(1).standard_normal(6)
    x = rng(2).standard_normal((3, 6)) * 2 + 1
    if norm is RMSNorm:
        exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.25) * layer.weight.data
    else:
        layer.bias.data[...] = rng(3).standard_normal(6)
        exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.25)
        exact = exact * layer.weight.data + layer.bias.data
    got = layer(Tensor(x.astype(np.float32))).data
    np.testing.assert_allclose(got, exact, atol=16 * EPS32 * np.abs(exact).max())


# ---- Dropout -----------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_and_needs_a_position_in_training() -> None:
    layer = Dropout(0.5, stream=0)
    x = Tensor(np.ones(100, dtype=np.float32))
    with pytest.raises(RuntimeError, match="dropout_position"):
        layer(x)
    with dropout_position(seed=1):
        assert set(layer(x).data.tolist()) == {0.0, 2.0}
    with pytest.raises(RuntimeError, match="dropout_position"):
        layer(x)  # the position ends with its context
    assert layer.eval()(x) is x
    assert Dropout(0.0, stream=0)(x) is x


def test_dropout_masks_are_a_function_of_seed_step_micro_batch_and_stream() -> None:
    x = Tensor(np.ones(400, dtype=np.float32))

    def mask(seed: int, step: int, micro_batch: int, stream: int) -> bytes:
        with dropout_position(seed, step, micro_batch):
            return Dropout(0.5, stream=stream)(x).data.tobytes()

    base = (1, 2, 3, 4)
    assert mask(*base) == mask(*base)
    changed = [tuple(v + (i == j) for j, v in enumerate(base)) for i in range(4)]
    swapped = [(2, 1, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3)]
    masks = [mask(*key) for key in [base, *changed, *swapped]]
    assert len(set(masks)) == len(masks)


def test_every_dropout_of_a_model_has_a_stream_of_its_own() -> None:
    model = TransformerLM(replace(TINY, dropout=0.1, num_layers=3))
    streams = [module.stream for _, module in model.named_modules() if isinstance(module, Dropout)]
    assert len(streams) == 1 + 3 * 3
    assert len(set(streams)) == len(streams)


def test_model_dropout_same_position_same_bits() -> None:
    model = TransformerLM(replace(TINY, dropout=0.3), seed=1)
    x = tokens(TINY)

    def run(seed: int, step: int) -> bytes:
        with dropout_position(seed, step):
            return model(x).data.tobytes()

    assert run(1, 5) == run(1, 5)
    assert len({run(1, 5), run(1, 6), run(2, 5)}) == 3
    plain = TransformerLM(TINY, seed=1)
    assert model.eval()(x).data.tobytes() == plain(x).data.tobytes()


# ---- ModelConfig -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide hidden_size=16"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5; it must be even"),
        ({"num_layers": 0}, "num_layers=0; it must be from 1"),
        ({"hidden_size": -16}, "hidden_size=-16"),
        ({"vocab_size": -1}, "vocab_size=-1; it must be from 0"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776"),
        ({"dropout": 1.0}, "dropout=1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06"),
        ({"init_scale": math.inf}, "init_scale=inf"),
        ({"embedding_std": -1.0}, "embedding_std=-1.0"),
        ({"head_scale": -1.0}, "head_scale=-1.0"),
    ],
)
def test_config_refuses_what_makes_no_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        replace(replace(TINY, head_dim=4), **{"head_dim": 0, **settings})
    assert "\n" not in str(error.value)


def test_config_fills_in_what_is_left_out() -> None:
    config = ModelConfig(hidden_size=20, num_heads=2)
    assert (config.head_dim, config.num_kv_heads) == (10, 2)
    assert config.intermediate_size % 8 == 0
    assert config.intermediate_size - 8 < 8 / 3 * 20 <= config.intermediate_size
    assert ModelConfig(hidden_size=20, num_heads=3, head_dim=4).head_dim == 4
    assert ModelConfig(head_dim=5, position_encoding="none").head_dim == 5
    with pytest.raises(InputError, match="vocab_size"):
        TransformerLM(ModelConfig())


# ---- TransformerLM -----------------------------------------------------------------------------


@variants
def test_shapes_names_and_dtype(config: ModelConfig) -> None:
    model = TransformerLM(config)
    D, V, K, F = config.hidden_size, config.vocab_size, config.head_dim, config.intermediate_size
    H, G = config.num_heads, config.num_kv_heads
    shapes = {"embedding.weight": (V, D), "norm.weight": (D,), "head.weight": (V, D)}
    for i in range(config.num_layers):
        block = {
            "attention_norm.weight": (D,),
            "attention.query.weight": (H * K, D),
            "attention.key.weight": (G * K, D),
            "attention.value.weight": (G * K, D),
            "attention.output.weight": (D, H * K),
            "attention.query_norm.weight": (K,),
            "attention.key_norm.weight": (K,),
            "feed_forward_norm.weight": (D,),
            "feed_forward.gate.weight": (F, D),
            "feed_forward.up.weight": (F, D),
            "feed_forward.down.weight": (D, F),
        }
        if not config.qk_norm:
            del block["attention.query_norm.weight"], block["attention.key_norm.weight"]
        shapes.update({f"blocks.{i}.{name}": shape for name, shape in block.items()})
    if config.tie_embeddings:
        del shapes["head.weight"]
        assert model.head.weight is model.embedding.weight
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.dtype == np.float32 for p in model.parameters())
    assert config.num_parameters == model.num_parameters() == sum(math.prod(s) for s in shapes.values())
    for batch, length in [(1, 1), (3, 5), (2, config.context_length), (0, 4)]:
        logits = model(np.zeros((batch, length), dtype=int))
        assert logits.shape == (batch, length, V)
        assert logits.dtype == np.float32
    with pytest.raises(ValueError, match=r"tokens have shape \(5,\); the model takes \(B, T\)"):
        model(np.zeros(5, dtype=int))


@variants
def test_a_later_token_changes_no_earlier_logit(config: ModelConfig) -> None:
    model = TransformerLM(config, seed=4)
    x = tokens(config)
    before = model(x).data
    for t in range(1, config.context_length):
        changed = x.copy()
        changed[:, t:] = (changed[:, t:] + 1) % config.vocab_size
        after = model(changed).data
        assert after[:, :t].tobytes() == before[:, :t].tobytes()
        assert (after[:, t] != before[:, t]).any()


def test_rows_of_a_batch_do_not_meet() -> None:
    model = TransformerLM(TINY, seed=4)
    x = tokens(TINY, batch=3)
    before = model(x).data
    x[1] = (x[1] + 1) % TINY.vocab_size
    after = model(x).data
    assert after[[0, 2]].tobytes() == before[[0, 2]].tobytes()
    assert (after[1] != before[1]).any(axis=-1).all()


def test_grouped_heads_equal_many_heads_with_repeated_keys_and_values() -> None:
    grouped = in_float64(TransformerLM(TINY))
    many = in_float64(TransformerLM(replace(TINY, num_kv_heads=4)), seed=99)
    state = dict(grouped.state_dict())
    for name in state:
        if name.endswith(("attention.key.weight", "attention.value.weight")):
            heads = state[name].reshape(2, TINY.head_dim, TINY.hidden_size)
            state[name] = heads.repeat(2, axis=0).reshape(-1, TINY.hidden_size)
    many.load_state_dict(state)
    x = tokens(TINY)
    expected = grouped(x).data
    np.testing.assert_allclose(many(x).data, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_attention_scores_depend_on_distance_alone() -> None:
    position = nn.RotaryEmbedding(TINY.rope_theta)
    generator = rng(1)
    q = Tensor(generator.standard_normal((1, 1, 8)))
    k = Tensor(generator.standard_normal((1, 1, 8)))

    def score(at_query: int, at_key: int) -> float:
        rotated = position.heads(q, 8, at_query).data * position.heads(k, 8, at_key).data
        return float(rotated.sum())

    for distance in (0, 1, 7, 100):
        scores = [score(distance + shift, shift) for shift in (0, 1, 13, 500)]
        np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-12)
    assert score(0, 0) == pytest.approx(float((q.data * k.data).sum()), abs=1e-12)
    assert abs(score(1, 0) - score(0, 0)) > 1e-3
    assert abs(score(0, 1) - score(1, 0)) > 1e-3  # the direction counts


def test_attention_follows_a_plain_loop() -> None:
    """Queries, keys and values by loops over heads and positions, from the equations."""
    config = replace(TINY, head_dim=4, rope_theta=50.0)
    model = in_float64(TransformerLM(config))
    attention = model.blocks[0].attention
    assert isinstance(attention, MultiHeadAttention)
    T, K, H, G = 5, 4, config.num_heads, config.num_kv_heads
    x = rng(8).standard_normal((1, T, config.hidden_size))

    def heads(layer: Linear, count: int, norm: RMSNorm | None) -> np.ndarray[Any, Any]:
        out = (x[0] @ layer.weight.data.T).reshape(T, count, K)
        if norm is None:
            return out
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + config.norm_eps) * norm.weight.data
        rotated = np.empty_like(out)
        for t in range(T):
            for i in range(K // 2):
                angle = t * 50.0 ** (-2 * i / K)
                a, b = out[t, :, i], out[t, :, i + K // 2]
                rotated[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                rotated[t, :, i + K // 2] = b * math.cos(angle) + a * math.sin(angle)
        return rotated

    q = heads(attention.query, H, attention.query_norm)
    k = heads(attention.key, G, attention.key_norm)
    v = heads(attention.value, G, None)
    mixed = np.zeros((T, H, K))
    for h in range(H):
        g = h // (H // G)
        for t in range(T):
            scores = np.array([q[t, h] @ k[s, g] / math.sqrt(K) for s in range(t + 1)])
            p = np.exp(scores - scores.max())
            mixed[t, h] = sum(p[s] / p.sum() * v[s, g] for s in range(t + 1))
    expected = mixed.reshape(T, H * K) @ attention.output.weight.data.T
    np.testing.assert_allclose(attention(Tensor(x)).data[0], expected, rtol=0, atol=1e-12)


def test_a_block_adds_its_branches_to_the_stream() -> None:
    block = in_float64(TransformerLM(TINY)).blocks[0]
    x = rng(2).standard_normal((1, 3, 16))

    def norm(values: Any, layer: RMSNorm) -> Any:
        root = np.sqrt((values**2).mean(-1, keepdims=True) + TINY.norm_eps)
        return values / root * layer.weight.data

    middle = x + block.attention(Tensor(norm(x, block.attention_norm))).data
    inner = norm(middle, block.feed_forward_norm)
    layer = block.feed_forward
    gate, up = inner @ layer.gate.weight.data.T, inner @ layer.up.weight.data.T
    expected = middle + (gate / (1 + np.exp(-gate)) * up) @ layer.down.weight.data.T
    np.testing.assert_allclose(block(Tensor(x)).data, expected, rtol=0, atol=1e-12)


# ---- Initialisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_initial_standard_deviations(tied: bool) -> None:
    config = ModelConfig(
        vocab_size=300, hidden_size=96, num_layers=3, num_heads=4, num_kv_heads=2, init_scale=0.9,
        embedding_std=0.7, head_scale=0.3, tie_embeddings=tied,
    )  # fmt: skip
    D, F = config.hidden_size, config.intermediate_size
    residual = 0.9 / math.sqrt(2 * 3)
    expected = {
        "embedding": 0.3 / math.sqrt(D) if tied else 0.7,
        "head": 0.3 / math.sqrt(D),
        "query": 0.9 / math.sqrt(D),
        "key": 0.9 / math.sqrt(D),
        "value": 0.9 / math.sqrt(D),
        "gate": 0.9 / math.sqrt(D),
        "up": 0.9 / math.sqrt(D),
        "output": residual / math.sqrt(D),
        "down": residual / math.sqrt(F),
    }
    seen = set()
    for name, parameter in TransformerLM(config, seed=7).named_parameters():
        kind = name.split(".")[-2]
        values = parameter.data.astype(np.float64)
        if "norm" in kind:
            assert (values == 1).all()
            continue
        seen.add(kind)
        # The mean of n normal numbers has deviation std/sqrt(n), their deviation std/sqrt(2n): 5 sigma.
        std, n = expected[kind], values.size
        assert abs(values.mean()) < 5 * std / math.sqrt(n), name
        assert abs(values.std() - std) < 5 * std / math.sqrt(2 * n), name
    assert seen == expected.keys() - ({"head"} if tied else set())


def test_initial_weights_are_a_function_of_the_seed_and_differ_between_layers() -> None:
    def weights(seed: Any) -> dict[str, bytes]:
        named = TransformerLM(TINY, seed).named_parameters()
        return {name: p.data.tobytes() for name, p in named if p.ndim == 2}

    assert weights(1) == weights(1) == weights(np.random.default_rng(1))
    both = [*weights(1).values(), *weights(2).values()]
    assert len(set(both)) == len(both)


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "ce15457ea9afa62b32e345d9c9c9a37e"),
        ({"tie_embeddings": True}, "05983fd509e7123374e805a1dd8541b2"),
        ({"qk_norm": False}, "021fc84f0941a66274e460e6eb7bf343"),
        ({"num_kv_heads": 2}, "5e9ab8bccc1e972d6006cea99a7819e7"),
        (
            {"num_kv_heads": 1, "head_dim": 6, "position_encoding": "none", "dropout": 0.1, "init_scale": 0.7,
             "embedding_std": 0.3, "head_scale": 0.1, "num_layers": 3},
            "496c2783fba4e702d77dfd21b42f567a",
        ),
    ],
)  # fmt: skip
def test_a_seed_gives_the_weights_that_it_always_gave(settings: dict[str, Any], digest: str) -> None:
    """Random numbers are drawn in one order for ever, so that a run from a seed can be repeated later."""
    model = TransformerLM(ModelConfig(**{"vocab_size": 65, "hidden_size": 32, **settings}), seed=7)
    found = hashlib.sha256()
    for name, array in model.state_dict().items():
        found.update(name.encode() + array.tobytes())
    assert found.hexdigest()[:32] == digest


@variants
def test_loss_at_initialisation_is_near_log_vocabulary(config: ModelConfig) -> None:
    config = replace(config, vocab_size=50, hidden_size=32, head_dim=8)
    model = TransformerLM(config, seed=3)
    x, y = tokens(config, batch=8, seed=1), tokens(config, batch=8, seed=2)
    with no_grad():
        loss = ops.cross_entropy(model(x), y).item()
    # Logits are normal with variance head_scale^2 = 1/16, so the mean of log-sum-exp minus a logit is
    # log V + 1/32; a target's logit has deviation 1/4, and 64 targets are averaged: 5 sigma = 0.16.
    assert abs(loss - math.log(50) - 1 / 32) < 0.16


# ---- Gradients ---------------------------------------------------------------------------------


def loss_and_gradients(model: TransformerLM, x: Any, y: Any) -> tuple[Any, list[Any]]:
    logits = model(x)
    return logits.data, gradients(ops.cross_entropy(logits, y), list(model.parameters()))


@variants
def test_fused_and_reference_models_agree(config: ModelConfig) -> None:
    model = in_float64(TransformerLM(config))
    x, y = tokens(config, seed=1), tokens(config, seed=2)
    logits, found = loss_and_gradients(model, x, y)
    with use_formulas():
        reference_logits, reference = loss_and_gradients(model, x, y)
    # The graphs are some 100 ops deep, each within a few eps of 2.2e-16 of the largest number in it.
    assert np.abs(logits - reference_logits).max() < 1e-13 * np.abs(logits).max()
    for (name, _), mine, other in zip(model.named_parameters(), found, reference, strict=True):
        assert np.abs(mine - other).max() < 1e-12 * np.abs(other).max(), name
    assert (logits != reference_logits).any()  # else this compared one thing with itself


@variants
def test_gradient_of_the_model_agrees_with_differences(config: ModelConfig) -> None:
    """A central difference of fourth order along random directions, in float64."""
    model = in_float64(TransformerLM(config))
    x, y = tokens(config, seed=1), tokens(config, seed=2)
    _, found = loss_and_gradients(model, x, y)
    parameters = list(model.parameters())
    origin = [p.data.copy() for p in parameters]
    generator = rng(10)

    def loss_at(directions: list[Any], h: float) -> float:
        for p, start, direction in zip(parameters, origin, directions, strict=True):
            p.data = start + h * direction
        with no_grad():
            return float(ops.cross_entropy(model(x), y).item())

    for _ in range(3):
        directions = [generator.standard_normal(p.shape) / math.sqrt(p.size) for p in parameters]
        h = 1e-4
        near = loss_at(directions, h) - loss_at(directions, -h)
        far = loss_at(directions, 2 * h) - loss_at(directions, -2 * h)
        slope = (8 * near - far) / (12 * h)
        exact = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
        # Rounding is some eps / h = 2e-12 times the loss; truncation is h^4 = 1e-16 times a fifth derivative,
        # which the norms of small embeddings make as large as 1e6.
        assert slope == pytest.approx(exact, rel=0, abs=1e-9)
        assert abs(exact) > 1e-4


@variants
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    model = TransformerLM(config, seed=1)
    ops.cross_entropy(model(tokens(config, seed=1)), tokens(config, seed=2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == np.float32
        assert (parameter.grad != 0).any(), name


def test_tied_matrix_gets_the_gradients_of_both_uses() -> None:
    config = replace(TINY, tie_embeddings=True)
    tied = in_float64(TransformerLM(config))
    untied = in_float64(TransformerLM(TINY), seed=99)
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embedding.weight.data})
    x, y = tokens(TINY, seed=1), tokens(TINY, seed=2)
    found = dict(zip(dict(tied.named_parameters()), loss_and_gradients(tied, x, y)[1], strict=True))
    apart = dict(zip(dict(untied.named_parameters()), loss_and_gradients(untied, x, y)[1], strict=True))
    both = apart["embedding.weight"] + apart["head.weight"]
    np.testing.assert_allclose(found["embedding.weight"], both, rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"qk_norm": False, "dropout": 0.05}])
def test_one_batch_can_be_learned_by_heart(settings: dict[str, Any]) -> None:
    config = replace(TINY, num_layers=1, **settings)
    model = TransformerLM(config, seed=1)
    x, y = tokens(config, batch=4, seed=1), tokens(config, batch=4, seed=2)
    optimizer = AdamW(model.named_parameters(), 1e-2, weight_decay=0.0)
    losses: list[float] = []
    for step in range(150):
        model.zero_grad()
        with dropout_position(seed=1, step=step):
            loss = ops.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[0] > 2
    assert ops.cross_entropy(model(x), y).item() < 0.1


def test_float32_stays_float32_through_the_model() -> None:
    model = TransformerLM(replace(TINY, dropout=0.1))
    with dropout_position(1):
        loss = ops.cross_entropy(model(tokens(TINY)), tokens(TINY))
    for tensor in walk(loss):
        assert tensor.dtype == np.float32
    loss.backward()
    assert all(p.grad.dtype == np.float32 for p in model.parameters())


def walk(tensor: Tensor) -> Iterator[Tensor]:
    seen, stack = set(), [tensor]
    while stack:
        current = stack.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            stack.extend(current.op.inputs if current.op is not None else ())


# ---- In a notebook -----------------------------------------------------------------------------


def test_a_notebook_shows_the_parameters_by_part() -> None:
    """Counted from the config: V D for the embedding, 2 D^2 + 2 D G K and two norms of K for attention, 3 D F."""
    html = TransformerLM(replace(TINY, tie_embeddings=True))._repr_html_()
    rows = dict(re.findall(r"<tr><th>([\w.]+)</th><td>([\d,]+)</td></tr>", html))
    V, D, K, G, L, F = 11, 16, 4, 2, 2, TINY.intermediate_size
    by_hand = {
        "embedding": V * D,
        "blocks.attention_norm": L * D,
        "blocks.attention": L * (2 * D * D + 2 * D * G * K + 2 * K),
        "blocks.feed_forward_norm": L * D,
        "blocks.feed_forward": L * 3 * D * F,
        "norm": D,
    }
    assert rows == {name: f"{size:,}" for name, size in (*by_hand.items(), ("all", sum(by_hand.values())))}
    assert "<caption>TransformerLM</caption>" in html


def test_a_notebook_shows_any_module() -> None:
    class Own(Module):
        def __init__(self) -> None:
            self.scale = Parameter(np.ones(3))
            self.layers = [Linear(2, 3, bias=False, rng=rng()), Linear(3, 1, bias=False, rng=rng())]
            setattr(self, "<b>", Linear(1, 1, bias=False, rng=rng()))

    html = Own()._repr_html_()
    assert re.findall(r"<th>([^<]+)</th><td>(\d+)</td>", html) == [
        ("scale", "3"), ("layers", "9"), ("&lt;b&gt;", "1"), ("all", "13")
    ]  # fmt: skip
    assert "<th>all</th><td>0</td>" in Module()._repr_html_()

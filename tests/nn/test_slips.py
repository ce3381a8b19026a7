"""The commonest slips in a program of one's own, and torch's way to say things: clear errors, or the right result."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import InputError, Tensor, gradients, nn, ops, optim
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import KeyValueCache
from tinyllm.tokenizer import ByteTokenizer
from tinyllm.training.checkpoints import checkpoint

CONFIG = ModelConfig(vocab_size=11, context_length=8, num_layers=2, num_heads=2, hidden_size=8)


@pytest.fixture
def model() -> TransformerLM:
    return TransformerLM(CONFIG, seed=1).eval()


# ---- Tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, Tensor, tinyllm.tensor, lambda x: np.array(x, dtype=np.uint8)])
def test_tokens_are_lists_arrays_or_tensors(model: TransformerLM, kind: Callable[[Any], Any]) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = model(np.array(rows))
    assert np.array_equal(model(kind(rows)).data, expected.data)
    np.testing.assert_allclose(model.infer(kind(rows)), expected.data, atol=1e-5)
    table = nn.Embedding(7, 3)
    assert np.array_equal(table(kind(rows)).data, table.weight.data[np.array(rows)])


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2], [3]], ValueError, r"rows of \[1, 2\] ids; the model takes \(B, T\), all of one length"),
        ([1, 2], ValueError, r"tokens have shape \(2,\); the model takes \(B, T\)"),
        (3, ValueError, r"tokens have shape \(\)"),
        ([[0.5]], TypeError, "indices are integers; got dtype float64"),
        ([[11]], IndexError, r"rows \[0, 11\)"),
        ("ab", ValueError, r"tokens have shape \(\)"),
    ],
)
@pytest.mark.parametrize("way", ["forward", "infer"])
def test_what_are_no_tokens(
    model: TransformerLM, tokens: Any, error: type[Exception], message: str, way: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(model, way)(tokens)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_more_tokens_than_the_context_are_refused(position: str) -> None:
    model = TransformerLM(replace(CONFIG, position_encoding=position), seed=1).eval()
    tokens = np.arange(18).reshape(2, 9) % 11
    for call in (model, model.infer, model.hidden, model.infer_hidden):
        with pytest.raises(ValueError, match=r"9 tokens are more than context_length=8.*tokens\[:, -8:\]"):
            call(tokens)
        cache = model.new_cache()
        call(tokens[:, :5], cache)
        with pytest.raises(ValueError, match="the cache has room for 8 tokens; got 10"):
            call(tokens[:, :5], cache)
        assert call(tokens, [KeyValueCache(20) for _ in model.blocks]).shape[0] == 2, (
            "a cache says how much room it has"
        )
        assert call(tokens[:, :8]).shape[:2] == (2, 8)
    # What the message says to do.
    assert model(tokens[:, -8:]).shape == (2, 8, 11)
    model.config = replace(model.config, context_length=9)
    assert model(tokens).shape == model.infer(tokens).shape == (2, 9, 11)


def test_sampling_goes_on_past_the_context(model: TransformerLM) -> None:
    for use_cache in (False, True):
        found = list(tinyllm.generate(model, [1] * 20, 30, temperature=0, use_cache=use_cache))
        assert len(found) == 30


# ---- Parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [Tensor(np.ones(8, np.float32)), [1.0] * 8, 1.0])
def test_the_data_of_a_parameter_is_an_array(model: TransformerLM, value: Any) -> None:
    model.norm.weight.data = value
    for use in (lambda: model([[1, 2]]), model.state_dict, lambda: optim.AdamW(model.parameters())):
        with pytest.raises(
            InputError, match=r"norm.weight.data is of class \w+, where an array must stand; write"
        ):
            use()
    own = nn.Sequential(nn.Linear(2, 2))
    own.scale = nn.Parameter(np.ones(2))  # of no class that declares it
    own.scale.data = value
    with pytest.raises(InputError, match=r"scale.data is of class"):
        own.state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rng: nn.Linear(2, 3, rng), r"bias=Generator.*a generator is given as rng="),
        (lambda rng: nn.Embedding(2, 3, rng), r"padding_idx=Generator.*a generator is given as rng="),
        (lambda rng: nn.LayerNorm((2, 3)), "over the last axis alone"),
        (lambda rng: nn.Dropout(1.5), "p=1.5; it is a probability"),
        (lambda rng: nn.MultiheadAttention(6, 4), "num_heads=4 does not divide embed_dim=6"),
        (lambda rng: nn.Sequential(nn.Linear(2, 2), ops.relu), "holds modules; '1' is of class function"),
        (lambda rng: nn.MultiheadAttention(4, 2)(*[Tensor(np.ones((2, 3)))] * 3), r"got \(2, 3\), \(2, 3\)"),
        (
            lambda rng: nn.CrossEntropyLoss()(Tensor(np.ones((2, 3, 4))), np.zeros((2, 3), int)),
            "classes second",
        ),
        (lambda rng: nn.ReLU().register_buffer("training", Tensor(1.0)), "an attribute 'training' already"),
        (lambda rng: nn.MSELoss()(Tensor([1.0, 2.0]), Tensor([[1.0], [2.0]])), "they need one shape"),
    ],
)
def test_what_a_module_is_not_made_of(build: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        build(np.random.default_rng(0))


def test_the_generator_of_manual_seed_draws_where_none_is_given() -> None:
    def drawn() -> list[Any]:
        parts = [nn.Linear(3, 2), nn.Embedding(3, 2), nn.FeedForward(4, 8), nn.MultiHeadAttention(4, 2, 1, 2)]
        weights = [p.data for part in parts for p in part.parameters()]
        dropped = nn.Dropout(0.5)(tinyllm.ones(40)).data
        return [*weights, nn.MultiheadAttention(4, 2).in_proj_weight.data, dropped, tinyllm.randn(3).data,
                tinyllm.rand(2, 2).data, tinyllm.randint(9, (4,)).data, tinyllm.randperm(7).data]  # fmt: skip

    tinyllm.manual_seed(1)
    first, second = drawn(), drawn()
    tinyllm.manual_seed(1)
    assert all(map(np.array_equal, drawn(), first))
    assert not any(map(np.array_equal, first, second))
    rng = np.random.default_rng(3)
    given = [nn.Linear(3, 2, rng=np.random.default_rng(3)).weight.data for _ in range(2)]
    assert np.array_equal(*given)
    assert np.array_equal(given[0], nn.Linear(3, 2, rng=rng).weight.data)


def test_frozen_parameters_get_no_gradient_and_are_not_moved() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    optimizer = optim.AdamW(net.parameters(), lr=0.1)
    before = {name: array.copy() for name, array in net.state_dict().items()}
    net(tinyllm.ones(2, 3)).sum().backward()
    assert [p.grad is None for p in net.parameters()] == [True, True, False, False]
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    moved = [name for name, array in net.state_dict().items() if not np.array_equal(array, before[name])]
    assert moved == ["1.weight", "1.bias"]


# ---- Clipping ----------------------------------------------------------------------------------


def graph_gradients() -> Any:
    x = Tensor(np.full(3, 2.0), requires_grad=True)
    return gradients((x**3).sum(), [x], create_graph=True)


CLIPPERS = [optim.clip_grad_norm, nn.utils.clip_grad_norm_]


@pytest.mark.parametrize("clip", CLIPPERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (graph_gradients, "no parameter is not clipped; of gradients, give the arrays"),
        (lambda: [Tensor([3.0, 4.0])], "no parameter is not clipped"),
        (lambda: {"w": np.ones(3)}, r"a dictionary, whose items are names; give its .values\(\)"),
        (lambda: [np.float32(3.0)], "gradients are floating-point arrays"),
        (lambda: [[3.0, 4.0]], "gradients are floating-point arrays"),
        (lambda: [np.array([3, 4])], "gradients are floating-point arrays"),
        (lambda: iter([]), "used up; give a list"),
    ],
)
def test_what_would_not_be_clipped_is_refused(clip: Any, given: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        clip(given(), 1.0)


def test_one_parameter_is_clipped_as_a_list_of_it() -> None:
    for clip, tiny in zip(CLIPPERS, (0.0, 1e-6), strict=True):
        parameter = nn.Parameter(np.zeros(2))
        parameter.grad = np.array([3.0, 4.0])
        assert float(clip(parameter, 1.0)) == 5
        np.testing.assert_allclose(parameter.grad, np.array([3, 4]) / (5 + tiny), rtol=1e-15)


def test_parameters_without_any_gradient() -> None:
    parameters = [nn.Parameter(np.zeros(2)), nn.Parameter(np.zeros(3))]
    assert nn.utils.clip_grad_norm_(parameters, 1.0).item() == 0  # as torch
    with pytest.raises(ValueError, match=r"none of the parameters has a gradient; call backward\(\) first"):
        optim.clip_grad_norm(parameters, 1.0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: nn.Linear(2, 2), r"an iterable of parameters, such as model.parameters\(\); got a Linear"),
        (lambda: nn.Parameter(np.ones(2)), "got a Parameter"),
        (lambda: [nn.Parameter(np.ones(2)) * 2], "must be a leaf Tensor"),
        (lambda: [np.ones(2)], "must be a leaf Tensor"),
        (lambda: [nn.Linear(2, 2).weight] * 2, "a parameter is given twice"),
        (lambda: [("a", nn.Parameter([1.0])), ("a", nn.Parameter([1.0]))], "parameter 'a' is given twice"),
        (lambda: iter([]), "AdamW got no parameters"),
    ],
)
def test_what_an_optimizer_does_not_change(params: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optim.AdamW(params())


def test_a_state_of_other_parameters_is_refused() -> None:
    one, other = (optim.SGD(net.parameters(), 0.1, 0.9) for net in (nn.Linear(2, 3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"'0.velocity' has shape \(3, 2\), expected \(2, 3\)"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="of other parameters"):
        optim.SGD(nn.Linear(2, 3, bias=False).parameters(), 0.1).load_state_dict(one.state_dict())


# ---- Elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [np.array([1.0, 2.0, 3.0]), 1.5, None, "1", np.array(1.0)])
def test_rope_takes_integers_as_its_offset(offset: Any) -> None:
    with pytest.raises(TypeError, match=r"rope: offset=.*; it is one integer"):
        ops.rope(np.ones((3, 4)), offset=offset)


def test_rope_takes_any_kind_of_integer() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4))
    for offset in (np.int8(2), np.array(2), Tensor(np.array(2))):
        assert np.array_equal(ops.rope(x, offset=offset).data, ops.rope(x, offset=2).data)


def test_a_checkpoint_needs_a_tokenizer_and_a_language_model(model: TransformerLM, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds a tokenizer, got None; .*tinyllm.save\(model.state_dict\(\), path\)"
    ):
        checkpoint.save(tmp_path / "a", model, None)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"holds a TransformerLM, got a Linear; of any other module, tinyllm.save"
    ):
        checkpoint.save(tmp_path / "a", nn.Linear(2, 2), ByteTokenizer())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_linear_schedule_reaches_its_end_one_step_after_the_last() -> None:
    factors = [optim.linear_schedule(step, 10, 0, 0.1) for step in range(11)]
    np.testing.assert_allclose(np.diff(factors), -0.09)
    assert math.isclose(factors[9], 0.19)
    assert math.isclose(factors[10], 0.1)


def test_parameters_are_found_in_dictionaries_and_lists_of_lists() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            self.named = {"a": nn.Linear(2, 2, bias=False), "b": nn.Parameter([1.0])}
            self.nested = [[nn.Parameter([1.0])], (nn.ReLU(), nn.Linear(1, 1, bias=False))]
            self.itself = [self]  # a circle is walked once

    own = Own()
    assert [name for name, _ in own.named_parameters()] == [
        "named.b", "nested.0.0", "named.a.weight", "nested.1.1.weight"
    ]  # fmt: skip
    assert [name for name, _ in own.named_modules()] == ["", "named.a", "nested.1.0", "nested.1.1"]
    own.load_state_dict({name: array + 1 for name, array in own.state_dict().items()})
    assert own.named["b"].item() == 2

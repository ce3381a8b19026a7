"""The invariants: each passes on our models, and fails on a model or function that breaks it, saying where."""

import copy
import doctest
import importlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.models import POSITION_ENCODINGS, ModelConfig, TransformerLM
from tinyllm.testing import invariants, learning
from tinyllm.testing.invariants import (
    InvariantError,
    check_batch_permutation,
    check_cached_decoding,
    check_causality,
    check_every_parameter_learns,
    check_forward_mode,
    check_ignore_index,
    check_initial_loss,
    check_model,
    check_model_forward_mode,
    check_overfits_one_batch,
    check_padding,
    check_rope_shift,
    check_sees_the_past,
)
from tinyllm.testing.mutants import MUTANTS
from tinyllm.testing.strategies import model_configs

V = 11


def small(**settings: Any) -> TransformerLM:
    shape = {"vocab_size": V, "context_length": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
             "hidden_size": 16, "intermediate_size": 24}  # fmt: skip
    return TransformerLM(ModelConfig(**{**shape, **settings}), seed=3)


def one_hot(tokens: Any) -> Any:
    return np.eye(V)[tokens]


def counts(tokens: Any) -> Any:
    """A right model that is none of ours: how often each token has come so far."""
    return np.cumsum(one_hot(tokens), axis=1)


def fails(message: str, check: Callable[..., None], *args: Any, **keywords: Any) -> None:
    with pytest.raises(InvariantError, match=message):
        check(*args, **keywords)


# ---- Ours pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, {"tie_embeddings": True}, {"qk_norm": False, "num_kv_heads": 4}, {"dropout": 0.3}, {"num_kv_heads": 1},
    *({"position_encoding": name} for name in POSITION_ENCODINGS),
], ids=str)  # fmt: skip
def test_our_models_pass(settings: dict[str, Any]) -> None:
    check_model(small(**settings))


@settings(max_examples=10)
@given(model_configs(min_vocab_size=2))
def test_our_models_of_any_shape_pass(config: ModelConfig) -> None:
    model = TransformerLM(config, seed=1)
    V, length = config.vocab_size, config.context_length
    for check in (check_causality, check_batch_permutation, check_padding, check_cached_decoding):
        check(model, V, length=length)
    check_model_forward_mode(model, V, length=length)


def test_a_model_is_left_as_it_was() -> None:
    model = small(dropout=0.2)
    model.train()
    model.blocks[0].eval()
    modes = [module.training for _, module in model.named_modules()]
    weights = {name: array.copy() for name, array in model.state_dict().items()}
    arrays = [parameter.data for parameter in model.parameters()]
    check_model(model)
    assert [module.training for _, module in model.named_modules()] == modes
    assert len(set(modes)) == 2
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, weights[name])
    assert all(parameter.data is array for parameter, array in zip(model.parameters(), arrays, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_check_model_refuses_what_is_too_small_to_tell() -> None:
    with pytest.raises(ValueError, match="too small to tell anything"):
        check_model(small(vocab_size=1))
    with pytest.raises(ValueError, match="nothing can be told apart"):
        check_causality(counts, 1)


# ---- Any callable ------------------------------------------------------------------------------


def test_any_function_of_tokens_will_do() -> None:
    for model in (counts, lambda tokens: Tensor(counts(tokens))):
        for check in (check_causality, check_sees_the_past, check_batch_permutation, check_padding):
            check(model, V)
    check_initial_loss(lambda tokens: 0.01 * counts(tokens), V)


def test_cached_decoding_of_any_function() -> None:
    def start() -> Callable[[Any], Any]:
        seen = [np.zeros((2, 0), dtype=int)]

        def step(tokens: Any) -> Any:
            seen.append(tokens)
            return counts(np.concatenate(seen, axis=1))[:, -tokens.shape[1] :]

        return step

    check_cached_decoding(counts, V, start)
    fails(r"with a cache, in pieces of \[1, 1.*batch 0, position 1 is 1; *expected 0|with a cache",
          check_cached_decoding, counts, V, lambda: counts)  # fmt: skip
    with pytest.raises(TypeError, match="needs start="):
        check_cached_decoding(counts, V)


def test_logits_of_the_wrong_shape() -> None:
    fails(r"the logits have shape \(2, 11\); expected \(2, 8, 'V'\)", check_causality,
          lambda tokens: counts(tokens)[:, -1], V)  # fmt: skip


# ---- What breaks them --------------------------------------------------------------------------


def test_causality() -> None:
    fails(r"changing the token at position 1 changed the logits at batch 0, position 0 by 1; expected no change",
          check_causality, lambda tokens: counts(tokens) + np.roll(one_hot(tokens), -1, axis=1), V)  # fmt: skip

    # The smallest possible change, in one row and one place.
    def nearly(tokens: Any) -> Any:
        logits = counts(tokens)
        logits[1, 2] += 1e-15 * tokens[1, 5]
        return logits

    fails(r"token at position 5 changed the logits at batch 1, position 2", check_causality, nearly, V)


def test_seeing_the_past() -> None:
    fails(r"changing the token at position 0 left the logits of the last position \(7\) of batch 0",
          check_sees_the_past, one_hot, V)  # fmt: skip
    fails(
        r"the token at position 7 left",
        check_sees_the_past,
        lambda tokens: counts(tokens) - one_hot(tokens),
        V,
    )


def test_order_of_the_batch() -> None:
    fails(r"with the rows of the batch in another order the logit of token \d+ at batch \d, position \d is",
          check_batch_permutation, lambda tokens: counts(tokens) + counts(tokens)[:1], V)  # fmt: skip
    fails(r"for row 0 of the batch alone", check_batch_permutation,
          lambda tokens: counts(tokens) - counts(tokens).mean(axis=0), V)  # fmt: skip


def test_padding() -> None:
    fails(r"for 1 tokens filled up to 8 with token 0 the logit of token \d+ at batch 0, position 0",
          check_padding, lambda tokens: counts(tokens) / tokens.shape[1], V)  # fmt: skip


def test_initial_loss() -> None:
    fails(r"the initial loss is \d+\.\d+; expected log\(11\) = 2\.3979 to within 0\.3; it is largest at batch \d",
          check_initial_loss, lambda tokens: 50 * one_hot(tokens), V)  # fmt: skip
    fails("nan", check_initial_loss, lambda tokens: np.full((*tokens.shape, V), np.nan), V)


def test_rope_shift() -> None:
    check_rope_shift()
    check_rope_shift(lambda x, offset: ops.rope(x, offset, 10.0, axis=-3), width=4, axis=1)
    fails("score at distance 1 is that at distance 0", check_rope_shift, lambda x, offset: x)
    fails("changed the length of a query at position 3", check_rope_shift, lambda x, offset: x * 1.1)

    def absolute(x: Tensor, offset: int) -> Tensor:
        """Turned by the square of the position: scores depend on where, not on the distance alone."""
        turned = [ops.rope(x[:, :, t : t + 1], (offset + t) ** 2) for t in range(x.shape[2])]
        return ops.concatenate(turned, axis=2)

    fails(r"with both moved on by 1; expected the same", check_rope_shift, absolute)


def test_ignore_index() -> None:
    check_ignore_index(
        lambda logits, targets: ops.cross_entropy(logits, targets, ignore_index=-1), ignore_index=-1
    )
    check_ignore_index(lambda logits, targets: ops.cross_entropy(logits, targets).data)

    def by_all(logits: Tensor, targets: Any) -> Tensor:
        return ops.cross_entropy(logits, targets, reduction="sum") / targets.size

    fails(r"with 3 of 8 targets ignored; expected", check_ignore_index, by_all)
    with MUTANTS["cross_entropy_ignored_targets_have_gradients"].planted():
        fails(
            r"the gradient at batch \d, position \d, token \d is .*because that target is ignored",
            check_ignore_index,
        )


def test_every_parameter_learns() -> None:
    model = small()
    model.blocks[1].feed_forward.down.weight.data[...] = 0
    model.blocks[1].feed_forward.gate.weight.data[...] = 0
    fails(r"blocks\.1\.feed_forward_norm\.weight got no gradient, or one of zeros", check_every_parameter_learns,
          model, V)  # fmt: skip
    broken = small()
    broken.norm.weight.data[0] = np.nan
    fails("is not finite", check_every_parameter_learns, broken, V)
    with MUTANTS["norm_weight_not_used"].planted():
        fails(r"blocks\.0\.attention_norm\.weight got no gradient", check_every_parameter_learns, small(), V)


def test_one_batch_can_be_overfitted() -> None:
    fails(r"after 5 steps on one batch the loss is \d\.\d+; expected at most 0\.1; it is largest at batch \d, position",
          check_overfits_one_batch, small(), V, steps=5)  # fmt: skip
    with MUTANTS["cross_entropy_forgets_the_target"].planted():
        fails("after 20 steps", check_overfits_one_batch, small(num_layers=1), V, steps=20, target=1.0)
    check_overfits_one_batch(small(num_layers=1), V, steps=20, target=1.0)


def test_forward_mode() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3)), rng.standard_normal((3, 4))
    check_forward_mode(lambda x, w: ops.softmax(x @ w), [x, Tensor(w)])
    check_forward_mode(lambda x: Tensor(np.ones(3)), [x])  # constant
    with MUTANTS["softmax_backward_without_the_mean"].planted():
        fails(r"<u, J v> = .* by forward mode, and .* It is input 0 that differs most: ", check_forward_mode,
              lambda x, y: ops.softmax(x) + y, [x, x])  # fmt: skip
    with MUTANTS["matmul_backward_averages_the_batch"].planted():
        batch = rng.standard_normal((5, 2, 3))
        fails("It is input 1 that differs most", check_forward_mode, lambda x, w: x @ w, [batch, w])


def test_forward_mode_of_a_model() -> None:
    with MUTANTS["attention_query_gradient_not_scaled"].planted():
        fails(r"It is blocks\.\d\.attention\.query(_norm)?\.weight that differs most", check_model_forward_mode,
              small(), V)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask_sees_one_token_ahead", "not causal: changing the token at position 1"),
        ("rope_offset_ignored", "with a cache, in pieces of"),
        ("position_always_zero", "the score at distance 1 is that at distance 0"),
        ("weights_begin_with_standard_deviation_one", "the initial loss is"),
        ("second_use_replaces_the_first", "by forward mode, and"),
    ],
)
def test_check_model_finds_planted_bugs(name: str, message: str) -> None:
    with MUTANTS[name].planted():
        fails(re.escape(message), check_model, small())
    check_model(copy.deepcopy(small()))


# ---- Documentation -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["invariants", "learning", "strategies", "mutants", "mutants.planting"])
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"tinyllm.testing.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_invariant_is_exported() -> None:
    defined = {
        name for module in (invariants, learning) for name in vars(module) if name.startswith("check_")
    }
    assert defined == {name for name in invariants.__all__ if name.startswith("check_")}

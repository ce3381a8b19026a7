"""Checks of derivatives and of learning: forward mode against backward, gradients that reach, one batch by heart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.autograd.transforms import jvp
from tinyllm.backend import Array
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.testing.model_functions import ROUNDING, InvariantError, draw_tokens, logits_of, to_array


def check_every_parameter_learns(
    model: Module, vocab_size: int, batch: int = 4, length: int = 8, seed: int = 0
) -> None:
    """Every parameter gets a gradient that is finite and not zero, and moves in one step of AdamW.

    Raises InvariantError naming the parameter.

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
        >>> check_every_parameter_learns(TransformerLM(ModelConfig(vocab_size=11)), vocab_size=11)
    """
    learner = copy.deepcopy(model).eval()
    tokens = draw_tokens(vocab_size, batch, length + 1, seed)
    named = dict(learner.named_parameters())
    before = {name: backend.to_numpy(parameter.data).copy() for name, parameter in named.items()}
    learner.zero_grad()
    _mean_loss(learner, tokens).backward()
    for name, parameter in named.items():
        if parameter.grad is None or not backend.to_numpy(parameter.grad).any():
            raise InvariantError(
                f"{name} got no gradient, or one of zeros; expected that the loss depends on it"
            )
        if not np.isfinite(backend.to_numpy(parameter.grad)).all():
            raise InvariantError(f"the gradient of {name} is not finite")
    AdamW(named.items(), lr=1e-2, weight_decay=0.0).step()
    for name, parameter in named.items():
        if np.array_equal(backend.to_numpy(parameter.data), before[name]):
            raise InvariantError(f"{name} has a gradient, and did not move in one step of the optimizer")


def check_overfits_one_batch(
    model: Module,
    vocab_size: int,
    batch: int = 2,
    length: int = 6,
    seed: int = 0,
    steps: int = 60,
    learning_rate: float = 0.01,
    target: float = 0.1,
) -> None:
    """A copy of the model learns one small batch by heart: the loss falls below `target` nats.

    Raises InvariantError with the loss reached, and the position where it is largest.
    Source: Karpathy, "A recipe for training neural networks", 2019, "overfit one batch".

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
        >>> check_overfits_one_batch(TransformerLM(ModelConfig(vocab_size=11)), vocab_size=11)
    """
    learner = copy.deepcopy(model).eval()
    tokens = draw_tokens(vocab_size, batch, length + 1, seed)
    # Two texts that begin alike cannot be told apart, nor the positions of one that begins with the same token twice.
    tokens[:, 0] = np.arange(batch) % vocab_size
    tokens[:, 1] = (tokens[:, 0] + 1) % vocab_size
    optimizer = AdamW(learner.named_parameters(), learning_rate, (0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        learner.zero_grad()
        _mean_loss(learner, tokens).backward()
        optimizer.step()
    losses = ops.cross_entropy(
        Tensor(logits_of(learner, tokens[:, :-1])), tokens[:, 1:], reduction="none"
    ).data
    if not float(losses.mean()) <= target:
        b, t = np.unravel_index(int(np.argmax(losses)), losses.shape)
        raise InvariantError(
            f"after {steps} steps on one batch the loss is {float(losses.mean()):.4f}; expected at most {target}; it "
            f"is largest at batch {b}, position {t}: {float(losses[b, t]):.4f}"
        )


def check_forward_mode(fn: Callable[..., Tensor], inputs: Sequence[Any], seed: int = 0) -> None:
    """<u, J v> = <J^T u, v> for random u and v: the backward of `fn` is the transpose of its derivative.

    J v comes from the formulas of the forward alone, by dual numbers, and is exact; J^T u from the backward. Inputs are
    taken in float64.

    Raises InvariantError with both products, and with the input whose share differs most.
    Source: the dot-product test of Claerbout, "Earth soundings analysis", 1992, section 5.

    Example:
        >>> check_forward_mode(lambda x, w: (x @ w).tanh(), [np.ones((2, 3)), np.ones((3, 4))])
    """
    xs = [Tensor(to_array(x).astype(np.float64), requires_grad=True) for x in inputs]
    rng = np.random.default_rng(seed)
    vs = [rng.standard_normal(x.shape) for x in xs]
    output = fn(*xs)
    u = rng.standard_normal(output.shape)
    # Not transforms.vjp: to be differentiable again, it takes fused ops through their references.
    found = gradients(output, xs, u) if output.requires_grad else [np.zeros(x.shape) for x in xs]
    pulled = [to_array(g) for g in found]

    def pushed(tangents: Sequence[Array]) -> float:
        return float((u * to_array(jvp(fn, xs, tangents)[1])).sum())

    _expect_same_products(
        pushed, pulled, vs, [f"input {i}" for i in range(len(xs))], float(np.finfo(np.float64).eps)
    )


def check_model_forward_mode(
    model: Module, vocab_size: int, batch: int = 2, length: int = 5, seed: int = 0
) -> None:
    """`check_forward_mode` for the logits of a model as a function of all its parameters, on a copy in float64.

    Raises InvariantError with both products, and the parameter whose share differs most.

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
        >>> check_model_forward_mode(TransformerLM(ModelConfig(vocab_size=11)), vocab_size=11)
    """
    twin = copy.deepcopy(model).eval().astype(np.float64)
    tokens = draw_tokens(vocab_size, batch, length, seed)
    named = dict(twin.named_parameters())
    rng = np.random.default_rng(seed)
    vs = [rng.standard_normal(parameter.shape) for parameter in named.values()]

    def with_weights(*weights: Tensor) -> Tensor:
        kept = [parameter.data for parameter in named.values()]
        try:
            for parameter, weight in zip(named.values(), weights, strict=True):
                parameter.data = weight.data
            logits: Tensor = twin(tokens)
            return logits
        finally:
            for parameter, data in zip(named.values(), kept, strict=True):
                parameter.data = data

    output = twin(tokens)
    u = rng.standard_normal(output.shape)
    pulled = [backend.to_numpy(g) for g in gradients(output, list(named.values()), u)]
    weights = [parameter.detach() for parameter in named.values()]

    def pushed(tangents: Sequence[Array]) -> float:
        return float((u * to_array(jvp(with_weights, weights, tangents)[1])).sum())

    # A norm divides by what may be small, so that rounding grows on the way.
    _expect_same_products(pushed, pulled, vs, list(named), 2**6 * float(np.finfo(np.float64).eps))


def _expect_same_products(
    pushed: Callable[[Sequence[Array]], float],
    pulled: Sequence[Array],
    vs: Sequence[Array],
    names: Sequence[str],
    epsilon: float,
) -> None:
    forward, backward = pushed(vs), sum(float((g * v).sum()) for g, v in zip(pulled, vs, strict=True))
    size = 1.0 + sum(float(np.abs(g * v).sum()) for g, v in zip(pulled, vs, strict=True))
    if abs(forward - backward) <= ROUNDING * epsilon * size:
        return
    shares = []
    for i, v in enumerate(vs):
        alone = [v if j == i else np.zeros_like(other) for j, other in enumerate(vs)]
        shares.append((pushed(alone), float((pulled[i] * v).sum())))
    worst = int(np.argmax([abs(a - b) for a, b in shares]))
    raise InvariantError(
        f"<u, J v> = {forward:.12g} by forward mode, and <J^T u, v> = {backward:.12g} by backward; expected the same. "
        f"It is {names[worst]} that differs most: {shares[worst][0]:.12g} and {shares[worst][1]:.12g}"
    )


def _mean_loss(model: Module, tokens: Array) -> Tensor:
    return ops.cross_entropy(model(backend.asarray(tokens[:, :-1])), backend.asarray(tokens[:, 1:]))

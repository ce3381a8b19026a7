"""Checks of optimizers against their papers' formulas, of clipping, schedules, data and sampling."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm import optim
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.data import sampling, windows
from tinyllm.models.generation.decoder import Decoder
from tinyllm.testing.invariants import check_overfits_one_batch
from tinyllm.testing.mutants.check_models import V, small_model
from tinyllm.testing.mutants.check_ops import close
from tinyllm.testing.mutants.checking import check

generate = importlib.import_module("tinyllm.models.generation.sampling")

Arrays = dict[str, Array]
STEPS = 5
SHAPES = {"wide": (3, 5), "same": (3, 5), "tall": (6, 2), "norm": (4,)}


def _run(
    make: Callable[[Any], Any], shapes: dict[str, Any], reload: bool = False
) -> tuple[Arrays, list[Arrays]]:
    """Parameters after STEPS steps with changing factors, and the gradients of each step."""
    rng = np.random.default_rng(13)
    named = {name: Tensor(rng.standard_normal(shape), requires_grad=True) for name, shape in shapes.items()}
    optimizer = make(named.items())
    steps = [{name: 3 * rng.standard_normal(s) for name, s in shapes.items()} for _ in range(STEPS)]
    for i, found in enumerate(steps):
        if reload and i == 2:
            saved = {key: array.copy() for key, array in optimizer.state_arrays().items()}
            steps_made, optimizer = optimizer.steps, make(named.items())
            optimizer.load_state_arrays(saved, steps_made)
        optimizer.step({name: g.copy() for name, g in found.items()}, factor=_factor(i))
    return {name: parameter.data for name, parameter in named.items()}, steps


def _start(shapes: dict[str, Any]) -> Arrays:
    rng = np.random.default_rng(13)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def _factor(step: int) -> float:
    return 1 / (1 + step)


def _compare(found: Arrays, expected: Arrays, what: str) -> None:
    for name, array in expected.items():
        close(found[name], array, f"{what}, parameter {name!r} after {STEPS} steps")


@check("AdamW against its paper")
def adamw() -> None:
    """Loshchilov and Hutter, 2019, algorithm 2, line by line; decay on matrices alone; a resume changes nothing."""
    rate, (beta1, beta2), eps, decay = 0.01, (0.8, 0.95), 1e-3, 0.3

    def make(named: Any) -> Any:
        return optim.AdamW(optim.matrices_decayed(named, decay), rate, (beta1, beta2), eps)

    for reload in (False, True):
        found, steps = _run(make, SHAPES, reload)
        expected = _start(SHAPES)
        for name, theta in expected.items():
            m = v = np.zeros(theta.shape)
            for t, gradients in enumerate(steps, start=1):
                g, eta = gradients[name], _factor(t - 1)
                m = beta1 * m + (1 - beta1) * g
                v = beta2 * v + (1 - beta2) * g**2
                step = rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
                theta = theta - eta * (step + (rate * decay * theta if theta.ndim == 2 else 0))
            expected[name] = theta
        _compare(found, expected, "AdamW resumed" if reload else "AdamW")


def _decoupled_sgd(named: Any) -> Any:
    return optim.SGD(optim.matrices_decayed(named, 0.1), 0.05, 0.8, decoupled_weight_decay=True)


@check("SGD against its formula")
def sgd() -> None:
    """theta -= rate v, v = momentum v + g, with decoupled decay of matrices."""
    found, steps = _run(_decoupled_sgd, SHAPES)
    expected = _start(SHAPES)
    for name, theta in expected.items():
        velocity = np.zeros(theta.shape)
        for t, gradients in enumerate(steps):
            velocity = 0.8 * velocity + gradients[name]
            theta = theta * (1 - 0.05 * _factor(t) * 0.1 * (theta.ndim == 2)) - 0.05 * _factor(t) * velocity
        expected[name] = theta
    _compare(found, expected, "SGD")


@check("Muon against its formula")
def muon() -> None:
    """Nesterov momentum made orthogonal by its polynomial, applied to singular values; sqrt(rows / columns)."""
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    found, steps = _run(lambda named: optim.Muon(named, 0.02, 0.0, 0.9), shapes)
    expected = _start(shapes)
    for name, theta in expected.items():
        M = np.zeros(theta.shape)
        for t, gradients in enumerate(steps):
            G = gradients[name]
            M = 0.9 * M + 0.1 * G
            U, S, Vt = np.linalg.svd(0.1 * G + 0.9 * M, full_matrices=False)
            S = S / np.sqrt((S**2).sum())
            for _ in range(5):  # Jordan et al., 2024: phi(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            theta = (
                theta - 0.02 * _factor(t) * math.sqrt(max(1, theta.shape[0] / theta.shape[1])) * (U * S) @ Vt
            )
        expected[name] = theta
    # The iteration adds 1e-7 to the norm that it divides by.
    for name, array in expected.items():
        close(found[name], array, f"Muon, parameter {name!r} after {STEPS} steps", 1e-6)


@check("Muon makes matrices orthogonal")
def orthogonal() -> None:
    """Singular values come out near 1, whatever the scale."""
    rng = np.random.default_rng(14)
    for shape, scale in (((8, 8), 1.0), ((12, 4), 100.0), ((4, 12), 1e-3)):
        values = np.linalg.svd(optim.orthogonalise(scale * rng.standard_normal(shape)), compute_uv=False)
        assert values.max() < 1.3, f"a singular value is {values.max():.2f}"
        assert values[: len(values) // 2].min() > 0.6, f"large singular values became {values.min():.2f}"


@check("clipping by the global norm")
def clipping() -> None:
    """Longer gradients keep their direction and get the norm; shorter ones stay as they are."""
    rng = np.random.default_rng(15)
    before = [rng.standard_normal(shape) for shape in ((3, 4), (5,), (2, 2))]
    norm = math.sqrt(math.fsum(float((g**2).sum()) for g in before))
    for limit in (0.5, 100.0):
        after = [g.copy() for g in before]
        told = optim.clip_grad_norm(after, limit)
        assert abs(told - norm) < 1e-12 * norm, f"the norm is {norm:.6f}, clip_grad_norm says {told:.6f}"
        for one, other in zip(after, before, strict=True):
            close(one, other * min(1.0, limit / norm), f"gradients of norm {norm:.2f} clipped to {limit}")


@check("learning-rate schedules")
def schedules() -> None:
    """The warm-up rises evenly to 1 from above 0, then the rate falls to the final factor without a jump."""
    for schedule in (optim.cosine_schedule, optim.linear_schedule):
        factors = [schedule(step, 100, 10, 0.1) for step in range(100)]
        assert factors[0] > 0, "the first step has rate 0"
        steps = np.diff([0.0, *factors[:10]])
        assert np.allclose(steps, steps[0]), "the warm-up does not rise evenly"
        assert abs(factors[10] - 1) < 0.02, f"after the warm-up the factor is {factors[10]:.3f}"
        assert (np.diff(factors[10:]) <= 0).all(), "the rate rises after the warm-up"
        assert np.abs(np.diff(factors[10:])).max() < 0.03, "the rate jumps"
        assert abs(factors[99] - 0.1) < 0.02, f"the last factor is {factors[99]:.3f}, expected 0.1"
    middle = optim.cosine_schedule(45, 91, 0, 0.2)
    assert abs(middle - 0.6) < 1e-12, f"half-way down to 0.2 the cosine is at {middle:.4f}"


# ---- Data --------------------------------------------------------------------------------------

TOKENS = np.arange(1, 104)


@check("targets are the next tokens")
def next_tokens() -> None:
    """In a text where each token is its position, each target is its input plus one."""
    samplers = [kind(TOKENS, 8, 5, seed=1) for kind in (sampling.RandomWindows, sampling.RandomOffsets)]
    pairs = [sampler.batch(step) for sampler in samplers for step in range(3)]
    pairs += [windows.SlidingWindows(TOKENS, 8)[4]]
    pairs += [(x[y != -100], y[y != -100]) for x, y in windows.SequentialWindows(TOKENS, 8, 3)]
    for inputs, targets in pairs:
        assert np.array_equal(targets, inputs + 1), (
            f"inputs {inputs.ravel()[:4]}, targets {targets.ravel()[:4]}"
        )


@check("validation sees every token once")
def validation() -> None:
    """Every token after the first is a target exactly once, for any length of text; windows slide to the end."""
    for n in (2, 8, 9, 10, 103):
        targets = np.concatenate(
            [y[y != -100] for _, y in windows.SequentialWindows(TOKENS[:n], 8, 3)] or [[]]
        )
        assert np.array_equal(targets, TOKENS[1:n]), f"of {n - 1} targets, {len(targets)} were seen"
    sliding = windows.SlidingWindows(TOKENS, 8, stride=5)
    assert [int(x[0]) for x, _ in sliding] == list(range(1, 96, 5)), "sliding windows miss one"
    train, rest = windows.split_by_position(TOKENS, 0.2)
    assert np.array_equal(np.concatenate([train, rest]), TOKENS), (
        "training and validation overlap, or lose text"
    )


@check("an epoch shows each window once")
def epochs() -> None:
    """No window comes twice in an epoch, epochs differ, batches go on after a resume, every token comes up."""
    sampler = sampling.RandomWindows(TOKENS, 8, 1, seed=2)
    n = sampler.windows_per_epoch
    orders = [[int(sampler.batch(epoch * n + i)[0][0, 0]) for i in range(n)] for epoch in range(3)]
    for order in orders:
        assert len(set(order)) == n, f"{n - len(set(order))} of {n} windows of an epoch came twice"
    assert orders[0] != orders[1], "two epochs have the same order"
    for kind in (sampling.RandomWindows, sampling.RandomOffsets):
        one, other = (kind(TOKENS, 8, 4, seed=2) for _ in range(2))
        batches = [next(one) for _ in range(3)]
        assert not np.array_equal(batches[0][0], batches[1][0]), "two steps have the same batch"
        other.load_state_dict(one.state_dict())
        assert np.array_equal(next(one)[0], next(other)[0]), "the batch after a resume is another"
    offsets = sampling.RandomOffsets(TOKENS, 8, 100, seed=3)
    seen = {int(token) for step in range(20) for token in offsets.batch(step)[1][:, -1]}
    assert max(seen) == TOKENS[-1], "the last token is never a target"


# ---- Sampling ----------------------------------------------------------------------------------


@check("drawn tokens have the probabilities asked for")
def drawn() -> None:
    """Frequencies of 4000 draws against softmax(logits / temperature), cut by top_k or top_p."""
    logits = np.array([1.0, 3.0, 0.5, 2.0, -1.0, 2.5])
    settings: list[dict[str, Any]] = [
        {}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.8}, {"top_p": 0.3},
    ]  # fmt: skip
    for setting in settings:
        p = np.exp(logits / setting.get("temperature", 1.0))
        p /= p.sum()
        order = np.argsort(-p)
        kept = setting.get("top_k", len(p))
        if "top_p" in setting:
            kept = next(k for k in range(1, 7) if p[order[:k]].sum() >= setting["top_p"])
        p[order[kept:]] = 0
        p /= p.sum()
        rng = np.random.default_rng(16)
        n = 1500
        counts = np.bincount([generate.next_token(logits, rng, **setting) for _ in range(n)], minlength=6)
        worst = int(np.argmax(np.abs(counts / n - p)))
        spread = 5 * np.sqrt(p * (1 - p) / n)
        assert (np.abs(counts / n - p) <= spread).all(), (
            f"with {setting} token {worst} came in {counts[worst] / n:.3f} of draws, expected {p[worst]:.3f}"
        )


@check("generation follows the model")
def generation() -> None:
    """At temperature 0 each token is the model's most likely next one, with a cache and without, dropout or not."""
    plain, model = small_model(context_length=16), small_model(context_length=16, dropout=0.5)
    for use_cache in (True, False):
        text = [1, 5, 2]
        for token in generate.generate(model, text, 8, temperature=0, use_cache=use_cache):
            expected = int(plain(np.array([text])).data[0, -1].argmax())
            assert token == expected, f"after {text} comes {token}, expected {expected} (cache: {use_cache})"
            text = [*text, token]
    assert max(text) < V


@check("the decoder gives the model's logits")
def decoding() -> None:
    """After several tokens at once and after one, from joined matrices and from those of the model."""
    model = small_model(context_length=16)
    text = [1, 5, 2, 4, 3]
    expected = model(np.array([text])).data[0]
    for joined in (False, True):
        decoder = Decoder(model)
        if joined:
            decoder.pack()
        for tokens in (text[:3], text[3:4], text[4:]):
            logits = decoder(tokens)
            np.testing.assert_allclose(logits, expected[decoder.length - 1], atol=1e-4)


@check("model: one batch can be overfitted")
def overfits() -> None:
    """The invariant of that name; it says least about the cause, so it comes last."""
    check_overfits_one_batch(small_model(num_layers=1), V, steps=50, target=0.2)

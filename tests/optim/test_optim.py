"""Optimizers against the formulas of their papers, schedules, clipping."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import Tensor
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.optim import (
    OPTIMIZERS,
    SGD,
    AdamW,
    Muon,
    NonFiniteNormError,
    Optimizer,
    OptimizerGroup,
    clip_grad_norm,
    cosine_schedule,
    linear_schedule,
    matrices_decayed,
    orthogonalise,
)
from tinyllm.training.config import TrainConfig
from tinyllm.training.optimization import build_optimizer

EPS32 = float(np.finfo(np.float32).eps)
Arrays = dict[str, Any]


def parameters(dtype: Any = np.float64, only_matrices: bool = False) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wide": (3, 5), "tall": (6, 2), "cube": (2, 3, 2), "vector": (4,)}
    if only_matrices:
        shapes = {"wide": (3, 5), "tall": (6, 2), "square": (4, 4)}
    return {
        name: Tensor(rng.standard_normal(shape).astype(dtype), requires_grad=True)
        for name, shape in shapes.items()
    }


def steps_of_gradients(named: dict[str, Tensor], steps: int) -> list[Arrays]:
    rng = np.random.default_rng(1)
    return [
        {name: (rng.standard_normal(p.shape) * 3).astype(p.dtype) for name, p in named.items()}
        for _ in range(steps)
    ]


def copies(named: dict[str, Tensor]) -> Arrays:
    return {name: p.data.astype(np.float64) for name, p in named.items()}


# ---- The formulas, each written once more ------------------------------------------------------


def adamw_by_the_paper(theta: Arrays, gradients: list[Arrays], factors: list[float], s: Any) -> Arrays:
    """Loshchilov and Hutter, 2019, algorithm 2, line by line; decay for two axes or more."""
    m = {name: np.zeros_like(value) for name, value in theta.items()}
    v = {name: np.zeros_like(value) for name, value in theta.items()}
    for t, (gradient, eta) in enumerate(zip(gradients, factors, strict=True), start=1):
        for name, value in theta.items():
            g = gradient[name].astype(np.float64)
            m[name] = s["beta1"] * m[name] + (1 - s["beta1"]) * g
            v[name] = s["beta2"] * v[name] + (1 - s["beta2"]) * g**2
            m_hat = m[name] / (1 - s["beta1"] ** t)
            v_hat = v[name] / (1 - s["beta2"] ** t)
            decay = s["decay"] if value.ndim >= 2 else 0.0
            step = m_hat / (np.sqrt(v_hat) + s["eps"]) + decay * value
            theta[name] = value - eta * s["rate"] * step
    return theta


def sgd_by_the_paper(theta: Arrays, gradients: list[Arrays], factors: list[float], s: Any) -> Arrays:
    """Heavy-ball momentum with decoupled decay."""
    velocity = {name: np.zeros_like(value) for name, value in theta.items()}
    for gradient, eta in zip(gradients, factors, strict=True):
        for name, value in theta.items():
            velocity[name] = s["momentum"] * velocity[name] + gradient[name].astype(np.float64)
            decay = s["decay"] if value.ndim >= 2 else 0.0
            theta[name] = value - eta * s["rate"] * (velocity[name] + decay * value)
    return theta


def newton_schulz(G: Any) -> Any:
    """Jordan et al., 2024: five times p(X) = aX + b(XX^T)X + c(XX^T)^2 X, on the singular values alone."""
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    S = S / (np.linalg.norm(G) + 1e-7)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return (U * S) @ Vt


def muon_by_the_paper(theta: Arrays, gradients: list[Arrays], factors: list[float], s: Any) -> Arrays:
    """Jordan et al., 2024, with Nesterov momentum as a running mean and the scale of the reference code."""
    momentum = {name: np.zeros_like(value) for name, value in theta.items()}
    mu = s["momentum"]
    for gradient, eta in zip(gradients, factors, strict=True):
        for name, value in theta.items():
            g = gradient[name].astype(np.float64)
            momentum[name] = mu * momentum[name] + (1 - mu) * g
            update = newton_schulz((1 - mu) * g + mu * momentum[name])
            scale = math.sqrt(max(1, value.shape[0] / value.shape[1]))
            theta[name] = value * (1 - eta * s["rate"] * s["decay"]) - eta * s["rate"] * scale * update
    return theta


FACTORS = [0.1, 1.0, 0.7, 0.3, 1.0, 0.0, 0.5]
BY_THE_PAPER: dict[str, tuple[Callable[..., Optimizer], Callable[..., Arrays], dict[str, float], bool]] = {
    "adamw": (
        lambda p, s: AdamW(matrices_decayed(p, s["decay"]), s["rate"], (s["beta1"], s["beta2"]), s["eps"]),
        adamw_by_the_paper,
        {"rate": 0.01, "beta1": 0.8, "beta2": 0.97, "eps": 1e-2, "decay": 0.3},
        False,
    ),
    "sgd": (
        lambda p, s: SGD(
            matrices_decayed(p, s["decay"]), s["rate"], s["momentum"], decoupled_weight_decay=True
        ),
        sgd_by_the_paper,
        {"rate": 0.01, "momentum": 0.7, "decay": 0.3},
        False,
    ),
    "plain sgd": (
        lambda p, s: SGD(p, s["rate"]),
        sgd_by_the_paper,
        {"rate": 0.1, "momentum": 0.0, "decay": 0.0},
        False,
    ),
    "muon": (
        lambda p, s: Muon(p, s["rate"], s["decay"], s["momentum"]),
        muon_by_the_paper,
        {"rate": 0.05, "momentum": 0.9, "decay": 0.2},
        True,
    ),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", BY_THE_PAPER)
def test_optimizers_follow_their_papers(kind: str, dtype: Any) -> None:
    build, oracle, values, only_matrices = BY_THE_PAPER[kind]
    named = parameters(dtype, only_matrices)
    gradients = steps_of_gradients(named, len(FACTORS))
    kept = [{name: g.copy() for name, g in step.items()} for step in gradients]
    expected = oracle(copies(named), gradients, FACTORS, values)
    optimizer = build(named.items(), values)
    arrays = {name: p.data for name, p in named.items()}
    for step, factor in zip(gradients, FACTORS, strict=True):
        optimizer.step(step, factor)
    assert optimizer.steps == len(FACTORS)
    # Each of the steps rounds a few times; Newton-Schulz may raise an error by 3.4445^5 = 485.
    tolerance = np.finfo(dtype).eps * 20 * len(FACTORS) * (500 if kind == "muon" else 1)
    for name, parameter in named.items():
        assert parameter.data is arrays[name]
        assert parameter.dtype == dtype
        error = np.abs(parameter.data - expected[name]).max()
        assert error < tolerance * np.abs(expected[name]).max(), name
    for before, after in zip(kept, gradients, strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_gradients_are_taken_from_the_parameters_by_default() -> None:
    one, other = parameters(), parameters()
    gradient = steps_of_gradients(one, 1)[0]
    for name, parameter in one.items():
        parameter.grad = gradient[name]
    AdamW(one.items()).step()
    AdamW(other.items()).step(gradient)
    assert all(np.array_equal(one[name].data, other[name].data) for name in one)


def test_decay_is_decoupled_and_on_matrices_alone() -> None:
    classes: list[type[Optimizer]] = [SGD, AdamW]
    for optimizer_class in classes:
        named = parameters()
        before = copies(named)
        zeros = {name: np.zeros(p.shape) for name, p in named.items()}
        config = TrainConfig(learning_rate=0.1, weight_decay=0.5)
        optimizer_class.from_settings(named.items(), config).step(zeros, factor=0.5)
        assert np.array_equal(named["vector"].data, before["vector"])
        for name in ("wide", "tall", "cube"):
            np.testing.assert_allclose(named[name].data, before[name] * (1 - 0.5 * 0.1 * 0.5), rtol=1e-15)


@pytest.mark.parametrize("group", [False, True])
def test_step_refuses_a_missing_gradient_before_changing_anything(group: bool) -> None:
    named = parameters(only_matrices=True)
    first = Muon([("wide", named["wide"]), ("tall", named["tall"])])
    second = AdamW([("square", named["square"])])
    optimizer = OptimizerGroup([first, second] if group else [AdamW(named.items())])
    before = copies(named)
    gradients = steps_of_gradients(named, 1)[0]
    del gradients["square"]
    with pytest.raises(KeyError, match="square"):
        optimizer.step(gradients)
    with pytest.raises(
        ValueError, match=r"none of the parameters \('.*', \.\.\.\) has a gradient; call backward"
    ):
        optimizer.step()
    assert optimizer.steps == 0
    assert all(np.array_equal(named[name].data, before[name]) for name in named)
    assert not any(array.any() for array in optimizer.state_dict().values())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: AdamW([]), "AdamW got no parameters"),
        (lambda p: SGD(p, -1.0), "lr=-1.0"),
        (lambda p: SGD(p, math.nan), "lr=nan"),
        (lambda p: AdamW(p, weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda p: AdamW(p, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda p: Muon(p), r"'cube' has shape \(2, 3, 2\)"),
        (lambda p: Muon(p[:2], momentum=1.0), "momentum=1.0"),
        (lambda p: OptimizerGroup([AdamW(p[:2]), SGD(p[1:], 0.1)]), "'tall' belongs to two optimizers"),
    ],
)
def test_impossible_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(list(parameters().items()))


# ---- State -------------------------------------------------------------------------------------


def build_group(named: dict[str, Tensor]) -> OptimizerGroup:
    matrices = {name: p for name, p in named.items() if p.ndim == 2}
    rest = {name: p for name, p in named.items() if p.ndim != 2}
    return OptimizerGroup([Muon(matrices.items()), AdamW(rest.items())])


def test_state_round_trip_goes_on_with_the_same_bits() -> None:
    named = parameters(np.float32)
    gradients = steps_of_gradients(named, 6)
    optimizer = build_group(named)
    for step in gradients[:3]:
        optimizer.step(step)
    saved = {key: array.copy() for key, array in optimizer.state_dict().items()}
    assert set(saved) == {
        "wide.momentum", "tall.momentum", "cube.m", "cube.v", "vector.m", "vector.v"
    }  # fmt: skip
    again = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in named.items()}
    resumed = build_group(again)
    resumed.load_state_dict(saved, optimizer.steps)
    for step in gradients[3:]:
        optimizer.step(step)
        resumed.step(step)
    assert resumed.steps == optimizer.steps == 6
    assert all(again[name].data.tobytes() == named[name].data.tobytes() for name in named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("vector.v"), "'vector.v' is missing"),
        (lambda s: s.update({"vector.v": np.ones(5)}), r"'vector.v' has shape \(5,\), expected \(4,\)"),
        (
            lambda s: s.update({"vector.v": s["vector.v"] * 1j}),
            "'vector.v' is of complex128, expected floating",
        ),
        (
            lambda s: s.update({"vector.v": s["vector.v"].astype(str)}),
            "'vector.v' is of <U32, expected floating",
        ),
    ],
)
def test_wrong_state_is_refused_and_changes_nothing(change: Any, message: str) -> None:
    optimizer = build_group(parameters())
    state = {key: array + 1 for key, array in optimizer.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state, 5)
    assert optimizer.steps == 0
    assert not any(array.any() for array in optimizer.state_dict().values())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_a_model_is_in_exactly_one_group(kind: Any, tied: bool) -> None:
    config = ModelConfig(vocab_size=9, num_layers=2, num_heads=2, hidden_size=8, tie_embeddings=tied)
    model = TransformerLM(config)
    group = build_optimizer(model, TrainConfig(optimizer=kind))
    found = [id(p) for optimizer in group.optimizers for p in optimizer.parameters.values()]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    muon = {name for o in group.optimizers if isinstance(o, Muon) for name in o.parameters}
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    assert muon == (matrices if kind == "muon" else set())
    assert len(matrices) == 2 * 7


# ---- Orthogonalisation -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (7, 1), (1, 1), (64, 32)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_orthogonalise_keeps_directions_and_levels_singular_values(
    shape: tuple[int, int], dtype: Any
) -> None:
    rng = np.random.default_rng(sum(shape))
    # Singular values from 1 down to 1/20 of the largest, scaled by something large.
    n = min(shape)
    U, _ = np.linalg.qr(rng.standard_normal((shape[0], n)))
    V, _ = np.linalg.qr(rng.standard_normal((shape[1], n)))
    S = np.linspace(1, 0.05, n) if n > 1 else np.ones(1)
    G = (U * (1e3 * S)) @ V.T
    got = orthogonalise(G.astype(dtype))
    assert got.shape == shape
    assert got.dtype == dtype
    # In the basis of G's singular vectors the result is diagonal, and its diagonal is in the paper's band.
    inside = U.T @ got.astype(np.float64) @ V
    diagonal = np.diag(inside)
    tolerance = 500 * n * float(np.finfo(dtype).eps)
    assert np.abs(inside - np.diag(diagonal)).max() < tolerance
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.25
    np.testing.assert_allclose(got, newton_schulz(G), rtol=0, atol=tolerance)


def test_orthogonalise_of_zero_is_zero() -> None:
    assert not orthogonalise(np.zeros((3, 4), dtype=np.float32)).any()


# ---- Schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
@settings(deadline=None, max_examples=60)
@given(
    warmup=st.integers(0, 20), more=st.integers(2, 60), final=st.floats(0, 1), total_less=st.integers(0, 3)
)
def test_schedules_rise_then_fall(
    schedule: Any, warmup: int, more: int, final: float, total_less: int
) -> None:
    total = warmup + more
    factors = [schedule(step, total, warmup, final) for step in range(total)]
    for step in range(warmup):
        assert factors[step] == pytest.approx((step + 1) / (warmup + 1))
    assert factors[warmup] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert schedule(total, total, warmup, final) == pytest.approx(final)
    assert schedule(total + total_less, total, warmup, final) == pytest.approx(final)


def test_schedules_at_known_points() -> None:
    assert cosine_schedule(99, 100) == pytest.approx(0)
    assert cosine_schedule(99, 100, 10, 0.2) == pytest.approx(0.2)
    assert cosine_schedule(50, 101) == pytest.approx(0.5)  # half way
    assert cosine_schedule(25, 101) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert linear_schedule(50, 100) == pytest.approx(0.5)
    assert linear_schedule(60, 110, 10, 0.5) == pytest.approx(0.75)
    # A text-book case of no room: all steps are warm-up.
    assert [cosine_schedule(i, 3, 10) for i in range(3)] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert cosine_schedule(0, 1) == pytest.approx(1)
    assert linear_schedule(0, 1) == pytest.approx(1)


# ---- Clipping ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), limit=st.floats(1e-2, 1e2))
def test_clipping_gives_the_exact_norm(seed: int, scale: float, limit: float) -> None:
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(3, 4), (7,), ()]
    arrays = [np.asarray(rng.standard_normal(shape) * scale, dtype=np.float32) for shape in shapes]
    exact = math.sqrt(math.fsum(float(x) ** 2 for array in arrays for x in array.reshape(-1)))
    before = [array.copy() for array in arrays]
    norm = clip_grad_norm(arrays, limit)
    assert norm == pytest.approx(exact, rel=20 * EPS32)
    factor = min(1.0, limit / exact)
    for array, start in zip(arrays, before, strict=True):
        np.testing.assert_allclose(array, start * factor, rtol=30 * EPS32)
        if exact < limit * (1 - 1e-5):
            assert np.array_equal(array, start)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clipping_refuses_what_is_not_finite_and_changes_nothing(bad: float) -> None:
    arrays = [np.full((2, 3), 5.0, dtype=np.float32), np.full(4, 5.0, dtype=np.float32)]
    arrays[1][2] = bad
    before = [array.copy() for array in arrays]
    with pytest.raises(NonFiniteNormError, match=r"global gradient norm is (nan|inf)"):
        clip_grad_norm(arrays, 1.0)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(arrays, before, strict=True))


def test_clipping_survives_squares_that_overflow_float32() -> None:
    arrays = [np.array([3e30, 0, 0], dtype=np.float32), np.array([[4e30]], dtype=np.float32)]
    assert clip_grad_norm(arrays, 1.0) == pytest.approx(5e30, rel=1e-6)
    np.testing.assert_allclose(arrays[0], [0.6, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(arrays[1], [[0.8]], rtol=1e-6)


def test_clipping_takes_the_gradients_of_tensors() -> None:
    named = parameters()
    named["wide"].grad = np.full((3, 5), 2.0)
    norm = clip_grad_norm(named.values(), 1.0)
    assert norm == pytest.approx(2 * math.sqrt(15))
    np.testing.assert_allclose(named["wide"].grad, 1 / math.sqrt(15))
    assert clip_grad_norm([], 1.0) == 0.0


def test_a_step_shared_by_names_changes_no_bit() -> None:
    plain, shared = parameters(np.float32), parameters(np.float32)
    groups = build_group(plain), build_group(shared)
    names = list(plain)
    for number, step in enumerate(steps_of_gradients(plain, 3), 1):
        groups[0].step(step)
        for part in (names[1:], names[:1], []):
            groups[1].step(step, names=part, number=number)
    assert groups[1].steps == 3
    for name in plain:
        assert plain[name].data.tobytes() == shared[name].data.tobytes()
        assert (plain[name].data != parameters(np.float32)[name].data).any()

"""Scaling laws: the loss of a language model by its size and the text that it has seen, and how to fit them.

A law is in nats per token, so it belongs to a tokenizer and a text, and it was fitted over a range of sizes beyond
which it is a guess.

Sources: Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022; Besiroglu et al., "Chinchilla Scaling:
A replication attempt", 2024; Muennighoff et al., "Scaling Data-Constrained Language Models", 2023.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from tinyllm.backend import HostArray
from tinyllm.system.errors import InputError

FLOPS_PER_WEIGHT = 6
"""Of a training step for each weight and token: 2 forward, 4 backward."""


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta: nats per token after D tokens, of a model of N parameters."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        """The loss in nats per token."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    @property
    def size_exponent(self) -> float:
        """a in N ~ C^a: how the best size grows with compute; that of the tokens is 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) with the lowest loss for so many FLOPs, where C = 6 N D.

        N = G (C / 6)^(beta / (alpha + beta)) with G = (alpha A / (beta B))^(1 / (alpha + beta)): Hoffmann, equation 4.
        """
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        pairs = flops / FLOPS_PER_WEIGHT
        N = G * pairs**self.size_exponent
        return N, pairs / N

    def optimal_size(self, D: float) -> float:
        """The N for which D tokens are the optimal number."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        # D = (C / 6)^(1 - a) / G, and N = G (C / 6)^a.
        return G * (G * D) ** (self.size_exponent / (1 - self.size_exponent))


HOFFMANN = ScalingLaw(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
"""Approach 3 of Hoffmann et al., with the digits of the paper's source: printed are 1.69, 0.34 and 0.28, by which the
best size at 5.76e23 FLOPs would be 32 billion parameters and not the paper's 40."""
BESIROGLU = ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""The same fitted again by Besiroglu et al. to the points of Hoffmann's figure 4."""
BESIROGLU_STANDARD_ERRORS = ScalingLaw(E=0.03, A=124.58, B=1293.23, alpha=0.02, beta=0.02)
"""Of each constant by itself; those of A and alpha, B and beta vary together, so they do not add up."""
FITTED_SIZES = (44e6, 16e9)
"""Parameters of the models that both laws were fitted to."""
CHARACTERS_PER_LAW_TOKEN = 4.2
"""About how many characters a token of their 32,000 has in English text."""

HOFFMANN_TABLES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "1, the envelope of training curves": (
        (4e8, 1.92e19, 8.0e9),
        (1e9, 1.21e20, 20.2e9),
        (1e10, 1.23e22, 205.1e9),
        (6.7e10, 5.76e23, 1.5e12),
        (1.75e11, 3.85e24, 3.7e12),
    ),
    "2, curves of equal compute": (
        (4e8, 1.84e19, 7.7e9),
        (1e9, 1.20e20, 20.0e9),
        (1e10, 1.32e22, 219.5e9),
        (6.7e10, 6.88e23, 1.7e12),
        (1.75e11, 4.54e24, 4.3e12),
    ),
    "3, the parametric law": (
        (4e8, 2.21e19, 9.2e9),
        (1e9, 1.62e20, 27.1e9),
        (1e10, 2.46e22, 410.1e9),
        (6.7e10, 1.71e24, 4.1e12),
        (1.75e11, 1.26e25, 12.0e12),
    ),
}
"""(parameters, FLOPs, tokens) that are optimal by each approach: Hoffmann et al., tables 3 and A3."""


def tabulated_size(approach: str, flops: float) -> float:
    """The optimal number of parameters by a table of HOFFMANN_TABLES, on straight lines between logarithms."""
    rows = np.log(np.array(HOFFMANN_TABLES[approach]))
    return math.exp(np.interp(math.log(flops), rows[:, 1], rows[:, 0]))


# ---- Text that is seen more than once ----------------------------------------------------------

REPEATED_TOKENS, EXCESS_PARAMETERS = 15.387756, 5.309743
"""R*_D and R*_N of Muennighoff et al., appendix A: after so many repetitions one is worth 1/e of something new."""
HARMLESS_PASSES = 4
"""Up to which repeated text is about as good as new (Muennighoff et al., section 6)."""


def effective(total: float, unique: float, decay: float) -> float:
    """D' = U + U R* (1 - e^(-R / R*)) with R = D / U - 1: how much that is new `total` is worth.

    unique: U, how much of it differs. decay: R*. Muennighoff et al., equation 5.
    """
    if total <= unique:
        return total
    return unique + unique * decay * (1 - math.exp(-(total / unique - 1) / decay))


def constrained_loss(law: ScalingLaw, N: float, D: float, unique: float) -> float:
    """The loss after D tokens of which `unique` differ, with N' and D' in place of N and D; Muennighoff, equation 6.

    N' is N where that is below FITTED_SIZES: which size is best for so little text is a guess there.
    """
    if unique >= D:
        return law.loss(N, D)
    if FITTED_SIZES[0] <= N:
        N = effective(N, law.optimal_size(unique), EXCESS_PARAMETERS)
    return law.loss(N, effective(D, unique, REPEATED_TOKENS))


# ---- Fitting -----------------------------------------------------------------------------------

HUBER = 1e-3
"""The residual of log L beyond which a run counts by its absolute and not its square error, as in both papers."""
FEWEST_RUNS = 6


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    resampled: the laws of bootstrap resamples. smallest, largest: the runs' range of N and D. residual: the median
    absolute residual of log L.
    """

    law: ScalingLaw
    resampled: tuple[ScalingLaw, ...]
    smallest: tuple[float, float]
    largest: tuple[float, float]
    residual: float

    def interval(self, name: str, level: float = 0.8) -> tuple[float, float]:
        """The bootstrap interval of a constant, or of size_exponent."""
        return _interval([getattr(law, name) for law in self.resampled], level)

    def loss_interval(self, N: float, D: float, level: float = 0.8) -> tuple[float, float]:
        """The bootstrap interval of the loss at N and D."""
        return _interval([law.loss(N, D) for law in self.resampled], level)


def _interval(values: Sequence[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fit_law(
    N: Sequence[float], D: Sequence[float], loss: Sequence[float], resamples: int = 200, seed: int = 0
) -> Fit:
    """The law of these runs: the least Huber loss of log L, from a grid of starts, as both papers fit it.

    N, D, loss: of each run. resamples: of the bootstrap, each fitted from the best law.

    Raises InputError for fewer runs than FEWEST_RUNS, fewer than three sizes or token counts, or numbers that are not
    positive and finite.
    """
    runs = np.array([N, D, loss], dtype=np.float64)
    sizes, lengths = len(set(N)), len(set(D))
    if runs.shape[1] < FEWEST_RUNS or min(sizes, lengths) < 3:
        raise InputError(
            f"got {runs.shape[1]} runs of {sizes} sizes and {lengths} numbers of tokens; a law of five constants needs "
            f"{FEWEST_RUNS} runs, and three of each"
        )
    if not (np.isfinite(runs).all() and (runs > 0).all()):
        raise InputError("sizes, tokens and losses must be above 0 and finite")
    logs = np.log(runs)
    starts = _starts(logs)
    thetas, objectives = _minimise(logs, np.ones((len(starts), runs.shape[1])), starts)
    order = np.argsort(objectives)
    best = thetas[order[0]]
    generator = np.random.default_rng(seed)
    probabilities = np.full(runs.shape[1], 1 / runs.shape[1])
    counts = generator.multinomial(runs.shape[1], probabilities, size=resamples).astype(np.float64)
    resampled, _ = _minimise(logs, counts, np.tile(best, (resamples, 1)))
    return Fit(
        _law(best, logs),
        tuple(_law(theta, logs) for theta in resampled),
        (float(min(N)), float(min(D))),
        (float(max(N)), float(max(D))),
        float(np.median(np.abs(_predicted(best[None], logs)[0] - logs[2]))),
    )


def _starts(logs: HostArray) -> HostArray:
    """Starts (K, 5): parts of the mean loss for E, A and B by some exponents."""
    mean = float(np.mean(logs[2]))
    lowest = float(np.min(logs[2]))
    grid = itertools.product((-2.5, -1.0), (-2.5, -1.0), (-2.0, -0.7, -0.1), (0.2, 0.6), (0.2, 0.6))
    return np.array([(mean + a, mean + b, lowest + e, alpha, beta) for a, b, e, alpha, beta in grid])


def _law(theta: HostArray, logs: HostArray) -> ScalingLaw:
    """The law of constants that are about the means of log N and log D."""
    a, b, e, alpha, beta = map(float, theta)
    centre_N, centre_D = float(logs[0].mean()), float(logs[1].mean())
    return ScalingLaw(math.exp(e), math.exp(a + alpha * centre_N), math.exp(b + beta * centre_D), alpha, beta)


def _terms(thetas: HostArray, logs: HostArray) -> HostArray:
    """The logarithms of the three terms of each law, (3, K, runs).

    thetas (K, 5): a, b, e, alpha, beta with log N and log D counted from their means, without which A and alpha, B and
    beta would hang together so closely that no step could tell them apart.
    """
    a, b, e, alpha, beta = thetas.T[:, :, None]
    n, d = logs[0] - logs[0].mean(), logs[1] - logs[1].mean()
    return np.stack([a - alpha * n, b - beta * d, np.broadcast_to(e, (len(thetas), len(n)))])


def _predicted(thetas: HostArray, logs: HostArray) -> HostArray:
    """log L of each law and run, (K, runs): logsumexp of the terms."""
    return np.logaddexp.reduce(_terms(thetas, logs), axis=0)


def _jacobian(thetas: HostArray, logs: HostArray) -> HostArray:
    """The derivatives of log L by the constants, (K, runs, 5): the softmax of the terms, times what each has inside."""
    terms = _terms(thetas, logs)
    of_N, of_D, of_E = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
    n, d = logs[0] - logs[0].mean(), logs[1] - logs[1].mean()
    return np.stack([of_N, of_D, of_E, -of_N * n, -of_D * d], axis=-1)


def _huber(residuals: HostArray, counts: HostArray) -> HostArray:
    size = np.abs(residuals)
    losses = np.where(size <= HUBER, 0.5 * residuals**2, HUBER * (size - 0.5 * HUBER))
    return (counts * losses).sum(-1)


def _minimise(
    logs: HostArray, counts: HostArray, starts: HostArray, steps: int = 150
) -> tuple[HostArray, HostArray]:
    """The constants (K, 5) with the least Huber loss from each of K starts, and these losses (K,).

    counts (K, runs): how often each run counts. Gauss-Newton steps of reweighted squares, damped as Levenberg and
    Marquardt do: a step that does not lower the loss is not made, and the next one is shorter.
    """
    thetas, damping = starts.copy(), np.full(len(starts), 1e-2)
    residuals = _predicted(thetas, logs) - logs[2]
    best = _huber(residuals, counts)
    for _ in range(steps):
        # The square with the same slope as the absolute error has this weight.
        weights = counts * np.minimum(1.0, HUBER / np.maximum(np.abs(residuals), 1e-12))
        J = _jacobian(thetas, logs)
        weighted = J * weights[..., None]
        H = np.swapaxes(weighted, 1, 2) @ J
        scale = np.einsum("kii->ki", H)
        H[:, range(5), range(5)] += damping[:, None] * (
            scale + 1e-9 * scale.max(axis=1, keepdims=True) + 1e-30
        )
        slope = (weighted * residuals[..., None]).sum(axis=1)
        step = np.linalg.solve(H, slope[..., None])[..., 0]
        # A step of more than 1 in a logarithm or an exponent is out of all proportion.
        tried = thetas - step / np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True))
        tried[:, 3:] = np.clip(tried[:, 3:], 1e-3, 3.0)
        tried_residuals = _predicted(tried, logs) - logs[2]
        losses = _huber(tried_residuals, counts)
        better = losses < best
        thetas = np.where(better[:, None], tried, thetas)
        residuals = np.where(better[:, None], tried_residuals, residuals)
        best = np.where(better, losses, best)
        damping = np.clip(np.where(better, damping / 3, damping * 3), 1e-12, 1e12)
        if (damping > 1e8).all():  # no step of any length lowers a loss
            break
    return thetas, best


def parabola_minimum(N: Sequence[float], loss: Sequence[float]) -> float | None:
    """The N at the lowest point of a parabola through the losses of runs of equal compute, over log N.

    Hoffmann's approach 2. None where the parabola opens downward or its lowest point lies outside the sizes tried: the
    runs do not say where the minimum is.
    """
    if len(N) < 3:
        return None
    x = np.log(N)
    square, slope, _ = np.polyfit(x, loss, 2)
    if square <= 0:
        return None
    lowest = -slope / (2 * square)
    return math.exp(lowest) if x.min() <= lowest <= x.max() else None


def power_law(C: Sequence[float], N: Sequence[float]) -> tuple[float, float]:
    """(k, a) of N = k C^a by least squares of logarithms."""
    slope, intercept = np.polyfit(np.log(C), np.log(N), 1)
    return math.exp(intercept), float(slope)


def as_numbers(law: ScalingLaw) -> dict[str, float]:
    """The constants by name, for JSON."""
    return dict(zip(("E", "A", "B", "alpha", "beta"), astuple(law), strict=True))

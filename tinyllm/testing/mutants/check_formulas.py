"""Checks of the values of functions against their formulas, written out once more with loops in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.backend.philox import Key
from tinyllm.testing.invariants import check_ignore_index, check_rope_shift
from tinyllm.testing.mutants.check_ops import close
from tinyllm.testing.mutants.checking import check

RANDOM = np.random.default_rng(5).standard_normal((2, 3, 4))


def softmax_of(row: Any) -> Array:
    """Softmax of one row, by the definition."""
    exponentials = [math.exp(x - max(row)) for x in row]
    return np.array(exponentials) / math.fsum(exponentials)


@check("formula of softmax")
def softmax() -> None:
    """Along each axis, and for logits far from 0."""
    for axis in (0, 1, -1):
        expected = np.apply_along_axis(softmax_of, axis, RANDOM)
        close(ops.softmax(Tensor(RANDOM), axis).data, expected, f"softmax along axis {axis}")
    close(
        ops.softmax(Tensor(RANDOM + 1000.0)).data, ops.softmax(Tensor(RANDOM)).data, "softmax moved by 1000"
    )


@check("formula of log_softmax")
def log_softmax() -> None:
    """The logarithm of softmax, and logsumexp, along each axis."""
    for axis in (0, 1, -1):
        expected = np.log(np.apply_along_axis(softmax_of, axis, RANDOM))
        close(ops.log_softmax(Tensor(RANDOM), axis).data, expected, f"log_softmax along axis {axis}")
        expected = np.log(np.exp(RANDOM).sum(axis=axis))
        close(ops.logsumexp(Tensor(RANDOM), axis).data, expected, f"logsumexp along axis {axis}")


@check("formula of cross_entropy")
def cross_entropy() -> None:
    """Minus the logarithm of the probability of the target, in nats, and its mean over targets that count."""
    targets = np.array([[0, 3, -100], [1, -100, 2]])
    losses = [
        [0.0 if t == -100 else -math.log(softmax_of(row)[t]) for row, t in zip(rows, line, strict=True)]
        for rows, line in zip(RANDOM, targets, strict=True)
    ]
    close(ops.cross_entropy(Tensor(RANDOM), targets, reduction="none").data, losses, "each loss")
    close(ops.cross_entropy(Tensor(RANDOM), targets).data, math.fsum(np.ravel(losses)) / 4, "the mean loss")


@check("ignore_index counts for nothing")
def ignored() -> None:
    """The invariant of that name."""
    check_ignore_index()


@check("formula of norms")
def norms() -> None:
    """RMSNorm and LayerNorm row by row, with an eps that shows."""
    weight, bias = np.array([0.5, 2.0, -1.0, 1.5]), np.array([1.0, 0.0, -2.0, 0.3])
    for eps in (1e-6, 0.1):
        rms = [[row / math.sqrt((row**2).mean() + eps) * weight for row in rows] for rows in RANDOM]
        close(ops.rms_norm(Tensor(RANDOM), weight, eps).data, rms, f"rms_norm with eps {eps}")
        centred = [
            [(row - row.mean()) / math.sqrt(row.var() + eps) * weight + bias for row in rows]
            for rows in RANDOM
        ]
        close(ops.layer_norm(Tensor(RANDOM), weight, bias, eps).data, centred, f"layer_norm with eps {eps}")


@check("formula of activations")
def activations() -> None:
    """silu, swiglu, gelu in both forms, by the functions of `math`."""
    x, up = RANDOM[0], RANDOM[1]
    logistic = np.array([[1 / (1 + math.exp(-v)) for v in row] for row in x])
    phi = np.array([[(1 + math.erf(v / math.sqrt(2))) / 2 for v in row] for row in x])
    close(ops.silu(Tensor(x)).data, x * logistic, "silu")
    close(ops.swiglu(Tensor(x), Tensor(up)).data, x * logistic * up, "swiglu")
    close(ops.gelu(Tensor(x)).data, x * phi, "gelu", 1e-7)
    # The tanh form was made to be near the exact one: to 0.0005 everywhere.
    close(ops.gelu(Tensor(x), approximate="tanh").data, x * phi, "gelu by tanh", 1e-3)


@check("formula of reductions")
def reductions() -> None:
    """Means, variances and running sums by loops."""
    x = Tensor(RANDOM)
    columns = RANDOM.swapaxes(1, 2)
    means = np.array([[math.fsum(column) / 3 for column in columns[b]] for b in range(2)])
    close(x.mean(axis=1).data, means, "the mean over axis 1")
    variances = np.array([[math.fsum((c - c.mean()) ** 2) for c in columns[b]] for b in range(2)])
    close(x.var(axis=1).data, variances / 3, "the variance over axis 1")
    close(x.var(axis=1, correction=1).data, variances / 2, "the variance divided by n - 1")
    sums = np.array([[math.fsum(RANDOM[0, 0, : i + 1]) for i in range(4)]])
    close(x.cumsum(axis=2).data[0, :1], sums, "the running sum")


@check("formula of linear")
def linear() -> None:
    """x W^T + b by loops."""
    weight, bias = np.random.default_rng(6).standard_normal((5, 4)), np.arange(5.0)
    expected = [[[row @ w + b for w, b in zip(weight, bias, strict=True)] for row in rows] for rows in RANDOM]
    close(ops.linear(Tensor(RANDOM), weight, bias).data, expected, "linear with a bias")


@check("formula of rope")
def rope() -> None:
    """Pairs (x_i, x_(i + K/2)) as complex numbers, multiplied by e^(i t theta^(-2i/K))."""
    x = np.random.default_rng(7).standard_normal((3, 8))
    for theta, offset in ((10000.0, 0), (50.0, 4)):
        expected = [rotated(row, offset + t, theta) for t, row in enumerate(x)]
        close(ops.rope(Tensor(x), offset, theta).data, expected, f"rope with theta {theta} from {offset}")
    check_rope_shift()


def rotated(row: Array, position: int, theta: float) -> Array:
    """One vector (K,) turned to its position."""
    half = len(row) // 2
    z = row[:half] + 1j * row[half:]
    z = z * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(row)))
    return np.concatenate([z.real, z.imag])


@check("formula of scaled_dot_product_attention")
def attention() -> None:
    """Query by query: softmax of q k / sqrt(d) over the keys that it may see, grouped heads, more keys than queries."""
    rng = np.random.default_rng(8)
    B, H, G, T, S, K = 2, 4, 2, 3, 5, 4
    q, k, v = (rng.standard_normal(s) for s in ((B, H, T, K), (B, G, S, K), (B, G, S, 3)))
    for causal in (True, False):
        expected = np.zeros((B, H, T, 3))
        for b, h, t in np.ndindex(B, H, T):
            group = h // (H // G)
            seen = t + S - T + 1 if causal else S
            p = softmax_of([q[b, h, t] @ k[b, group, s] / math.sqrt(K) for s in range(seen)])
            expected[b, h, t] = p @ v[b, group, :seen]
        found = ops.scaled_dot_product_attention(Tensor(q), k, v, causal=causal).data
        close(found, expected, f"attention with causal={causal}")


@check("statistics of dropout")
def dropout() -> None:
    """The part that is dropped is p, the mean stays, and masks of other keys are independent."""
    n = 20000
    for p in (0.1, 0.5, 0.8):
        y = ops.dropout(Tensor(np.ones(n)), p, Key(3)).data
        # Five standard deviations of a binomial count: one false alarm in two million.
        spread = 5 * math.sqrt(p * (1 - p) / n)
        assert abs(float((y == 0).mean()) - p) < spread, f"{float((y == 0).mean()):.3f} dropped, expected {p}"
        assert abs(float(y.mean()) - 1) < spread / (1 - p), f"the mean of ones is {float(y.mean()):.3f}"
    masks = [ops.dropout(Tensor(np.ones(n)), 0.5, key).data > 0 for key in
             (Key(3), Key(4), Key(3, 1), Key(3, 0, 1), Key(3, 0, 0, 1))]  # fmt: skip
    for i, one in enumerate(masks):
        for other in masks[:i]:
            same = float((one == other).mean())
            assert abs(same - 0.5) < 2.5 / math.sqrt(n), f"masks of two keys agree in {same:.3f} of places"

"""Functions in plain NumPy with their backwards: right ones, and the usual slips, each with the cause that names it.

`function(*inputs)` and `backward(g, *inputs)`, g the upstream gradient, as `check_vjp` takes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Right:
    """A function with its backward. shapes: of its inputs, drawn from [low, high]. constants: integers after them."""

    function: Callable[..., Any]
    backward: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((3, 4),)
    low: float = -2.0
    high: float = 2.0
    constants: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Wrong:
    """A wrong backward of a right function, and a regular expression for what its report must say."""

    name: str
    backward: Callable[..., Any]
    cause: str


# ---- Functions of several lines ------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_backward(g: Array, x: Array) -> Array:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x**2))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(g: Array, x: Array) -> Array:
    p = softmax(x)
    return p * (g - (p * g).sum(axis=-1, keepdims=True))


def log_softmax(x: Array) -> Array:
    z = x - x.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


TARGETS = np.array([2, 0, 2])


def cross_entropy(x: Array, targets: Array) -> Array:
    return -np.take_along_axis(log_softmax(x), targets[:, None], -1).mean()


def cross_entropy_backward(g: Array, x: Array, targets: Array) -> tuple[Array, None]:
    one_hot = np.eye(x.shape[1], dtype=x.dtype)[targets]
    return g * (softmax(x) - one_hot) / len(targets), None


def standardised(x: Array, axis: int = -1) -> tuple[Array, Array]:
    """x_hat and 1 / sigma."""
    rate = (x.var(axis=axis, keepdims=True) + 1e-5) ** -0.5
    return (x - x.mean(axis=axis, keepdims=True)) * rate, rate


def layer_norm(x: Array, w: Array, b: Array) -> Array:
    return standardised(x)[0] * w + b


def layer_norm_backward(g: Array, x: Array, w: Array, b: Array) -> tuple[Array, ...]:
    x_hat, rate = standardised(x)
    h = g * w
    dx = rate * (h - h.mean(-1, keepdims=True) - x_hat * (h * x_hat).mean(-1, keepdims=True))
    return dx, (g * x_hat).sum(0), g.sum(0)


def batch_norm_backward(g: Array, x: Array) -> Array:
    x_hat, rate = standardised(x, 0)
    return rate * (g - g.mean(0) - x_hat * (g * x_hat).mean(0))


def rms(x: Array) -> Array:
    return ((x * x).mean(-1, keepdims=True) + 1e-5) ** 0.5


def rms_norm_backward(g: Array, x: Array, w: Array) -> tuple[Array, Array]:
    x_hat, h = x / rms(x), g * w
    return (h - x_hat * (h * x_hat).mean(-1, keepdims=True)) / rms(x), (g * x_hat).sum(0)


def swap(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def scores(q: Array, k: Array, causal: bool = False) -> Array:
    s = q @ swap(k) * q.shape[-1] ** -0.5
    return np.where(np.tril(np.ones(s.shape[-2:], dtype=bool)), s, -1e9).astype(s.dtype) if causal else s


def attention(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    return softmax(scores(q, k, causal)) @ v


def score_gradient(g: Array, q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    p = softmax(scores(q, k, causal))
    dp = g @ swap(v)
    return p * (dp - (p * dp).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5


def attention_backward(g: Array, q: Array, k: Array, v: Array, causal: bool = False) -> tuple[Array, ...]:
    ds = score_gradient(g, q, k, v, causal)
    return ds @ k, swap(ds) @ q, swap(softmax(scores(q, k, causal))) @ g


def rotated(x: Array, sign: float) -> Array:
    """RoPE by half rotation: x (T, D)."""
    T, D = x.shape
    angles = np.arange(1, T + 1)[:, None] * 10.0 ** -np.arange(D // 2)
    cos, sin = np.cos(angles).astype(x.dtype), (sign * np.sin(angles)).astype(x.dtype)
    a, b = x[:, : D // 2], x[:, D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def windows(x: Array, n: int) -> Array:
    return np.lib.stride_tricks.sliding_window_view(x, n, axis=-1)


def conv1d(x: Array, w: Array) -> Array:  # x: (N, T), w: (K,) -> (N, T - K + 1), correlation as in networks
    return windows(x, len(w)) @ w


def conv1d_backward(g: Array, x: Array, w: Array) -> tuple[Array, Array]:
    padded = np.pad(g, ((0, 0), (len(w) - 1,) * 2))
    return windows(padded, len(w)) @ w[::-1], np.einsum("nt,ntk->k", g, windows(x, len(w)))


def conv2d(x: Array, w: Array) -> Array:  # x: (H, W), w: (K, L)
    views = np.lib.stride_tricks.sliding_window_view(x, w.shape)
    return np.einsum("hwkl,kl->hw", views, w)


def conv2d_backward(g: Array, x: Array, w: Array) -> tuple[Array, Array]:
    padded = np.pad(g, [(n - 1, n - 1) for n in w.shape])
    return conv2d(padded, w[::-1, ::-1]), conv2d(x, g)


def same_conv(x: Array, w: Array) -> Array:  # x: (N, T), odd kernel, padded with zeros
    return windows(np.pad(x, ((0, 0), (len(w) // 2,) * 2)), len(w)) @ w


def same_conv_backward(g: Array, x: Array, w: Array) -> tuple[Array, Array]:
    views = windows(np.pad(x, ((0, 0), (len(w) // 2,) * 2)), len(w))
    return same_conv(g, w[::-1]), np.einsum("nt,ntk->k", g, views)


def shares_of_max(x: Array, axis: int | None = None) -> Array:
    equal = (x == x.max(axis=axis, keepdims=True)).astype(x.dtype)
    return equal / equal.sum(axis=axis, keepdims=True)


def first_max(g: Array, x: Array) -> Array:
    found = np.zeros_like(x)
    np.put_along_axis(found, x.argmax(-1)[:, None], g[:, None], -1)
    return found


def prod_backward(g: Array, x: Array) -> Array:
    others = [np.prod(np.delete(x, i, axis=-1), axis=-1) for i in range(x.shape[-1])]
    return g[:, None] * np.stack(others, axis=-1)


ROWS = np.array([1, 3, 3, 0, 1])
PLACES = np.array([[3, 0], [1, 1], [0, 2]])
MASK = np.arange(12).reshape(3, 4) % 3 == 0


def added_at(x: Array, index: Any, g: Array) -> Array:
    found = np.zeros_like(x)
    np.add.at(found, index, g)
    return found


def unit_length(x: Array) -> Array:
    return x / ((x * x).sum(-1, keepdims=True) + 0.1) ** 0.5


def unit_length_backward(g: Array, x: Array) -> Array:
    y, n = unit_length(x), ((x * x).sum(-1, keepdims=True) + 0.1) ** 0.5
    return (g - y * (g * y).sum(-1, keepdims=True)) / n


def inverse_backward(g: Array, x: Array) -> Array:
    y = np.linalg.inv(x + 5 * np.eye(3, dtype=x.dtype))
    return -y.T @ g @ y.T


def residual(x: Array, w: Array) -> Array:
    return x + np.tanh(x @ w)


def residual_backward(g: Array, x: Array, w: Array) -> tuple[Array, Array]:
    h = g * (1 - np.tanh(x @ w) ** 2)
    return g + h @ w.T, x.T @ h


def swiglu_backward(g: Array, x: Array, gate: Array) -> tuple[Array, Array]:
    s = sigmoid(gate)
    return g * gate * s, g * x * (s + gate * s * (1 - s))


def variance_backward(g: Array, x: Array) -> Array:
    return g[:, None] * 2 * (x - x.mean(-1, keepdims=True)) / x.shape[-1]


def huber_backward(g: Array, x: Array, y: Array) -> tuple[Array, Array]:
    d = g * np.clip(x - y, -1, 1)
    return d, -d


def huber(x: Array, y: Array) -> Array:
    d = np.abs(x - y)
    return np.where(d <= 1, 0.5 * d * d, d - 0.5).astype(x.dtype)


TWO = ((3, 4), (3, 4))
ROW = ((3, 4), (4,))
THREE = ((4, 5), (4, 5), (4, 5))
SQUARES = ((3, 3), (3, 3))

RIGHT: dict[str, Right] = {
    # What fooled the laboratory: derivatives without a second one, tiny inputs, large values
    "relu squared": Right(lambda x: np.maximum(x, 0) ** 2, lambda g, x: 2 * g * np.maximum(x, 0)),
    "x |x|": Right(lambda x: x * np.abs(x), lambda g, x: 2 * g * np.abs(x)),
    "relu cubed": Right(lambda x: np.maximum(x, 0) ** 3, lambda g, x: 3 * g * np.maximum(x, 0) ** 2),
    "square": Right(lambda x: x * x, lambda g, x: 2 * g * x),
    "add 5": Right(lambda x: x + 5, lambda g, x: g),
    "cube": Right(lambda x: x * x * x, lambda g, x: 3 * g * x * x),
    "log (x + 3)": Right(lambda x: np.log(x + 3), lambda g, x: g / (x + 3)),
    "exp": Right(np.exp, lambda g, x: g * np.exp(x)),
    "exp far down": Right(lambda x: np.exp(x - 60), lambda g, x: g * np.exp(x - 60)),
    "large sum beside": Right(lambda x, b: ((x * 1000) ** 2).sum() + b.sum(),
                              lambda g, x, b: (g * 2e6 * x, g * np.ones_like(b)), ((8,), (3,))),
    "saturated sigmoid": Right(lambda x: sigmoid(x + 30), lambda g, x: g * sigmoid(x + 30) * sigmoid(-x - 30)),
    "equal maxima, shares": Right(lambda x: x.max(-1), lambda g, x: g[:, None] * shares_of_max(x, -1)),
    "equal maxima, the first": Right(lambda x: x.max(-1), first_max),
    "maximum of all": Right(lambda x: x.max(), lambda g, x: g * shares_of_max(x)),
    "largest magnitude": Right(lambda x: np.abs(x).max(), lambda g, x: g * np.sign(x) * shares_of_max(np.abs(x))),
    "maximum of two": Right(np.maximum, lambda g, x, y: (g * (x >= y), g * (x < y)), TWO),
    "minimum of two": Right(np.minimum, lambda g, x, y: (g * ((x < y) + (x == y) / 2).astype(x.dtype),
                                                         g * ((x > y) + (x == y) / 2).astype(x.dtype)), TWO),
    "product": Right(lambda x, y: x * y, lambda g, x, y: (g * y, g * x), TWO),
    # Element by element
    "relu": Right(lambda x: np.maximum(x, 0), lambda g, x: g * (x > 0)),
    "abs": Right(np.abs, lambda g, x: g * np.sign(x)),
    "leaky relu": Right(lambda x: np.maximum(x, 0.1 * x), lambda g, x: g * np.where(x > 0, 1, 0.1).astype(x.dtype)),
    "clip": Right(lambda x: np.clip(x, -1, 1), lambda g, x: g * (np.abs(x) <= 1)),
    "tanh": Right(np.tanh, lambda g, x: g * (1 - np.tanh(x) ** 2)),
    "sigmoid": Right(sigmoid, lambda g, x: g * sigmoid(x) * (1 - sigmoid(x))),
    "silu": Right(lambda x: x * sigmoid(x), lambda g, x: g * (sigmoid(x) + x * sigmoid(x) * sigmoid(-x))),
    "gelu": Right(gelu, gelu_backward),
    "softplus": Right(lambda x: np.logaddexp(x, 0), lambda g, x: g * sigmoid(x)),
    "x sin x": Right(lambda x: x * np.sin(x), lambda g, x: g * (np.sin(x) + x * np.cos(x))),
    "cosine": Right(np.cos, lambda g, x: -g * np.sin(x)),
    "log": Right(np.log, lambda g, x: g / x, low=0.25),
    "sqrt": Right(np.sqrt, lambda g, x: g / (2 * np.sqrt(x)), low=0.25),
    "reciprocal": Right(lambda x: 1 / x, lambda g, x: -g / (x * x), low=0.25),
    "power 1.5": Right(lambda x: x**1.5, lambda g, x: 1.5 * g * x**0.5, low=0.25),
    "divide": Right(lambda x, y: x / (y + 3), lambda g, x, y: (g / (y + 3), -g * x / (y + 3) ** 2), TWO),
    "swiglu": Right(lambda x, gate: x * gate * sigmoid(gate), swiglu_backward, TWO),
    "huber": Right(huber, huber_backward, TWO),
    "where": Right(lambda x, y: np.where(MASK, x, y), lambda g, x, y: (g * MASK, g * ~MASK), TWO),
    # Broadcasting and products of matrices
    "bias": Right(lambda x, b: x + b, lambda g, x, b: (g, g.sum(0)), ROW),
    "scale of columns": Right(lambda x, w: x * w, lambda g, x, w: (g * w, (g * x).sum(0)), ROW),
    "scale of rows": Right(lambda x, w: x * w, lambda g, x, w: (g * w, (g * x).sum(1, keepdims=True)),
                           ((3, 4), (3, 1))),
    "matmul": Right(lambda a, b: a @ b, lambda g, a, b: (g @ b.T, a.T @ g), ((3, 4), (4, 2))),
    "square matmul": Right(lambda x, w: x @ w, lambda g, x, w: (g @ w.T, x.T @ g), SQUARES),
    "batched matmul": Right(lambda a, b: a @ b, lambda g, a, b: (g @ swap(b), swap(a) @ g), ((2, 3, 4), (2, 4, 2))),
    "linear": Right(lambda x, w, b: x @ w.T + b, lambda g, x, w, b: (g @ w, g.T @ x, g.sum(0)), ((3, 4), (2, 4), (2,))),
    "x x^T": Right(lambda x: x @ x.T, lambda g, x: (g + g.T) @ x),
    "outer": Right(np.outer, lambda g, a, b: (g @ b, a @ g), ((3,), (4,))),
    "inverse": Right(lambda x: np.linalg.inv(x + 5 * np.eye(3, dtype=x.dtype)), inverse_backward, ((3, 3),), -1, 1),
    "residual": Right(residual, residual_backward, ((3, 4), (4, 4))),
    # Reductions and norms
    "sum of rows": Right(lambda x: x.sum(1), lambda g, x: np.broadcast_to(g[:, None], x.shape).copy()),
    "mean of columns": Right(lambda x: x.mean(0), lambda g, x: np.broadcast_to(g / len(x), x.shape).copy()),
    "mean": Right(lambda x: x.mean(), lambda g, x: np.full_like(x, g / x.size)),
    "mean square": Right(lambda x: (x * x).mean(), lambda g, x: 2 * g * x / x.size),
    "squared error": Right(lambda x, y: ((x - y) ** 2).mean(),
                           lambda g, x, y: (2 * g * (x - y) / x.size, 2 * g * (y - x) / x.size), TWO),
    "centred": Right(lambda x: x - x.mean(-1, keepdims=True), lambda g, x: g - g.mean(-1, keepdims=True)),
    "variance": Right(lambda x: x.var(-1), variance_backward),
    "prod": Right(lambda x: x.prod(-1), prod_backward),
    "cumsum": Right(lambda x: x.cumsum(1), lambda g, x: g[:, ::-1].cumsum(1)[:, ::-1]),
    "logsumexp": Right(lambda x: x[:, 0] - log_softmax(x)[:, 0], lambda g, x: g[:, None] * softmax(x)),
    "softmax": Right(softmax, softmax_backward),
    "log softmax": Right(log_softmax, lambda g, x: g - softmax(x) * g.sum(-1, keepdims=True)),
    "cross entropy": Right(cross_entropy, cross_entropy_backward, constants=(TARGETS,)),
    "standardise": Right(lambda x: standardised(x)[0], lambda g, x: layer_norm_backward(g, x, 1, 0)[0], ((3, 5),)),
    "layer norm": Right(layer_norm, layer_norm_backward, ((3, 5), (5,), (5,))),
    "batch norm": Right(lambda x: standardised(x, 0)[0], batch_norm_backward, ((5, 3),)),
    "rms norm": Right(lambda x, w: x / rms(x) * w, rms_norm_backward, ((3, 5), (5,))),
    "unit length": Right(unit_length, unit_length_backward, ((3, 5),)),
    # What a language model has besides
    "attention": Right(attention, attention_backward, THREE),
    "causal attention": Right(lambda q, k, v: attention(q, k, v, True),
                              lambda g, q, k, v: attention_backward(g, q, k, v, True), THREE),
    "rope": Right(lambda x: rotated(x, 1), lambda g, x: rotated(g, -1)),
    "conv 1d": Right(conv1d, conv1d_backward, ((2, 7), (3,))),
    "conv 2d": Right(conv2d, conv2d_backward, ((5, 4), (3, 2))),
    "conv of the same length": Right(same_conv, same_conv_backward, ((2, 6), (3,))),
    "embedding": Right(lambda w, i: w[i], lambda g, w, i: (added_at(w, i, g), None), ((5, 2),), constants=(ROWS,)),
    "take along axis": Right(lambda x, i: np.take_along_axis(x, i, 1),
                             lambda g, x, i: (added_at(x, (np.arange(3)[:, None], i), g), None), constants=(PLACES,)),
    "concatenate": Right(lambda x, y: np.concatenate([x, y], 1), lambda g, x, y: (g[:, :4], g[:, 4:]),
                         ((3, 4), (3, 2))),
    "transpose": Right(lambda x: np.ascontiguousarray(x.T), lambda g, x: g.T),
    "roll": Right(lambda x: np.roll(x, 1, 1), lambda g, x: np.roll(g, -1, 1)),
    "flip": Right(lambda x: x[:, ::-1].copy(), lambda g, x: g[:, ::-1]),
    "tril": Right(np.tril, lambda g, x: np.tril(g)),
    "mean pool": Right(lambda x: x.reshape(3, 2, 2).mean(-1), lambda g, x: np.repeat(g / 2, 2, axis=1)),
}  # fmt: skip


def last_use(w: Array, i: Array, g: Array) -> Array:
    found = np.zeros_like(w)
    found[i] = g
    return found


def softmax_sum_for_all(g: Array, x: Array) -> Array:
    p = softmax(x)
    return p * (g - (p * g).sum())


def inner(change: Callable[[Array, Array, Array, Array], Array]) -> Callable[..., tuple[Array, ...]]:
    """layer_norm_backward with another gradient of x: change(h, h's mean, x_hat, its mean with h) / sigma."""

    def backward(g: Array, x: Array, w: Array, b: Array) -> tuple[Array, ...]:
        x_hat, rate = standardised(x)
        h = g * w
        dx = rate * change(h, h.mean(-1, keepdims=True), x_hat, (h * x_hat).mean(-1, keepdims=True))
        return dx, (g * x_hat).sum(0), g.sum(0)

    return backward


ANY = "."
WRONG: list[Wrong] = [
    # Signs, factors, and what is multiplied by
    Wrong("cosine", lambda g, x: g * np.sin(x), "^sign flipped$"),
    Wrong("log (x + 3)", lambda g, x: g * (x + 3), ANY),
    Wrong("square", lambda g, x: g * x, "used twice when only one use is counted"),
    Wrong("cube", lambda g, x: 2 * g * x * x, "constant factor: the gradient is 0.666666667 times"),
    Wrong("product", lambda g, x, y: (g * x, g * y), r"gradient of argument 1 \(y\): two are exchanged|exchanged"),
    Wrong("product", lambda g, x, y: (g * y, g * y), ANY),
    Wrong("divide", lambda g, x, y: (g / (y + 3), g * x / (y + 3) ** 2), "^sign flipped$"),
    Wrong("exp", lambda g, x: g * x, "formula holds for the output"),
    Wrong("tanh", lambda g, x: g * (1 - x * x), "formula holds for the output"),
    Wrong("sigmoid", lambda g, x: g * x * (1 - x), r"formula holds for the output.* x \(1 - x\) for y \(1 - y\)"),
    Wrong("softmax", lambda g, x: x * (g - (x * g).sum(-1, keepdims=True)), "formula holds for the output"),
    Wrong("sqrt", lambda g, x: g / (2 * x), "formula holds for the output"),
    Wrong("tanh", lambda g, x: 1 - np.tanh(x) ** 2, "^upstream gradient ignored"),
    Wrong("mean square", lambda g, x: 2 * x / x.size, "^upstream gradient ignored"),
    Wrong("cross entropy", lambda g, x, t: (cross_entropy_backward(1, x, t)[0], None), "^upstream gradient ignored"),
    Wrong("rope", lambda g, x: np.ones_like(x), "^upstream gradient ignored"),
    Wrong("exp", lambda g, x: g * g * np.exp(x), "^upstream gradient squared"),
    Wrong("x |x|", lambda g, x: g * np.abs(x), "0.5 times"),
    Wrong("gelu", lambda g, x: g * sigmoid(1.702 * x), ANY),
    Wrong("huber", lambda g, x, y: (g * np.clip(x - y, -1, 1),) * 2, "^sign flipped$"),
    Wrong("log", lambda g, x: g * np.log(x), ANY),
    Wrong("reciprocal", lambda g, x: -g / x, ANY),
    Wrong("power 1.5", lambda g, x: g * x**0.5, "0.666666667 times"),
    Wrong("where", lambda g, x, y: (g * ~MASK, g * MASK), ANY),
    Wrong("add 5", lambda g, x: 5 * g, "5.0 times"),
    Wrong("large sum beside", lambda g, x, b: (g * 2e6 * x, g * 0 * b), "^zero gradient"),
    Wrong("large sum beside", lambda g, x, b: (g * 2e6 * x, 2 * g * np.ones_like(b)), "2.0 times"),
    # One of two uses
    Wrong("residual", lambda g, x, w: (residual_backward(g, x, w)[0] - g, residual_backward(g, x, w)[1]),
          r"one of two uses of this input is not counted: .* x in x \+ h\(x\)"),
    Wrong("x sin x", lambda g, x: g * x * np.cos(x), r"one of two uses.* x was left out"),
    Wrong("x sin x", lambda g, x: g * np.sin(x), r"one of two uses.* h\(x\) was left out"),
    Wrong("silu", lambda g, x: g * sigmoid(x), r"one of two uses.* h\(x\) was left out"),
    Wrong("x x^T", lambda g, x: g @ x, "one of two uses of this input is not counted, as in x @ x.T"),
    # Transposes, flips, turns
    Wrong("square matmul", lambda g, x, w: (g @ w, x.T @ g), r"argument 1 \(w\) .* without its transpose: W for W.T"),
    Wrong("square matmul", lambda g, x, w: (g @ w.T, g.T @ x), r"transposed: .*\(1, 0\)"),
    Wrong("inverse", lambda g, x: inverse_backward(g.T, x).T.copy(), ANY),
    Wrong("residual", lambda g, x, w: (g + g * (1 - np.tanh(x @ w) ** 2) @ w, residual_backward(g, x, w)[1]), ANY),
    Wrong("rope", lambda g, x: rotated(g, 1), "rotation turned the wrong way"),
    Wrong("conv 1d", lambda g, x, w: (conv1d_backward(g, x, w[::-1])[0], conv1d_backward(g, x, w)[1]),
          "kernel that is not flipped"),
    Wrong("conv 1d", lambda g, x, w: (conv1d_backward(g, x, w)[0], conv1d_backward(g, x, w)[1][::-1]),
          "reversed along axis 0"),
    Wrong("conv 2d", lambda g, x, w: (conv2d_backward(g, x, w[::-1, ::-1])[0], conv2d_backward(g, x, w)[1]),
          "kernel that is not flipped"),
    Wrong("conv of the same length", lambda g, x, w: (same_conv(g, w), same_conv_backward(g, x, w)[1]),
          "kernel that is not flipped"),
    Wrong("attention", lambda g, q, k, v: (*[score_gradient(g, q, k, v) @ x for x in (k, q)],
                                           attention_backward(g, q, k, v)[2]),
          "inner transpose missing"),
    Wrong("causal attention", lambda g, q, k, v: (*attention_backward(g, q, k, v, True)[:2],
                                                  softmax(scores(q, k, True)) @ g),
          ANY),
    Wrong("causal attention", lambda g, q, k, v: attention_backward(g, q, k, v, False), ANY),
    Wrong("attention", lambda g, q, k, v: (2 * attention_backward(g, q, k, v)[0], *attention_backward(g, q, k, v)[1:]),
          "2.0 times"),
    Wrong("cumsum", lambda g, x: g.cumsum(1), "accumulated from the wrong end along axis 1"),
    Wrong("roll", lambda g, x: np.roll(g, 1, 1), "shifted by 2 along axis 1"),
    Wrong("flip", lambda g, x: g, "reversed along axis 1"),
    # Sums over what was broadcast, means, norms
    Wrong("bias", lambda g, x, b: (g, g[0]), "holds only slice 0"),
    Wrong("bias", lambda g, x, b: (g, g), r"not summed over broadcast axes: sum it over \(0,\)"),
    Wrong("scale of columns", lambda g, x, w: (g * w, (g * x).mean(0)), "a mean where a sum belongs, over 3 elements"),
    Wrong("mean of columns", lambda g, x: np.broadcast_to(g / 4, x.shape).copy(), "mean over the wrong axis"),
    Wrong("centred", lambda g, x: g - g.mean(0), "mean over the wrong axis"),
    Wrong("centred", lambda g, x: g, "mean not subtracted"),
    Wrong("centred", lambda g, x: g - g.sum(-1, keepdims=True), "sum for mean"),
    Wrong("mean", lambda g, x: np.full_like(x, g), "1/12 of a mean over 12 elements is missing"),
    Wrong("variance", lambda g, x: g[:, None] * 2 * x / x.shape[-1], "mean not subtracted"),
    Wrong("softmax", lambda g, x: softmax(x) * g, "mean not subtracted"),
    Wrong("softmax", softmax_sum_for_all, ANY),
    Wrong("log softmax", lambda g, x: g - softmax(x) * g, ANY),
    Wrong("log softmax", lambda g, x: g, ANY),
    Wrong("cross entropy", lambda g, x, t: (g * softmax(x) / 3, None), ANY),
    Wrong("layer norm", inner(lambda h, m, x_hat, c: h - m), "variance taken as constant"),
    Wrong("layer norm", inner(lambda h, m, x_hat, c: h - x_hat * c), "mean not subtracted"),
    Wrong("layer norm", inner(lambda h, m, x_hat, c: h), "mean and variance taken as constant"),
    Wrong("layer norm", inner(lambda h, m, x_hat, c: h - 5 * m - x_hat * c), "sum for mean along axis 1.* mean"),
    Wrong("layer norm", inner(lambda h, m, x_hat, c: h - m - 5 * x_hat * c), "sum for mean along axis 1.* variance"),
    Wrong("standardise", lambda g, x: standardised(x)[1] * (g - g.mean(-1, keepdims=True)),
          "variance taken as constant"),
    Wrong("batch norm", lambda g, x: standardised(x, 0)[1] * (g - g.mean(0)),
          "variance taken as constant along axis 0"),
    Wrong("rms norm", lambda g, x, w: (g * w / rms(x), rms_norm_backward(g, x, w)[1]), "mean square taken as constant"),
    Wrong("unit length", lambda g, x: g / ((x * x).sum(-1, keepdims=True) + 0.1) ** 0.5, "taken as constant"),
    Wrong("embedding", lambda g, w, i: (last_use(w, i, g), None), "repeated rows overwrite each other"),
    Wrong("take along axis", lambda g, x, i: (last_use(x, (np.arange(3)[:, None], i), g), None), ANY),
    Wrong("maximum of all", lambda g, x: 2 * g * shares_of_max(x), "2.0 times"),
    Wrong("prod", lambda g, x: g[:, None] * x, ANY),
    Wrong("squared error", lambda g, x, y: (2 * g * (x - y), 2 * g * (y - x)), "1/12 of a mean over 12"),
]  # fmt: skip

ON_ONE_SIDE: list[Wrong] = [
    Wrong("relu", lambda g, x: g * (g > 0), ANY),
    Wrong("relu", lambda g, x: g, ANY),
    Wrong("relu squared", lambda g, x: g * np.maximum(x, 0), "0.5 times"),
    Wrong("abs", lambda g, x: g * (x > 0), ANY),
    Wrong("clip", lambda g, x: g * (x >= 0), ANY),
]
"""Wrong for negative numbers alone, or for positive ones."""

SHARED: list[Wrong] = [
    Wrong("equal maxima, shares", lambda g, x: g[:, None] * (x == x.max(-1, keepdims=True)), "shared kink"),
    Wrong("maximum of all", lambda g, x: g * (x == x.max()), "shared kink"),
    Wrong("maximum of two", lambda g, x, y: (g * (x >= y), g * (x <= y)), "shared kink"),
    Wrong("largest magnitude", lambda g, x: g * np.sign(x) * (np.abs(x) == np.abs(x).max()), "shared kink"),
    Wrong("minimum of two", lambda g, x, y: (g * (x <= y), g * (x <= y)), ANY),
]
"""Wrong where elements are equal, and right elsewhere."""

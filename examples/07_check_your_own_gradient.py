"""Thirteen backwards in plain NumPy, each with a mistake that is easy to make, and what `check_vjp` says about it.

No Tensor is needed: `check_vjp(forward, backward, inputs)` compares `backward(gradient, *inputs)` with numerical
derivatives of `forward(*inputs)`. For each pair below the faulty backward is reported, and the corrected one passes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm.testing import GradientError, check_vjp

Array = np.ndarray[Any, Any]


def cosine(x: Array) -> Array:
    return np.cos(x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def linear(x: Array, weight: Array) -> Array:  # x: (N, D), weight: (D, D) -> (N, D)
    return x @ weight.T


def add_bias(x: Array, bias: Array) -> Array:  # x: (N, D), bias: (D,) -> (N, D)
    return x + bias


def scale_rows(x: Array, factor: Array) -> Array:  # x: (N, D), factor: (N, 1) -> (N, D)
    return x * factor


def softmax(x: Array) -> Array:  # x: (N, D) -> (N, D)
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def mean_squared_error(prediction: Array, target: Array) -> Array:  # both (N, D) -> ()
    return ((prediction - target) ** 2).mean()


def square(x: Array) -> Array:
    return x * x


def weighted_sum(x: Array, weight: Array) -> Array:  # x: (N, D), weight: (D,) -> (N,)
    return (x * weight).sum(axis=1)


def normalise(x: Array) -> Array:  # x: (N, D) -> (N, D), as in a layer norm
    deviation = x - x.mean(axis=-1, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(axis=-1, keepdims=True) + 1e-5)


def running_sum(x: Array) -> Array:  # x: (N, D) -> (N, D)
    return np.cumsum(x, axis=1)


def embedding(weight: Array, indices: Array) -> Array:  # weight: (V, D), indices: (T,) -> (T, D)
    return weight[indices]


# Backwards: the gradient of the output and the inputs in, one gradient for each input out.


def cosine_without_sign(g: Array, x: Array) -> Array:
    return g * np.sin(x)


def cosine_backward(g: Array, x: Array) -> Array:
    return -g * np.sin(x)


def sigmoid_of_input(g: Array, x: Array) -> Array:
    return g * x * (1 - x)  # y (1 - y) holds for the output


def sigmoid_backward(g: Array, x: Array) -> Array:
    y = sigmoid(x)
    return g * y * (1 - y)


def linear_transposed(g: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    return g @ weight, x.T @ g


def linear_backward(g: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    return g @ weight, g.T @ x


def bias_not_summed(g: Array, x: Array, bias: Array) -> tuple[Array, Array]:
    return g, g


def bias_of_first_row(g: Array, x: Array, bias: Array) -> tuple[Array, Array]:
    return g, g[0]


def bias_backward(g: Array, x: Array, bias: Array) -> tuple[Array, Array]:
    return g, g.sum(axis=0)


def factor_averaged(g: Array, x: Array, factor: Array) -> tuple[Array, Array]:
    return g * factor, (g * x).mean(axis=1, keepdims=True)


def factor_backward(g: Array, x: Array, factor: Array) -> tuple[Array, Array]:
    return g * factor, (g * x).sum(axis=1, keepdims=True)


def softmax_without_mean(g: Array, x: Array) -> Array:
    return softmax(x) * g


def softmax_backward(g: Array, x: Array) -> Array:
    p = softmax(x)
    return p * (g - (p * g).sum(axis=-1, keepdims=True))


def error_without_count(g: Array, prediction: Array, target: Array) -> tuple[Array, Array]:
    difference = 2 * g * (prediction - target)
    return difference, -difference


def error_backward(g: Array, prediction: Array, target: Array) -> tuple[Array, Array]:
    difference = 2 * g * (prediction - target) / prediction.size
    return difference, -difference


def square_used_once(g: Array, x: Array) -> Array:
    return g * x  # x * x: the other factor depends on x as well


def square_backward(g: Array, x: Array) -> Array:
    return g * x + x * g


def weight_of_wrong_axis(g: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    return g[:, None] * weight, (g[:, None] * x).sum(axis=1)


def weight_backward(g: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    return g[:, None] * weight, (g[:, None] * x).sum(axis=0)


def normalise_as_if_constant(g: Array, x: Array) -> Array:
    deviation = x - x.mean(axis=-1, keepdims=True)
    return g / np.sqrt((deviation**2).mean(axis=-1, keepdims=True) + 1e-5)


def normalise_backward(g: Array, x: Array) -> Array:
    x_hat = normalise(x)
    centred = g - g.mean(axis=-1, keepdims=True) - x_hat * (g * x_hat).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def running_sum_not_flipped(g: Array, x: Array) -> Array:
    return np.cumsum(g, axis=1)


def running_sum_backward(g: Array, x: Array) -> Array:
    return np.cumsum(g[:, ::-1], axis=1)[:, ::-1]


def embedding_overwrites(g: Array, weight: Array, indices: Array) -> tuple[Array, None]:
    gradient = np.zeros_like(weight)
    gradient[indices] += g  # NumPy adds once for each place, however often it is named
    return gradient, None


def embedding_backward(g: Array, weight: Array, indices: Array) -> tuple[Array, None]:
    gradient = np.zeros_like(weight)
    np.add.at(gradient, indices, g)
    return gradient, None


rng = np.random.default_rng(0)
x, square_matrix = rng.normal(size=(3, 4)), rng.normal(size=(3, 3))
row, column = rng.normal(size=4), rng.normal(size=(3, 1))

Pair = tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any], tuple[Array, ...]]
PAIRS: list[Pair] = [
    ("cosine: the sign is missing", cosine, cosine_without_sign, cosine_backward, (x,)),
    ("sigmoid: y (1 - y) with the input for y", sigmoid, sigmoid_of_input, sigmoid_backward, (x,)),
    ("linear: the weight's gradient is transposed", linear, linear_transposed, linear_backward,
     (square_matrix, rng.normal(size=(3, 3)))),
    ("bias: not summed over the rows", add_bias, bias_not_summed, bias_backward, (x, row)),
    ("bias: the first row for the sum of all", add_bias, bias_of_first_row, bias_backward, (x, row)),
    ("factor: a mean for a sum", scale_rows, factor_averaged, factor_backward, (x, column)),
    ("softmax: the mean is not subtracted", softmax, softmax_without_mean, softmax_backward, (x,)),
    ("mean squared error: without 1/N", mean_squared_error, error_without_count, error_backward,
     (x, rng.normal(size=(3, 4)))),
    ("square: only one of two uses", square, square_used_once, square_backward, (x,)),
    ("weighted sum: summed over the wrong axis", weighted_sum, weight_of_wrong_axis, weight_backward,
     (rng.normal(size=(4, 4)), row)),
    ("layer norm: mean and deviation as if constant", normalise, normalise_as_if_constant, normalise_backward, (x,)),
    ("cumulative sum: not from the end", running_sum, running_sum_not_flipped, running_sum_backward, (x,)),
    ("embedding: repeated rows overwritten", embedding, embedding_overwrites, embedding_backward,
     (rng.normal(size=(5, 2)), np.array([1, 3, 3, 0, 1]))),
]  # fmt: skip

for number, (mistake, forward, faulty, correct, inputs) in enumerate(PAIRS, 1):
    print(f"{number}. {mistake}")
    try:
        check_vjp(forward, faulty, inputs)
    except GradientError as report:
        print("   " + str(report).replace("\n", "\n   "))
    else:
        raise SystemExit(f"{faulty.__name__}: the mistake was not found")
    result = check_vjp(forward, correct, inputs)
    print(
        f"   corrected: {result.comparisons} derivatives by {result.method}, largest error {result.max_error:.1e}\n"
    )

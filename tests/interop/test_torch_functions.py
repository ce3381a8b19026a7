"""Functions, losses and forms of attention against PyTorch: values and gradients for random cotangents."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tinyllm import gradients, ops
from tinyllm.autograd.tensor import Tensor

torch = pytest.importorskip("torch", reason="needs the interop-test extra")
F = torch.nn.functional

Array = np.ndarray[Any, Any]
INF, NAN = np.inf, np.nan
TOLERANCES = {np.float32: 2e-5, np.float64: 1e-12}
REDUCTIONS = ("mean", "sum", "none")


def compare(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    arrays: Sequence[Array],
    tolerance: float = 1e-12,
    second: bool = False,
) -> None:
    """Values and gradients of all inputs, for a random cotangent; with `second`, of the gradients' cubes again."""
    rng = np.random.default_rng(7)
    xs = [Tensor(x, requires_grad=True) for x in arrays]
    peers = [torch.tensor(x, requires_grad=True) for x in arrays]
    output, their_output = ours(*xs), theirs(*peers)
    assert_close(output.data, their_output, tolerance)
    cotangent = rng.standard_normal(output.shape).astype(output.dtype)
    if second:  # what is linear has no second derivative in torch
        output, their_output = output + 0 * output**3, their_output + 0 * their_output**3
    found = gradients(output, xs, cotangent, create_graph=True)
    expected = torch.autograd.grad(their_output, peers, torch.tensor(cotangent), create_graph=second)
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine.data, other, tolerance)
    if second:
        total = sum(((x**3).sum() for x in found), Tensor(np.zeros((), output.dtype)))
        their_total = sum((x**3).sum() for x in expected)
        for mine, other in zip(gradients(total, xs), torch.autograd.grad(their_total, peers), strict=True):
            assert_close(mine, other, tolerance)


def assert_close(found: Array, expected: Any, tolerance: float) -> None:
    """Equal in shape, dtype, NaN and infinities; to `tolerance` of the largest number, at least 1, otherwise."""
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=1))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


# ---- Element by element ------------------------------------------------------------------------

ONE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], float]] = {
    "softplus": (ops.softplus, lambda x: torch.logaddexp(x, torch.zeros_like(x)), -30),
    "log_sigmoid": (ops.log_sigmoid, F.logsigmoid, -30),
    "log2": (ops.log2, torch.log2, 0.1),
    "log10": (ops.log10, torch.log10, 0.1),
    "tan": (ops.tan, torch.tan, -1.5),
    "np.tan": (np.tan, torch.tan, -1.5),
    "np.log2": (np.log2, torch.log2, 0.1),
    "np.log10": (np.log10, torch.log10, 0.1),
    "np.logaddexp": (lambda x: np.logaddexp(x, 1), lambda x: torch.logaddexp(x, torch.ones_like(x)), -30),
    "leaky_relu": (ops.leaky_relu, F.leaky_relu, -3),
    "leaky_relu 0.2": (lambda x: ops.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2), -3),
    "elu": (ops.elu, F.elu, -3),
    "elu 0.5": (lambda x: ops.elu(x, 0.5), lambda x: F.elu(x, 0.5), -3),
    "squared_relu": (ops.squared_relu, lambda x: F.relu(x) ** 2, -3),
    "rms_norm without weight": (
        lambda x: ops.rms_norm(x, eps=1e-3),
        lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-3),
        -3,
    ),
    "layer_norm without weight": (ops.layer_norm, lambda x: F.layer_norm(x, x.shape[-1:]), -3),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_argument(name: str, dtype: Any) -> None:
    ours, theirs, low = ONE[name]
    for shape in ((3, 4), (1, 5, 1), (0, 3)):
        x = (
            np.random.default_rng(1)
            .uniform(low, max(-low, 3) if name != "np.tan" else 1.5, shape)
            .astype(dtype)
        )
        if "tan" in name:
            x = np.clip(x, -1.5, 1.5)
        compare(
            ours, theirs, [x], TOLERANCES[dtype] * (100 if "tan" in name else 1), second=dtype == np.float64
        )


EDGES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[list[float]]]] = {
    "softplus": (ops.softplus, F.softplus, [[-INF, INF, -1000, 1000, 0, NAN]]),
    "log_sigmoid": (ops.log_sigmoid, F.logsigmoid, [[-INF, INF, -1000, 1000, 0, NAN]]),
    "logaddexp": (
        ops.logaddexp,
        torch.logaddexp,
        [
            [-INF, INF, INF, -INF, -INF, 3, 0, 1000, -1000, NAN],
            [-INF, INF, -INF, INF, 1, INF, 0, 999, 1000, 0],
        ],
    ),
    "elu": (ops.elu, F.elu, [[-INF, INF, -1000, 1000, 0]]),
    "leaky_relu": (ops.leaky_relu, F.leaky_relu, [[-INF, INF, -1000, 1000, 0, NAN]]),
    "squared_relu": (ops.squared_relu, lambda x: F.relu(x) ** 2, [[-INF, INF, -1000, 1000, 0, NAN]]),
    "log2": (ops.log2, torch.log2, [[0, INF, -1, 8, 2.0**-1060, NAN]]),
    "log10": (ops.log10, torch.log10, [[0, INF, -1, 1000, 1e-310, NAN]]),
    "mse_loss": (
        lambda x, y: ops.mse_loss(x, y, "none"),
        lambda x, y: F.mse_loss(x, y, reduction="none"),
        [[INF, 1, 0, 1e200], [0, 0, 0, 0]],
    ),
    "l1_loss": (
        lambda x, y: ops.l1_loss(x, y, "none"),
        lambda x, y: F.l1_loss(x, y, reduction="none"),
        [[INF, 1, 0, -1e200], [0, 0, 0, 0]],
    ),
    "smooth_l1_loss": (
        lambda x, y: ops.smooth_l1_loss(x, y, "none"),
        lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
        [[INF, -INF, 1, -1, 0, 1e300, 0.25], [0, 0, 0, 0, 0, 0, 0]],
    ),
    "huber_loss": (
        lambda x, y: ops.huber_loss(x, y, "none", 0.5),
        lambda x, y: F.huber_loss(x, y, reduction="none", delta=0.5),
        [[INF, -INF, 0.5, -0.5, 0, 1e300, 0.25], [0, 0, 0, 0, 0, 0, 0]],
    ),
    "binary_cross_entropy_with_logits": (
        lambda x: ops.binary_cross_entropy_with_logits(
            x, np.array([0.0, 1, 0, 1, 0.3, 1, 0]), reduction="none"
        ),
        lambda x: F.binary_cross_entropy_with_logits(
            x, torch.tensor([0.0, 1, 0, 1, 0.3, 1, 0], dtype=x.dtype), reduction="none"
        ),
        [[1000, 1000, -1000, -1000, 0, 0, INF]],
    ),
    "kl_div": (
        lambda x: ops.kl_div(x, np.array([0, 0.5, 0.5, 1e-300]), "none"),
        lambda x: F.kl_div(x, torch.tensor([0, 0.5, 0.5, 1e-300], dtype=x.dtype), reduction="none"),
        [[-1000, -INF, -1e300, -1]],
    ),
    "cumprod": (lambda x: ops.cumprod(x, 0), lambda x: torch.cumprod(x, 0), [[2, 0, 3, 0, 5, -1]]),
    "label smoothing": (
        lambda x: ops.cross_entropy(x, np.array(1), label_smoothing=0.1),
        lambda x: F.cross_entropy(x, torch.tensor(1), label_smoothing=0.1),
        [[-INF, 1, 2]],
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    ours, theirs, lines = EDGES[name]
    with np.errstate(all="ignore"):
        compare(ours, theirs, [np.array(line, dtype=np.float64) for line in lines], 1e-14)


# ---- Losses ------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "mse_loss": (ops.mse_loss, F.mse_loss, {}),
    "l1_loss": (ops.l1_loss, F.l1_loss, {}),
    "smooth_l1_loss": (ops.smooth_l1_loss, F.smooth_l1_loss, {}),
    "smooth_l1_loss 0.3": (ops.smooth_l1_loss, F.smooth_l1_loss, {"beta": 0.3}),
    "smooth_l1_loss 0": (ops.smooth_l1_loss, F.smooth_l1_loss, {"beta": 0.0}),
    "huber_loss": (ops.huber_loss, F.huber_loss, {}),
    "huber_loss 0.3": (ops.huber_loss, F.huber_loss, {"delta": 0.3}),
    "binary_cross_entropy_with_logits": (
        ops.binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
        {},
    ),
    "kl_div": (ops.kl_div, F.kl_div, {}),
    "kl_div of logarithms": (ops.kl_div, F.kl_div, {"log_target": True}),
}


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_two_arguments(name: str, dtype: Any) -> None:
    ours, theirs, arguments = PAIRS[name]
    rng = np.random.default_rng(2)
    reductions = (*REDUCTIONS, "batchmean") if name.startswith("kl_div") else REDUCTIONS

    def check(shape: tuple[int, ...], reduction: str) -> None:
        pair = [rng.uniform(-2, 2, shape).astype(dtype), rng.uniform(0.05, 0.95, shape).astype(dtype)]
        compare(
            lambda x, y: ours(x, y, reduction=reduction, **arguments),
            lambda x, y: theirs(x, y, reduction=reduction, **arguments),
            pair,
            TOLERANCES[dtype],
        )

    for shape, reduction in itertools.product(((2, 3), (4,), (1, 2, 2)), reductions):
        check(shape, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_weights_of_binary_cross_entropy(with_pos_weight: bool, with_weight: bool, reduction: str) -> None:
    rng = np.random.default_rng(3)
    weights = (
        rng.random((3, 1)) if with_weight else None,
        reduction,
        rng.uniform(0.5, 3, 4) if with_pos_weight else None,
    )
    in_torch = [w if w is None else torch.tensor(w) for w in (weights[0], weights[2])]
    compare(
        lambda x, y: ops.binary_cross_entropy_with_logits(x, y, *weights),
        lambda x, y: F.binary_cross_entropy_with_logits(
            x, y, in_torch[0], reduction=reduction, pos_weight=in_torch[1]
        ),
        [rng.uniform(-3, 3, (3, 4)), rng.uniform(0, 1, (3, 4))],
    )


SHAPES = ((5,), (3, 5), (2, 3, 5), (2, 2, 1, 2, 5), (3, 1))


def drawn_targets(rng: np.random.Generator, shape: tuple[int, ...], ignore_index: int) -> Array:
    """Classes, of which some but not the first are ignored."""
    targets = np.asarray(rng.integers(0, shape[-1], shape[:-1]))
    targets[targets == ignore_index] = 0
    if targets.size > 1:
        targets.reshape(-1)[1:][rng.random(targets.size - 1) < 0.4] = ignore_index
    return targets


def classes_second(x: Any) -> Any:
    """Classes on torch's axis, which is the second where there is one."""
    return x.movedim(-1, min(1, x.ndim - 1)).contiguous()


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [*[(shape, np.float64) for shape in SHAPES], ((2, 3, 5), np.float32)]
)
def test_losses_of_classes(shape: tuple[int, ...], reduction: str, is_weighted: bool, dtype: Any) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal(shape).astype(dtype)
    weight = rng.uniform(0.5, 2, shape[-1]).astype(dtype) if is_weighted else None
    in_torch = None if weight is None else torch.tensor(weight)
    q = rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(dtype)
    tolerance = TOLERANCES[dtype]

    def check(ignore_index: int, smoothing: float) -> None:
        targets = drawn_targets(rng, shape, ignore_index)
        compare(
            lambda x: ops.cross_entropy(x, targets, ignore_index, reduction, 0.0, weight, smoothing),
            lambda x: F.cross_entropy(
                classes_second(x),
                torch.tensor(targets),
                in_torch,
                None,
                ignore_index,
                None,
                reduction,
                smoothing,
            ),
            [logits],
            tolerance,
            second=smoothing == 0.1 and dtype == np.float64,
        )
        compare(
            lambda x: ops.nll_loss(x, targets, weight, ignore_index, reduction),
            lambda x: F.nll_loss(
                classes_second(x), torch.tensor(targets), in_torch, None, ignore_index, None, reduction
            ),
            [logits],
            tolerance,
        )
        compare(
            lambda x, p: ops.cross_entropy(
                x, p, reduction=reduction, weight=weight, label_smoothing=smoothing
            ),
            lambda x, p: F.cross_entropy(
                classes_second(x), classes_second(p), in_torch, reduction=reduction, label_smoothing=smoothing
            ),
            [logits, q],
            tolerance,
            second=smoothing == 0.1 and dtype == np.float64,
        )

    for ignore_index, smoothing in ((-100, 0.0), (2, 0.1), (-100, 1.0)):
        check(ignore_index, smoothing)


# ---- Rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [0, 2, -1, None])
def test_embedding_with_padding(padding_idx: int | None) -> None:
    indices = np.array([[0, 2, 3], [2, 2, 1]])
    compare(
        lambda w: ops.embedding(w, indices, padding_idx),
        lambda w: F.embedding(torch.tensor(indices), w, padding_idx),
        [np.random.default_rng(5).standard_normal((4, 2))],
        second=True,
    )


def test_one_hot() -> None:
    for indices in (np.array([[0, 2], [1, 0]]), np.array(3), np.array([1], dtype=np.uint8)):
        for count in (None, 5):
            found = ops.one_hot(indices, count)
            expected = F.one_hot(torch.tensor(indices.astype(int)), -1 if count is None else count)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found.data, expected.numpy())


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 4, 3), (5, 1, 1), (0, 3, 2)])
def test_scatter_add(axis: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal([5 if i == axis % 3 else n for i, n in enumerate((6, 4, 3))])
    source = rng.standard_normal((6, 4, 3))
    indices = rng.integers(0, 5, shape)
    compare(
        lambda a, b: ops.scatter_add(a, axis, indices, b),
        # PyTorch 2 has no gradient for a source that is longer than its indices.
        lambda a, b: a.scatter_add(
            axis, torch.tensor(indices), b[tuple(slice(n) for n in shape)].contiguous()
        ),
        [x, source],
        second=True,
    )


# ---- Attention ---------------------------------------------------------------------------------

LEADING: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "no heads": ((), ()),
    "heads": ((4,), (4,)),
    "grouped heads": ((4,), (2,)),
    "batch": ((2, 4), (2, 2)),
    "two batch axes": ((2, 3, 4), (2, 3, 2)),
    "three batch axes": ((2, 1, 3, 2), (2, 1, 3, 2)),
    "batch that broadcasts": ((3, 1, 2), (1, 2, 2)),
    "keys without a batch": ((2, 3, 2), (2,)),
    "keys without heads": ((2, 3), ()),
    "queries without a batch": ((2,), (3, 2)),
    "empty batch": ((0, 2), (0, 2)),
}


def attention_in_torch(q: Any, k: Any, v: Any, mask: Any, causal: bool = False) -> Any:
    """Grouped heads repeated, and the causal mask added to one of numbers, which torch does not take together."""
    if q.ndim > 2 and k.ndim > 2 and 1 < k.shape[-3] != q.shape[-3]:
        k, v = (y.repeat_interleave(q.shape[-3] // y.shape[-3], -3) for y in (k, v))
    if causal:
        T, S = q.shape[-2], k.shape[-2]
        seen = torch.ones((T, S), dtype=torch.bool).tril(S - T)
        mask = seen if mask is None else torch.where(seen, mask, -INF)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def qkv(of_queries: tuple[int, ...], of_keys: tuple[int, ...], dtype: Any = np.float64) -> list[Array]:
    rng = np.random.default_rng(8)
    shapes = ((*of_queries, 3, 4), (*of_keys, 5, 4), (*of_keys, 5, 2))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LEADING)
def test_attention_with_any_leading_axes(name: str, causal: bool) -> None:
    compare(
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, causal),
        lambda q, k, v: attention_in_torch(q, k, v, None, causal),
        qkv(*LEADING[name]),
    )


def mask_shapes(scores: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that broadcast to that of the scores: it, with axes of length 1, with axes left out."""
    every_second = tuple(n if i % 2 else 1 for i, n in enumerate(scores))
    return [scores, every_second, *(scores[i:] for i in range(1, len(scores) + 1))]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "name", ["no heads", "grouped heads", "batch", "two batch axes", "keys without a batch"]
)
def test_attention_with_additive_masks(name: str, causal: bool, dtype: Any) -> None:
    rng = np.random.default_rng(9)
    arrays = qkv(*LEADING[name], dtype)
    for shape in mask_shapes((*LEADING[name][0], 3, 5)):
        mask = rng.standard_normal(shape).astype(dtype)
        mask[rng.random(shape) < 0.3] = -INF
        if shape[-2:] == (3, 5):
            mask[..., 1, :] = -INF  # a query that sees no key
        compare(
            lambda q, k, v, m: ops.scaled_dot_product_attention(q, k, v, causal, m),
            lambda q, k, v, m: attention_in_torch(q, k, v, m, causal),
            [*arrays, mask],
            TOLERANCES[dtype],
        )


@pytest.mark.parametrize("name", ["no heads", "heads", "batch", "two batch axes", "keys without a batch"])
def test_attention_with_boolean_masks(name: str) -> None:
    arrays = qkv(*LEADING[name])

    def check(mask: Array) -> None:
        compare(
            lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, mask=mask),
            lambda q, k, v: attention_in_torch(q, k, v, torch.tensor(mask)),
            arrays,
        )

    for shape in mask_shapes((*LEADING[name][0], 3, 5)):
        check(np.random.default_rng(10).random(shape) < 0.6)

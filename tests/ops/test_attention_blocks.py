"""Attention in blocks: the values and gradients of the whole, in memory that grows with the length alone."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, gradients, ops, use_formulas
from tinyllm.ops.fast import attention, tiled_attention
from tinyllm.system.cores import threads_allowed

# (B, H, G, T, S, K, K_v), causal, the shape of a random mask or None
SETTINGS: list[tuple[tuple[int, ...], bool, tuple[int, ...] | None]] = [
    ((2, 4, 2, 7, 7, 4, 5), True, None),
    ((1, 2, 2, 5, 9, 4, 4), True, None),
    ((1, 2, 1, 9, 5, 4, 3), True, None),  # the first queries see no key
    ((2, 2, 2, 6, 8, 4, 4), False, None),
    ((2, 2, 2, 6, 8, 4, 4), False, (6, 8)),
    ((2, 4, 2, 6, 6, 4, 4), True, (2, 1, 6, 6)),
    ((2, 6, 2, 5, 6, 4, 4), True, (6, 5, 6)),  # each query head has its own
    ((2, 6, 2, 5, 6, 4, 4), False, (2, 1, 1, 6)),
    ((1, 2, 1, 6, 6, 4, 4), True, (2, 6, 1)),
]


def in_tiles(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(attention, "KEPT_SCORES", 0)
    patch.setattr(tiled_attention, "_COLUMNS", 2)
    patch.setattr(tiled_attention, "_ELEMENTS", 2 * rows)


def in_tiles_less_the_maximum(patch: pytest.MonkeyPatch, rows: int) -> None:
    in_tiles(patch, rows)
    patch.setattr(tiled_attention, "_SAFE_SCORE", 0)


def kept_in_blocks(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(attention, "CAUSAL_ROWS", rows)


def probabilities(q: Any, k: Any, causal: bool, mask: Any) -> Any:
    """P (B, H, T, S) by the formula."""
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    scores = q @ np.repeat(k, H // k.shape[1], axis=1).swapaxes(2, 3) / np.sqrt(q.shape[3])
    seen = np.tri(T, S, S - T, dtype=bool) if causal else np.ones((T, S), dtype=bool)
    exponentials = np.exp(scores) * (seen if mask is None else seen & mask)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total == 0, 1, total)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(("shape", "causal", "mask_shape"), SETTINGS)
def test_blocks_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    shape: tuple[int, ...],
    causal: bool,
    mask_shape: tuple[int, ...] | None,
) -> None:
    B, H, G, T, S, K, K_v = shape
    rng = np.random.default_rng(rows)
    q, k, v = (
        Tensor(rng.normal(size=size), requires_grad=True)
        for size in ((B, H, T, K), (B, G, S, K), (B, G, S, K_v))
    )
    mask = None if mask_shape is None else rng.random(mask_shape) < 0.5
    cotangent = rng.normal(size=(B, H, T, K_v))

    def run() -> list[Any]:
        out = ops.scaled_dot_product_attention(q, k, v, causal=causal, mask=mask)
        if isinstance(out.op, attention.ScaledDotProductAttention):
            assert bool(out.op.kept) == (attention.KEPT_SCORES > 0)
            assert rows >= T or not (causal and out.op.keeps) or len(out.op.blocks) > 1
            np.testing.assert_allclose(out.op.p, probabilities(q.data, k.data, causal, mask), rtol=1e-12)
        return [out.data, *gradients(out, [q, k, v], cotangent)]

    with use_formulas():
        expected = run()
    for patch in (kept_in_blocks, in_tiles, in_tiles_less_the_maximum):
        patch(monkeypatch, rows)
        # Sums of at most 9 terms of size 1 to 10 in float64.
        for mine, theirs in zip(run(), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "size", "largest"),
    [
        ("float32", 31, 1e20),
        ("float32", 33, 1e20),
        ("float32", 63, 1e20),
        ("float32", 5000, 1e20),
        ("float16", 16, 1),
    ],
)
def test_scores_of_every_size(
    monkeypatch: pytest.MonkeyPatch, dtype: str, size: float, largest: float
) -> None:
    """Among the largest scores there may be, and far below them, the output is that of the formula."""
    in_tiles(monkeypatch, 3)
    rng = np.random.default_rng(3)
    directions = rng.normal(size=(2, 1, 1, 9, 4))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    directions[1, 0, 0, ::2] = directions[0, 0, 0, ::2]  # some queries look along a key, and some against one
    directions[1, 0, 0, 1] = -directions[0, 0, 0, 1]
    q, k = (size**0.5 * directions).astype(dtype)
    v = (largest * rng.uniform(-1, 1, size=(1, 1, 9, 3))).astype(dtype)
    out = ops.scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), scale=1.0)
    expected = probabilities(*(x.astype(np.longdouble) for x in (2 * q, k)), False, None) @ v  # 2: sqrt(K)
    # A score is rounded to `size` times epsilon, and the weights are its exponential.
    np.testing.assert_allclose(out.data, expected, rtol=0, atol=8 * size * largest * np.finfo(dtype).eps)


def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    in_tiles(monkeypatch, 2)
    q = Tensor(np.full((1, 1, 4, 2), 300.0, dtype=np.float32), requires_grad=True)
    k = Tensor(np.array([[[[300.0, 0], [0, 1], [1, 0], [300.0, 0]]]], dtype=np.float32))
    v = Tensor(np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1))
    out = ops.scaled_dot_product_attention(q, k, v, causal=True, scale=1.0)
    np.testing.assert_allclose(out.data[0, 0, :, 0], [0, 0, 0, 1.5])
    assert np.isfinite(gradients(out, [q], np.ones(out.shape))[0]).all()


def test_memory_grows_with_the_length() -> None:
    """Twice the length takes little more than twice the memory; probabilities that are kept would take four times."""

    def peak(T: int) -> int:
        rng = np.random.default_rng(0)
        q, k, v = (
            Tensor(rng.normal(size=(1, 2, T, 16)).astype(np.float32), requires_grad=True) for _ in range(3)
        )
        tracemalloc.start()
        with threads_allowed(1):  # each thread has blocks of its own
            out = ops.scaled_dot_product_attention(q, k, v, causal=True)
            gradients(out, [q, k, v], rng.normal(size=out.shape).astype(np.float32))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(4096) < 2.3 * peak(2048)
    assert peak(4096) < 4096 * 4096  # a sixteenth of the scores and their gradients

"""Philox 4x32-10, a counter-based random generator in plain integer array arithmetic.

Random numbers are a pure function of a key and a counter, so that a mask drawn inside a graph has the same
bits on NumPy and CuPy, in any thread, on any rank, in recomputation and after a resume.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

from tinyllm import backend
from tinyllm.backend import Array, current

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF


class Key(NamedTuple):
    """What a stream of random numbers depends on; each part is a non-negative integer.

    `seed` has 64 bits; `step`, `stream` (which module draws) and `micro_batch` have 32 bits each.
    """

    seed: int
    step: int = 0
    stream: int = 0
    micro_batch: int = 0


@backend.elementwise
def philox_4x32(
    c0: Array, c1: Array, c2: Array, c3: Array, k0: Array | int, k1: Array | int
) -> tuple[Array, Array, Array, Array]:
    """Ten rounds of Philox on four uint64 arrays that hold 32-bit words; returns four such arrays.

    c0 to c3: the counter, each (N,) or broadcastable to it; k0, k1: the key, likewise or integers.
    """
    for _ in range(ROUNDS):
        product_0 = c0 * MULTIPLIER_0
        product_1 = c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & WORD,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & WORD,
        )
        k0 = (k0 + WEYL_0) & WORD
        k1 = (k1 + WEYL_1) & WORD
    return c0, c1, c2, c3


def random_words(count: int, key: Key) -> Array:
    """`count` random 32-bit words for `key`: uint32, shape (count,)."""
    xp = current.xp
    blocks = -(-count // 4)
    index = xp.arange(blocks, dtype=xp.uint64)
    step, stream, micro_batch = (
        xp.full(1, part & WORD, dtype=xp.uint64) for part in (key.step, key.stream, key.micro_batch)
    )
    words = xp.empty((blocks, 4), dtype=xp.uint32)
    found = philox_4x32(index, step, stream, micro_batch, key.seed & WORD, (key.seed >> 32) & WORD)
    for lane, word in enumerate(found):
        words[:, lane] = word
    return words.reshape(-1)[:count]


def keep_mask(shape: tuple[int, ...], drop_probability: float, key: Key) -> Array:
    """A boolean mask that is True with probability `1 - drop_probability`, to within 2**-32."""
    count = 1
    for size in shape:
        count *= size
    threshold = round(drop_probability * 2**32)
    return (random_words(count, key) >= min(threshold, WORD)).reshape(shape)

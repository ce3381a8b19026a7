"""The gradient laboratory on many functions: no right backward is refused, and no wrong one passes.

At random points, at zeros and equal elements, at tiny inputs, and at what hypothesis draws, in float64 and float32.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from functions import ON_ONE_SIDE, RIGHT, SHARED, WRONG, Array, Right, Wrong
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.testing import GradientError, check_vjp
from tinyllm.testing import strategies as t

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])


def random_inputs(right: Right, dtype: Any) -> list[Array]:
    rng = np.random.default_rng(zlib.crc32(str(right.shapes).encode()))
    return [
        *(rng.uniform(right.low, right.high, shape).astype(dtype) for shape in right.shapes),
        *right.constants,
    ]


def equal_inputs(right: Right, dtype: Any, value: float, other: float | None = None) -> list[Array]:
    """All elements the same, or every second `other`, and no number outside the domain."""
    first, second = (max(v, right.low) for v in (value, value if other is None else other))
    inputs = [np.resize(np.array([first, second], dtype), shape) for shape in right.shapes]
    return [*inputs, *right.constants]


POINTS: dict[str, Callable[[Right, Any], list[Array]]] = {
    "random": random_inputs,
    "zeros": lambda right, dtype: equal_inputs(right, dtype, 0.0),
    "one and minus one": lambda right, dtype: equal_inputs(right, dtype, 1.0, -1.0),
    "tiny": lambda right, dtype: equal_inputs(right, dtype, 1e-12),
    "mixed": lambda right, dtype: [
        np.where(np.arange(x.size).reshape(x.shape) % 2, x, max(right.low, 0)).astype(dtype) if x.dtype == dtype else x
        for x in random_inputs(right, dtype)
    ],
}  # fmt: skip


def test_there_are_many() -> None:
    assert len(RIGHT) >= 60
    assert len(WRONG) >= 60


@DTYPES
@pytest.mark.parametrize("name", RIGHT)
def test_no_right_backward_is_refused(name: str, dtype: Any) -> None:
    right = RIGHT[name]
    for point in POINTS.values():
        check_vjp(right.function, right.backward, point(right, dtype))


@DTYPES
@pytest.mark.parametrize("wrong", [*WRONG, *ON_ONE_SIDE], ids=lambda wrong: wrong.name)
def test_no_wrong_backward_passes(wrong: Wrong, dtype: Any) -> None:
    right = RIGHT[wrong.name]
    for place, point in POINTS.items():
        with pytest.raises(GradientError) as caught:
            check_vjp(right.function, wrong.backward, point(right, dtype))
        if place == "random":
            assert re.search(wrong.cause, caught.value.cause), caught.value


@DTYPES
@pytest.mark.parametrize("wrong", SHARED, ids=lambda wrong: wrong.name)
def test_a_gradient_is_not_given_to_each_of_several_equal_elements(wrong: Wrong, dtype: Any) -> None:
    right = RIGHT[wrong.name]
    for value in (0.0, 1.0):
        with pytest.raises(GradientError) as caught:
            check_vjp(right.function, wrong.backward, equal_inputs(right, dtype, value))
        assert re.search(wrong.cause, caught.value.cause), caught.value


def drawn(data: st.DataObject, right: Right) -> list[Array]:
    dtype = data.draw(t.floating_dtypes())
    arrays = [data.draw(t.arrays(shape, dtype, right.low, right.high)) for shape in right.shapes]
    return [*arrays, *right.constants]


@given(st.data(), st.sampled_from(sorted(RIGHT)))
def test_no_right_backward_is_refused_where_hypothesis_goes(data: st.DataObject, name: str) -> None:
    check_vjp(RIGHT[name].function, RIGHT[name].backward, drawn(data, RIGHT[name]))


@given(st.data(), st.sampled_from(WRONG))
def test_no_wrong_backward_passes_where_hypothesis_goes(data: st.DataObject, wrong: Wrong) -> None:
    with pytest.raises(GradientError):
        check_vjp(RIGHT[wrong.name].function, wrong.backward, drawn(data, RIGHT[wrong.name]))

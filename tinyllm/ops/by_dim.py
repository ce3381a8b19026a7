"""Functions that torch and NumPy mean different things by: torch's, with its words.

A function or a method of the name is one of these when it is called with `dim=`, and `tinyllm.max` is one always.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinyllm.autograd.operands import as_tensor
from tinyllm.autograd.operators import Axis
from tinyllm.autograd.tensor import Tensor
from tinyllm.ops import reduce, shape
from tinyllm.ops.index import take_along_axis
from tinyllm.ops.ordering import argsort
from tinyllm.ops.without_gradient import argmax, argmin


class Found(NamedTuple):
    """Values, and the positions that they were found at."""

    values: Tensor
    indices: Tensor


def max(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The maximum along an axis, the first of equal ones, and its position; without `dim`, of all."""
    return reduce.max(input) if dim is None else _found(input, argmax(input, dim, True), dim, keepdim)


def min(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The minimum along an axis, the first of equal ones, and its position; without `dim`, of all."""
    return reduce.min(input) if dim is None else _found(input, argmin(input, dim, True), dim, keepdim)


def sort(input: Any, dim: int = -1, descending: bool = False) -> Found:
    """The elements sorted along an axis, and their positions before."""
    return _found(input, argsort(input, dim, descending), dim, True)


def _found(x: Any, positions: Tensor, axis: int, keepdim: bool) -> Found:
    x = as_tensor(x)
    found = Found(take_along_axis(x, positions.data, axis) if x.ndim else x, positions)
    return found if keepdim or not x.ndim else Found(*[shape.squeeze(each, axis) for each in found])


def split(tensor: Any, split_size_or_sections: Any, dim: int = 0) -> list[Tensor]:
    """The tensor cut along an axis into parts of a length, the last one maybe shorter, or of the lengths listed."""
    n, lengths = as_tensor(tensor).shape[dim], split_size_or_sections
    if np.ndim(lengths) == 0:
        return shape.split(tensor, list(range(n))[:: operator.index(lengths)][1:], dim)
    if sum(lengths) != n:
        raise ValueError(
            f"split: the lengths {list(lengths)} are those of {sum(lengths)} elements, not of {n}"
        )
    return shape.split(tensor, list(itertools.accumulate(lengths))[:-1], dim)


def var(
    input: Any,
    dim: Axis = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: int | None = None,
) -> Tensor:
    """The variance over axes, divided by n - 1, or by n - correction."""
    return reduce.var(input, dim, keepdim, int(unbiased) if correction is None else correction)


def std(
    input: Any,
    dim: Axis = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: int | None = None,
) -> Tensor:
    """The standard deviation over axes, with n - 1, or n - correction."""
    return reduce.std(input, dim, keepdim, int(unbiased) if correction is None else correction)


BY_DIM: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "sort": sort,
    "split": split,
    "std": std,
    "var": var,
}
"""These functions by name."""

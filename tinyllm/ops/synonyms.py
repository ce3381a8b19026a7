"""Names of torch, and of NumPy elsewhere, for the functions and arguments that are offered here under NumPy's names.

The meaning is always that of the function here. Where torch's function of the same name has another, its word raises.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

ARGUMENTS = {
    "dim": "axis", "dims": "axis", "dim1": "axis1", "dim2": "axis2", "start_dim": "start_axis", "end_dim": "end_axis",
    "keepdim": "keepdims", "ddof": "correction", "unbiased": "correction", "min": "low", "max": "high",
    "a_min": "low", "a_max": "high", "index": "indices", "shifts": "shift", "p": "ord",
    "src": "source",
}  # fmt: skip
"""Other words for arguments: which argument each of them is."""

FUNCTIONS = {
    "abs": "absolute", "amax": "max", "amin": "min", "cat": "concatenate", "clamp": "clip",
    "clone": "copy", "div": "divide", "logsigmoid": "log_sigmoid", "movedim": "moveaxis", "mul": "multiply",
    "neg": "negative", "pow": "power", "ravel": "flatten", "repeat_interleave": "repeat", "sub": "subtract",
    "unsqueeze": "expand_dims", "view": "reshape",
}  # fmt: skip
"""Other names of functions: which function each of them is."""

_PAIRS = "torch returns a pair (values, positions), this function the values"
_DIVISOR = "torch divides by n - 1 unless told otherwise, NumPy and this function by n"
REFUSED = {
    "max": f"{_PAIRS}; say axis=, or amax(dim=); argmax has the positions",
    "min": f"{_PAIRS}; say axis=, or amin(dim=); argmin has the positions",
    "sort": f"{_PAIRS}; say axis=; argsort has the positions, and topk both",
    "split": "torch cuts into parts of a given length, NumPy and this function into a number of parts; "
    "say axis=, or chunk(x, parts, dim)",
    "var": f"{_DIVISOR}; say dim= with correction=, or axis=",
    "std": f"{_DIVISOR}; say dim= with correction=, or axis=",
}
"""Functions that torch's `dim` is not accepted by, because its meaning would be another, and what to say instead."""


def with_synonyms(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, offered as `name`, taking the other words for its arguments as well.

    The result raises TypeError for an argument that is given under two names, and for a word in `REFUSED`.
    """
    parameters = inspect.signature(function).parameters
    words = {word: own for word, own in ARGUMENTS.items() if own in parameters and word not in parameters}
    if not words:
        return function

    @functools.wraps(function)
    def translated(*arguments: Any, **keywords: Any) -> Any:
        if keywords and not words.keys().isdisjoint(keywords):
            keywords = _translated(name, words, keywords)
        return function(*arguments, **keywords)

    return translated


def _translated(name: str, words: dict[str, str], keywords: dict[str, Any]) -> dict[str, Any]:
    own = {words.get(word, word): value for word, value in keywords.items()}
    if len(own) < len(keywords):
        raise TypeError(f"{name}: an argument is given under two names, {' and '.join(keywords)}")
    if "dim" in keywords and name in REFUSED and "correction" not in own:
        raise TypeError(f"{name}: dim= is torch's word, and {REFUSED[name]}")
    return own

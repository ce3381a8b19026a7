"""Names of torch, and of NumPy elsewhere, for the functions and arguments that are offered here under NumPy's names.

The meaning is that of the function here. Where torch's function of the same name has another, `dim=`, which is torch's
word alone, calls torch's (`by_dim`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tinyllm.ops.by_dim import BY_DIM

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
    "type": "astype", "unsqueeze": "expand_dims", "view": "reshape",
}  # fmt: skip
"""Other names of functions: which function each of them is."""


def with_synonyms(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, offered as `name`, taking the other words for its arguments as well.

    The result raises TypeError for an argument that is given under two names.
    """
    parameters = inspect.signature(function).parameters
    words = {word: own for word, own in ARGUMENTS.items() if own in parameters and word not in parameters}
    if not words:
        return function

    @functools.wraps(function)
    def translated(*arguments: Any, **keywords: Any) -> Any:
        if not keywords or words.keys().isdisjoint(keywords):
            return function(*arguments, **keywords)
        if "dim" in keywords and name in BY_DIM:
            return BY_DIM[name](*arguments, **keywords)
        return function(*arguments, **_translated(name, words, keywords))

    return translated


def _translated(name: str, words: dict[str, str], keywords: dict[str, Any]) -> dict[str, Any]:
    own = {words.get(word, word): value for word, value in keywords.items()}
    if len(own) < len(keywords):
        raise TypeError(f"{name}: an argument is given under two names, {' and '.join(keywords)}")
    return own

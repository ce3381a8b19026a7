"""Hypothesis strategies for arrays, shapes, axes, indices, model configs, tokens and texts.

Failing examples shrink to the smallest: no axes before axes, short before long, zeros before numbers, a plain memory
layout before a strange one. All have good health under hypothesis's default profile.

Profiles: `register_profiles()` registers `ci` (few examples, the same ones in every run, no deadline) and `thorough`
(many, random, no deadline), and loads the one that the environment variable `TINYLLM_PROFILE` names:

    TINYLLM_PROFILE=thorough python -m pytest

Example:
    >>> from hypothesis import given
    >>> from tinyllm.testing import gradcheck
    >>> @given(arrays(shapes(min_axes=1)))
    ... def test_my_function(x):
    ...     gradcheck(lambda x: (x * x).cumsum(0), x)
"""

from __future__ import annotations

import array
import collections
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from tinyllm.backend import Array
from tinyllm.models import POSITION_ENCODINGS, ModelConfig
from tinyllm.system.errors import InputError

try:
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as numpy_strategies
except ImportError as error:
    raise ImportError(
        "tinyllm.testing.strategies needs hypothesis, which is not installed; pip install 'tinyllm-numpy[test]'"
    ) from error

Shape = tuple[int, ...]
PROFILE_VARIABLE = "TINYLLM_PROFILE"


def register_profiles(default: str | None = None) -> str | None:
    """Register the profiles `ci` and `thorough`, and load one; returns its name.

    That is the one that the environment variable TINYLLM_PROFILE names, or `default`; with neither, the profile in
    use stays. Call it in a conftest.py, before tests are defined: settings take the profile of that moment.

    Raises InputError when the name is no profile.
    """
    default_profile = hypothesis.settings.get_profile(
        "default"
    )  # not the one in use, which may be one of these
    hypothesis.settings.register_profile(
        "ci", default_profile, max_examples=25, derandomize=True, deadline=None
    )
    hypothesis.settings.register_profile("thorough", default_profile, max_examples=1000, deadline=None)
    name = os.environ.get(PROFILE_VARIABLE) or default
    if name is None:
        return None
    try:
        hypothesis.settings.load_profile(name)
    except hypothesis.errors.InvalidArgument:
        raise InputError(
            f"{PROFILE_VARIABLE}={name!r} is no hypothesis profile; choose ci, thorough or default"
        ) from None
    return name


# ---- Arrays ------------------------------------------------------------------------------------


def _transposed(x: Array) -> Array:
    return np.array(x.T, order="C").T


def _strided(x: Array) -> Array:
    """The same values as every second element of a larger memory, which is NaN elsewhere."""
    wide = np.full(tuple(2 * n for n in x.shape), np.nan, dtype=x.dtype)
    every_second: Any = (*(slice(None, None, 2),) * x.ndim, ...)
    view: Array = wide[every_second]
    view[...] = x
    return view


def _reversed(x: Array) -> Array:
    backwards: Any = (*(slice(None, None, -1),) * x.ndim, ...)
    return np.array(x[backwards], order="C")[backwards]


def _read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "strided": _strided,
    "reversed": _reversed,
    "read-only": _read_only,
}
"""Ways to lay the same values out in memory: what a function of arrays must not depend on."""


def floating_dtypes() -> st.SearchStrategy[np.dtype[Any]]:
    """float64 and float32."""
    return st.sampled_from([np.dtype(np.float64), np.dtype(np.float32)])


def shapes(
    min_axes: int = 0, max_axes: int = 3, min_length: int = 0, max_length: int = 4
) -> st.SearchStrategy[Shape]:
    """Shapes, with axes of length 0 unless `min_length` is larger. Shrinks to few and short axes."""
    return numpy_strategies.array_shapes(
        min_dims=max(min_axes, 0), max_dims=max_axes, min_side=min_length, max_side=max_length
    )


WIDTHS: dict[int, Literal[16, 32, 64]] = {8: 64, 4: 32, 2: 16}
"""Bits of a float by its bytes."""


@st.composite
def arrays(
    draw: st.DrawFn,
    shape: Shape | st.SearchStrategy[Shape] | None = None,
    dtype: Any = np.float64,
    low: float = -2.0,
    high: float = 2.0,
    layouts: Sequence[str] = ("contiguous",),
) -> Array:
    """Floating-point arrays with elements in [low, high]. Shrinks to zeros, or what is nearest to them.

    Args:
        shape: a shape, or a strategy for shapes; `shapes()` if None.
        dtype: a dtype, or a strategy for dtypes. Numbers whose fourth power underflows are 0 instead: a function
            of several products would else be tested on how it rounds to nothing.
        layouts: which of `LAYOUTS` to lay arrays out in; `tuple(LAYOUTS)` for all.

    Raises InvalidArgument when a layout is unknown, or the range holds no number of the dtype.

    Example:
        >>> hypothesis.find(arrays(dtype=np.float32), lambda x: x.sum() > 1)
        array(2., dtype=float32)
    """
    unknown = [layout for layout in layouts if layout not in LAYOUTS]
    if unknown or not layouts:
        raise hypothesis.errors.InvalidArgument(f"layouts={layouts!r}; choose among {', '.join(LAYOUTS)}")
    chosen = np.dtype(draw(dtype) if isinstance(dtype, st.SearchStrategy) else dtype)
    lengths = draw(shapes() if shape is None else shape) if not isinstance(shape, tuple) else shape
    smallest = float(np.finfo(chosen).tiny) ** 0.25
    numbers = st.floats(*_inside(chosen, low, high), width=WIDTHS[chosen.itemsize], allow_subnormal=False)
    elements = numbers.map(lambda number: number if abs(number) >= smallest or low > 0 or high < 0 else 0.0)
    # Without a fill every element is drawn by itself: most elements equal would be a poor test of an order.
    values = draw(numpy_strategies.arrays(chosen, lengths, elements=elements, fill=st.nothing()))
    return LAYOUTS[draw(st.sampled_from(layouts))](values)


def _inside(dtype: np.dtype[Any], low: float, high: float) -> tuple[float, float]:
    """The smallest and the largest number of `dtype` in [low, high]."""
    first, last = dtype.type(low), dtype.type(high)
    first = np.nextafter(first, dtype.type(np.inf)) if float(first) < low else first
    last = np.nextafter(last, dtype.type(-np.inf)) if float(last) > high else last
    return float(first), float(last)


class BroadcastableShapes(Protocol):
    """Shapes that broadcast together, and the shape of the result."""

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """One for each operand."""

    @property
    def result_shape(self) -> Shape:
        """What they broadcast to."""


def broadcastable_shapes(
    count: int = 2, min_axes: int = 0, max_axes: int = 3, min_length: int = 0, max_length: int = 4
) -> st.SearchStrategy[BroadcastableShapes]:
    """`count` shapes that broadcast together: `.input_shapes`, and `.result_shape`.

    Example:
        >>> hypothesis.find(broadcastable_shapes(3), lambda drawn: True).input_shapes
        ((), (), ())
    """
    return numpy_strategies.mutually_broadcastable_shapes(
        num_shapes=count, min_dims=min_axes, max_dims=max_axes, min_side=min_length, max_side=max_length
    )


# ---- Axes and indices --------------------------------------------------------------------------


INTEGER_FORMS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": lambda number: np.uint8(number) if number >= 0 else np.int8(number),
    "array": np.array,
}
"""Ways to write an integer: Python's, NumPy's, an array without axes."""


@st.composite
def reduction_axes(draw: st.DrawFn, shape: Shape, min_axes: int = 0, forms: Sequence[str] = ("int",)) -> Any:
    """What `axis=` of a reduction may be for an array of `shape`: None, an integer, or several distinct axes.

    Axes count from either end, and are written in one of `forms`, of INTEGER_FORMS; with more than one form, several
    axes are a tuple or a list. Shrinks to None. `min_axes=1` leaves out the tuple without axes.
    """
    axis = draw(_plain_axes(shape, min_axes))
    write = INTEGER_FORMS[draw(st.sampled_from(forms))]
    if not isinstance(axis, tuple):
        return None if axis is None else write(axis)
    sequence = draw(st.sampled_from((tuple, list))) if len(forms) > 1 else tuple
    return sequence([write(position) for position in axis])


@st.composite
def _plain_axes(draw: st.DrawFn, shape: Shape, min_axes: int) -> int | tuple[int, ...] | None:
    ndim = len(shape)
    kind = draw(st.sampled_from(("all", "one", "several") if ndim else ("all", "several")))
    if kind == "all" or (kind == "several" and min_axes > ndim):
        return None
    if kind == "one":
        return _from_either_end(draw, draw(st.integers(0, ndim - 1)), ndim)
    axes = (
        draw(st.lists(st.integers(0, ndim - 1), min_size=min_axes, max_size=ndim, unique=True))
        if ndim
        else []
    )
    return tuple(_from_either_end(draw, axis, ndim) for axis in axes)


def _from_either_end(draw: st.DrawFn, position: int, length: int) -> int:
    """The same place counted from the start or, as a negative number, from the end."""
    return draw(st.sampled_from((position, position - length)))


@st.composite
def indices(draw: st.DrawFn, shape: Shape, max_length: int = 3, forms: Sequence[str] = ("array",)) -> Any:
    """Valid indices of an array of `shape`, of every kind that NumPy has.

    Slices, integers, `...`, `None`, integer arrays that broadcast together, a boolean mask of one axis or of all.
    Integers count from either end. `forms`: which of `INDEX_FORMS` to write arrays in; `tuple(INDEX_FORMS)` for all.
    Shrinks to an empty tuple, which takes everything.

    Example:
        >>> x = np.arange(12).reshape(3, 4)
        >>> x[hypothesis.find(indices(x.shape), lambda index: x[index].size == 2)].size
        2
    """
    kind = draw(st.sampled_from(("everything", "parts", "parts", "parts", "parts", "mask")))
    if kind == "everything":
        return ()  # what everything shrinks to must need the fewest choices
    if kind == "mask":
        return draw(numpy_strategies.arrays(bool, shape))
    ndim = len(shape)
    named = draw(st.integers(0, ndim))  # axes with a part of their own; the rest are taken whole
    together = draw(shapes(0, 2, 0 if 0 not in shape else 1, max_length))  # what integer arrays broadcast to
    masked = draw(st.integers(-1, named - 1)) if draw(st.booleans()) else -1
    trailing = draw(st.integers(0, named)) if draw(st.booleans()) else 0  # parts after an ellipsis
    parts: list[Any] = []
    for number in range(named):
        axis = number if number < named - trailing else ndim - named + number
        kinds = ["slice"] + (["integer"] if shape[axis] else [])
        kinds += ["array"] if shape[axis] and masked < 0 else []
        kind = "mask" if number == masked else draw(st.sampled_from(kinds))
        parts.append(_part(draw, kind, shape[axis], together))
    if trailing or draw(st.booleans()):
        parts.insert(named - trailing, Ellipsis)
    for _ in range(draw(st.integers(0, 2))):
        parts.insert(draw(st.integers(0, len(parts))), None)
    alone = len(parts) == 1 and draw(st.booleans())
    form = draw(st.sampled_from(forms))
    written = tuple([_written(part, form) for part in parts])
    return written[0] if alone and not isinstance(written[0], tuple) else written


def _part(draw: st.DrawFn, kind: str, length: int, together: Shape) -> Any:
    """The part of an index for one axis; an array broadcasts to the shape `together`."""
    if kind == "slice":
        return draw(st.slices(length))
    if kind == "mask":
        return draw(numpy_strategies.arrays(bool, (length,)))
    if kind == "integer":
        return _from_either_end(draw, draw(st.integers(0, length - 1)), length)
    own = tuple(draw(st.sampled_from((n, 1))) for n in together)
    skipped = draw(st.integers(0, len(own)))
    integers = st.integers(-length, length - 1)
    return draw(numpy_strategies.arrays(np.int64, own[skipped:], elements=integers))


def _nested_tuples(values: Any) -> Any:
    return tuple(map(_nested_tuples, values)) if isinstance(values, list) else values


def _as_range(part: Array) -> range:
    step = int(part[1] - part[0]) if len(part) > 1 else 1
    return range(part[0], part[0] + step * len(part), step)


INDEX_FORMS: dict[str, Callable[[Array], Any]] = {
    "array": lambda part: part,
    "list": lambda part: part.tolist(),
    "tuple": lambda part: _nested_tuples(part.tolist()),
    "array.array": lambda part: array.array("b", part.tolist()),
    "memoryview": lambda part: part.data,
    "deque": lambda part: collections.deque(part.tolist()),
    "range": _as_range,
    "short integers": lambda part: part.astype(np.int8),
}
"""Ways to write an array of integers or booleans in an index: an array, and sequences that NumPy takes for one."""


def _written(part: Any, form: str) -> Any:
    """The same part of an index in one of INDEX_FORMS, where that can hold it."""
    if isinstance(part, int) and form == "short integers":
        return np.int8(part)
    if not isinstance(part, np.ndarray):
        return part
    try:
        found = INDEX_FORMS[form](part)
    except (TypeError, IndexError, ValueError):  # of two axes, empty, or not evenly spaced
        return part
    read = np.asarray(found)
    same = np.array_equal(read, part) and (read.dtype == bool) == (part.dtype == bool)
    return found if same else part


@st.composite
def einsums(draw: st.DrawFn) -> tuple[str, list[Shape]]:
    """Subscripts of `einsum` for up to three operands, with a result or without, and the operands' shapes.

    An axis has the length of its label, or 1, unless its label comes twice in one operand. NumPy may refuse what is
    drawn. Shrinks to a scalar.

    Example:
        >>> hypothesis.find(einsums(), lambda drawn: len(drawn[1]) == 2)
        (',', [(), ()])
    """
    lengths = {"i": draw(st.integers(0, 3)), "j": draw(st.integers(1, 3)), "k": 2}
    terms = draw(st.lists(st.text("ijk", max_size=3), min_size=1, max_size=3))
    own = {True: lambda n: draw(st.sampled_from((n, 1))), False: lambda n: n}
    shapes = [tuple(own[term.count(label) == 1](lengths[label]) for label in term) for term in terms]
    result = "".join(draw(st.permutations(sorted(set("".join(terms))))))
    arrow = draw(st.sampled_from(("", f"->{result[: draw(st.integers(0, len(result)))]}")))
    return ",".join(terms) + arrow, shapes


# ---- Models, tokens, texts ---------------------------------------------------------------------


@st.composite
def model_configs(
    draw: st.DrawFn, min_vocab_size: int = 1, max_vocab_size: int = 12, dropout: bool = False
) -> ModelConfig:
    """Small valid ModelConfigs: every position encoding, grouped heads, QK-norm, tied embeddings.

    With `dropout`, its probability may be above 0. Shrinks to one layer with one head of the smallest width.

    Example:
        >>> hypothesis.find(model_configs(), lambda config: config.num_heads > config.num_kv_heads).num_heads
        2
    """
    num_kv_heads = draw(st.integers(1, 2))
    return ModelConfig(
        vocab_size=draw(st.integers(min_vocab_size, max_vocab_size)),
        context_length=draw(st.integers(1, 8)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=num_kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=num_kv_heads,
        hidden_size=draw(st.integers(1, 8)),
        intermediate_size=draw(st.integers(1, 8)),
        head_dim=2 * draw(st.integers(1, 3)),
        position_encoding=draw(st.sampled_from(sorted(POSITION_ENCODINGS))),
        rope_theta=draw(st.sampled_from((10000.0, 10.0, 500000.0))),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.1, 0.5))) if dropout else 0.0,
    )


def token_batches(
    vocab_size: int,
    max_batch: int = 3,
    max_length: int = 8,
    min_batch: int = 1,
    min_length: int = 1,
) -> st.SearchStrategy[Array]:
    """Arrays of tokens (B, T), int64 in [0, vocab_size). Shrinks to one token 0.

    Example:
        >>> hypothesis.find(token_batches(65), lambda tokens: tokens.max() > 9)
        array([[10]])
    """
    both = st.tuples(st.integers(min_batch, max_batch), st.integers(min_length, max_length))
    elements = st.integers(0, vocab_size - 1)
    return numpy_strategies.arrays(np.int64, both, elements=elements, fill=st.nothing())


REMARKABLE = (
    "\r\n", "\n", "\t", "\x00", "\x85", "\u2028", "\ufeff", "\xa0", "\u3000",  # line ends and spaces
    "e\u0301", "\xe9", "n\u0303", "\u1112\u1161\u11ab", "\ud55c",  # composed and decomposed
    "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\U0001f1eb\U0001f1f7", "\U0001d11e", "\U0010ffff",  # astral
    "\u0130", "\u00df", "\ufb00", "\u01c5",  # letters whose case or form changes their number
    "\u0645\u0631\u062d\u0628\u0627", "\u202e", "\u05d0", "\u0915\u094d\u0937",  # right to left, conjuncts
    "'s", "<|endoftext|>", "  ", "123", "\u0664", "\u00bd",  # what tokenizers treat by itself
)  # fmt: skip
"""Pieces of text on which tokenizers and text readers have failed."""


def texts(max_pieces: int = 20, min_pieces: int = 0) -> st.SearchStrategy[str]:
    """Unicode texts of all kinds: ASCII, any code point, combining marks, astral characters, line ends.

    No surrogates, so that every text can be written as UTF-8. Shrinks to "" or "0".
    """
    pieces = st.one_of(
        st.characters(min_codepoint=32, max_codepoint=126),
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(REMARKABLE),
    )
    return st.lists(pieces, min_size=min_pieces, max_size=max_pieces).map("".join)

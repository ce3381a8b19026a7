"""What an argument `axis` may be, and indices of a part of one axis."""

from __future__ import annotations

import operator
from typing import Any


def own_axis(axis: Any) -> int | tuple[int, ...] | None:
    """`axis` as None, an int or a tuple of ints, from integers of any kind and sequences of them.

    A sequence of one is that one, so that a scalar, too, is reduced over (0,).
    """
    try:
        return None if axis is None else operator.index(axis)
    except TypeError:
        axes = tuple([operator.index(position) for position in axis])
        return axes[0] if len(axes) == 1 else axes


def named_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes that `axis` names, each in [0, ndim), once; None names all. A scalar takes 0 and -1, which name none."""
    axis = own_axis(axis)
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    n = ndim or 1
    for position in axes:
        if not -n <= position < n:
            raise IndexError(f"axis {position} is out of range for {ndim} axes")
    found = tuple([position % n for position in axes])
    if len(set(found)) < len(found):
        raise ValueError(f"axis={axis} names an axis of {ndim} twice")
    return found if ndim else ()


def along(axis: int, part: Any) -> tuple[Any, ...]:
    """The index that takes `part` of one axis, which is counted from the front, and all of the others."""
    return (slice(None),) * axis + (part,)

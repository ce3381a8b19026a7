"""Functions whose results carry no gradient: tests, positions and roundings. They are Tensors without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyllm.autograd.operands import as_tensor, countable
from tinyllm.autograd.operators import Axis
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops.axes import own_axis


def on_arrays(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """`function` of the arrays beneath the Tensors among its arguments; arrays that it returns become Tensors."""
    result = function(*[arrays(x) for x in arguments], **{name: arrays(x) for name, x in keywords.items()})
    if isinstance(result, tuple):
        return tuple([Tensor(part) for part in result])
    return Tensor(result) if hasattr(result, "dtype") else result


def arrays(value: Any) -> Any:
    """The array beneath a Tensor, and those beneath the Tensors of a list or tuple; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)([arrays(part) for part in value])
    return value.detach().data if isinstance(value, Tensor) else value


def any(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Whether any element over `axis` is true (not zero): booleans."""
    return Tensor(as_tensor(x).detach().data.any(axis=own_axis(axis), keepdims=keepdims))


def all(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Whether all elements over `axis` are true (not zero): booleans."""
    return Tensor(as_tensor(x).detach().data.all(axis=own_axis(axis), keepdims=keepdims))


def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The position of the first maximum over `axis`, or in all of x: integers."""
    return Tensor(current.xp.argmax(as_tensor(x).detach().data, axis=own_axis(axis), keepdims=keepdims))


def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The position of the first minimum over `axis`, or in all of x: integers."""
    return Tensor(current.xp.argmin(as_tensor(x).detach().data, axis=own_axis(axis), keepdims=keepdims))


def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """Where |a - b| <= atol + rtol |b|: booleans."""
    return on_arrays(current.xp.isclose, a, b, rtol=rtol, atol=atol, equal_nan=equal_nan)


def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """Whether |a - b| <= atol + rtol |b| everywhere."""
    return bool(isclose(a, b, rtol, atol, equal_nan).all())


def array_equal(a: Any, b: Any) -> bool:
    """Whether a and b have the same shape and the same elements."""
    a, b = as_tensor(a), as_tensor(b)
    return a.shape == b.shape and bool((a == b).all())


def _of_each_element(name: str, summary: str) -> Callable[..., Tensor]:
    """`numpy.NAME`, whose derivative is zero or that has none."""

    def function(x: Any) -> Tensor:
        return on_arrays(getattr(current.xp, name), countable(x))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{summary}. A Tensor without a graph."
    return function


floor = _of_each_element("floor", "The largest integer that is at most x, of each element")
ceil = _of_each_element("ceil", "The smallest integer that is at least x, of each element")
sign = _of_each_element("sign", "-1, 0 or 1 with the sign of each element")
isnan = _of_each_element("isnan", "Where x is NaN: booleans")
isinf = _of_each_element("isinf", "Where x is infinite: booleans")
isfinite = _of_each_element("isfinite", "Where x is neither infinite nor NaN: booleans")


def round(x: Any, decimals: int = 0) -> Tensor:
    """x to so many decimals, halves to the even side. A Tensor without a graph."""
    return Tensor(current.xp.round(countable(x).detach().data, decimals))

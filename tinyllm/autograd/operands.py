"""What ops make of their arguments: Tensors of one dtype, of a dtype that the op has values in, or constants."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm.autograd.forward_mode import primal
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current


def as_tensor(value: Any, dtype: np.dtype[Any] | None = None) -> Tensor:
    """`value` as a Tensor. A number or array that is none yet takes `dtype`."""
    return value if isinstance(value, Tensor) else Tensor(value, dtype=dtype)


def operands(*values: Any) -> tuple[Tensor, ...]:
    """The operands of an op as Tensors of one dtype, by the rule of promotion in `tinyllm.ops`.

    Numbers, arrays, and integer or boolean Tensors take the dtype of the floating-point Tensor among them. Without
    one, integers and booleans meet floating-point numbers in float32, arrays and each other as in NumPy.

    Raises:
        TypeError: two Tensors have different floating-point dtypes; nothing is promoted silently.
    """
    if all([isinstance(value, Tensor) for value in values]):
        first = values[0].data.dtype
        if all(
            [value.data.dtype is first for value in values]
        ):  # as nearly always: NumPy has one object for each
            return values
    given = [value.data.dtype for value in values if isinstance(value, Tensor)]
    floats = [dtype for dtype in given if dtype.kind == "f"]
    if any(dtype != floats[0] for dtype in floats):
        raise TypeError(
            f"operands have dtypes {' and '.join(map(str, dict.fromkeys(floats)))}; nothing is promoted silently, "
            "so convert one of them with .astype(...)"
        )
    dtype = floats[0] if floats else None
    if dtype is not None and all(known == dtype for known in given):
        return tuple([x if isinstance(x, Tensor) else _own(x, dtype) for x in values])
    if dtype is None:
        # NumPy's own numbers are numbers beside a Tensor: `counts * np.sqrt(2)` is float32.
        values = tuple([x.item() if given and isinstance(x, np.generic) else x for x in values])
        numbers = [value for value in values if isinstance(value, (int, float))]
        tensors = [as_tensor(value) for value in values if not isinstance(value, (int, float))]
        dtype = np.result_type(*[x.data.dtype for x in tensors], *numbers)
        if dtype == np.float64 and not any([x.data.dtype == dtype for x in tensors]):
            dtype = np.dtype(np.float32)
    tensors = [value if isinstance(value, Tensor) else _own(value, dtype) for value in values]
    return tuple([x if x.data.dtype == dtype else Tensor(x.data.astype(dtype)) for x in tensors])


def _own(values: Any, dtype: Any) -> Tensor:
    """A Tensor whose memory is not that of `values`, which may change before backward needs them as they are now."""
    tensor = Tensor(values, dtype=dtype)
    shared = tensor.data is values or getattr(tensor.data, "base", None) is not None
    return Tensor(current.xp.array(tensor.data)) if shared else tensor


def floating(*values: Any) -> tuple[Tensor, ...]:
    """The values as Tensors of their own; integers and booleans become float32."""
    return tuple([_of_kinds("iub", value, np.float32) for value in values])


def summable(x: Any) -> Tensor:
    """x as a Tensor whose elements can be added up; booleans and integers become int64."""
    return _of_kinds("iub", x, np.int64)


def countable(x: Any) -> Tensor:
    """x as a Tensor of numbers; booleans become int64."""
    return _of_kinds("b", x, np.int64)


def _of_kinds(kinds: str, value: Any, dtype: Any) -> Tensor:
    """`value` as a Tensor; in another dtype if its own is one of these kinds."""
    tensor = as_tensor(value)
    return tensor if tensor.data.dtype.kind not in kinds else Tensor(tensor.data.astype(dtype, copy=False))


def constant(x: Any) -> Any:
    """x as a constant of the formula that it stands in: without a Tensor's graph or a Dual's tangent."""
    return x.detach() if isinstance(x, Tensor) else primal(x)

"""Whether the arrays of a state fit the tensors of a model, and what stands where a parameter must."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.system.errors import InputError
from tinyllm.system.wording import nearest, shown

_LISTED = 3
"""Faults of a kind that an error names; it counts the others."""


class LoadResult(NamedTuple):
    """What `load_state_dict` passed over with `strict=False`: names without an array, and arrays of no name."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if self.missing_keys or self.unexpected_keys:
            return f"LoadResult(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"
        return "<All keys matched successfully>"


def require_fit(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Any], of_any_dtype: Collection[str] = ()
) -> None:
    """Raise InputError, with all faults in one line, unless `arrays` are of floating point and of these shapes.

    of_any_dtype: names of those that may hold other numbers, as buffers do.
    """
    missing = [name for name in shapes if name not in arrays]
    unknown = [name for name in arrays if name not in shapes]
    faults = [f"missing: {listed(missing)}"] if missing else []
    if unknown:
        near = nearest(unknown[0], missing or shapes)
        faults.append(f"unknown: {listed(unknown)}" + (f" (did you mean {near!r}?)" if near else ""))
    unfit = []
    for name, shape in shapes.items():
        if name not in arrays:
            continue
        array = arrays[name]
        dtype = getattr(array, "dtype", None)
        if dtype is None:
            unfit.append(f"{name!r} is {shown(array)}, not an array")
        elif tuple(array.shape) != shape:
            unfit.append(f"{name!r} has shape {shown(tuple(array.shape))}, the model needs {shape}")
        elif name not in of_any_dtype and "float" not in getattr(dtype, "name", str(dtype)):
            unfit.append(f"{name!r} is of {dtype}; weights must be floating-point numbers")
    faults += unfit[:_LISTED]
    if len(unfit) > _LISTED:
        faults.append(f"{len(unfit) - _LISTED:,} more that do not fit")
    if faults:
        raise InputError("; ".join(faults))


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(map(shown, names[:_LISTED])) + more


def holds_array(data: Any) -> bool:
    """Whether this is an array, of whatever library: a number of NumPy has a dtype too, and cannot be written into."""
    return type(data) is np.ndarray or (
        hasattr(data, "dtype") and hasattr(data, "__setitem__") and not isinstance(data, Tensor)
    )


def under_one_name(state: Mapping[str, Any], other: str, name: str) -> dict[str, Any]:
    """The state with the array of `other` under `name`, which is the same parameter in this model."""
    values = {name: state[other], **{key: value for key, value in state.items() if key != other}}
    one, two = (x.data if isinstance(x, Tensor) else x for x in (values[name], state[other]))
    if not np.array_equal(backend.to_numpy(one), backend.to_numpy(two)):
        raise InputError(f"{name!r} and {other!r} are one parameter here, and their arrays differ")
    return values


def not_a_parameter(path: str, name: str, value: Any) -> InputError:
    """The error that `value` stands as attribute `name` of the module at `path`, in the place of a Parameter."""
    name = f"{path}.{name}" if path else name
    if isinstance(value, Tensor) and not holds_array(value.data):
        name, value = f"{name}.data", value.data
        return InputError(
            f"{name} is of class {type(value).__name__}, where an array must stand; write `{name}[...] = values`, or "
            "assign an array"
        )
    return InputError(
        f"{name} is of class {type(value).__name__}, where a Parameter must stand; change its values with "
        f"`{name}.data[...] = values`, or assign Parameter(values)"
    )

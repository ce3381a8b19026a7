"""The text of one CUDA kernel out of a Python function that computes arrays element by element.

`trace` calls the function once, on tracers that stand in for its arguments and write down each operation as a line of
C (see `tracers`):

    >>> print(trace(lambda gate, up: gate / (1 + numpy.exp(-gate)) * up, [numpy.dtype("float32")] * 2).operation)
    const float t0 = -gate;
    const float t1 = exp(t0);
    ...

What is computed is what NumPy computes, with NumPy's dtypes. Three things differ. float16 is computed in float32, and
rounded only where it is stored or asked for by `astype`. Whole powers up to 8 are products. The compiler of the device
may fuse a product and a sum, and its exp and the like may differ in the last bits.

All fresh outputs have the broadcast shape of all arguments in use.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from tinyllm.backend.tracing import C_TYPES, NUMBERS, OF_FLOATS, Trace, Tracer, Value

_RESERVED = """
    alignas alignof and_eq asm auto bitand bitor bool case catch char compl const const_cast constexpr decltype default
    delete do double dynamic_cast else enum explicit export extern false float friend goto half inline int long mutable
    namespace new noexcept not_eq nullptr operator or_eq private protected public register reinterpret_cast restrict
    short signed sizeof static static_assert static_cast struct switch template this thread_local throw true typedef
    typeid typename union unsigned using virtual void volatile wchar_t xor xor_eq
    float16 bfloat16 i n fabs floor ceil fmod copysign pow isnan isinf isfinite
"""
"""Words of C++, cupy's own names and the functions that lines call, none of which can name an argument."""


SEGMENT_SUMS = (
    "raw T values, raw int64 order, int64 begin, int64 end, int64 column, int64 width",
    "T target",
    """T total = 0;
for (long long j = begin; j < end; ++j) {
    total += values[order[j] * width + column];
}
target += total;
""",
    "tinyllm_segment_sums",
)
"""The arguments of `cupy.ElementwiseKernel` for `backend.CuPy.segment_sums`: a thread adds up a column of a segment."""


@dataclass(frozen=True)
class Returned:
    """What the function returned: the argument at this position, or the fresh output at this one."""

    of: Literal["argument", "fresh"]
    position: int


@dataclass(frozen=True)
class Source:
    """What `cupy.ElementwiseKernel` is made of, and how it is called.

    Its inputs are the arguments at the positions `inputs`, then the condition, if `guarded`. Its outputs, all of them
    to be passed, are the arguments at the positions `changed`, which it changes in place, then arrays of `fresh`.
    `returns` is one value, a tuple of them or None, as of the function itself.
    """

    name: str
    in_params: str
    out_params: str
    operation: str
    inputs: tuple[int, ...]
    changed: tuple[int, ...]
    fresh: tuple[numpy.dtype[Any], ...]
    guarded: bool
    returns: Returned | tuple[Returned, ...] | None

    def result(self, arguments: Sequence[Any], fresh: Sequence[Any]) -> Any:
        """What the function returns, from its arguments and the fresh outputs."""

        def one(returned: Returned) -> Any:
            return (arguments if returned.of == "argument" else fresh)[returned.position]

        if self.returns is None:
            return None
        return tuple(map(one, self.returns)) if isinstance(self.returns, tuple) else one(self.returns)


def describe(argument: Any) -> Any:
    """What `trace` wants to know of an argument: the dtype of an array, the type of a Python number."""
    kind = getattr(argument, "dtype", type(argument))
    if kind not in NUMBERS and getattr(kind, "name", None) not in C_TYPES:
        raise TypeError(
            f"an argument is {kind}; an elementwise function takes arrays of real numbers, and numbers"
        )
    return kind


def trace(function: Callable[..., Any], arguments: Sequence[Any], where: bool = False) -> Source:
    """The kernel that does what `function` does.

    Args:
        function: called once. arguments: of each the dtype of an array, or bool, int or float for a Python number,
            whose value the kernel is given at each call. where: take a condition, a boolean, as the last input; where
            it is false, the arguments that the function changes keep their bits.

    Raises TypeError, with the name of the function, for what cannot be done element by element.
    """
    name = getattr(function, "__name__", "function")
    traced = Trace(name)
    names = _Names(_argument_names(function, len(arguments)))
    tracers = [
        traced.argument(position, kind, names.arguments[position]) for position, kind in enumerate(arguments)
    ]
    returned = function(*tracers)
    cells, returns = _places(traced, returned, tracers)
    changed = [position for position, tracer in enumerate(tracers) if tracer.changed]
    if not changed and not cells:
        traced.refuse("compute nothing")
    stores = [(names.arguments[position], tracers[position]) for position in changed]
    stores += [(names.new(f"y{position}"), cell) for position, cell in enumerate(cells)]
    condition = names.new("condition") if where else ""
    text = _Text(traced, [cell.read() for _, cell in stores], changed, names)
    assignments = [f"{output} = {text.stored(cell.read())};" for output, cell in stores]
    if where and changed:
        kept = ["    " + line for line in assignments[: len(changed)]]
        assignments[: len(changed)] = [f"if ({condition}) {{", *kept, "}"]
    inputs = [position for position in text.arguments if position not in changed]
    in_params = [f"{tracers[position].array} {names.arguments[position]}" for position in inputs]
    return Source(
        name="tinyllm_" + (re.sub(r"\W", "", name, flags=re.ASCII).strip("_") or "kernel"),
        in_params=", ".join(in_params + ([f"bool {condition}"] if where else [])),
        out_params=", ".join(f"{cell.array} {output}" for output, cell in stores),
        operation="\n".join(text.lines + assignments) + "\n",
        inputs=tuple(inputs),
        changed=tuple(changed),
        fresh=tuple(cell.array for cell in cells),
        guarded=where,
        returns=returns,
    )


def _places(
    traced: Trace, returned: Any, arguments: list[Tracer]
) -> tuple[list[Tracer], Returned | tuple[Returned, ...] | None]:
    """The fresh outputs, and where what the function returned is to be found."""
    fresh: list[Tracer] = []

    def place(item: Any) -> Returned:
        if not isinstance(item, Tracer) or item.weak:
            traced.refuse(f"return a {'number' if isinstance(item, Tracer) else type(item).__name__}")
        for position, argument in enumerate(arguments):
            if argument is item:
                return Returned("argument", position)
        if not any(cell is item for cell in fresh):
            fresh.append(item)
        return Returned("fresh", [cell is item for cell in fresh].index(True))

    if type(returned) is tuple:
        return fresh, tuple(map(place, returned))
    return fresh, None if returned is None else place(returned)


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    names = []
    for parameter in inspect.signature(function).parameters.values():
        many = parameter.kind is parameter.VAR_POSITIONAL
        names += [f"{parameter.name}{k}" for k in range(count)] if many else [parameter.name]
    return (names + [f"argument{k}" for k in range(count)])[:count]


class _Names:
    """Names of C, each given once."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.taken = {*_RESERVED.split(), *OF_FLOATS}
        self.arguments = [self.new(name) for name in arguments]

    def new(self, name: str) -> str:
        """`name`, or one like it that is free and that C allows."""
        name = name if name.isascii() else "argument"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


class _Text:
    """The lines that compute `values`, without those that nothing needs, and the arguments that they read."""

    def __init__(self, traced: Trace, values: list[Value], changed: list[int], names: _Names) -> None:
        needed: set[Value] = set()
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if value not in needed:
                needed.add(value)
                waiting += value.operands
        self.lines: list[str] = []
        self.arguments: list[int] = []
        self.texts: dict[Value, str] = {}
        for value in traced.values.values():
            if value not in needed:
                continue
            text = value.template.format(*[self.texts[operand] for operand in value.operands])
            if value.argument is not None:
                self.arguments.append(value.argument)
                text = names.arguments[value.argument]
            # An argument that is changed is read before: two may exchange their values.
            if (
                value.operands
                or value.argument in changed
                or (value.number is None and value.dtype == "float16")
            ):
                name = names.new(f"{value.name}{'' if value.name == 't' else '_'}{len(self.lines)}")
                self.lines.append(f"const {C_TYPES[value.dtype.name]} {name} = {text};")
                text = name
            self.texts[value] = text

    def stored(self, value: Value) -> str:
        """What is assigned to an output."""
        return ("(float16)" if value.dtype == "float16" else "") + self.texts[value]

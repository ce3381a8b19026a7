"""What stands in for arrays while an elementwise function is traced: each operation on them is a line of C.

The rules of what is computed are NumPy's: its dtypes, NaNs that go through maximum and minimum, integers that are
divided downwards, shifts by more than there are bits. See `kernels` for what is made of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy

C_TYPES = {
    "bool": "bool", "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int", "uint64": "unsigned long long",
    "float16": "float", "float32": "float", "float64": "double",
}  # fmt: skip
"""The types of the lines; parameters and outputs of float16 are cupy's class `float16`."""
NUMBERS = {bool: numpy.dtype(bool), int: numpy.dtype("int64"), float: numpy.dtype("float64")}
"""In what a Python number is passed. float64, for 1 - beta1 in float32 would have lost most of its digits."""
LARGEST_PRODUCT = 8

OF_FLOATS = ("exp", "expm1", "log", "log1p", "sqrt", "tanh", "sin", "cos")
_SIGN = "{0} > 0 ? 1 : {0} < 0 ? -1 : {0} == 0 ? 0 : {0}"
# By the name of the ufunc, and where that matters the kind of dtype that it computes in.
_TEMPLATES = {
    **{name: name + "({0})" for name in OF_FLOATS},
    "add": "{0} + {1}", "add b": "{0} || {1}", "subtract": "{0} - {1}", "multiply": "{0} * {1}",
    "divide": "{0} / {1}", "negative": "-{0}", "square": "{0} * {0}", "reciprocal f": "1 / {0}",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}", "invert": "~{0}",
    "invert b": "!{0}", "less": "{0} < {1}", "less_equal": "{0} <= {1}", "greater": "{0} > {1}",
    "greater_equal": "{0} >= {1}", "equal": "{0} == {1}", "not_equal": "{0} != {1}",
    "logical_and": "{0} != 0 && {1} != 0", "logical_or": "{0} != 0 || {1} != 0", "logical_not": "{0} == 0",
    "logical_xor": "({0} != 0) != ({1} != 0)", "absolute f": "fabs({0})", "absolute i": "{0} < 0 ? -{0} : {0}",
    "absolute": "{0}", "sign f": _SIGN, "sign i": _SIGN, "sign u": "{0} > 0 ? 1 : 0",
    "maximum": "{0} > {1} ? {0} : {1}", "maximum f": "{0} > {1} || isnan({0}) ? {0} : {1}",
    "minimum": "{0} < {1} ? {0} : {1}", "minimum f": "{0} < {1} || isnan({0}) ? {0} : {1}",
    "isfinite f": "isfinite({0})", "isnan f": "isnan({0})", "isinf f": "isinf({0})", "isfinite": "true",
    "isnan": "false", "isinf": "false", "floor f": "floor({0})", "ceil f": "ceil({0})", "floor": "{0}", "ceil": "{0}",
    # NumPy gives 0 for what no integer can be divided by, and rounds down.
    "floor_divide u": "{1} == 0 ? 0 : {0} / {1}", "remainder u": "{1} == 0 ? 0 : {0} % {1}",
    "floor_divide i": "{1} == 0 ? 0 : {1} == -1 ? -{0} : {0} / {1} - ({0} % {1} != 0 && ({0} < 0) != ({1} < 0))",
    "remainder i": "{1} == 0 || {1} == -1 ? 0 : {0} % {1} + ({0} % {1} != 0 && ({0} < 0) != ({1} < 0) ? {1} : 0)",
}  # fmt: skip
_OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "left_shift", "rshift": "right_shift",
}  # fmt: skip
_COMPARISONS = {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
}  # fmt: skip
_UNARY = {"neg": "negative", "invert": "invert", "abs": "absolute"}
_REFUSED = {
    **dict.fromkeys(
        ("bool", "int", "float", "index", "complex"), "turn an array into one number, or branch on it"
    ),
    **dict.fromkeys(("getitem", "setitem", "delitem", "iter", "len", "contains"), "take an array apart"),
    **dict.fromkeys(("matmul", "rmatmul", "imatmul"), "multiply matrices"),
    **dict.fromkeys(("divmod", "rdivmod"), "return two values of divmod"),
    "array": "make a NumPy array",
}
_OF_BITS = ("bitwise_and", "bitwise_or", "bitwise_xor")


@dataclass(eq=False)
class Value:
    """One number of a kernel: a line of its text, or an argument or a literal, which need none."""

    template: str
    dtype: Any
    operands: tuple[Value, ...]
    argument: int | None = None
    number: Any = None  # of a literal
    name: str = "t"  # of its line: the argument that it is assigned to


class Trace:
    """All values of a kernel, in the order in which they are computed; equal ones are one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[Any, Value] = {}

    def refuse(self, what: str) -> NoReturn:
        """Raise TypeError: the traced function does what cannot be done element by element."""
        raise TypeError(f"{self.name}: an elementwise function cannot {what}")

    def value(self, template: str, dtype: Any, *operands: Value, argument: int | None = None) -> Value:
        """The value of a template of C filled with operands; the same one for the same."""
        if getattr(dtype, "name", None) not in C_TYPES:
            self.refuse(f"compute with {dtype}")
        key = (template, dtype, operands, argument)
        return self.values.setdefault(key, Value(template, dtype, operands, argument))

    def argument(self, position: int, kind: Any, name: str) -> Tracer:
        """What stands in for the argument at a position: an array of dtype `kind`, or a number of that type."""
        value = self.value("", NUMBERS.get(kind, kind), argument=position)
        value.name = name
        return Tracer(self, value, value.dtype, kind if kind in NUMBERS else None, name)

    def literal(self, number: Any, dtype: Any) -> Value:
        """A number that stands in the text of the kernel."""
        with numpy.errstate(all="ignore"):
            number = dtype.type(number)
        text = _literal_text(number)
        return self.values.setdefault((text, dtype), Value(text, dtype, (), number=number))

    def cast(self, value: Value, dtype: Any) -> Value:
        """`value` converted to another dtype."""
        if value.dtype == dtype:
            return value
        if value.number is not None:
            return self.literal(value.number, dtype)
        if dtype.kind == "b":
            return self.value("{0} != 0", dtype, value)
        if dtype.name == "float16":
            return self.value(
                "(float)(float16)" + ("" if value.dtype.kind == "f" else "(float)") + "{0}", dtype, value
            )
        return self.value(f"({C_TYPES.get(dtype.name)}){{0}}", dtype, value)

    def kind(self, operand: Any) -> Any:
        """The dtype of an operand, or the type of a Python number, which has the dtype of what it meets."""
        if isinstance(operand, Tracer):
            if operand.trace is not self:
                self.refuse("use an argument of another one")
            return operand.weak or operand.read().dtype
        if type(operand) in NUMBERS:
            return type(operand)
        # NumPy's own scalars come as arrays without axes when they are compared.
        if not isinstance(operand, numpy.generic) and getattr(operand, "shape", None) != ():
            self.refuse(f"use a {type(operand).__name__} that is not an argument")
        return operand.dtype

    def operand(self, operand: Any, dtype: Any) -> Value:
        """A tracer or a number as a value of this dtype."""
        if isinstance(operand, Tracer):
            return self.cast(operand.read(), dtype)
        return self.literal(operand, dtype)

    def call(self, ufunc: Any, operands: Sequence[Any], weak: bool = False) -> Tracer:
        """ufunc(*operands) as a new tracer. weak: of Python numbers alone it is one again, as by an operator."""
        name = ufunc.__name__
        if ufunc.nout != 1 or len(operands) != ufunc.nin:
            self.refuse(f"call numpy.{name} with {len(operands)} arrays")
        kinds = [self.kind(operand) for operand in operands]
        of_numbers = all(kind in NUMBERS for kind in kinds)
        weak = weak and of_numbers
        if of_numbers:  # a bool that Python computes with is an int
            kinds = [
                NUMBERS[int if weak and kind is bool and name not in _OF_BITS else kind] for kind in kinds
            ]
        try:
            kinds = [numpy.dtype(bool) if kind is bool else kind for kind in kinds]
            *dtypes, dtype = ufunc.resolve_dtypes((*kinds, None))
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        if len({each.kind for each in dtypes} & {"i", "u"}) == 2:
            self.refuse(f"compare {dtypes[0]} with {dtypes[1]}")
        value = self._compute(
            name, dtype, [self.operand(*pair) for pair in zip(operands, dtypes, strict=True)]
        )
        of_kind = {"b": bool, "i": int, "f": float}
        return Tracer(self, value, dtype, of_kind[dtype.kind] if weak else None)

    def _compute(self, name: str, dtype: Any, operands: list[Value]) -> Value:
        kind = operands[0].dtype.kind if operands else ""
        if name == "power" and operands[0].dtype.kind != "b":
            return self._power(*operands)
        if name in ("left_shift", "right_shift"):
            return self._shift("<<" if name == "left_shift" else ">>", *operands)
        if kind == "f" and name in ("floor_divide", "remainder"):
            return self._divide(name, *operands)
        template = _TEMPLATES.get(f"{name} {kind}") or _TEMPLATES.get(name)
        if template is None:
            self.refuse(f"call numpy.{name} on {operands[0].dtype}")
        return self.value(template, dtype, *operands)

    def _power(self, base: Value, exponent: Value) -> Value:
        dtype, power = base.dtype, exponent.number
        if power is None or power != int(power if abs(power) < 100 else 0) or abs(power) > LARGEST_PRODUCT:
            if dtype.kind != "f":
                self.refuse(f"raise integers to a power that is not a literal up to {LARGEST_PRODUCT}")
            return self.value("sqrt({0})" if power == 0.5 else "pow({0}, {1})", dtype, base, exponent)
        if power < 0:
            if dtype.kind != "f":
                self.refuse("raise integers to a negative power")
            return self.value("1 / {0}", dtype, self._power(base, self.literal(-power, dtype)))
        product = self.literal(1, dtype) if power == 0 else base
        for bit in f"{int(power):b}"[1:]:
            product = self.value("{0} * {0}", dtype, product)
            if bit == "1":
                product = self.value("{0} * {1}", dtype, product, base)
        return product

    def _shift(self, symbol: str, bits: Value, count: Value) -> Value:
        width = bits.dtype.itemsize * 8
        template = f"{{0}} {symbol} {{1}}"
        if count.number is None or not 0 <= count.number < width:  # in C undefined
            beyond = "({0} < 0 ? -1 : 0)" if symbol == ">>" and bits.dtype.kind == "i" else "0"
            template = f"(unsigned long long){{1}} < {width} ? {template} : {beyond}"
        return self.value(template, bits.dtype, bits, count)

    def _divide(self, name: str, a: Value, b: Value) -> Value:
        """a // b or a % b of floating numbers, in the steps of NumPy's npy_divmod, after Python's."""
        value, dtype = self.value, a.dtype
        rest = value("fmod({0}, {1})", dtype, a, b)
        wrong = value("{0} != 0 && ({1} < 0) != ({0} < 0)", numpy.dtype(bool), rest, b)
        if name == "remainder":
            sign = value("copysign({0}, {1})", dtype, self.literal(0, dtype), b)
            return value("{0} ? {1} + {2} : {1} == 0 ? {3} : {1}", dtype, wrong, rest, b, sign)
        quotient = value("({0} - {1}) / {2} - {3}", dtype, a, rest, b, wrong)
        below = value("floor({0})", dtype, quotient)
        nearest = value("{0} - {1} > 0.5f ? {1} + 1 : {1}", dtype, quotient, below)
        exact = value("{0} / {1}", dtype, a, b)
        zero = value("copysign({0}, {1})", dtype, self.literal(0, dtype), exact)
        return value("{0} == 0 ? {1} : {2} == 0 ? {3} : {4}", dtype, b, exact, quotient, zero, nearest)

    def choose(self, condition: Any, x: Any, y: Any) -> Tracer:
        """numpy.where."""
        self.kind(condition)
        chosen = self.operand(condition, numpy.dtype(bool))
        kinds = [self.kind(each) for each in (x, y)]
        dtype = numpy.result_type(*[kind(0) if kind in NUMBERS else kind for kind in kinds])
        value = self.value("{0} ? {1} : {2}", dtype, chosen, self.operand(x, dtype), self.operand(y, dtype))
        return Tracer(self, value, dtype)


class Tracer:
    """An array, or with a type `weak` a Python number, while its function is traced. Assignments change its value."""

    def __init__(
        self, trace: Trace, value: Value | None, dtype: Any, weak: type | None = None, name: str = "t"
    ) -> None:
        self.trace = trace
        self.value = value
        self.array = dtype
        self.weak = weak
        self.name = name
        self.changed = False

    def read(self) -> Value:
        """Its value now."""
        return self.value or self.trace.refuse("read what empty_like left undefined")

    def store(self, value: Value) -> Tracer:
        """Its value from now on, in its own dtype."""
        if not numpy.can_cast(value.dtype, self.dtype, "same_kind"):
            self.trace.refuse(f"assign {value.dtype} to {self.dtype}")
        self.value = self.trace.cast(value, self.dtype)
        self.changed = True
        if self.value.name == "t":
            self.value.name = self.name
        return self

    @property
    def dtype(self) -> Any:
        """Of an array; a Python number has none, and cannot be assigned to."""
        return self.trace.refuse("use a number as an array") if self.weak else self.array

    def astype(self, dtype: Any) -> Tracer:
        """A new array of this dtype."""
        dtype = numpy.dtype(dtype)
        return Tracer(self.trace, self.trace.cast(self.read(), dtype), dtype if self.dtype else None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **given: Any) -> Any:
        if method != "__call__" or given:
            self.trace.refuse(f"call numpy.{ufunc.__name__}.{method} with {', '.join(given) or 'that'}")
        result = self.trace.call(ufunc, inputs)
        return result if out is None else self._cell(out).store(result.read())

    def _cell(self, out: Any) -> Tracer:
        cell = out[0] if isinstance(out, tuple) else out
        return cell if isinstance(cell, Tracer) else self.trace.refuse(f"write into a {type(cell).__name__}")

    def __array_function__(self, function: Any, types: Any, args: Any, given: dict[str, Any]) -> Any:
        handlers: dict[Any, Callable[..., Any]] = {
            numpy.where: self.trace.choose,
            numpy.clip: self._clip,
            numpy.copyto: self._copyto,
            numpy.empty_like: lambda prototype: Tracer(self.trace, None, prototype.dtype),
        }
        handler = handlers.get(function)
        if handler is None or len(args) > 3:
            self.trace.refuse(f"call numpy.{function.__name__}")
        try:
            inspect.signature(handler).bind(*args, **given)
        except TypeError as error:
            self.trace.refuse(f"call numpy.{function.__name__} so: {error}")
        return handler(*args, **given)

    def _clip(self, a: Any, a_min: Any, a_max: Any, out: Any = None) -> Any:
        kind = self.trace.kind(a)
        a = Tracer(
            self.trace, self.trace.operand(a, NUMBERS.get(kind, kind)), NUMBERS.get(kind, kind)
        )  # an array
        for ufunc, bound in ((numpy.maximum, a_min), (numpy.minimum, a_max)):
            a = a if bound is None else self.trace.call(ufunc, [a, bound])
        return a if out is None else self._cell(out).store(a.read())

    def _copyto(self, dst: Any, src: Any, where: Any = True) -> None:
        target = self._cell(dst)
        if where is not True:
            src = self.trace.choose(where, src, target)
        kind = self.trace.kind(src)
        dtype = numpy.result_type(target.dtype, kind(0)) if kind in NUMBERS else kind
        target.store(self.trace.operand(src, dtype))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # by which libraries ask what it is
            raise AttributeError(name)
        self.trace.refuse(f"use .{name}")


def _literal_text(number: Any) -> str:
    """A NumPy scalar as C writes it."""
    kind, name = number.dtype.kind, number.dtype.name
    if kind == "b":
        return "true" if number else "false"
    if kind == "f":
        suffix = "" if name == "float64" else "f"
        if numpy.isfinite(number):
            text = str(numpy.float32(number) if suffix else number) + suffix
        else:
            text = f"({0 if numpy.isnan(number) else 1 if number > 0 else -1}.0{suffix} / 0.0{suffix})"
    else:
        text = str(number) + {"uint32": "U", "int64": "LL", "uint64": "ULL"}.get(name, "")
        if kind == "i" and number == numpy.iinfo(number.dtype).min and name in ("int32", "int64"):
            text = f"({int(number) + 1}{'LL' if name == 'int64' else ''} - 1)"  # C has no negative literals
    return f"({text})" if text.startswith("-") else text


def _add_operators() -> None:
    def forward(ufunc: Any) -> Any:
        return lambda self, *other: self.trace.call(ufunc, [self, *other], weak=True)

    def reflected(ufunc: Any) -> Any:
        return lambda self, other: self.trace.call(ufunc, [other, self], weak=True)

    def in_place(ufunc: Any) -> Any:
        def call(self: Tracer, other: Any) -> Tracer:
            result = self.trace.call(ufunc, [self, other], weak=True)
            return result if self.weak else self.store(result.read())

        return call

    def refusal(what: str) -> Any:
        return lambda self, *other: self.trace.refuse(what)

    for symbol, name in {**_OPERATORS, **_COMPARISONS, **_UNARY}.items():
        setattr(Tracer, f"__{symbol}__", forward(getattr(numpy, name)))
    for symbol, name in _OPERATORS.items():
        setattr(Tracer, f"__r{symbol}__", reflected(getattr(numpy, name)))
        setattr(Tracer, f"__i{symbol}__", in_place(getattr(numpy, name)))
    for symbol, what in _REFUSED.items():
        setattr(Tracer, f"__{symbol}__", refusal(what))


_add_operators()

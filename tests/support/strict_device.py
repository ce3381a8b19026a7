"""A stand-in for CuPy that computes with NumPy and refuses what CuPy, or a fast step on a device, cannot do.

With it, the code for a device is tested where there is none:

    with strict_device() as device:
        loss = next(trainer.train_steps())
    assert device.count.synchronizations == 0

Its arrays do not turn into NumPy's, do not mix with them, and are not numbers before `.item()` is called. It has
the functions in `FUNCTIONS` alone, each with the keywords that CuPy's has; a test compares both with CuPy where that is
installed (it needs no device). It counts what costs time on a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from tinyllm import backend
from tinyllm.backend import kernel_sources

UFUNCS = (
    "absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "ceil", "cos", "divide", "equal", "exp", "expm1",
    "floor", "floor_divide", "greater", "greater_equal", "invert", "isfinite", "isinf", "isnan", "left_shift", "less",
    "less_equal", "log", "log10", "log1p", "log2", "logaddexp", "logical_and", "logical_not", "logical_or",
    "maximum", "minimum", "multiply", "negative", "not_equal", "power", "reciprocal", "remainder", "right_shift",
    "sign", "sin", "sqrt", "square", "subtract", "tanh",
)  # fmt: skip
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "arange": ("dtype",),
    "argsort": ("axis",),
    "broadcast_to": (),
    "clip": ("out",),
    "concatenate": ("axis", "out", "dtype"),
    "copyto": ("where",),
    "cumprod": ("axis", "dtype", "out"),
    "dot": ("out",),
    "einsum": (),
    "empty": ("dtype", "order"),
    "empty_like": ("dtype", "order"),
    "expand_dims": (),
    "eye": ("k", "dtype"),
    "full": ("dtype", "order"),
    "full_like": ("dtype", "order"),
    "matmul": ("out",),
    "ones": ("dtype", "order"),
    "ones_like": ("dtype", "order"),
    "pad": ("mode", "constant_values"),
    "searchsorted": ("side",),
    "stack": ("axis", "out", "dtype"),
    "take_along_axis": ("axis",),
    "tri": ("dtype",),
    "where": (),
    "zeros": ("dtype", "order"),
    "zeros_like": ("dtype", "order"),
}
"""The functions beside the ufuncs, `array` and `asarray`, with the keywords that may be given by name."""
UFUNC_KEYWORDS = ("out", "dtype", "casting")
METHODS: dict[str, tuple[str, ...]] = {
    "all": ("axis", "out", "keepdims"),
    "any": ("axis", "out", "keepdims"),
    "argmax": ("axis", "out", "dtype", "keepdims"),
    "argsort": ("axis", "kind"),
    "astype": ("order", "casting", "copy"),
    "clip": ("out",),
    "conj": (),
    "copy": ("order",),
    "cumsum": ("axis", "dtype", "out"),
    "dot": ("out",),
    "fill": (),
    "max": ("axis", "out", "keepdims"),
    "mean": ("axis", "dtype", "out", "keepdims"),
    "min": ("axis", "out", "keepdims"),
    "prod": ("axis", "dtype", "out", "keepdims"),
    "ravel": ("order",),
    "repeat": ("axis",),
    "reshape": ("order",),
    "squeeze": ("axis",),
    "sum": ("axis", "dtype", "out", "keepdims"),
    "swapaxes": (),
    "transpose": (),
    "view": (),
}
"""The methods of an array; in CuPy none of them has `where` or `initial`."""
VIEWS = {"broadcast_to", "expand_dims", "ravel", "reshape", "squeeze", "swapaxes", "transpose", "view"}
"""What launches no kernel (`reshape` and `ravel`: where they need no copy)."""


_COMPLEX = (np.dtype("complex64"), np.dtype("complex128"))


class StrictDeviceError(TypeError):
    """Something that CuPy refuses, or that a step on a device must not do."""


@dataclass
class Count:
    """What has been done since the double was made: uploads, downloads, waits, kernels."""

    to_device: int = 0
    to_host: int = 0
    synchronizations: int = 0
    launches: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(*[getattr(self, f.name) - getattr(other, f.name) for f in fields(self)])

    def copy(self) -> Count:
        """The figures now."""
        return self - Count()


def _is_foreign(kind: type) -> bool:
    """Whether this is an array of another library, or what stands in for one."""
    return hasattr(kind, "__array_function__") and not issubclass(kind, (DeviceArray, np.generic))


class DeviceArray:
    """An array of the strict double."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(self, host: Any, device: StrictDevice, base: DeviceArray | None = None) -> None:
        self._host = np.asarray(host)
        self._device = device
        self.base = base
        if self._host.dtype.kind not in "biufc" or self._host.dtype.itemsize > 16:
            raise StrictDeviceError(f"CuPy has no dtype {self._host.dtype}")

    @property
    def flags(self) -> SimpleNamespace:
        """Whether the elements lie in order."""
        return SimpleNamespace(c_contiguous=self._host.flags.c_contiguous)

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"DeviceArray({self._host!r})"

    def _view(self, host: Any) -> DeviceArray:
        return DeviceArray(host, self._device, self if self.base is None else self.base)

    # ---- What must be asked for ----------------------------------------------------------------

    def get(self) -> Any:
        """A copy in the memory of the host; waits for the device."""
        self._device.count.to_host += 1
        self._device.count.synchronizations += 1
        return self._host.copy()

    def item(self) -> Any:
        """The only element as a Python number; waits for the device."""
        return self.get().item()

    def set(self, values: Any) -> None:
        """Overwrite the array with one of the host's memory, of the same shape and dtype."""
        if type(values) is not np.ndarray or values.shape != self.shape or values.dtype != self.dtype:
            raise StrictDeviceError(
                f"set() takes a NumPy array of shape {self.shape} and dtype {self.dtype}; got {values!r}"
            )
        self._device.count.to_device += 1
        self._host[...] = values

    def _refuse(self, what: str) -> NoReturn:
        raise StrictDeviceError(
            f"{what} of a device array waits for the device without saying so; use .item()"
        )

    def __bool__(self) -> bool:
        self._refuse("the truth")

    def __float__(self) -> float:
        self._refuse("float()")

    def __int__(self) -> int:
        self._refuse("int()")

    def __index__(self) -> int:
        self._refuse("the value as an index")

    def __complex__(self) -> complex:
        self._refuse("complex()")

    def __iter__(self) -> NoReturn:
        self._refuse("each element")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        raise StrictDeviceError("implicit conversion to a NumPy array; use backend.to_numpy")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **given: Any) -> Any:
        """NumPy's functions, called on arrays of the device alone, are those of its library, as with CuPy."""
        if method != "__call__" or any(_is_foreign(type(x)) for x in inputs):
            return NotImplemented
        return self._device.ufunc(ufunc.__name__, *inputs, **given)

    def __array_function__(self, function: Any, types: Any, args: Any, given: dict[str, Any]) -> Any:
        if any(map(_is_foreign, types)):
            return NotImplemented
        return getattr(self._device, function.__name__)(*args, **given)

    # ---- Elements ------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> DeviceArray:
        parts = index if isinstance(index, tuple) else (index,)
        taken = self._host[self._plain_index(index)]
        if any(isinstance(part, DeviceArray) and part.dtype == bool for part in parts):
            self._device.count.synchronizations += 1  # the number of elements decides the shape
        if any(isinstance(part, DeviceArray) for part in parts):
            self._device.count.launches += 1
            return DeviceArray(taken, self._device)
        open_parts = parts if any(part is Ellipsis for part in parts) else (*parts, ...)
        return self._view(self._host[open_parts])  # a single element is a view as well

    def __setitem__(self, index: Any, value: Any) -> None:
        self._device.count.launches += 1
        self._host[self._plain_index(index)] = self._device.plain(value)

    def _plain_index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._plain_index(part) for part in index)
        if isinstance(index, DeviceArray):
            return index._host
        if index is None or index is Ellipsis or isinstance(index, (int, slice, np.integer)):
            return index
        raise StrictDeviceError(f"an index of type {type(index).__name__} would be copied to the device")


def _attribute(name: str, view: bool) -> None:
    def value(self: DeviceArray) -> Any:
        """As NumPy's."""
        found = getattr(self._host, name)
        return self._view(found) if view else found

    setattr(DeviceArray, name, property(value))


for _name in ("shape", "ndim", "size", "dtype", "itemsize", "nbytes", "strides", "T", "real", "imag"):
    _attribute(_name, view=_name in ("T", "real", "imag"))


def _operator(name: str, ufunc: str) -> None:
    def forward(self: DeviceArray, other: Any) -> Any:
        if getattr(other, "__array_priority__", 0) > self.__array_priority__:
            return NotImplemented
        return self._device.ufunc(ufunc, self, other)

    def reflected(self: DeviceArray, other: Any) -> Any:
        return self._device.ufunc(ufunc, other, self)

    def in_place(self: DeviceArray, other: Any) -> Any:
        return self._device.ufunc(ufunc, self, other, out=self)

    setattr(DeviceArray, f"__{name}__", forward)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(DeviceArray, f"__r{name}__", reflected)
        setattr(DeviceArray, f"__i{name}__", in_place)


for _name, _ufunc in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "left_shift", "rshift": "right_shift", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal", "eq": "equal", "ne": "not_equal", "matmul": "matmul",
}.items():  # fmt: skip
    _operator(_name, _ufunc)


def _unary(name: str, ufunc: str) -> None:
    setattr(DeviceArray, f"__{name}__", lambda self: self._device.ufunc(ufunc, self))


for _name, _ufunc in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
    _unary(_name, _ufunc)


def _method(name: str, keywords: tuple[str, ...]) -> None:
    def method(self: DeviceArray, *args: Any, **given: Any) -> Any:
        return self._device.call(name, keywords, getattr(self._host, name), args, given, of=self)

    method.__doc__ = f"As NumPy's, with the keywords {', '.join(keywords) or '(none)'}."
    setattr(DeviceArray, name, method)


for _name, _keywords in METHODS.items():
    _method(_name, _keywords)


class StrictDevice:
    """The double of the module `cupy`."""

    ndarray = DeviceArray

    def __init__(self, precision: str = "float32", fuses: bool = True) -> None:
        self.precision, self.fuses = precision, fuses
        self.count = Count()
        self.sources: dict[Any, kernel_sources.Source] = {}
        """The kernels that elementwise functions have become."""
        stream = SimpleNamespace(synchronize=self._synchronize)
        self.cuda = SimpleNamespace(get_current_stream=lambda: stream)

    def _synchronize(self) -> None:
        self.count.synchronizations += 1

    def __getattr__(self, name: str) -> Any:
        if name in UFUNCS:
            return _Ufunc(self, name)
        if name in FUNCTIONS:
            function = getattr(np, name)
            return lambda *args, **given: self.call(name, FUNCTIONS[name], function, args, given)
        if name in ("float16", "float32", "float64", "int32", "int64", "uint32", "uint64", "bool_"):
            return getattr(np, name)
        raise AttributeError(f"the strict double of CuPy has no {name!r}")

    def array(self, values: Any, dtype: Any = None, copy: bool = True) -> DeviceArray:
        """A new array; from the host's memory it is an upload."""
        if isinstance(values, DeviceArray):
            self.count.launches += 1
            return DeviceArray(np.array(values._host, dtype=dtype), self)
        self.count.to_device += 1
        return DeviceArray(np.array(values, dtype=dtype), self)

    def asarray(self, values: Any, dtype: Any = None) -> DeviceArray:
        """`values` itself where it is an array of this dtype, otherwise a new one."""
        if isinstance(values, DeviceArray) and (dtype is None or dtype == values.dtype):
            return values
        return self.array(values, dtype)

    def ufunc(self, name: str, *args: Any, **given: Any) -> Any:
        """A ufunc, or matmul."""
        return self.call(name, UFUNC_KEYWORDS, getattr(np, name), args, given)

    def call(
        self,
        name: str,
        keywords: tuple[str, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        given: dict[str, Any],
        of: DeviceArray | None = None,
    ) -> Any:
        """The function on the arrays behind these arguments; refuses keywords that CuPy's does not have."""
        unknown = set(given) - set(keywords)
        if unknown:
            raise StrictDeviceError(f"{name}() of CuPy has no keyword {', '.join(sorted(unknown))}")
        if name.startswith("logical") and any(getattr(x, "dtype", None) in _COMPLEX for x in args):
            raise StrictDeviceError(f"{name} of CuPy takes no complex numbers")
        if name in ("concatenate", "stack"):
            self.count.to_device += 1  # of the places of the arrays that are joined
        out = given.get("out")
        if out is not None and not isinstance(out, DeviceArray):
            raise StrictDeviceError(f"{name}: out= is a {type(out).__name__}")
        if of is None and not any(isinstance(x, DeviceArray) for x in _leaves(args)):
            self._refuse_numbers(name, args)
        plain = [self.plain(x) for x in args]
        if name in ("matmul", "dot", "einsum") and self.precision == "float16":
            plain = [x if isinstance(x, str) else _rounded(x) for x in plain]
        result = function(*plain, **{key: self.plain(value) for key, value in given.items()})
        view = name in VIEWS and of is not None and np.shares_memory(result, of._host)
        self.count.launches += not (view or name.startswith("empty") or name == "broadcast_to")
        if out is not None:
            return out
        if result is None:
            return None
        if name == "broadcast_to":
            return args[0]._view(result)
        return of._view(result) if view and of is not None else DeviceArray(result, self)

    def _refuse_numbers(self, name: str, args: tuple[Any, ...]) -> None:
        """CuPy's ufuncs and joins need a device array among their arguments, so as not to guess where to compute."""
        if name in UFUNCS or name in ("matmul", "dot", "where", "clip", "einsum", "concatenate", "stack"):
            raise StrictDeviceError(f"{name}: no device array among {[type(x).__name__ for x in args]}")

    def plain(self, value: Any) -> Any:
        """What NumPy takes for an argument; an array of the host's memory is refused."""
        if isinstance(value, DeviceArray):
            return value._host
        if isinstance(value, (list, tuple)):
            return type(value)(self.plain(item) for item in value)
        if isinstance(value, np.ndarray):
            raise StrictDeviceError(
                f"a NumPy array of shape {value.shape} meets a device array; upload it first"
            )
        if value is None or isinstance(
            value, (bool, int, float, complex, str, slice, type, np.generic, np.dtype)
        ):
            return value
        raise StrictDeviceError(f"CuPy cannot use a {type(value).__name__}")

    def segment_sums(
        self,
        target: DeviceArray,
        values: DeviceArray,
        order: DeviceArray,
        begin: DeviceArray,
        end: DeviceArray,
    ) -> None:
        """As `backend.CuPy.segment_sums`."""
        N, D = target.shape
        for array, shape in ((values, (len(order), D)), (begin, (N, 1)), (end, (N, 1))):
            if array.shape != shape or not array.flags.c_contiguous:
                raise StrictDeviceError(f"segment_sums: shape {array.shape}, expected {shape} in one piece")
        if {order.dtype, begin.dtype, end.dtype} != {np.dtype("int64")} or values.dtype != target.dtype:
            raise StrictDeviceError(
                "segment_sums: order, begin and end are int64, values have the target's dtype"
            )
        self.count.launches += 1
        for n in range(N):
            for j in range(begin._host[n, 0], end._host[n, 0]):
                target._host[n] += values._host[order._host[j]]

    def _require_kernel(self, function: Callable[..., Any], arguments: tuple[Any, ...], where: Any) -> None:
        """Refuse what does not become one kernel whose outputs have one shape."""
        key = (function, where is None, *map(kernel_sources.describe, arguments))
        if key not in self.sources:
            self.sources[key] = kernel_sources.trace(function, key[2:], where is not None)
        shapes = [x.shape for x in arguments if isinstance(x, DeviceArray)]
        whole = np.broadcast_shapes(*shapes)
        for position in self.sources[key].changed:
            if arguments[position].shape != whole:
                raise StrictDeviceError(
                    f"{function.__name__}: argument {position} of shape {arguments[position].shape} is changed, and "
                    f"all arguments together have shape {whole}"
                )

    def elementwise(self, function: Callable[..., Any], arguments: tuple[Any, ...], where: Any) -> Any:
        """One kernel: the function on the arrays behind the arguments, as NumPy computes it.

        Where `where`, a boolean of the device, is false, the arguments keep what they hold.
        """
        self._require_kernel(function, arguments, where)
        if not self.fuses and where is None:
            return function(*arguments)
        self.count.launches += 1
        hosts = [_Element(x._host) if isinstance(x, DeviceArray) else self.plain(x) for x in arguments]
        if where is not None and not where._host.item():
            hosts = [x.copy() if isinstance(x, np.ndarray) else x for x in hosts]
        results = function(*hosts)

        def back(result: Any) -> Any:
            for argument, host in zip(arguments, hosts, strict=True):
                if result is host:
                    return argument
            return DeviceArray(np.asarray(result).view(np.ndarray), self)

        if results is None:
            return None
        return tuple(map(back, results)) if isinstance(results, tuple) else back(results)


@dataclass(frozen=True)
class _Ufunc:
    device: StrictDevice
    name: str

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self.device.ufunc(self.name, *args, **given)

    def at(self, target: DeviceArray, index: Any, values: Any) -> None:
        """target[index] += values, every one of them; CuPy has it for few functions."""
        if self.name != "add":
            raise StrictDeviceError(f"{self.name}.at() is not for a device")
        self.device.count.launches += 1
        np.add.at(target._host, target._plain_index(index), self.device.plain(values))


def _rounded(x: Any) -> Any:
    """float32 numbers as float16 has them."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32) if x.dtype == np.float32 else x


class _Element(np.ndarray):
    """A host array inside of `StrictDevice.elementwise`, which the namespace of a device hands on to NumPy."""

    def __new__(cls, host: Any) -> _Element:
        return host.view(cls)


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


@contextlib.contextmanager
def strict_device(precision: str = "float32", fuses: bool = True) -> Iterator[StrictDevice]:
    """The strict double as the backend.

    With the precision "float16" it rounds the factors of products to that. Without `fuses`, every operation of an
    elementwise function counts as a kernel of its own, but for what a condition guards.
    """
    device = StrictDevice(precision, fuses)
    with backend.use_library(device):
        yield device

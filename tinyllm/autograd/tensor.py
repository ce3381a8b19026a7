"""Reverse-mode automatic differentiation: Tensor, Op, the registry of ops, and the backward pass.

An op computes arrays from arrays (`forward`) and gradients from a gradient (`backward`): its formula, in whose place a
fast form may run. A Tensor holds an
array and remembers the op that made it; the ops and their input Tensors are the graph. Operators such as `+`
are in `operators`, which `tinyllm.ops` is given to, so that this module imports nothing above the backend.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeVar, overload

import numpy as np

from tinyllm import backend
from tinyllm.autograd.forward_mode import Dual, level_of, primal, top
from tinyllm.autograd.mode import current_mode, enable_grad, mode_set, module_stack
from tinyllm.autograd.operators import Operators
from tinyllm.backend import Array, current
from tinyllm.system.wording import shown


class Tensor(Operators):
    """An array in a graph of ops.

    Args:
        values: an array, a number, nested lists of numbers, or a Tensor. An array keeps its dtype and is
            shared, not copied; Python floats become float32.
        requires_grad: whether `backward` computes a gradient for this Tensor.
        dtype: the dtype to convert to.
        name: a name for messages and graphs.

    Attributes:
        data: the array. grad: the gradient that `backward` accumulates, an array of the same shape and dtype,
        or None. op: the op that made this Tensor, None for a leaf.

    Example:
        >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> x.grad
        array([2., 4., 6.], dtype=float32)
    """

    __slots__ = ("__weakref__", "_grad", "data", "name", "op", "requires_grad", "retains_grad")

    __array_priority__ = 1000
    """An operator between an array of a device and a Tensor is the Tensor's; NumPy's arrays know by other means."""

    data: Any
    _grad: Any
    name: str | None
    op: Op | None
    requires_grad: bool
    retains_grad: bool

    def __init__(
        self, values: Any, requires_grad: bool = False, dtype: Any = None, name: str | None = None
    ) -> None:
        self.data = numbers(values, dtype)
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(
                f"requires_grad=True needs a floating-point dtype; got {self.data.dtype}. "
                "Convert with Tensor(values, dtype='float32')"
            )
        self._grad = None
        self.name = name
        self.op = None
        self.requires_grad = requires_grad
        self.retains_grad = False

    @property
    def grad(self) -> Any:
        """The gradient that `backward` adds into: an array, or None. It may be set to one of this shape and dtype."""
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            value = backend.asarray(value.data if isinstance(value, Tensor) else value)
            if value.shape != self.shape or value.dtype != self.dtype:
                raise ValueError(
                    f".grad of a Tensor of shape {self.shape} and dtype {self.dtype} is an array of the same, or None; "
                    f"got shape {value.shape} and dtype {value.dtype}"
                )
        self._grad = value

    def __reduce__(self) -> tuple[Any, ...]:
        """What copy, deepcopy and pickle make anew: a leaf with its gradient."""
        if self.op is not None:
            raise RuntimeError(
                f"a Tensor made by {self.op.name} is part of a graph, which a copy or a pickle would tear or contain; "
                "copy x.detach()"
            )
        values = type(self), self.data, self.requires_grad, self.name, self._grad, self.retains_grad
        return _restored, values, getattr(self, "__dict__", None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        shape: tuple[int, ...] = self.data.shape
        return shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.data.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(self.data.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the elements."""
        dtype: np.dtype[Any] = self.data.dtype
        return dtype

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded op made this Tensor."""
        return self.op is None

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a Tensor with shape () has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"a Tensor with shape {self.shape} is neither true nor false; reduce it to one element first"
            )
        return bool(backend.read(self.data))

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.shape or self.dtype.kind not in "iu":
            raise TypeError(f"only an integer Tensor with shape () is an index; got {self!r}")
        return int(backend.read(self.data))

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        if self.size != 1:
            raise TypeError(f"a Tensor with shape {self.shape} is no number to write as {spec!r}")
        return format(self.item(), spec)

    def __repr__(self) -> str:
        parts = [self._values_text("Tensor("), f"shape={self.shape}", f"dtype={self.dtype}"]
        if self.op is not None:
            parts.append(f"op={self.op.name}")
        elif self.requires_grad:
            parts.append("requires_grad=True")
        if self.name is not None:
            parts.append(f"name={self.name!r}")
        return f"Tensor({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = {"shape": str(self.shape), "dtype": str(self.dtype), "values": self._values_text("")}
        if self.name is not None:
            rows = {"name": self.name} | rows
        if self.op is not None:
            rows["op"] = self.op.name
        elif self.requires_grad:
            rows["requires_grad"] = "True"
        if self.grad is not None:
            rows["grad"] = Tensor(self.grad)._values_text("")
        import html  # only notebooks need it

        cells = (
            f'<tr><th style="text-align:left">{key}</th>'
            f'<td style="text-align:left"><pre style="margin:0">{html.escape(value)}</pre></td></tr>'
            for key, value in rows.items()
        )
        return f"<table>{''.join(cells)}</table>"

    def _values_text(self, prefix: str) -> str:
        """The values, cut in the middle where they are many, and to 4 digits where they are not a single number."""
        return np.array2string(
            backend.to_numpy(primal(self.data)),
            separator=", ",
            prefix=prefix,
            threshold=100,
            precision=4 if self.shape else None,
        )

    __hash__ = object.__hash__

    def item(self) -> Any:
        """The only element as a Python number; raises ValueError when there is not exactly one."""
        if self.size != 1:
            raise ValueError(f"item() needs exactly one element; this Tensor has shape {self.shape}")
        return backend.read(self.data)

    def numpy(self) -> Array:
        """The values as a NumPy array that shares memory with this Tensor; refused while it is in a graph."""
        if self.requires_grad:
            raise RuntimeError(
                "numpy() of a Tensor that requires a gradient would hide changes from the graph; "
                "call .detach().numpy()"
            )
        return backend.to_numpy(self.data)

    def detach(self) -> Tensor:
        """A Tensor that shares these values and has no graph behind it, nor inside `jvp` a tangent."""
        return Tensor(primal(self.data))

    def retain_grad(self) -> None:
        """Keep the gradient of this Tensor in `.grad` although it is not a leaf."""
        if not self.requires_grad:
            raise RuntimeError("retain_grad() on a Tensor that does not require a gradient")
        self.retains_grad = True

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add the gradient of this Tensor into `.grad` of every leaf that it depends on.

        Args:
            gradient: the cotangent, an array or Tensor of this shape; may be left out for one element (1).
            retain_graph: keep the graph for another backward pass. Otherwise it is freed on the way.

        Raises:
            RuntimeError: no graph leads here, or it was freed by an earlier backward pass.
            ValueError: `gradient` is missing or has another shape.
        """
        cotangent = _cotangent(self, gradient)
        for tensor, value in propagate(self, cotangent, retain_graph=retain_graph):
            if tensor.op is None or tensor.retains_grad:
                if tensor._grad is None:
                    tensor._grad = value if tensor.op is None else _copied(value)
                else:
                    tensor._grad += value


_PYTHON_NUMBERS = frozenset((bool, int, float))


def numbers(values: Any, dtype: Any = None) -> Array:
    """`values` as an array of `dtype`, or of the dtype that they have; Python floats have float32.

    Raises TypeError for what is no number: None, strings and objects, alone or in a list; and for complex numbers that
    are to be real.
    """
    if dtype is not None and type(values) in _PYTHON_NUMBERS:
        return backend.asarray(values, dtype)  # no need to look
    if isinstance(values, Tensor):
        values = values.data
    if isinstance(values, (np.ndarray, np.generic, Dual)):
        array = values
    else:
        array = backend.asarray(values)
        if dtype is None and array.dtype == np.float64 and not hasattr(values, "dtype"):
            dtype = np.float32
    wanted = array.dtype if dtype is None else np.dtype(dtype)
    if not (array.dtype.kind in "biuf" and wanted.kind in "biuf"):
        raise TypeError(
            f"a Tensor holds real numbers; got {type(values).__name__} {shown(values)} with dtype {array.dtype}"
            + ("" if wanted == array.dtype else f", to be converted to {wanted}")
        )
    return array.astype(wanted) if isinstance(array, Dual) else backend.asarray(array, wanted)


def _restored(
    kind: type[Tensor], data: Any, requires_grad: bool, name: str | None, grad: Any, retains_grad: bool
) -> Tensor:
    """A leaf from what `Tensor.__reduce__` gave; its gradient, which `backward` adds into, is its own."""
    leaf = kind.__new__(kind)
    leaf.data, leaf.requires_grad, leaf.name = data, requires_grad, name
    leaf._grad = None if grad is None else current.xp.array(grad)
    leaf.op, leaf.retains_grad = None, retains_grad
    return leaf


@dataclass(frozen=True)
class Case:
    """How to call an op in the tests that run over the registry.

    Attributes:
        shapes: the shape of each input Tensor. arguments: the keywords of the op's constructor.
        low, high: inputs are drawn uniformly from this range.
        kinked: whether the op is not differentiable somewhere in the range; a difference quotient that
            straddles the kink is then left out of the comparison.
    """

    shapes: tuple[tuple[int, ...], ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    low: float = -2.0
    high: float = 2.0
    kinked: bool = False


class Op:
    """One differentiable function. A subclass is one op, and its `forward` and `backward` are the formula.

    `forward` takes arrays and returns an array. What `backward` needs is kept on the instance under its mathematical
    name. `backward` takes the gradient of the output and returns one gradient for each input, or None for an input
    without one. Both are written with operators, methods and NumPy functions, never in place, so that they run on
    Tensors too: derivatives of any order come out of them. The engine sums out broadcasting and checks shapes and
    dtypes, so ops do neither.

    An instance called on arrays computes an array; called on Tensors, it computes a Tensor in the graph, by the fast
    form if there is one (see `fast_form_of`) and outside `use_formulas`. An instance in a graph is not called again,
    since what it keeps is that graph's.

    Tensors of float16 are computed with in float32, and each result is rounded once, so that no sum overflows or
    stops growing on the way.
    """

    name: ClassVar[str] = "op"
    cases: ClassVar[Sequence[Case]] = ()
    changes_dtype: ClassVar[bool] = False
    """Whether the output may have another dtype than the inputs."""
    moves: ClassVar[bool] = False
    """Whether elements are only moved, so that float16 needs no float32."""
    fast_form: ClassVar[type[Op] | None] = None
    formula: ClassVar[type[Op] | None] = None
    """Of a fast form, the op that it computes."""

    inputs: tuple[Tensor, ...] = ()
    sequence: int = -1
    modules: tuple[Any, ...] = ()
    released: bool = False
    widened: bool = False
    """Whether forward was given float32 for float16, as backward is then."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output array, from the input arrays."""
        raise TypeError(f"{type(self).__name__} defines no forward(); an Op subclass must")

    def backward(self, gradient: Any) -> Any:
        """The gradient of each input, from the gradient of the output."""
        raise TypeError(f"{type(self).__name__} defines no backward(); an Op subclass must")

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        """Floating-point operations of forward, for inputs of these shapes; here one for each element."""
        return math.prod(output)

    def needs(self, index: int) -> bool:
        """Whether the gradient of input `index` will be used, for ops that can save work."""
        return not self.inputs or self.inputs[index].requires_grad

    def as_form(self, form: type[Op]) -> Op:
        """This op, with its arguments and what it keeps, as the formula or the fast form of it."""
        other = form.__new__(form)
        vars(other).update(vars(self))
        return other

    @overload
    def __call__(self, *inputs: Tensor) -> Tensor: ...
    @overload
    def __call__(self, *inputs: Any) -> Any: ...
    def __call__(self, *inputs: Any) -> Any:
        if self.inputs or self.released:
            raise RuntimeError(
                f"{self.name}: this {type(self).__name__} is in a graph, whose backward needs what it keeps; make one "
                "for each call"
            )
        if not isinstance(inputs[0], Tensor):
            return self.forward(*inputs)
        mode = current_mode.get()
        form = self.formula if mode.formulas else self.fast_form
        op = self if form is None else self.as_form(form)
        arrays = _with_duals(inputs) if mode.duals else [x.data for x in inputs]
        widened = arrays[0].dtype.char == "e" and not (op.moves or op.changes_dtype)
        if widened is not op.widened:
            op.widened = widened
        for observer in mode.observers:
            observer.before_forward(op, inputs)
        try:
            data = op.forward(*[_wide(x) for x in arrays] if widened else arrays)
        except (IndexError, TypeError, ValueError) as error:
            _raise_named(op, inputs, error)
        if widened and data.dtype == np.float32:
            data = data.astype(np.float16)
        for observer in mode.observers:
            observer.after_forward(op, inputs, data)
        if data.dtype != inputs[0].data.dtype and not self.changes_dtype:
            raise TypeError(f"{self.name}: forward made {data.dtype} out of {_describe(inputs)}")
        out: Tensor = Tensor.__new__(Tensor)
        # NumPy reduces to scalars, which are not arrays.
        out.data = _held(data) if mode.duals else current.xp.asarray(data)
        out._grad = None
        out.name = None
        out.retains_grad = False
        if mode.gradient and any([x.requires_grad for x in inputs]):
            op.inputs = inputs
            op.sequence = next(_sequence_numbers)
            op.modules = module_stack.get()
            out.op = op
            out.requires_grad = True
        else:
            out.op = None
            out.requires_grad = False
        return out

    def release(self) -> None:
        """Drop the inputs and everything that was kept for backward."""
        vars(self).clear()
        self.released = True


class FusedOp(Op):
    """The fast form of a composition of ops, with a name and cases of its own.

    `composition` computes the same from the same inputs by the ops that it is made of, on Tensors: that is what runs in
    `use_formulas`, what the fused form is tested against, and the way to derivatives of higher order.
    """

    composition: ClassVar[Composite]

    def composed(self, *inputs: Tensor) -> Tensor:
        """The same by the ops that it is made of."""
        return self.composition.function(
            *inputs, **{name: getattr(self, name) for name in self.composition.arguments}
        )

    def __call__(self, *inputs: Any) -> Any:
        if isinstance(inputs[0], Tensor) and current_mode.get().formulas:
            return self.composed(*inputs)
        return super().__call__(*inputs)


class Composite:
    """A function that is a composition of ops: Tensors first, then arguments by name.

    Outside `use_formulas` its fast form, a FusedOp whose constructor takes the same arguments, runs in its place.
    """

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.name, self.function = name, function
        self.fast_form: type[FusedOp] | None = None
        self.arguments = tuple(
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        )

    def __call__(self, *inputs: Tensor, **arguments: Any) -> Tensor:
        if self.fast_form is None or current_mode.get().formulas:
            return self.function(*inputs, **arguments)
        return self.fast_form(**arguments)(*inputs)


def composite(name: str) -> Callable[[Callable[..., Tensor]], Composite]:
    """Decorator of a composition of ops that a fast form of this name may replace."""
    return lambda function: Composite(name, function)


def constant(x: Any) -> Any:
    """x as a constant of the formula that it stands in: without a Tensor's graph or a Dual's tangent."""
    return x.detach() if isinstance(x, Tensor) else primal(x)


REGISTRY: dict[str, type[Op]] = {}
"""Every registered op by name. The tests of gradient properties run over it."""

OpClass = TypeVar("OpClass", bound=type[Op])
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def register(op: OpClass) -> OpClass:
    """Class decorator that registers an op by its `name`; without one, by its class's (`LogSoftmax` is `log_softmax`).

    Raises ValueError when the name is taken or the op gives no cases to test it with.
    """
    if "name" not in vars(op):
        op.name = _WORD_START.sub("_", op.__name__).lower()
    if op.name in REGISTRY:
        raise ValueError(f"an op named {op.name!r} is registered already")
    if not op.cases:
        raise ValueError(f"op {op.name!r} gives no cases; the registry's tests need at least one")
    REGISTRY[op.name] = op
    return op


def fast_form_of(formula: type[Op] | Composite) -> Callable[[OpClass], OpClass]:
    """Class decorator of the fast form of an op, which is a subclass of it, or of a composition, which is a FusedOp."""

    def decorate(form: OpClass) -> OpClass:
        if isinstance(formula, Composite):
            assert issubclass(form, FusedOp)
            form.name = formula.name
            form.composition = formula
            formula.fast_form = form
            return register(form)
        form.fast_form, form.formula = None, formula
        formula.fast_form = form
        return form

    return decorate


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
        ):  # as nearly always; NumPy has one object for each
            return values
    given = [value.data.dtype for value in values if isinstance(value, Tensor)]
    floating = [dtype for dtype in given if dtype.kind == "f"]
    if any(dtype != floating[0] for dtype in floating):
        raise TypeError(
            f"operands have dtypes {' and '.join(map(str, dict.fromkeys(floating)))}; nothing is promoted silently, "
            "so convert one of them with .astype(...)"
        )
    dtype = floating[0] if floating else None
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


def gradients(
    output: Tensor,
    tensors: Sequence[Tensor],
    gradient: Any = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> list[Any]:
    """The gradient of `output` for each of `tensors`, stored nowhere.

    Args:
        output: the Tensor to differentiate. gradient: its cotangent; may be left out for one element (1).
        tensors: leaves or intermediate Tensors of the graph.
        retain_graph: keep the graph for another backward pass.
        create_graph: return Tensors with a graph of their own, which can be differentiated again.
            It implies `retain_graph`.

    Returns:
        Arrays (Tensors with `create_graph`) in the order of `tensors`, zeros where `output` does not depend
        on one.

    Example:
        >>> x = Tensor(3.0, requires_grad=True)
        >>> (slope,) = gradients(x * x * x, [x], create_graph=True)
        >>> gradients(slope, [x])
        [array(18., dtype=float32)]
    """
    cotangent = _cotangent(output, gradient)
    if create_graph:
        cotangent = gradient.astype(output.dtype) if isinstance(gradient, Tensor) else Tensor(cotangent)
    wanted = {id(tensor) for tensor in tensors}
    found: dict[int, Any] = {}
    for tensor, value in propagate(output, cotangent, retain_graph=retain_graph, create_graph=create_graph):
        if id(tensor) in wanted:
            found[id(tensor)] = value if create_graph or tensor.op is None else _copied(value)
    results: list[Any] = []
    given: set[int] = set()
    for tensor in tensors:
        value = found.get(id(tensor))
        if value is None:
            value = current.xp.zeros_like(tensor.data)
        elif id(tensor) in given and not create_graph:
            value = _copied(value)  # asked for twice
        given.add(id(tensor))
        results.append(Tensor(value) if create_graph and not isinstance(value, Tensor) else value)
    return results


def propagate(
    output: Tensor,
    cotangent: Any,
    stop: frozenset[int] = frozenset(),
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Iterator[tuple[Tensor, Any]]:
    """Walk the graph from `output` back to its leaves, and yield each Tensor with its complete gradient.

    Ops are numbered as they are made, so descending numbers are a topological order. Leaves come last. Each
    op is released once its backward has run, unless the graph is retained. Tensors whose `id` is in `stop`
    are treated as leaves.
    """
    tensors = ancestors(output, stop)
    pending = {id(output): cotangent}
    leaves = {} if tensors else {id(output): output}
    mode = current_mode.get()
    watching = mode.observers
    while tensors:
        tensor = tensors.pop()
        gradient = pending.pop(id(tensor), None)
        op = tensor.op
        assert op is not None
        if gradient is not None:
            yield tensor, gradient
            for observer in watching:
                observer.before_backward(op, gradient)
            if create_graph:
                results = _backward_as_graph(op, gradient)
            elif mode.formulas and (op.formula is not None or isinstance(op, FusedOp)):
                results = _backward_by_formula(op, gradient)
            else:
                results = op.backward(_wide(gradient) if op.widened else gradient)
                if not isinstance(results, tuple):
                    results = (results,)
            if len(results) != len(op.inputs):
                raise RuntimeError(
                    f"{op.name}: backward returned {len(results)} gradients for {len(op.inputs)} inputs"
                )
            for observer in watching:
                observer.after_backward(op, gradient, results)
            for position, x in enumerate(op.inputs):
                value = results[position]
                if value is None or not x.requires_grad:
                    continue
                data, key = x.data, id(x)
                if value.shape != data.shape or value.dtype != data.dtype:
                    value = _conform(op, position, x, value)
                known = pending.get(key)
                if known is not None:
                    value = _added(known, value)
                elif x.op is None or key in stop:
                    leaves[key] = x
                    value = _owned(value, gradient, results, position)
                pending[key] = value
        if not (retain_graph or create_graph):
            op.release()
    for leaf in leaves.values():
        value = pending.pop(id(leaf))
        # NumPy makes scalars of sums of arrays with shape ().
        yield leaf, value if isinstance(value, (Tensor, Dual)) else backend.asarray(value)


_sequence_numbers = itertools.count()


def ancestors(output: Tensor, stop: frozenset[int] = frozenset()) -> list[Tensor]:
    """All Tensors made by ops that lead to `output`, itself included, oldest first."""
    found: list[Tensor] = []
    seen: set[int] = set(stop)
    stack = [output]
    while stack:
        tensor = stack.pop()
        op = tensor.op
        if op is None or id(tensor) in seen:
            continue
        if op.released:
            raise RuntimeError(
                f"the graph behind {op.name} was freed by an earlier backward pass; "
                "of two losses over a shared part, add them and go back once, or call the first backward with "
                "retain_graph=True; otherwise compute the forward pass again"
            )
        seen.add(id(tensor))
        found.append(tensor)
        stack.extend(op.inputs)
    found.sort(key=lambda tensor: tensor.op.sequence)  # type: ignore[union-attr]
    return found


def _cotangent(output: Tensor, gradient: Any) -> Any:
    """The array that the backward pass from `output` starts with."""
    if not output.requires_grad:
        raise RuntimeError(
            "this Tensor depends on nothing that requires a gradient; "
            "set requires_grad=True on an input, and compute outside no_grad()"
        )
    if gradient is None:
        if output.size != 1:
            raise ValueError(
                f"backward from a Tensor with shape {output.shape} needs gradient=, an array of that shape; "
                "or reduce it first, for example with .sum()"
            )
        return current.xp.ones_like(output.data)
    # A copy, because a leaf may keep this array as its gradient.
    values = _copied(numbers(gradient, output.data.dtype))
    if values.shape != output.shape:
        raise ValueError(f"gradient= has shape {values.shape}, the Tensor has shape {output.shape}")
    return values


def _conform(op: Op, position: int, x: Tensor, gradient: Any) -> Any:
    """`gradient` with broadcasting summed out, checked to have the shape and dtype of input `x`."""
    shape, dtype = x.shape, x.data.dtype
    if gradient.dtype != dtype and not (op.widened and gradient.dtype == np.float32):
        raise TypeError(
            f"{op.name}: backward made a gradient of dtype {gradient.dtype} for input {position} "
            f"of dtype {dtype}"
        )
    extra = len(gradient.shape) - len(shape)
    if extra < 0 or any(n not in (1, m) for n, m in zip(shape, gradient.shape[extra:], strict=True)):
        raise ValueError(
            f"{op.name}: backward made a gradient of shape {gradient.shape} for input {position} of shape {shape}"
        )
    stretched = tuple(
        axis for axis, n in enumerate((1,) * extra + shape) if n == 1 and gradient.shape[axis] != 1
    )
    axes = tuple(range(extra)) + tuple(axis for axis in stretched if axis >= extra)
    with enable_grad():  # as in _added
        if dtype.char != "e":
            return gradient.sum(axis=axes).reshape(shape)
        return _wide(gradient).sum(axis=axes).reshape(shape).astype(dtype)


def _wide(x: Any) -> Any:
    """An array or a Tensor of float16 in float32."""
    return x.astype(np.float32) if x.dtype.char == "e" else x


def _added(known: Any, value: Any) -> Any:
    """The sum of two gradients; of Tensors with a graph, even where the backward pass runs in no_grad."""
    if not isinstance(value, Tensor):
        return known + value
    with enable_grad():
        return known + value


def _owned(value: Any, gradient: Any, results: tuple[Any, ...], position: int) -> Any:
    """`value` itself where nothing else can hold its memory, otherwise a copy: a leaf keeps what it gets."""
    if isinstance(value, (Tensor, Dual)):
        return value
    shared = (
        value is gradient
        or getattr(value, "base", None) is not None
        or any(value is other for other in results[:position])
    )
    return current.xp.array(value) if shared or not backend.is_array(value) else value


def _copied(value: Any) -> Any:
    """A copy of an array; nothing changes Tensors and dual numbers in place."""
    return value if isinstance(value, (Tensor, Dual)) else current.xp.array(value)


def _with_duals(inputs: tuple[Tensor, ...]) -> list[Any]:
    """What an op computes with inside `jvp`: the dual numbers of the innermost level, and constants beside them.

    A constant that requires a gradient comes as the Tensor that it is, so that value and tangent have its graph.
    """
    level, gradient = top(inputs), current_mode.get().gradient
    return [
        Dual(level, x, None) if level_of(x) < level and gradient and x.requires_grad else x.data
        for x in inputs
    ]


def _held(data: Any) -> Any:
    """What an op has computed inside `jvp`, as a Tensor holds it."""
    data = data.data if isinstance(data, Tensor) else data
    return data if isinstance(data, Dual) else current.xp.asarray(data)


def _backward_as_graph(op: Op, gradient: Tensor) -> tuple[Any, ...]:
    """The backward of `op` as Tensors: differentiable in the gradient and in the op's inputs."""
    with mode_set(gradient=True):
        if isinstance(op, FusedOp):
            return _backward_composed(op, op.inputs, gradient, create_graph=True)
        # Run on Tensors, forward keeps Tensors where it kept arrays, and backward then builds a graph.
        replay = op.as_form(op.formula or type(op))
        replay.forward(*[_wide(x) for x in op.inputs] if op.widened else op.inputs)
        results = replay.backward(_wide(gradient) if op.widened else gradient)
    return results if isinstance(results, tuple) else (results,)


def _backward_by_formula(op: Op, gradient: Any) -> tuple[Any, ...]:
    """The backward of a fast form by the formula that it computes, from the op's inputs."""
    if isinstance(op, FusedOp):
        inputs = tuple([Tensor(x.data, requires_grad=x.requires_grad) for x in op.inputs])
        with mode_set(gradient=True):
            return _backward_composed(op, inputs, gradient, create_graph=False)
    assert op.formula is not None
    formula = op.as_form(op.formula)
    formula.forward(*[_wide(x.data) if op.widened else x.data for x in op.inputs])
    results = formula.backward(_wide(gradient) if op.widened else gradient)
    return results if isinstance(results, tuple) else (results,)


def _backward_composed(
    op: FusedOp, inputs: tuple[Tensor, ...], gradient: Any, create_graph: bool
) -> tuple[Any, ...]:
    with mode_set(formulas=True):
        output = op.composed(*inputs)
        found: dict[int, Any] = {}
        if output.requires_grad:
            stop = frozenset(id(x) for x in inputs)
            for tensor, value in propagate(output, gradient, stop=stop, create_graph=create_graph):
                if id(tensor) in stop:
                    found[id(tensor)] = value
    # An input given twice has one gradient, which must be counted once.
    return tuple(found.pop(id(x), None) for x in inputs)


def _describe(inputs: Sequence[Any]) -> str:
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)


def _raise_named(op: Op, inputs: Sequence[Tensor], error: Exception) -> NoReturn:
    """Raise `error` again with the op and its inputs in the message."""
    kind = next(kind for kind in (IndexError, TypeError, ValueError) if isinstance(error, kind))
    raise kind(f"{op.name}({_describe(inputs)}): {error}") from error

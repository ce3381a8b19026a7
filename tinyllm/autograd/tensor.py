"""Reverse-mode automatic differentiation: Tensor, Op, and gradients.

An op computes arrays from arrays (`forward`) and gradients from a gradient (`backward`): its formula, in whose place a
fast form may run. A Tensor holds an
array and remembers the op that made it; the ops and their input Tensors are the graph. Operators such as `+`
are in `operators`, which `tinyllm.ops` is given to, so that this module imports nothing above the backend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, overload

import numpy as np

from tinyllm import backend
from tinyllm.autograd.backward_pass import copied, propagate, wide
from tinyllm.autograd.forward_mode import Dual, level_of, primal, top
from tinyllm.autograd.mode import current_mode, mode_set, module_stack
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
                    tensor._grad = value if tensor.op is None else copied(value)
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
    is_formula: ClassVar[bool] = True
    """Whether this is no fast form, of an op or of a composition."""

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
            data = op.forward(*[wide(x) for x in arrays] if widened else arrays)
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

    def backward_as_graph(self, gradient: Tensor) -> Any:
        """`backward` on Tensors: differentiable in the gradient and in the op's inputs."""
        with mode_set(gradient=True):
            # Run on Tensors, forward keeps Tensors where it kept arrays, and backward then builds a graph.
            replay = self.as_form(self.formula or type(self))
            replay.forward(*[wide(x) for x in self.inputs] if self.widened else self.inputs)
            return replay.backward(wide(gradient) if self.widened else gradient)

    def backward_by_formula(self, gradient: Any) -> Any:
        """`backward` of the formula that this fast form computes, from the op's inputs."""
        assert self.formula is not None
        formula = self.as_form(self.formula)
        formula.forward(*[wide(x.data) if self.widened else x.data for x in self.inputs])
        return formula.backward(wide(gradient) if self.widened else gradient)

    def release(self) -> None:
        """Drop the inputs and everything that was kept for backward."""
        vars(self).clear()
        self.released = True


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
            found[id(tensor)] = value if create_graph or tensor.op is None else copied(value)
    results: list[Any] = []
    given: set[int] = set()
    for tensor in tensors:
        value = found.get(id(tensor))
        if value is None:
            value = current.xp.zeros_like(tensor.data)
        elif id(tensor) in given and not create_graph:
            value = copied(value)  # asked for twice
        given.add(id(tensor))
        results.append(Tensor(value) if create_graph and not isinstance(value, Tensor) else value)
    return results


_sequence_numbers = itertools.count()


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
    values = copied(numbers(gradient, output.data.dtype))
    if values.shape != output.shape:
        raise ValueError(f"gradient= has shape {values.shape}, the Tensor has shape {output.shape}")
    return values


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


def _describe(inputs: Sequence[Any]) -> str:
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)


def _raise_named(op: Op, inputs: Sequence[Tensor], error: Exception) -> NoReturn:
    """Raise `error` again with the op and its inputs in the message."""
    kind = next(kind for kind in (IndexError, TypeError, ValueError) if isinstance(error, kind))
    raise kind(f"{op.name}({_describe(inputs)}): {error}") from error

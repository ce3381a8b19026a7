"""Module and Parameter: a model is an object whose parameters are found by walking its attributes."""

from __future__ import annotations

import copy
import html
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from tinyllm import backend
from tinyllm.autograd.mode import module_stack, no_grad
from tinyllm.autograd.observer import observers
from tinyllm.autograd.tensor import Tensor
from tinyllm.nn.hooks import Boundary, Hook
from tinyllm.system.errors import InputError
from tinyllm.system.wording import nearest, shown

_LISTED = 3
"""Faults of a kind that an error names; it counts the others."""


class Parameter(Tensor):
    """A Tensor that an optimizer changes: a leaf that requires a gradient."""

    __slots__ = ()

    def __init__(self, values: Any, dtype: Any = None) -> None:
        super().__init__(values, requires_grad=True, dtype=dtype)


class Module:
    """A part of a model. Parameters and submodules are plain attributes, or lists of them.

    Names are attribute paths, such as `blocks.0.attention.query.weight`. A parameter that is reached twice
    (tied weights) is listed once, under its first name.

    Beside `forward` a class may have `infer`, the same on arrays, which decoding runs. It belongs to the class that
    defines it alone: a subclass without its own infers by its `forward`, which may be another.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ()
    """The attributes that must be Parameters or None: what else stood there would be neither trained nor saved."""
    training: bool = True
    _forward_hooks: tuple[Hook, ...] = ()
    _backward_hooks: tuple[Hook, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module computes."""
        raise TypeError(f"{type(self).__name__} defines no forward(); a Module subclass must")

    def infer(self, *inputs: Any, **settings: Any) -> Any:
        """What `forward` computes in evaluation, on arrays and without a graph.

        Args:
            inputs: of `forward`, with floating-point arrays for Tensors; caches and integers as they are.
            settings: `newest=True` asks for the last position alone: (B, T, ...) -> (B, 1, ...).
        """
        newest = settings.pop("newest", False)
        with no_grad():
            output = self(*[Tensor(x) if _is_floating(x) else x for x in inputs], **settings).data
        return output[:, -1:] if newest else output

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "infer" not in vars(cls):
            cls.infer = Module.infer  # type: ignore[method-assign]

    @property
    def has_own_infer(self) -> bool:
        """Whether the class of this module has an `infer` of its own, instead of inferring by `forward`."""
        return type(self).infer is not Module.infer

    def packed(self) -> Self:
        """A copy whose matrices lie in memory as single tokens read them fastest; it is for `infer` alone.

        It takes as much memory as the matrices, and does not follow them when they change. Modules that infer by
        `forward` are not copied.
        """
        packed = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Module):
                setattr(packed, name, _packed(value))
            elif isinstance(value, (list, tuple)):
                setattr(packed, name, type(value)([_packed(item) for item in value]))
        return packed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = module_stack.set((*module_stack.get(), self))
        try:
            for name in self.declared_parameters:
                value = getattr(self, name)
                # Tensors pass: whoever differentiates with respect to a weight puts one there for the time of a call.
                if value is not None and not isinstance(value, Tensor):
                    raise _not_a_parameter(path_of(module_stack.get()), name, value)
            for observer in observers():
                observer.enter_module(self)
            if self._forward_hooks or self._backward_hooks:
                return self._call_with_hooks(args, kwargs)
            return self.forward(*args, **kwargs)
        finally:
            module_stack.reset(token)

    def _call_with_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boundary = Boundary(self, self._backward_hooks) if self._backward_hooks else None
        if boundary is not None:
            args = boundary.enter(args)
        output = self.forward(*args, **kwargs)
        if boundary is not None:
            output = boundary.leave(output)
        for hook in self._forward_hooks:
            replaced = hook(self, args, output)
            output = output if replaced is None else replaced
        return output

    def register_forward_hook(self, hook: Hook) -> Callable[[], None]:
        """Call `hook(module, inputs, output)` after each forward; what it returns, if not None, is the output.

        Returns a function that removes the hook.
        """
        self._forward_hooks = (*self._forward_hooks, hook)

        def remove() -> None:
            self._forward_hooks = tuple(other for other in self._forward_hooks if other is not hook)

        return remove

    def register_full_backward_hook(self, hook: Hook) -> Callable[[], None]:
        """Call `hook(module, input_gradients, output_gradients)` in backward, once all of them are known.

        Both are tuples of arrays: one for each Tensor among the positional inputs (None for one that requires
        no gradient), and one for the output, which must be a Tensor. What the hook returns, if not None,
        replaces the gradient of a module with a single input. Returns a function that removes the hook.
        """
        self._backward_hooks = (*self._backward_hooks, hook)

        def remove() -> None:
            self._backward_hooks = tuple(other for other in self._backward_hooks if other is not hook)

        return remove

    def children(self) -> Iterator[tuple[str, Module | Parameter]]:
        """The submodules and parameters that are attributes of this module, with their names."""
        for name, value in vars(self).items():
            if isinstance(value, (Module, Parameter)):
                yield name, value
            elif isinstance(value, (list, tuple)):
                for i, item in enumerate(value):
                    if isinstance(item, (Module, Parameter)):
                        yield f"{name}.{i}", item

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each with its path from here."""
        yield prefix, self
        for name, child in self.children():
            if isinstance(child, Module):
                yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their paths, each once.

        Raises InputError where something else stands in the place of a declared parameter.
        """
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name in module.declared_parameters:
                value = getattr(module, name)
                if value is not None and not isinstance(value, Parameter):
                    raise _not_a_parameter(path, name, value)
            for name, child in module.children():
                if isinstance(child, Parameter) and id(child) not in seen:
                    seen.add(id(child))
                    yield (f"{path}.{name}" if path else name), child

    def parameters(self) -> Iterator[Parameter]:
        """All parameters, each once."""
        for _, parameter in self.named_parameters():
            yield parameter

    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(parameter.size for parameter in self.parameters())

    def _repr_html_(self) -> str:
        """What a notebook shows: how many parameters each part has, the blocks of a list taken together."""
        sizes: Counter[str] = Counter()
        for name, parameter in self.named_parameters():
            *path, leaf = (part for part in name.split(".") if not part.isdigit())
            sizes[".".join(path[:2]) or leaf] += parameter.size
        rows = [*sizes.items(), ("all", sizes.total())]
        cells = "".join(f"<tr><th>{html.escape(part)}</th><td>{size:,}</td></tr>" for part, size in rows)
        head = "<tr><th>part</th><th>parameters</th></tr>"
        return f"<table><caption>{type(self).__name__}</caption>{head}{cells}</table>"

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> Self:
        """Switch this module and all below it to training (dropout on), or with False to evaluation."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch this module and all below it to evaluation: dropout off."""
        return self.train(False)

    def astype(self, dtype: Any) -> Self:
        """Convert all parameters in place: float64 for checks of gradients, float32 for training."""
        for parameter in self.parameters():
            parameter.data = parameter.data.astype(dtype)
            parameter.grad = None
        return self

    def state_dict(self) -> dict[str, Any]:
        """The arrays of all parameters by name; they share memory with the parameters."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy arrays into the parameters of the same names.

        Raises InputError, with all that does not fit (see `require_fit`), and what NumPy raises for values that it
        cannot convert; nothing is changed then.
        """
        parameters = dict(self.named_parameters())
        require_fit({name: parameter.shape for name, parameter in parameters.items()}, state)
        fixed = [name for name, p in parameters.items() if not getattr(p.data.flags, "writeable", True)]
        if fixed:
            raise InputError(
                f"the arrays of {_listed(fixed)} are read-only; assign copies of them to `.data`"
            )
        values = {name: value.data if isinstance(value, Tensor) else value for name, value in state.items()}
        # All are converted before the first is copied, because any of them may fail.
        arrays = {name: backend.asarray(values[name], p.dtype) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data[...] = arrays[name]


def require_fit(shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Any]) -> None:
    """Raise InputError, with all faults in one line, unless `arrays` are of floating point and of these shapes."""
    missing = [name for name in shapes if name not in arrays]
    unknown = [name for name in arrays if name not in shapes]
    faults = [f"missing: {_listed(missing)}"] if missing else []
    if unknown:
        near = nearest(unknown[0], missing or shapes)
        faults.append(f"unknown: {_listed(unknown)}" + (f" (did you mean {near!r}?)" if near else ""))
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
        elif "float" not in getattr(dtype, "name", str(dtype)):
            unfit.append(f"{name!r} is of {dtype}; weights must be floating-point numbers")
    faults += unfit[:_LISTED]
    if len(unfit) > _LISTED:
        faults.append(f"{len(unfit) - _LISTED:,} more that do not fit")
    if faults:
        raise InputError("; ".join(faults))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(map(shown, names[:_LISTED])) + more


def _not_a_parameter(path: str, name: str, value: Any) -> InputError:
    name = f"{path}.{name}" if path else name
    return InputError(
        f"{name} is of class {type(value).__name__}, where a Parameter must stand; change its values with "
        f"`{name}.data[...] = values`, or assign Parameter(values)"
    )


def _packed(value: Any) -> Any:
    return value.packed() if isinstance(value, Module) and value.has_own_infer else value


def _is_floating(value: Any) -> bool:
    return backend.is_array(value) and value.dtype.kind == "f"


def path_of(modules: Sequence[Module]) -> str:
    """The path of the last of `modules`, each an attribute of the one before: `blocks.2.attention`."""
    names = []
    for parent, child in itertools.pairwise(modules):
        names.append(next((name for name, item in parent.children() if item is child), type(child).__name__))
    return ".".join(names)

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
from tinyllm.backend import cuda
from tinyllm.nn.hooks import Boundary, Hook
from tinyllm.nn.state import LoadResult, holds_array, listed, not_a_parameter, require_fit, under_one_name
from tinyllm.system.errors import InputError


class Parameter(Tensor):
    """A Tensor that an optimizer changes: a leaf that requires a gradient, unless it is frozen."""

    __slots__ = ()

    def __init__(self, values: Any, requires_grad: bool = True, dtype: Any = None) -> None:
        super().__init__(values, requires_grad=requires_grad, dtype=dtype)


class Module:
    """A part of a model. Parameters and submodules are plain attributes, or lists or dictionaries of them.

    Names are attribute paths, such as `blocks.0.attention.query.weight`. A parameter or module that is reached twice
    (tied weights) is listed once, under its first name. Other Tensors that belong to the state are buffers.

    Beside `forward` a class may have `infer`, the same on arrays, which decoding runs. It belongs to the class that
    defines it alone: a subclass without its own infers by its `forward`, which may be another.
    """

    declared_parameters: ClassVar[tuple[str, ...]] = ()
    """The attributes that must be Parameters or None: what else stood there would be neither trained nor saved."""
    folds_children: ClassVar[bool] = False
    """Whether equal neighbours among the submodules are shown once in `repr`."""
    training: bool = True
    _buffers: tuple[tuple[str, bool], ...] = ()
    """The names of the attributes that are buffers, each with whether it is saved."""
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
                if value is not None and not (isinstance(value, Tensor) and holds_array(value.data)):
                    raise not_a_parameter(path_of(module_stack.get()), name, value)
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
        return self._registered("_forward_hooks", hook)

    def register_full_backward_hook(self, hook: Hook) -> Callable[[], None]:
        """Call `hook(module, input_gradients, output_gradients)` in backward, once all of them are known.

        Both are tuples of arrays: one for each Tensor among the positional inputs (None for one that requires
        no gradient), and one for the output, which must be a Tensor. What the hook returns, if not None,
        replaces the gradient of a module with a single input. Returns a function that removes the hook.
        """
        return self._registered("_backward_hooks", hook)

    def _registered(self, kind: str, hook: Hook) -> Callable[[], None]:
        setattr(self, kind, (*getattr(self, kind), hook))

        def remove() -> None:
            setattr(self, kind, tuple(other for other in getattr(self, kind) if other is not hook))

        return remove

    def members(self) -> Iterator[tuple[str, Module | Parameter]]:
        """The submodules and parameters that this module holds itself, with their names."""
        for name, value in vars(self).items():
            yield from _found(name, value)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The submodules that this module holds itself, each once, with their names."""
        seen: set[int] = set()
        for name, member in self.members():
            if isinstance(member, Module) and id(member) not in seen:
                seen.add(id(member))
                yield name, member

    def children(self) -> Iterator[Module]:
        """The submodules that this module holds itself, each once."""
        return (child for _, child in self.named_children())

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """This module and all below it, each with its path from here, and once unless `remove_duplicate` is False.

        memo: modules that are passed over.
        """
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        else:
            memo = memo | {self}  # those above it, so that a circle ends
        yield prefix, self
        for name, member in self.members():
            if isinstance(member, Module):
                path = f"{prefix}.{name}" if prefix else name
                yield from member.named_modules(memo, path, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` with every module below this one, and with this one last."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their paths, each once unless `remove_duplicate` is False.

        recurse: those of submodules too. Raises InputError where something else stands in the place of a declared
        parameter, or of the array of one.
        """
        seen: set[int] = set()
        walked = self.named_modules(None, prefix, remove_duplicate) if recurse else [(prefix, self)]
        for path, module in walked:
            for name in module.declared_parameters:
                value = getattr(module, name)
                if value is not None and not isinstance(value, Parameter):
                    raise not_a_parameter(path, name, value)
            for name, member in module.members():
                if isinstance(member, Parameter) and not (remove_duplicate and id(member) in seen):
                    if not holds_array(member.data):
                        raise not_a_parameter(path, name, member)
                    seen.add(id(member))
                    yield (f"{path}.{name}" if path else name), member

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """All parameters, each once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Make `tensor` the attribute `name`, and a part of the state that no optimizer changes, such as a mask.

        persistent: whether `state_dict` has it. Raises KeyError where there is such an attribute already.
        """
        if hasattr(self, name):
            raise KeyError(f"{type(self).__name__} has an attribute {name!r} already")
        setattr(self, name, tensor if tensor is None or isinstance(tensor, Tensor) else Tensor(tensor))
        self._buffers = (*self._buffers, (name, persistent))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, *, persistent_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """All buffers with their paths; raises InputError where something else than a Tensor stands in the place."""
        for path, module in self.named_modules(prefix=prefix) if recurse else [(prefix, self)]:
            for name, persistent in module._buffers:
                value = getattr(module, name)
                name = f"{path}.{name}" if path else name
                if value is not None and not isinstance(value, Tensor):
                    raise InputError(f"{name} is of class {type(value).__name__}, where a Tensor must stand")
                if value is not None and (persistent or not persistent_only):
                    yield name, value

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """All buffers."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze all parameters (False), so that backward computes no gradients for them, or free them again."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or with False fill them with zeros."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad[...] = 0

    def train(self, mode: bool = True) -> Self:
        """Switch this module and all below it to training (dropout on), or with False to evaluation."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch this module and all below it to evaluation: dropout off."""
        return self.train(False)

    def astype(self, dtype: Any) -> Self:
        """Convert parameters and floating-point buffers in place: float64 to check gradients, float32 to train."""
        for parameter in self.parameters():
            parameter.data = parameter.data.astype(dtype)
            parameter.grad = None
        for buffer in self.buffers():
            if buffer.dtype.kind == "f":
                buffer.data = buffer.data.astype(dtype)
        return self

    def to(self, *targets: Any, dtype: Any = None, device: Any = None) -> Self:
        """Convert to a dtype, as `astype`; a device must be where all arrays lie (see `Tensor.to`)."""
        wanted = cuda.wanted_dtype(*targets, dtype, device)
        return self if wanted is None else self.astype(wanted)

    def double(self) -> Self:
        """Convert parameters and buffers to float64."""
        return self.astype("float64")

    def float(self) -> Self:
        """Convert parameters and buffers to float32."""
        return self.astype("float32")

    def state_dict(self) -> dict[str, Any]:
        """The arrays of all parameters and persistent buffers by name; they share memory with them."""
        return {name: tensor.data for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        named = dict(self.named_parameters())  # each once
        for path, module in self.named_modules():
            own = dict(module.named_parameters(path, recurse=False))
            state |= {name: parameter for name, parameter in own.items() if name in named}
            state |= module.named_buffers(path, recurse=False, persistent_only=True)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadResult:
        """Copy arrays into the parameters and buffers of the same names; returns what was passed over.

        A tied parameter may come under each of its names. Without `strict`, names that are missing or unknown are
        passed over. Raises InputError, with all that does not fit (see `require_fit`), and what NumPy raises for values
        that it cannot convert; nothing is changed then.
        """
        state, tensors = state_dict, self._state()
        first = {id(tensor): name for name, tensor in tensors.items()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name in state and name not in tensors:
                state = under_one_name(state, name, first[id(parameter)])
        passed_over = LoadResult(
            [name for name in tensors if name not in state], [name for name in state if name not in tensors]
        )
        if not strict:
            state = {name: value for name, value in state.items() if name in tensors}
            tensors = {name: tensor for name, tensor in tensors.items() if name in state}
        buffers = [name for name, tensor in tensors.items() if not isinstance(tensor, Parameter)]
        require_fit({name: tensor.shape for name, tensor in tensors.items()}, state, buffers)
        fixed = [name for name, p in tensors.items() if not getattr(p.data.flags, "writeable", True)]
        if fixed:
            raise InputError(f"the arrays of {listed(fixed)} are read-only; assign copies of them to `.data`")
        values = {name: value.data if isinstance(value, Tensor) else value for name, value in state.items()}
        # All are converted before the first is copied, because any of them may fail.
        arrays = {name: backend.asarray(values[name], p.dtype) for name, p in tensors.items()}
        for name, tensor in tensors.items():
            tensor.data[...] = arrays[name]
        return passed_over

    def extra_repr(self) -> str:
        """What `repr` says of this module beside its submodules, such as sizes."""
        return ""

    def __repr__(self) -> str:
        children = [(name, repr(child).replace("\n", "\n  ")) for name, child in self.named_children()]
        lines = [f"({name}): {text}" for name, text in _folded(children, self.folds_children)]
        if not lines:
            return f"{type(self).__name__}({self.extra_repr()})"
        extra = self.extra_repr()
        return "\n  ".join([f"{type(self).__name__}(", *([extra] if extra else []), *lines]) + "\n)"


def _found(name: str, value: Any) -> Iterator[tuple[str, Module | Parameter]]:
    """The modules and parameters that an attribute is, or that are in a list or a dictionary there."""
    if isinstance(value, (Module, Parameter)):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _found(f"{name}.{i}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _found(f"{name}.{key}", item)


def _folded(children: Sequence[tuple[str, str]], all_of_them: bool) -> Iterator[tuple[str, str]]:
    """Names and texts, those of equal neighbours in a list as one: ("blocks.0-3", "4 x Block(...)")."""
    for text, run in itertools.groupby(children, key=lambda child: child[1]):
        names = [name for name, _ in run]
        if len(names) > 1 and (all_of_them or all("." in name for name in names)):
            yield f"{names[0]}-{names[-1].rpartition('.')[2]}", f"{len(names)} x {text}"
        else:
            yield from ((name, text) for name in names)


def _packed(value: Any) -> Any:
    return value.packed() if isinstance(value, Module) and value.has_own_infer else value


def _is_floating(value: Any) -> bool:
    return backend.is_array(value) and value.dtype.kind == "f"


def path_of(modules: Sequence[Module]) -> str:
    """The path of the last of `modules`, each called by the one before: `blocks.2.attention`."""
    names = []
    for parent, child in itertools.pairwise(modules):
        # Mostly a member, and otherwise in a container, which is not called.
        candidates = itertools.chain(parent.members(), parent.named_modules())
        names.append(next((name for name, item in candidates if item is child), type(child).__name__))
    return ".".join(names)

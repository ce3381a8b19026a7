"""Modules made of modules: Sequential, ModuleList and ModuleDict, as torch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from tinyllm.nn.module import Module


class _Container(Module):
    """Named modules in an order. Each is an attribute of its name, which may be a number."""

    def __init__(self, named: Mapping[str, Module]) -> None:
        for name, module in named.items():
            self._set(name, module)

    def _set(self, name: str, module: Module) -> None:
        if not isinstance(module, Module):
            raise TypeError(
                f"{type(self).__name__} holds modules; {name!r} is of class {type(module).__name__}"
            )
        if hasattr(type(self), name):
            raise KeyError(f"{name!r} is an attribute of {type(self).__name__}; give another name")
        setattr(self, name, module)

    def _named(self) -> dict[str, Module]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Module)}

    def __len__(self) -> int:
        return len(self._named())


class _Row(_Container):
    """Modules by position."""

    def __iter__(self) -> Iterator[Module]:
        return iter(self._named().values())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self._like(dict(list(self._named().items())[index]))
        return list(self._named().values())[index]

    def _like(self, named: Any) -> Any:
        """Some of the modules as a container of this kind."""
        kind: Any = type(self)
        return kind(named)

    def __setitem__(self, index: int, module: Module) -> None:
        self._set(list(self._named())[index], module)

    def __delitem__(self, index: int | slice) -> None:
        modules = list(self)
        del modules[index]
        self._hold(modules)

    def append(self, module: Module) -> Self:
        """Put a module at the end."""
        self._set(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Put modules at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Put a module before the one at `index`."""
        modules = list(self)
        modules.insert(index, module)
        return self._hold(modules)

    def _hold(self, modules: Iterable[Module]) -> Self:
        """These modules alone, named by their positions."""
        for name in self._named():
            delattr(self, name)
        return self.extend(modules)


class ModuleList(_Row):
    """Modules in a list: `for block in self.blocks: x = block(x)`. A plain list as an attribute does the same."""

    folds_children: ClassVar[bool] = True

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__({str(i): module for i, module in enumerate(modules)})

    def _like(self, named: Any) -> Any:
        return super()._like(named.values())


class Sequential(_Row):
    """Modules called one after the other, each with the output of the one before.

    Example:
        >>> net = Sequential(Linear(4, 8), ReLU(), Linear(8, 2))
        >>> net(Tensor(np.ones((3, 4), dtype=np.float32))).shape, [name for name, _ in net.named_parameters()]
        ((3, 2), ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(self, *modules: Any) -> None:
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            super().__init__(modules[0])
        else:
            super().__init__({str(i): module for i, module in enumerate(modules)})

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x


class ModuleDict(_Container):
    """Modules by name: `self.heads["word"](x)` or `self.heads.word(x)`."""

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] = ()) -> None:
        super().__init__(dict(modules))

    def __getitem__(self, name: str) -> Any:
        return self._named()[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self._set(name, module)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self._named()

    def __iter__(self) -> Iterator[str]:
        return iter(self._named())

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._named().keys()

    def values(self) -> Iterable[Module]:
        """The modules."""
        return self._named().values()

    def items(self) -> Iterable[tuple[str, Module]]:
        """The names with their modules."""
        return self._named().items()

"""Modules made of modules: Sequential, ModuleList and ModuleDict, as torch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from tinyllm.nn.module import Module, Parameter


class _Container(Module):
    """Named modules in an order; their names here are their keys."""

    def __init__(self, named: Mapping[str, Module]) -> None:
        self._items: dict[str, Module] = {}
        for name, module in named.items():
            self._set(name, module)

    def _set(self, name: str, module: Module) -> None:
        if not isinstance(module, Module):
            raise TypeError(
                f"{type(self).__name__} holds modules; {name!r} is of class {type(module).__name__}"
            )
        self._items[name] = module

    def members(self) -> Iterator[tuple[str, Module | Parameter]]:
        for name, value in super().members():
            yield name.removeprefix("_items."), value

    def __len__(self) -> int:
        return len(self._items)


class _Row(_Container):
    """Modules by position."""

    def __iter__(self) -> Iterator[Module]:
        return iter(self._items.values())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self._like(dict(list(self._items.items())[index]))
        return list(self._items.values())[index]

    def _like(self, named: Any) -> Any:
        """Some of the modules as a container of this kind."""
        kind: Any = type(self)
        return kind(named)

    def __setitem__(self, index: int, module: Module) -> None:
        self._set(list(self._items)[index], module)

    def __delitem__(self, index: int | slice) -> None:
        modules = list(self._items.values())
        del modules[index]
        self._items = {str(i): module for i, module in enumerate(modules)}

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
        modules = list(self._items.values())
        modules.insert(index, module)
        self._items = {}
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
        for module in self._items.values():
            x = module(x)
        return x


class ModuleDict(_Container):
    """Modules by name: `self.heads["word"](x)`."""

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] = ()) -> None:
        super().__init__(dict(modules))

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self._set(name, module)

    def __delitem__(self, name: str) -> None:
        del self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._items.keys()

    def values(self) -> Iterable[Module]:
        """The modules."""
        return self._items.values()

    def items(self) -> Iterable[tuple[str, Module]]:
        """The names with their modules."""
        return self._items.items()

"""What a planted bug is, and how it is planted: one function or constant of the package replaced for a while."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tinyllm.autograd.operators import Operators

Wrap = Callable[[Any], Any]
_ABSENT: Any = object()


@dataclass(frozen=True)
class Mutant:
    """One mistake that a person could make in this package.

    Attributes:
        name: of the mistake. explanation: what was done wrong, and how it shows.
        owner: the class or module that it is in. attribute: the name there of what is wrong.
        replacement: what stands there while the bug is planted.

    Example:
        >>> from tinyllm import Tensor
        >>> with MUTANTS["relu_passes_where_the_gradient_is_positive"].planted():
        ...     Tensor([1.0, -1.0]).relu().numpy()
        array([1., 0.], dtype=float32)
    """

    name: str
    explanation: str
    owner: Any
    attribute: str
    replacement: Any

    @property
    def place(self) -> str:
        """Where the bug is: `tinyllm.ops.softmaxes.Softmax.backward`."""
        inner = f"{self.owner.__qualname__}." if inspect.isclass(self.owner) else ""
        return f"{self.module}.{inner}{self.attribute}"

    @property
    def module(self) -> str:
        """The module that the bug is in."""
        return str(self.owner.__module__ if inspect.isclass(self.owner) else self.owner.__name__)

    def planted(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the package has the bug; not for use in two threads at once."""
        return replaced(self.owner, self.attribute, self.replacement)


MUTANTS: dict[str, Mutant] = {}
"""All mutants by name, in the order of the package's layers."""


@contextlib.contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Within this context `owner.attribute` is `value`; afterwards everything is as it was.

    Raises AttributeError when there is no such attribute: the package has changed, and the mutant must follow.
    """
    original = getattr(owner, attribute)
    places = list(
        dict.fromkeys([(owner, attribute), *(_imports_of(original) if isinstance(owner, ModuleType) else ())])
    )
    # The entry itself, not what getattr makes of it: properties and class methods come back as they were.
    before = [vars(place).get(name, _ABSENT) for place, name in places]
    for place, name in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name), entry in zip(places, before, strict=True):
            if entry is _ABSENT:
                delattr(place, name)
            else:
                setattr(place, name, entry)


def _imports_of(function: Any) -> list[tuple[Any, str]]:
    """Where else in the package a module's function is known: imported by name, wrapped, or as a method of Tensor."""
    if not callable(function):
        return []
    modules = [
        module
        for path, module in list(sys.modules.items())
        # Mutants keep what they replace, to call it.
        if path.partition(".")[0] == "tinyllm" and not path.startswith("tinyllm.testing.mutants")
    ]
    return [
        (owner, name)
        for owner in [Operators, *modules]
        for name, value in list(vars(owner).items())
        if callable(value) and inspect.unwrap(value) is inspect.unwrap(function)
    ]


def edited(owner: type, method: str, old: str, new: str) -> Callable[..., Any]:
    """The method with `old` in its text replaced by `new`. Raises ValueError when `old` does not stand there once."""
    function = vars(owner)[method]
    source = textwrap.dedent(inspect.getsource(function))
    head, mark, body = source.rpartition('"""\n') if function.__doc__ else ("", "", source)
    if body.count(old) != 1:
        raise ValueError(f"{old!r} stands {body.count(old)} times in {owner.__qualname__}.{method}")
    changed_source = head + mark + body.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(changed_source, f"<{owner.__name__}.{method}>", "exec"), function.__globals__, names)
    changed: Callable[..., Any] = names[method]
    return changed


def mutant(owner: Any, attribute: str, wrap: Wrap = lambda function: function) -> Wrap:
    """Decorator: the function replaces `owner.attribute`. Its name is the mutant's, its docstring the explanation."""

    def register(function: Any) -> Any:
        add(function.__name__, function.__doc__ or "", owner, attribute, wrap(function))
        return function

    return register


def add(name: str, explanation: str, owner: Any, attribute: str, replacement: Any) -> None:
    """Add a mutant to MUTANTS. Raises ValueError when the name is taken or nothing is explained."""
    explanation = re.sub(r"\s+", " ", explanation).strip()
    if name in MUTANTS or not explanation:
        raise ValueError(f"mutant {name!r} is there already, or has no explanation")
    MUTANTS[name] = Mutant(name, explanation, owner, attribute, replacement)

"""Checks by name, which of them reach which mutant, and who kills whom."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinyllm.testing.mutants.planting import MUTANTS, Mutant, replaced

CHECKS: dict[str, Callable[[], None]] = {}
"""All checks by name: each raises when what it checks does not hold. None looks at numbers that we stored."""


def check(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorator that puts a function among CHECKS. Raises ValueError when the name is taken."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        if name in CHECKS:
            raise ValueError(f"a check named {name!r} is there already")
        CHECKS[name] = function
        return function

    return register


def run_check(name: str) -> None:
    """Run one check; raises what it raises."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # A bug may overflow on the way to a wrong result; it is the result that is judged.
        warnings.simplefilter("ignore")
        CHECKS[name]()


@dataclass(frozen=True)
class Kill:
    """A mutant that a check has noticed. message: the first line of what the check said."""

    mutant: str
    check: str
    message: str


@dataclass
class Survey:
    """Who killed whom.

    Attributes:
        failures: checks that fail without any mutant, with what they said. kills: one or more for each mutant that
        was noticed. survivors: the names of the others. seconds: how long it took.
    """

    failures: dict[str, str] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every check passes without mutants, and every mutant was killed."""
        return not self.failures and not self.survivors


def survey(
    mutants: Iterable[Mutant] | None = None,
    all_kills: bool = False,
    report: Callable[[Mutant, list[Kill]], None] = lambda mutant, kills: None,
) -> Survey:
    """Run every check without a mutant, then for each mutant the checks that reach it.

    Args:
        mutants: which; all if None. all_kills: go on after the first check that kills.
        report: told of each mutant and its kills as soon as they are known.

    A check that does not call what a mutant replaces cannot notice it, and is not run for it. Checks for which the
    mutant's own place is the subject come first, then the others in their order.
    """
    begun = time.perf_counter()
    chosen = list(MUTANTS.values() if mutants is None else mutants)
    result = Survey()
    reached: dict[str, set[tuple[int, str]]] = {}
    for name in CHECKS:
        with _watching(chosen) as seen:
            failed = failure(name)
        reached[name] = seen
        if failed is not None:
            result.failures[name] = failed.message
    for mutant in chosen:
        kills = []
        for name in _ordered(mutant, reached):
            with mutant.planted():
                failed = failure(name)
            if failed is not None and not failed.stale and name not in result.failures:
                kills.append(Kill(mutant.name, name, failed.message))
                if not all_kills:
                    break
        result.kills += kills
        if not kills:
            result.survivors.append(mutant.name)
        report(mutant, kills)
    result.seconds = time.perf_counter() - begun
    return result


class Failure(NamedTuple):
    """What a check that did not pass has said. stale: whether it was an error that says that a mutant no longer fits
    the package (a wrong number of arguments, say), and not that its bug was noticed."""

    message: str
    stale: bool


def failure(name: str) -> Failure | None:
    """Run a check: the first line of what it says, None when it passes."""
    try:
        run_check(name)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        message = first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"
        return Failure(message, isinstance(error, (AttributeError, ImportError, NameError, TypeError)))
    return None


def _ordered(mutant: Mutant, reached: dict[str, set[tuple[int, str]]]) -> list[str]:
    """The checks that reach a mutant, those of its own subject first."""
    place = (id(mutant.owner), mutant.attribute)
    subject = getattr(mutant.owner, "name", None)  # an op's
    names = [name for name, seen in reached.items() if place in seen]
    return sorted(names, key=lambda name: not name.endswith(f" of {subject}"))


@contextlib.contextmanager
def _watching(mutants: Iterable[Mutant]) -> Iterator[set[tuple[int, str]]]:
    """The places of mutants that are called within this context; a constant counts as called always."""
    seen: set[tuple[int, str]] = set()
    with contextlib.ExitStack() as stack:
        for place in {(id(m.owner), m.attribute): m for m in mutants}.values():
            key = (id(place.owner), place.attribute)
            found = inspect.getattr_static(place.owner, place.attribute)
            if isinstance(found, property):
                watcher: Any = property(_noting(found.fget, seen, key))
            elif callable(found):
                watcher = _noting(found, seen, key)
            else:
                seen.add(key)
                continue
            stack.enter_context(replaced(place.owner, place.attribute, watcher))
        yield seen


def _noting(function: Any, seen: set[tuple[int, str]], key: tuple[int, str]) -> Any:
    @functools.wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.add(key)
        return function(*args, **kwargs)

    return noting

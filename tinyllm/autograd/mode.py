"""How ops behave in the current context: with or without a graph, by formula or fast form, observed by tools.

The modes are context variables, so they hold in the thread that set them and in worker threads that run in a copy of
its context.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple


class Mode(NamedTuple):
    """How ops behave in the current context."""

    gradient: bool = True
    formulas: bool = False
    duals: bool = False
    """Inside `jvp`, where Tensors may hold dual numbers, which only formulas compute with."""
    observers: tuple[Any, ...] = ()
    """Each an `observer.Observer`, outermost first."""


module_stack: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("tinyllm_modules", default=())
"""The modules whose forward is running, outermost first; each op keeps it, so that a graph knows its modules."""

current_mode: contextvars.ContextVar[Mode] = contextvars.ContextVar(
    "tinyllm_mode",
    default=Mode(),  # noqa: B039 (a named tuple is immutable)
)
"""The mode of the current context."""


@contextlib.contextmanager
def mode_set(**changes: Any) -> Iterator[None]:
    """Within this context the current mode has other values for the named fields of Mode."""
    token = current_mode.set(current_mode.get()._replace(**changes))
    try:
        yield
    finally:
        current_mode.reset(token)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Within this context ops record no graph: `with no_grad(): logits = model(tokens)`."""
    return mode_set(gradient=False)


def enable_grad() -> contextlib.AbstractContextManager[None]:
    """Undo an outer `no_grad` within this context."""
    return mode_set(gradient=True)


def use_formulas(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within this context every op runs as its formula, and what was fused runs as the ops that it is made of.

    This is the mode for stepping through the mathematics, and the oracle of the fast forms' tests. Gradients of a graph
    that was made before are computed by formula too. Inside `jvp` formulas run always.
    """
    return mode_set(formulas=enabled or current_mode.get().duals)


def is_grad_enabled() -> bool:
    """Whether ops record a graph in the current context."""
    return current_mode.get().gradient

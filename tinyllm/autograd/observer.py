"""Who is told of every op and module that runs: the tools of `tinyllm.debug`."""

from __future__ import annotations

import contextlib
from typing import Any

from tinyllm.autograd.mode import current_mode, mode_set
from tinyllm.autograd.tensor import Op, Tensor


class Observer:
    """Told of every op and module that runs within `observe`; the tools of `tinyllm.debug` are its subclasses.

    Methods do nothing here. They may raise, which stops the computation where it stands.
    """

    def before_forward(self, op: Op, inputs: tuple[Tensor, ...]) -> None:
        """`op` is about to compute its output."""

    def after_forward(self, op: Op, inputs: tuple[Tensor, ...], output: Any) -> None:
        """`op` has computed the array `output`."""

    def before_backward(self, op: Op, gradient: Any) -> None:
        """`op` is about to compute the gradients of its inputs."""

    def after_backward(self, op: Op, gradient: Any, results: tuple[Any, ...]) -> None:
        """`op` has computed `results`, one gradient or None for each input."""

    def enter_module(self, module: Any) -> None:
        """A module's forward is about to run."""


def observe(observer: Observer) -> contextlib.AbstractContextManager[None]:
    """Within this context `observer` is told of every op and module that runs."""
    return mode_set(observers=(*current_mode.get().observers, observer))


def observers() -> tuple[Observer, ...]:
    """The observers in the current context, outermost first."""
    return current_mode.get().observers

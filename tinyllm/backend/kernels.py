"""Functions of single elements, which become one kernel on a device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy

from tinyllm.backend import current
from tinyllm.backend.current import Array


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function that computes each element of arrays from the same element of others, or a number.

    It may change arguments in place. On NumPy it is called as it is; on a device it becomes one kernel (see
    `kernel_sources`).
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if current.xp is numpy:
            return function(*arguments)
        return current.xp.library.elementwise(function, arguments, _condition.get())

    return call


_condition: ContextVar[Any] = ContextVar("condition", default=None)


@contextlib.contextmanager
def masked_updates(condition: Array | None) -> Iterator[None]:
    """Within this context, elementwise functions change arguments only if `condition`, a boolean on a device, is true.

    None: always. So a step can be given up without waiting for the number that decides it.
    """
    token = _condition.set(condition)
    try:
        yield
    finally:
        _condition.reset(token)

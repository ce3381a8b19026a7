"""Engines: who makes training steps. Batches go in, outcomes come out, and the trainer does not ask which.

`serial.py` is the loop to read first, in the caller's own thread. `processes.py` is the same loop with each of its
phases made by all cores of this machine. `device.py` makes many steps before anybody looks at a number.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinyllm import backend
from tinyllm.models import TransformerLM
from tinyllm.optim import OptimizerGroup
from tinyllm.system.interrupts import Interrupts
from tinyllm.training.engines.device import DeviceSteps
from tinyllm.training.engines.engine import Engine
from tinyllm.training.engines.processes import Processes
from tinyllm.training.engines.serial import Serial
from tinyllm.training.objectives import Batch, Objective

__all__ = ["DeviceSteps", "Engine", "Processes", "Serial", "build_engine", "build_host_engine"]


def build_engine(
    model: TransformerLM,
    optimizer: OptimizerGroup,
    objective: Objective,
    threads: int,
    seed: int = 0,
    validation: Iterable[Batch] = (),
    interrupts: Interrupts | None = None,
) -> Engine:
    """The engine for the current backend and so many threads.

    seed: of dropout. validation: what is evaluated. interrupts: whose signals cut a step before anything is changed.
    """
    if backend.is_asynchronous():
        return DeviceSteps(model, optimizer, objective, seed, validation, interrupts)
    return build_host_engine(model, optimizer, objective, threads, seed, validation, interrupts)


def build_host_engine(
    model: TransformerLM,
    optimizer: OptimizerGroup,
    objective: Objective,
    threads: int,
    seed: int = 0,
    validation: Iterable[Batch] = (),
    interrupts: Interrupts | None = None,
) -> Serial:
    """The same on this machine's cores: Serial for one thread, otherwise Processes."""
    if threads == 1:
        return Serial(model, optimizer, objective, seed, validation, interrupts)
    return Processes(model, optimizer, objective, threads, seed, validation, interrupts)

"""What the trainer asks of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from tinyllm.backend import Array
from tinyllm.training.events import Limits, Outcome
from tinyllm.training.objectives import Batch


class Engine(Protocol):
    """Makes the steps of one model, to be used as a context.

    most_steps: how many it makes at most without anybody looking at a number between them.
    """

    most_steps: int

    @property
    def total(self) -> Mapping[str, Array]:
        """The gradients of the last step by name, where it was the only one of its call."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(
        self,
        position: int,
        batches: Sequence[Batch],
        factors: Sequence[float],
        largest_norm: float,
        limits: Limits,
    ) -> list[Outcome]:
        """Steps on these batches in turn.

        A step is made where its loss and gradient norm are finite and within `limits`; otherwise it changes nothing.

        Args:
            position: the number of the first batch, which dropout depends on, with the seed. batches: at most
                `most_steps`, in the memory of this machine. factors: the schedule's of each step.
            largest_norm: to which gradients are clipped.
        """

    def evaluate(self) -> float:
        """The mean loss of the validation batches, with dropout off."""

    def state_dict(self) -> dict[str, Any] | None:
        """What must survive a kill beside the model and the optimizer, for JSON; None: nothing."""

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a saved state; raises ValueError, TypeError or KeyError, with nothing changed, if damaged."""

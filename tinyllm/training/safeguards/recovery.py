"""What is to be done after a step that was not made: skip its batch, go back to a checkpoint, or stop.

All of it follows from what is in the checkpoint, so that a run that was killed on the way ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Remedy:
    """What is to be done after a rejected step.

    in_words: the same for a report. candidates: the checkpoints that a rollback tries in turn. skipped: how many
    batches are passed over after it, beside those that were rejected. number: how often training goes back for this
    trouble. tried: in plain words, what did not help, where training stops.
    """

    action: Literal["skip", "roll back", "stop"]
    in_words: str
    candidates: tuple[Path, ...] = ()
    skipped: int = 0
    number: int = 0
    tried: str = ""


@dataclass
class Recovery:
    """The policy after a rejected step; whoever asks it has to act.

    The batch is skipped. After `patience` rejections in a row the parameters themselves are taken to be bad: training
    goes back to an earlier checkpoint, and skips batches, twice as many each time. After `max_rollbacks` of these
    without a window of accepted steps past the point of trouble, it stops.

    rejected: rejections since the last accepted step. rollbacks: since the last time that trouble was passed.
    trouble: the furthest step after which training went back.
    """

    patience: int
    max_rollbacks: int
    window: int
    rejected: int = field(default=0, init=False)
    rollbacks: int = field(default=0, init=False)
    trouble: int = field(default=-1, init=False)

    def accept(self, step: int) -> None:
        """Step number `step` was made."""
        self.rejected = 0
        if step >= self.trouble + self.window:
            self.rollbacks, self.trouble = 0, -1

    def reject(self, step: int, checkpoints: Sequence[Path]) -> Remedy:
        """The step after `step` was rejected; checkpoints: those that training may go back to, oldest first."""
        self.rejected += 1
        if self.rejected < self.patience:
            return Remedy("skip", "its batch was skipped")
        if not checkpoints or self.rollbacks >= self.max_rollbacks:
            return Remedy("stop", "training stopped", tried=self._tried())
        self.rejected = 0
        self.rollbacks += 1
        self.trouble = max(self.trouble, step)
        candidates = list(reversed(checkpoints))
        if self.rollbacks > 1 and len(candidates) > 1:
            # The newest did not help the last time.
            del candidates[0]
        return Remedy(
            "roll back",
            "its batch was skipped, and training went back to an earlier checkpoint",
            tuple(candidates),
            skipped=self.patience * 2 ** (self.rollbacks - 1),
            number=self.rollbacks,
        )

    def _tried(self) -> str:
        text = f"{self.patience} steps in a row were rejected"
        if self.rollbacks:
            times = "a return" if self.rollbacks == 1 else f"{self.rollbacks} returns"
            text += f", and {times} to earlier checkpoints did not help"
        return text

    def state_dict(self) -> dict[str, int]:
        """The counts; JSON can hold them."""
        return {"rejected": self.rejected, "rollbacks": self.rollbacks, "trouble": self.trouble}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved counts; raises ValueError, TypeError or KeyError, with nothing changed, for damaged ones."""
        counts = [int(state[name]) for name in ("rejected", "rollbacks", "trouble")]
        self.rejected, self.rollbacks, self.trouble = counts

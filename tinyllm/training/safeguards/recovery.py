"""What is done after a step that the watch rejects: skip its batch, go back to a checkpoint, or stop.

All of it follows from what is in the checkpoint, so that a run that was killed on the way ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinyllm.system.errors import InputError
from tinyllm.training.checkpoints import checkpoint, resuming
from tinyllm.training.safeguards import incidents
from tinyllm.training.safeguards.watch import Rejection

if TYPE_CHECKING:
    from tinyllm.training.trainer import Trainer

Action = Literal["skip", "roll back", "stop"]
DONE: dict[Action, str] = {
    "skip": "its batch was skipped",
    "roll back": "its batch was skipped, and training went back to an earlier checkpoint",
    "stop": "training stopped",
}


@dataclass
class Recovery:
    """What is done after a rejected step.

    Its batch is skipped. After `patience` rejections in a row the parameters themselves are taken to be bad: training
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

    def reject(self, step: int, can_roll_back: bool) -> Action:
        """The step after `step` was rejected; returns what is to be done."""
        self.rejected += 1
        if self.rejected < self.patience:
            return "skip"
        if not can_roll_back or self.rollbacks >= self.max_rollbacks:
            return "stop"
        self.rejected = 0
        self.rollbacks += 1
        self.trouble = max(self.trouble, step)
        return "roll back"

    def targets(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Which of these, oldest first, a rollback tries in turn.

        It begins with the newest, and for the same trouble again with the one before, where there is one.
        """
        newest_first = list(reversed(checkpoints))
        return newest_first[1:] if self.rollbacks > 1 and len(checkpoints) > 1 else newest_first

    @property
    def summary(self) -> str:
        """What was tried, in plain words."""
        text = f"{self.patience} steps in a row were rejected"
        if self.rollbacks:
            times = "a return" if self.rollbacks == 1 else f"{self.rollbacks} returns"
            text += f", and {times} to earlier checkpoints did not help"
        return text

    @property
    def batches_to_skip(self) -> int:
        """How many batches are passed over after a rollback, beside those that were rejected."""
        return self.patience * 2 ** (self.rollbacks - 1)

    def state_dict(self) -> dict[str, int]:
        """The counts; JSON can hold them."""
        return {"rejected": self.rejected, "rollbacks": self.rollbacks, "trouble": self.trouble}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved counts; raises ValueError, TypeError or KeyError, with nothing changed, for damaged ones."""
        counts = [int(state[name]) for name in ("rejected", "rollbacks", "trouble")]
        self.rejected, self.rollbacks, self.trouble = counts


@dataclass(frozen=True)
class Rollback:
    """Training went back to a checkpoint.

    step: the number of the step that was rejected last. to_step: the checkpoint's. skipped: batches that are passed
    over beside the rejected ones. number: how often training went back for this trouble.
    """

    step: int
    to_step: int
    skipped: int
    number: int


def recover(trainer: Trainer, rejection: Rejection) -> Action:
    """Do what is to be done after a rejected step; raises InputError when nothing is left to try."""
    config, recovery = trainer.config, trainer.recovery
    folders = [] if trainer.run is None else trainer.scheduled()
    action = recovery.reject(trainer.step, can_roll_back=bool(folders))
    if trainer.run is not None and rejection.replayable:
        rejection = _with_incident(trainer, rejection, DONE[action])
    for callback in trainer.callbacks:
        callback.on_rejected(rejection)
    if action == "roll back":
        rollback = _roll_back(trainer, rejection, recovery.targets(folders))
        for callback in trainer.callbacks:
            callback.on_rollback(rollback)
    elif action == "stop":
        report = f"; what led there is in {rejection.incident}" if rejection.incident else ""
        raise InputError(
            f"training diverged in step {rejection.step}: {rejection.reason}; {recovery.summary}; lower "
            f"--learning-rate (now {config.learning_rate}) or raise --warmup-steps (now {config.warmup_steps}), in a "
            f"new run: --out DIR or --overwrite{report}"
        )
    return action


def _with_incident(trainer: Trainer, rejection: Rejection, done: str) -> Rejection:
    """The rejection with the folder that tells more, or in its reason why there is none."""
    try:
        return replace(rejection, incident=incidents.record(trainer, rejection, done))
    except Exception as error:  # whatever it is: a report is never worth a run
        line = str(error).partition("\n")[0]
        return replace(rejection, reason=f"{rejection.reason} (there is no report: {line})")


def _roll_back(trainer: Trainer, rejection: Rejection, folders: list[Path]) -> Rollback:
    """Go back to the first of these checkpoints that can be used, and on with batches that were not seen yet."""
    assert trainer.run is not None
    recovery = trainer.recovery
    skipped, counts = recovery.batches_to_skip, recovery.state_dict()
    position, best_loss = trainer.sampler.step, trainer.best_loss
    for number, folder in enumerate(folders):
        try:
            resuming.restore(trainer, checkpoint.read(folder))
        except InputError:
            if number == len(folders) - 1:
                raise
            continue
        break
    trainer.sampler.step = position + skipped
    # The best checkpoint stays, under another name than its step's.
    trainer.best_loss, trainer.best_step = best_loss, -1
    trainer.saved = folder
    recovery.load_state_dict(counts)
    checkpoint.go_back(trainer.run, folder)
    return Rollback(rejection.step, trainer.step, skipped, recovery.rollbacks)

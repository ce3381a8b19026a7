"""The checkpoints that a run writes while it trains: one after another, with room made where the disk is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tinyllm import backend
from tinyllm.backend import current
from tinyllm.models import TransformerLM
from tinyllm.system.errors import InputError, NoSpaceError
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.checkpoints.checkpoint import TrainingState


class RunCheckpoints:
    """Writes the checkpoints of a run, links to them, and deletes those that are not to be kept.

    Args:
        run: the folder of the run; None: nothing is written.
        model, tokenizer: what is saved. every: steps between checkpoints. keep: how many of these are kept.
        notify: told of the name of an event and its values (see Callback). seconds: between checkpoints, beside those
            by steps; 0: no others.

    Attributes:
        saved: the last checkpoint that was written, or gone on from.
    """

    def __init__(
        self,
        run: Path | None,
        model: TransformerLM,
        tokenizer: Tokenizer,
        every: int,
        keep: int,
        notify: Callable[..., None],
        seconds: float = 0.0,
    ) -> None:
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.every, self.keep = every, keep
        self.notify = notify
        self.seconds = seconds
        self.saved: Path | None = None
        self._tried = time.monotonic()
        """When a checkpoint was last written, or could not be."""

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint, -1 if there is none or it is gone."""
        return keeping.step_of(self.saved) if self.saved is not None and self.saved.exists() else -1

    def scheduled(self) -> list[Path]:
        """Those that do not depend on interrupts and on the best loss, oldest first."""
        return [] if self.run is None else keeping.scheduled(self.run, self.every)[-self.keep :]

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, by steps or by the clock.

        One by the clock changes nothing else: it is no place that training goes back to, and the next one replaces it.
        """
        return step % self.every == 0 or 0 < self.seconds <= time.monotonic() - self._tried

    def save(
        self, step: int, collect: Callable[[], TrainingState], best: bool = False, interrupted: bool = False
    ) -> None:
        """Write a checkpoint of this step, make it `latest` (and `best`), and delete those that are not to be kept.

        collect: gives the training state. interrupted: the step may not be evaluated yet; a checkpoint of it that is
        there already will do. Raises InputError when it cannot be written, saying what there is instead.
        """
        if self.run is None or (interrupted and step == self.saved_step):
            return
        self._tried = time.monotonic()
        checkpoint.require_loadable(self.model, self.tokenizer)
        folder = keeping.folder_of(self.run, step, interrupted)
        there = (
            f"--resume goes on from step {self.saved_step}"
            if self.saved_step >= 0
            else "nothing is saved yet"
        )
        if not all(backend.read(current.xp.isfinite(p.data).all()) for p in self.model.parameters()):
            raise InputError(
                f"the parameters after step {step} are not finite, so they are not saved; {there}"
            )
        try:
            if folder != self.saved or not folder.exists():
                self.notify("on_save", step)
                self._write(self.run, folder, collect())
                self.saved = folder
            if best:
                keeping.link_to(self.run, "best", folder)
            keeping.link_to(self.run, "latest", folder)
            keeping.prune(self.run, self.scheduled())
        except InputError as error:
            raise InputError(f"{error}; free space or mend the folder; {there}") from None

    def go_on_from(self, folder: Path, best_step: int) -> None:
        """Make the checkpoint `folder` the last one, and that of `best_step` the best one, after a resume."""
        assert self.run is not None
        self.saved = folder
        keeping.remove_after(self.run, folder)
        keeping.mend_best(self.run, keeping.folder_of(self.run, best_step))

    def go_back(self, folder: Path) -> None:
        """Make the checkpoint `folder` the last one again, amid a run; see `keeping.go_back`."""
        assert self.run is not None
        self.saved = folder
        keeping.go_back(self.run, folder)

    def _write(self, run: Path, folder: Path, state: TrainingState) -> None:
        """Write a checkpoint; on a full disk older ones make room, but for the newest and the best."""
        try:
            checkpoint.save(folder, self.model, self.tokenizer, state)
        except NoSpaceError:
            if self.saved is None or not self.saved.exists():
                raise
            keeping.prune(run, [self.saved])
            checkpoint.save(folder, self.model, self.tokenizer, state)
            self.notify(
                "on_message", "the disk is full: older checkpoints were removed to make room for a new one"
            )

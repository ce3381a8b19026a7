"""metrics.jsonl: the steps, evaluations, rejections, rollbacks and new settings of a run, a JSON object a line."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.progress import print_status
from tinyllm.system.wording import shown
from tinyllm.training.callbacks import Callback
from tinyllm.training.events import Changes, Evaluation, Rejection, Rollback, StepMetrics

METRICS = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends one JSON object a line to metrics.jsonl.

    Training that goes on from a checkpoint cuts the file to the lines that it had then. Lines that cannot be written,
    on a full disk for one, are kept and written later. A file that was deleted meanwhile is made again, and one that
    somebody else has put in its place, such as another run, is left alone. JSON has no NaN: it is null there.
    """

    def __init__(self, folder: Path, log_every: int = 1) -> None:
        self.path = folder / METRICS
        self.log_every = log_every
        self._file: io.FileIO | None = None
        self._size = 0
        """Of the whole lines in the file; what follows is a part of one."""
        self._lines = 0
        self._waiting: list[str] = []
        self._trouble_reported = False
        """Whether the trouble that there is has been reported."""

    def state_dict(self) -> dict[str, Any]:
        """The lines in the file, which are flushed to disk first, and those that could not be written."""
        self._write_waiting()
        if self._file is not None:
            with contextlib.suppress(OSError):
                storage.flush_file(self._file)
        return {"lines": self._lines, "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        lines, waiting = state.get("lines", 0), state.get("waiting", [])
        if type(lines) is not int or lines < 0 or not all(isinstance(line, str) for line in waiting):
            raise ValueError(f"the lines of {METRICS} are {shown(state)}")
        self._lines, self._waiting = lines, list(waiting)

    def on_start(self, step: int, total_steps: int) -> None:
        try:
            whole = storage.read_file(self.path).split(b"\n")[:-1] if self.path.exists() else []
            kept = [line + b"\n" for line in whole[: self._lines]]
            storage.replace(self.path, b"".join(kept))
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        self._lines, self._size = len(kept), sum(map(len, kept))
        self._write_waiting()

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step % self.log_every == 0:
            self._append(vars(metrics))

    def on_changes(self, changes: Changes) -> None:
        for name, (before, now) in changes.settings.items():
            self._append(
                {"step": changes.step, "event": "changed", "setting": name, "before": before, "now": now}
            )

    def on_rejected(self, rejection: Rejection) -> None:
        self._append(
            {
                "step": rejection.step,
                "event": "rejected",
                "position": rejection.position,
                "loss": rejection.loss,
                "grad_norm": rejection.grad_norm,
                "reason": rejection.reason,
            }
        )

    def on_rollback(self, rollback: Rollback) -> None:
        self._append({"step": rollback.step, "event": "rollback", **vars(rollback)})

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self._append(vars(evaluation))

    def on_end(self) -> None:
        self._write_waiting()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, values: dict[str, Any]) -> None:
        values = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        self._waiting.append(json.dumps(values) + "\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write what waits, or keep it for the next time."""
        if self._file is None:
            return
        content = "".join(self._waiting).encode()
        try:
            self._find_again()
            self._file.seek(self._size)
            storage.write_bytes(self._file, content)
        except OSError as error:
            if not self._trouble_reported:
                print_status(
                    f"{self.path}: cannot be written: {error.strerror or error}; its lines are kept and written later"
                )
            self._trouble_reported = True
            return
        self._trouble_reported = False
        self._size += len(content)
        self._lines += len(self._waiting)
        self._waiting.clear()

    def _find_again(self) -> None:
        """Where the file was deleted, put its lines, which an open file keeps, into a new one."""
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return
            raise OSError(errno.EEXIST, "somebody else has made another file of this name")
        self._file.seek(0)
        content = self._file.read(self._size)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.replace(self.path, content or b"")
        found = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._file.close()
        self._file = found


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to the first that is damaged; none where there is no file."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            break
        lines.append(line)
    return lines


def last_branch(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of steps and evaluations without those that training went back before, and without events."""
    branch: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == "rollback":
            branch = [earlier for earlier in branch if earlier["step"] <= line["to_step"]]
        elif "event" not in line:
            branch.append(line)
    return branch

"""The folder of a run: looked at before any work, locked and kept whole while it is trained into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyllm.data import is_for_tokens
from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.lock import FolderLock
from tinyllm.system.toml_files import write_toml
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import keeping

CONFIG_FILE = "run.toml"


class RunFolder(Callback):
    """A run's folder while it is trained into: locked, and made again, with its settings, if somebody deletes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FolderLock(folder)
        self.settings: dict[str, Any] = {}

    def __enter__(self) -> RunFolder:
        try:
            self.lock.hold()
        except OSError as error:
            raise InputError(f"{self.lock.path}: cannot be written: {error.strerror or error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def write(self, settings: dict[str, Any]) -> None:
        """Write the configs of the run, by section."""
        self.settings = settings
        write_toml(self.folder / CONFIG_FILE, settings)

    def on_save(self, step: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.hold()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror or error}") from None
        if not (self.folder / CONFIG_FILE).exists():
            write_toml(self.folder / CONFIG_FILE, self.settings)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make sure, before any work, that the folder holds what the user thinks and can be written."""
    if is_for_tokens(folder):
        raise InputError(f"{folder} holds the tokens of a prepared text; give another --out")
    try:
        has_run = bool(keeping.checkpoints(folder))
    except OSError:
        has_run = False  # what is wrong with the folder is said below
    if resume and not has_run:
        raise InputError(f"{folder}: no run to resume; leave --resume out to begin one")
    if has_run and not resume and not overwrite:
        raise InputError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, "
            "--out DIR writes elsewhere"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = storage.temporary_name(folder / "probe")
        storage.write_new(probe, b"written")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{folder}: cannot be written: {reason or error}; give another --out") from None

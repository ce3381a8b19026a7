"""The checkpoints of a run: which there are, the links that name two of them, and which are deleted.

A run keeps its checkpoints as `checkpoints/step-00000250`, and names two of them by links: `latest` and `best`. Where
there are no symbolic links, a link is a folder with the checkpoint's model and tokenizer, and its name in a file. What
Ctrl-C saved ends in `-interrupted`: it may lack the evaluation of its step, and the next save removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tinyllm.models import TransformerLM
from tinyllm.models.formats import state_file
from tinyllm.system import storage
from tinyllm.system.errors import InputError, UnreadableError
from tinyllm.system.progress import print_status
from tinyllm.system.storage import StrPath
from tinyllm.system.wording import command_line
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints.checkpoint import (
    ELSEWHERE,
    Checkpoint,
    check_vocabulary,
    is_checkpoint,
    read,
)

LINKS = ("latest", "best")
NAMED = "checkpoint.txt"
"""In a folder that stands for a link: the file that holds the path of the checkpoint, from the run's folder."""
INTERRUPTED = "-interrupted"
SET_ASIDE = "before-rollback-"
_NAME = re.compile(rf"step-(\d+)({INTERRUPTED})?")


def load_any(path: StrPath) -> Any:
    """Of a folder, its model and tokenizer (see `load`); of a file, what `tinyllm.save` put there."""
    return state_file.load(path) if Path(path).is_file() else load(path)


def load(path: StrPath) -> tuple[TransformerLM, Tokenizer]:
    """The model and tokenizer of a checkpoint, of a run (its best checkpoint), or of a folder of transformers.

    Of a run's checkpoints, damaged ones are passed over, with a line on standard error. Raises InputError, in one
    line, when nothing is left, and for what is not supported.
    """
    found = find_valid(path, ("best", "latest"))
    report_passed_over(found)
    model, tokenizer = found.model(), found.tokenizer()
    try:
        check_vocabulary(model.config, tokenizer)
    except InputError as error:
        raise InputError(f"{found.folder}: {error}") from None
    return model, tokenizer


def find_valid(path: StrPath, links: tuple[str, ...] = (), training: bool = False) -> Checkpoint:
    """The checkpoint at `path`; of a run the first that verifies: of `links`, then the others, newest first.

    training: whether it must hold a training state. Raises InputError when there is none.
    """
    folder = Path(path)
    candidates = _candidates(folder, links)
    passed_over: list[str] = []
    for candidate in candidates:
        try:
            found = read(candidate)
            if training:
                found.training()
        except InputError as error:
            if len(candidates) == 1:
                raise
            if training and isinstance(error, UnreadableError):
                # To go on from an older one would be to delete this one, which may be whole.
                raise InputError(
                    f"{error}; mend that, or remove {candidate} to go on from the checkpoint before it"
                ) from None
            passed_over.append(str(error).removesuffix(ELSEWHERE))
        else:
            return Checkpoint(found.folder, found.files, tuple(passed_over))
    raise InputError(
        f"{folder}: all {len(candidates)} checkpoints are damaged, the newest: {passed_over[0]}; begin a new run with "
        "--overwrite, or restore one from a copy"
    )


def report_passed_over(found: Checkpoint) -> None:
    """A line on standard error for each damaged checkpoint, and one with what is taken in their place."""
    for line in found.passed_over:
        print_status(f"passed over {line}")
    if found.passed_over:
        print_status(f"taking {found.folder}")


def find(path: StrPath, links: tuple[str, ...] = LINKS) -> Path:
    """The checkpoint that `path` is, or the first of `links` that the run at `path` has; it may be damaged."""
    return _candidates(Path(path), links)[0]


def _candidates(folder: Path, links: tuple[str, ...]) -> list[Path]:
    """Checkpoints in the order in which they are wanted; raises InputError when there is none."""
    if is_checkpoint(folder):
        return [_named_by(folder) or folder]
    names = {target.resolve(): target for target in checkpoints(folder)}
    found = [read_link(folder, link) for link in links]
    linked = [names.get(target, target) for target in found if target is not None and is_checkpoint(target)]
    # Those without a link too: a crash may have come between the checkpoint and the link to it.
    wanted = [*dict.fromkeys([*linked, *reversed(names.values())])]
    if wanted:
        return wanted
    if not folder.exists():
        raise InputError(
            f"{folder}: no such folder; give a run or a checkpoint that `{command_line('train')}` wrote"
        )
    raise InputError(
        f"{folder}: no checkpoint here; give a run or a checkpoint that `{command_line('train')}` wrote"
    )


def folder_of(run: Path, step: int, interrupted: bool = False) -> Path:
    """The name of a run's checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08}{INTERRUPTED if interrupted else ''}"


def step_of(folder: Path) -> int:
    """After how many steps a run's checkpoint was made, by its name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; an interrupted one before the whole one of the same step."""
    folder = run / "checkpoints"
    # Asked first: glob() raises ValueError from Python 3.13 on for a name with a NUL, which no folder has.
    inside = folder.glob("step-*") if folder.is_dir() else ()
    found = [path for path in inside if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(INTERRUPTED)))


def scheduled(run: Path, every: int) -> list[Path]:
    """The checkpoints that a run makes every so many steps, oldest first, whatever interrupts it."""
    whole = [path for path in checkpoints(run) if not path.name.endswith(INTERRUPTED)]
    return [path for path in whole if step_of(path) % every == 0]


def link_to(run: Path, link: str, target: Path) -> None:
    """Make `run/link` name the checkpoint `target`, in one step."""
    temporary = storage.temporary_name(run / f"new-{link}")
    relative = os.path.relpath(target, run)
    try:
        storage.remove(temporary)
        try:
            storage.link(relative, temporary)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            _write_folder(temporary, target, relative)
        if not (temporary.is_symlink() and (run / link).is_symlink()):
            storage.remove(run / link)  # a link alone can be put in the place of another in one step
        storage.rename(temporary, run / link)
        storage.flush_folder(run)
    except OSError as error:
        raise InputError(f"{run / link}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            storage.remove(temporary)


def _write_folder(folder: Path, target: Path, relative: str) -> None:
    """What stands for a link in a file system, or with a user, that has none."""
    folder.mkdir()
    for file in target.iterdir():
        if file.is_file():
            storage.duplicate(file, folder / file.name)
    storage.write_new(folder / NAMED, relative.encode())
    storage.flush_folder(folder)


def read_link(run: Path, link: str) -> Path | None:
    """The checkpoint that `run/link` names, or None."""
    path = run / link
    if path.is_dir():
        return _named_by(path) or path.resolve()
    return _written_in(path, run)


def _named_by(folder: Path) -> Path | None:
    """The checkpoint that a folder in the place of a link stands for, or None if it is no such folder."""
    return _written_in(folder / NAMED, folder.parent)


def _written_in(file: Path, run: Path) -> Path | None:
    if file.is_file():
        with contextlib.suppress(OSError, ValueError):  # not what we wrote
            return (run / storage.read_file(file, 4096).decode("utf-8").strip()).resolve()
    return None


def prune(run: Path, keep: Collection[Path] = ()) -> None:
    """Delete the checkpoints of a run but `keep` and those that a link names, and what a crash left."""
    kept = {path.resolve() for path in (*keep, *(read_link(run, link) for link in LINKS)) if path is not None}
    for folder in [*checkpoints(run), *(run / "checkpoints").glob(f"{SET_ASIDE}*")]:
        if folder.resolve() not in kept:
            with contextlib.suppress(OSError):  # what stays now goes next time
                storage.remove_folder(folder)
    storage.remove_leftovers(run / "checkpoints")
    storage.remove_leftovers(run)


def go_back(run: Path, target: Path) -> None:
    """Make `target` the latest checkpoint of a run again, and delete the newer ones.

    The best one is kept, under another name, because training will come to its step again.
    """
    link_to(run, "latest", target)
    best = read_link(run, "best")
    if best is not None and best.exists() and step_of(best) > step_of(target):
        aside = best.with_name(SET_ASIDE + best.name)
        try:
            if aside.exists():
                storage.remove_folder(aside)
            storage.rename(best, aside)
        except OSError as error:
            raise InputError(f"{best}: cannot be renamed: {error.strerror or error}") from None
        link_to(run, "best", aside)
    remove_after(run, target)


def mend_best(run: Path, best: Path) -> None:
    """Make `best` the best checkpoint of a run again, where a crash came before the link to it, or amid `go_back`."""
    aside = best.with_name(SET_ASIDE + best.name)
    if not best.exists() and aside.exists():
        try:
            storage.rename(aside, best)
        except OSError as error:
            raise InputError(f"{aside}: cannot be renamed: {error.strerror or error}") from None
    if best.exists():
        link_to(run, "best", best)


def remove_after(run: Path, target: Path) -> None:
    """Delete the checkpoints that are newer than `target`; raises InputError when that is not possible."""
    every = checkpoints(run)
    names = [folder.name for folder in every]
    # The newest first: what a crash leaves is then what there was at some time.
    for folder in reversed(every[names.index(target.resolve().name) + 1 :]):
        try:
            storage.remove_folder(folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot be removed: {error.strerror or error}") from None


def remove_run(run: Path) -> None:
    """Delete the checkpoints of a run and the links to them."""
    for link in LINKS:
        storage.remove(run / link)
    if (run / "checkpoints").exists():
        storage.remove_folder(run / "checkpoints")

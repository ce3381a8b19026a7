"""From text to token shards: read as a stream, encoded on all cores, written in order, to be stopped at any moment.

Documents come in an order that depends on the input alone and are grouped into tasks. What is on disk is always that of
the first so many tasks, so who goes on reads the input again and encodes what comes after them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from tinyllm.data.documents import Reading, documents_of, find_document_files
from tinyllm.data.shard_writer import SplitWriter
from tinyllm.data.shards import (
    FORMAT,
    INDEX_FILE,
    SPLITS,
    STATE_FILE,
    VERSION,
    Integers,
    Prepared,
    file_digest,
    is_prepared,
    open_prepared,
)
from tinyllm.data.survey import SEPARATOR, Survey, digest_of, is_validation, learn_tokenizer, survey
from tinyllm.system import settings, storage
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError, NoSpaceError
from tinyllm.system.json_files import read_json
from tinyllm.system.lock import LOCK_FILE, FolderLock
from tinyllm.system.processes import ordered_map
from tinyllm.system.progress import Bar, print_status
from tinyllm.system.text_files import counted
from tinyllm.system.wording import command_line, shown
from tinyllm.tokenizer import Tokenizer, load_tokenizer
from tinyllm.tokenizer.base import FILE_NAME

SHARD_TOKENS = 1 << 24
FLUSH_SECONDS = 5.0
"""Between two moments that a run that was killed goes on from."""

LEAST_VOCAB_SIZE = 257
"""Of a vocabulary that is learned: all bytes, and SEPARATOR."""

_TASK_BYTES = 1 << 22
_GO_ON = "the same command goes on"

Ids = npt.NDArray[Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class PrepareConfig:
    """What text becomes tokens, and how; one of tokenizer and vocab_size is given."""

    data: tuple[str, ...] = settings.field((), "text: files or folders")
    out: str = settings.field("", "folder to write")
    tokenizer: str | None = settings.field(None, "a tokenizer.json, a folder with one, or a .model")
    vocab_size: int | None = settings.field(
        None, f"learn byte-pair encoding of so many tokens, of at most 100 MB of the text, with {SEPARATOR}"
    )
    field: str = settings.field("text", "the field of JSON lines, CSV and Parquet that is the text")
    newlines: Literal["lf", "keep"] = settings.field("lf", "lf: line ends become \\n; keep: they stay")
    separator: str | None = settings.field(None, "a text that stands between the documents of a plain file")
    drop_duplicates: bool = settings.field(
        False, "leave out documents that came before; takes about 100 bytes of memory for each"
    )
    validation_fraction: float = settings.field(
        0.01, "share of the documents that is for validation, chosen by their hash", at_least=0, below=1
    )
    special_tokens: bool = settings.field(
        True, "special tokens in the text become their ids; no: they are text"
    )
    threads: int = settings.field(0, "processes; 0: one for each core", at_least=0)

    def __post_init__(self) -> None:
        settings.check_bounds(self)
        if not self.data or not self.out:
            raise InputError("--data FILES and --out FOLDER are needed")
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise InputError(
                "give --tokenizer FILE, or --vocab-size N to learn one"
                + " and not both" * bool(self.tokenizer)
            )
        if self.vocab_size is not None and self.vocab_size < LEAST_VOCAB_SIZE:
            raise InputError(
                f"vocab_size={self.vocab_size}; it must be at least {LEAST_VOCAB_SIZE}: 256 bytes and {SEPARATOR}"
            )

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading(self.field, self.newlines, self.separator)

    @property
    def command(self) -> str:
        """The command line that goes on with this."""
        arguments = ["prepare"]
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                arguments.append(flag if value else "--no-" + flag[2:])
            else:
                arguments += [flag, *(value if isinstance(value, tuple) else [str(value)])]
        return command_line(*arguments)


@dataclass(frozen=True)
class Outcome:
    """What `prepare` has done.

    Args:
        dropped: documents that came before. bytes_read: of the files, in `seconds`, in this process.
    """

    prepared: Prepared
    dropped: int
    bytes_read: int
    seconds: float


def prepare(
    config: PrepareConfig,
    overwrite: bool = False,
    say: Say = print_status,
    shard_tokens: int = SHARD_TOKENS,
    flush_seconds: float = FLUSH_SECONDS,
) -> Outcome:
    """Write the tokens of text to config.out, or go on with it where it was stopped, however that was.

    The same input and settings give the same files, with any number of processes, stopped and continued or not. Each
    process takes well under 1 GB, whatever the length of the text.

    Args:
        overwrite: begin anew where the folder holds tokens of other text or settings. say: told lines of progress.
        flush_seconds: how much work a kill may cost.

    Raises:
        InputError: no text, text that cannot be read, a folder that holds something else, or work with other settings,
            a disk that is full, no document for training or for validation.
    """
    left_out: dict[str, list[Path]] = {}
    files = find_document_files(config.data, left_out)
    if left_out:
        say(f"left out: {counted(left_out)}")
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, and a folder is to be written; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, "prepares a text")
        lock.hold()
        try:
            return _Preparation(config, files, shard_tokens, say).run(overwrite, flush_seconds)
        finally:
            lock.release()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind, advice = (NoSpaceError, "make space, and ") if full else (InputError, "")
        raise kind(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; {advice}{_GO_ON}"
        ) from None


# ---- From documents to tokens ------------------------------------------------------------------


@dataclass
class _Part:
    """The texts of a task that are in one split; begins: whether each begins a document there."""

    texts: list[str] = dataclasses.field(default_factory=list)
    begins: list[bool] = dataclasses.field(default_factory=list)
    bytes: int = 0


@dataclass
class _Task:
    """Texts that are encoded together; where: the file of the last one; read: bytes of the files up to its end."""

    parts: dict[str, _Part]
    where: str = ""
    read: int = 0


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a part, and where in them documents begin."""

    tokens: Ids
    starts: Integers
    characters: int
    bytes: int


def _new_task() -> _Task:
    return _Task({name: _Part() for name in SPLITS})


def _tasks(
    files: Sequence[Path], reading: Reading, validation_fraction: float, duplicates: frozenset[int]
) -> Iterator[_Task]:
    """The documents of all files in tasks of about _TASK_BYTES, without those whose numbers are in `duplicates`."""
    read = 0

    def on_read(amount: int) -> None:
        nonlocal read
        read += amount

    task = _new_task()
    size, number, before = 0, -1, ""
    for file in files:
        for document in documents_of(file, reading, on_read):
            if document.begins:
                number, before = number + 1, ""
            if number in duplicates:
                continue
            content = document.text.encode()
            name = "validation" if is_validation(digest_of(content), validation_fraction) else "train"
            part = task.parts[name]
            part.texts.append(document.text)
            part.begins.append(before != name)
            part.bytes += len(content)
            before = name
            size += len(content)
            if size >= _TASK_BYTES:
                task.where, task.read = str(file), read
                yield task
                task, size = _new_task(), 0
        task.where = str(file)
    task.read = read
    yield task


def _encode(
    task: _Task, tokenizer: Tokenizer, separator: int | None, special_tokens: bool
) -> tuple[dict[str, _Encoded], int]:
    """The tokens of a task, by split, and how far in the files that is."""
    try:
        encoded = {
            name: _encode_part(part, tokenizer, separator, special_tokens)
            for name, part in task.parts.items()
        }
    except InputError as error:
        raise InputError(f"{task.where}, or a file just before it: {error}") from None
    return encoded, task.read


def _encode_part(part: _Part, tokenizer: Tokenizer, separator: int | None, special_tokens: bool) -> _Encoded:
    documents = tokenizer.encode_documents(part.texts, special_tokens)
    before = np.array([] if separator is None else [separator], tokenizer.dtype)
    pieces: list[Ids] = [before[:0]]
    starts = []
    length = 0
    for ids, begins in zip(documents, part.begins, strict=True):
        if begins:
            starts.append(length)
            pieces.append(before)
            length += len(before)
        pieces.append(ids)
        length += len(ids)
    characters = sum(map(len, part.texts))
    return _Encoded(np.concatenate(pieces), np.array(starts, np.int64), characters, part.bytes)


# ---- The folder --------------------------------------------------------------------------------


class _Preparation:
    """The work in one folder, and its state, which is on disk in STATE_FILE until it has ended."""

    def __init__(self, config: PrepareConfig, files: Sequence[Path], shard_tokens: int, say: Say) -> None:
        self.config, self.files, self.shard_tokens, self.say = config, files, shard_tokens, say
        self.folder = Path(config.out)
        self.workers = config.threads or physical_cores()
        self.inputs = _inputs(files)
        self.given = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
        self.settings: dict[str, Any] = {
            "field": config.field,
            "newlines": config.newlines,
            "separator": config.separator,
            "longest": config.reading.longest,
            "drop_duplicates": config.drop_duplicates,
            "validation_fraction": config.validation_fraction,
            "special_tokens": config.special_tokens,
        }
        self.state: dict[str, Any] = {
            "command": config.command,
            "inputs": self.inputs,
            "settings": self.settings
            | {
                "shard_tokens": shard_tokens,
                "vocab_size": config.vocab_size,
                "tokenizer": self._given_tokenizer(),
            },
            "tokenizer": None,
            "tasks": 0,
            "splits": {},
        }

    def _given_tokenizer(self) -> str | None:
        """The SHA-256 of the tokenizer that is given."""
        if self.given is None:
            return None
        content = json.dumps(self.given.to_json(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def run(self, overwrite: bool, flush_seconds: float) -> Outcome:
        """All of it, from where it was stopped."""
        if self._has_ended():
            (self.folder / STATE_FILE).unlink()
            return Outcome(open_prepared(self.folder), 0, 0, 0.0)
        self._begin(overwrite)
        found = self._survey()
        tokenizer = self._tokenizer(found)
        if found.duplicates:
            self.say(f"{len(found.duplicates):,} documents came before and are dropped")
        begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            writers = {}
            for name in SPLITS:
                state = self.state["splits"].get(name)
                writers[name] = SplitWriter(self.folder, name, tokenizer.dtype, self.shard_tokens, state)
                stack.callback(writers[name].close)
            read = self._encode_all(tokenizer, found.duplicates, writers, flush_seconds)
            self._require_both(writers)
            if _inputs(self.files) != self.inputs:
                raise InputError(
                    "the files changed while they were read; begin again with --overwrite when nobody writes to them"
                )
            self._end(writers, tokenizer)
        seconds = time.perf_counter() - begun
        return Outcome(open_prepared(self.folder), len(found.duplicates), read, seconds)

    def _has_ended(self) -> bool:
        """Whether the same work was stopped after its index was written and before its state was removed."""
        file = self.folder / STATE_FILE
        state = _read_state(file) if file.is_file() and is_prepared(self.folder) else None
        return state is not None and not _difference(state, self.state)

    def _begin(self, overwrite: bool) -> None:
        """Take the state that is there, if it is of the same work, or begin; raises InputError for another's."""
        file = self.folder / STATE_FILE
        for name in (INDEX_FILE, STATE_FILE, FILE_NAME):
            for path in self.folder.glob(f".{name}.*.tmp"):  # of a write that was killed
                path.unlink()
        if is_prepared(self.folder):
            if not overwrite:
                raise InputError(
                    f"{self.folder} holds prepared text already; --overwrite replaces it, --out FOLDER writes elsewhere"
                )
            self._clear()
        elif file.is_file():
            state = _read_state(file)
            different = "it cannot be read" if state is None else _difference(state, self.state)
            if state is not None and different and _nothing_done(state):
                overwrite = True
            if state is not None and not different:
                self.state = state
                self.say(f"{self.folder}: goes on after {state['tasks'] * _TASK_BYTES >> 20:,} MiB of text")
                return
            if not overwrite:
                raise InputError(
                    f"{self.folder} holds unfinished work, and {different}; give the same again, --overwrite to begin "
                    "anew, or another --out"
                )
            self._clear()
        elif others := [path.name for path in self.folder.iterdir() if path.name != LOCK_FILE]:
            raise InputError(
                f"{self.folder} holds something else ({shown(sorted(others)[0])}); give another --out"
            )
        self._save_state()

    def _clear(self) -> None:
        """Delete what `prepare` writes, the index first, without which the rest is nothing."""
        for name in (INDEX_FILE, STATE_FILE, FILE_NAME):
            (self.folder / name).unlink(missing_ok=True)
        for name in SPLITS:
            for path in self.folder.glob(f"{name}-*.npy"):
                path.unlink()

    def _save_state(self) -> None:
        content = json.dumps(self.state | {"digest": _state_digest(self.state)}, indent=1)
        storage.replace(self.folder / STATE_FILE, content.encode())

    def _survey(self) -> Survey:
        """A first look at all text, where one is needed."""
        learns = self.config.vocab_size is not None and self.state["tokenizer"] is None
        if not learns and not self.config.drop_duplicates:
            return Survey(frozenset(), [])
        with Bar("looking at all text", sum(size for _, size, _ in self.inputs), "B") as bar:
            fraction = self.config.validation_fraction
            return survey(self.files, self.config.reading, self.config.drop_duplicates, learns, fraction, bar)

    def _tokenizer(self, found: Survey) -> Tokenizer:
        """The tokenizer in the folder, which is put there first."""
        config, file = self.config, self.folder / FILE_NAME
        if self.state["tokenizer"] is None:
            tokenizer = self.given
            if tokenizer is None:
                assert config.vocab_size is not None
                if not any(found.sample):
                    self._refuse_empty(["train"], found.documents)
                tokenizer = learn_tokenizer(found.sample, config.vocab_size, self.workers, self.say)
                found.sample.clear()
            content = json.dumps(tokenizer.to_json(), ensure_ascii=False, indent=2) + "\n"
            storage.replace(file, content.encode())
            self.state["tokenizer"] = file_digest(file)
            self._save_state()
        elif not file.is_file() or file_digest(file) != self.state["tokenizer"]:
            raise InputError(f"{file}: not the one that this was begun with; begin again with --overwrite")
        return load_tokenizer(file)

    def _encode_all(
        self,
        tokenizer: Tokenizer,
        duplicates: frozenset[int],
        writers: dict[str, SplitWriter],
        flush_seconds: float,
    ) -> int:
        """Encode and write what is not on disk yet; returns the bytes of the files that this was."""
        config = self.config
        encode = functools.partial(
            _encode,
            tokenizer=tokenizer,
            separator=tokenizer.special_tokens.get(SEPARATOR),
            special_tokens=config.special_tokens,
        )
        tasks = _tasks(self.files, config.reading, config.validation_fraction, duplicates)
        flushed = time.monotonic()
        before = 0
        with Bar("reading again what is prepared", self.state["tasks"] * _TASK_BYTES, "B") as bar:
            for _ in range(self.state["tasks"]):
                before = next(tasks).read
                bar(_TASK_BYTES)
        done = before
        with Bar("preparing", sum(size for _, size, _ in self.inputs), "B", done=before) as bar:
            results = ordered_map(encode, tasks, self.workers)
            with contextlib.closing(results):
                for encoded, read in results:
                    for name, part in encoded.items():
                        writers[name].append(part.tokens, part.starts, part.characters, part.bytes)
                    self.state["tasks"] += 1
                    bar(read - done)
                    done = read
                    if time.monotonic() - flushed >= flush_seconds:
                        self.state["splits"] = {name: writer.flush() for name, writer in writers.items()}
                        self._save_state()
                        flushed = time.monotonic()
        return done - before

    def _require_both(self, writers: dict[str, SplitWriter]) -> None:
        """Raise InputError where a split that was asked for is empty; nothing stays behind then."""
        fraction = self.config.validation_fraction
        documents = sum(writer.documents for writer in writers.values())
        empty = [name for name in SPLITS if not writers[name].tokens and (name == "train" or fraction)]
        if empty:
            self._refuse_empty(empty, documents)

    def _refuse_empty(self, empty: Sequence[str], documents: int) -> NoReturn:
        """Raise InputError for splits that are empty, of so many documents; nothing stays behind."""
        self._clear()
        if not documents:
            raise InputError("no text: all of it is empty, or separators alone; give text")
        raise InputError(
            f"the text is too short to be split by the hash of its documents, or of parts of "
            f"{self.config.reading.longest:,} characters of long ones: none is for {' and '.join(empty)} with "
            f"--validation-fraction {self.config.validation_fraction}; give more text, or "
            + (
                "a smaller fraction"
                if empty[0] == "train"
                else "a larger fraction such as 0.1, or 0 for none"
            )
        )

    def _end(self, writers: dict[str, SplitWriter], tokenizer: Tokenizer) -> None:
        """Write the index, which makes of the folder a prepared one."""
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": tokenizer.dtype.name,
            "shard_tokens": self.shard_tokens,
            "tokenizer": self.state["tokenizer"],
            "separator": tokenizer.special_tokens.get(SEPARATOR),
            "settings": self.settings,
            "splits": {name: writer.end() for name, writer in writers.items()},
        }
        storage.replace(self.folder / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())
        (self.folder / STATE_FILE).unlink()


def _inputs(files: Sequence[Path]) -> list[list[Any]]:
    """[path, bytes, time of the last change] of each file."""
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
        found.append([os.path.abspath(file), status.st_size, status.st_mtime_ns])
    return found


def _read_state(file: Path) -> dict[str, Any] | None:
    """The state in a file; None where it is damaged."""
    try:
        state = read_json(file)
    except InputError:
        return None
    digest = state.pop("digest", None)
    return state if digest == _state_digest(state) else None


def _state_digest(state: dict[str, Any]) -> str:
    """By which a state that something else than this module wrote, or damaged, is told."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _nothing_done(state: dict[str, Any]) -> bool:
    """Whether neither tokens nor a vocabulary that was learned would be lost: the text or a flag was wrong, mostly."""
    learned = state["tokenizer"] is not None and state["settings"].get("vocab_size") is not None
    return not state["tasks"] and not learned


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between the state of the work in a folder and that of this command; "" where nothing does."""
    for name, value in now["settings"].items():
        begun = there["settings"].get(name)
        if begun != value:
            if name == "tokenizer":
                return "it was begun with another tokenizer"
            return f"it was begun with {name}={shown(begun)}, not {shown(value)}"
    before = {path: rest for path, *rest in there["inputs"]}
    after = {path: rest for path, *rest in now["inputs"]}
    for path in [*before, *after]:
        if path not in after:
            return f"{path} is no longer among its files"
        if path not in before:
            return f"{path} was not among its files"
        if before[path] != after[path]:
            return f"{path} has changed since (size or time)"
    return "" if list(before) == list(after) else "its files came in another order"

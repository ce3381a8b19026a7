"""Token shards: a prepared text on disk as arrays of tokens, memory-mapped and used as one, with checksums."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.system.storage import StrPath
from tinyllm.system.wording import shown
from tinyllm.tokenizer import Tokenizer, load_tokenizer
from tinyllm.tokenizer.base import FILE_NAME

INDEX_FILE = "index.json"
STATE_FILE = "unfinished.json"
"""Where `tinyllm prepare` keeps how far it has come; gone when it has ended."""
FORMAT = "tinyllm-tokens"
VERSION = 1
SPLITS = ("train", "validation")
HEADER_BYTES = 128
"""Of a .npy file of one dimension, whatever its length."""

_BLOCK = 1 << 22
_AGAIN = "prepare the text again with --overwrite, or copy the folder again"

Integers = npt.NDArray[np.int64]


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """The HEADER_BYTES that a .npy file of so many numbers begins with."""
    described = (
        f"{{'descr': '{dtype.newbyteorder('<').str}', 'fortran_order': False, 'shape': ({length},), }}"
    )
    content = described.ljust(HEADER_BYTES - 11).encode("ascii") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


def file_digest(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in bounded memory; on_read is told the bytes of each block. Raises OSError."""
    digest = hashlib.sha256()
    with storage.open_file(path) as file:
        while content := file.read(_BLOCK):
            digest.update(content)
            if on_read is not None:
                on_read(len(content))
    return digest.hexdigest()


@dataclass(frozen=True)
class ArrayFile:
    """A .npy file of one dimension, as an index describes it."""

    path: Path
    dtype: np.dtype[Any]
    length: int
    sha256: str

    def require_size(self) -> None:
        """Raise InputError where the file is missing or has not the size that the index says."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise InputError(f"{self.path}: missing, and the index names it; {_AGAIN}") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        expected = HEADER_BYTES + self.length * self.dtype.itemsize
        if size != expected:
            raise InputError(
                f"{self.path}: {size:,} bytes, and {expected:,} by the index: cut short, or of another text; {_AGAIN}"
            )

    def require_content(self, on_read: Callable[[int], None] | None = None) -> None:
        """Raise InputError where the file is not, byte for byte, the one that the index was written for."""
        self.require_size()
        try:
            found = file_digest(self.path, on_read)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if found != self.sha256:
            raise InputError(
                f"{self.path}: damaged, or of another text or tokenizer: its SHA-256 is {found[:12]}..., and by the "
                f"index {self.sha256[:12]}...; {_AGAIN}"
            )

    def opened(self) -> npt.NDArray[Any]:
        """The array, memory-mapped, once its content was found to be right."""
        self.require_content()
        if not self.length:
            return np.empty(0, self.dtype)  # which cannot be mapped
        return np.asarray(np.memmap(self.path, self.dtype, "r", HEADER_BYTES, (self.length,)))


class TokenShards:
    """One split of a prepared text, as one array of tokens that stays on disk.

        shards[3], shards[10:20], shards[starts[:, None] + np.arange(T)]    # copies, of shards.dtype

    A shard is compared with its SHA-256 when it is first read from; `len` and `digest` read none.
    """

    ndim = 1

    def __init__(
        self,
        files: list[ArrayFile],
        document_starts: ArrayFile,
        dtype: np.dtype[Any],
        shard_tokens: int,
        characters: int,
        bytes: int,
    ) -> None:
        """files: of shard_tokens tokens each, but for the last. characters, bytes: of the text, in UTF-8.

        Raises InputError for a file that is missing or has another size.
        """
        self._files, self._starts_file = files, document_starts
        self._shard_tokens = shard_tokens
        self.characters, self.bytes = characters, bytes
        self.dtype = dtype
        self.size = sum(file.length for file in files)
        for file in (*files, document_starts):
            file.require_size()
        self._opened: dict[int, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return self.size

    @property
    def shape(self) -> tuple[int]:
        """(number of tokens,)."""
        return (self.size,)

    @functools.cached_property
    def document_starts(self) -> Integers:
        """(number of documents,) int64, memory-mapped: where each begins, ascending."""
        return self._starts_file.opened()

    @functools.cached_property
    def digest(self) -> str:
        """A SHA-256 of all tokens and where documents begin: of the checksums in the index."""
        files = [(file.length, file.sha256) for file in (*self._files, self._starts_file)]
        return hashlib.sha256(json.dumps([self.dtype.name, files]).encode()).hexdigest()

    def __getitem__(self, index: Any) -> Any:
        """A token, the tokens of a slice of step 1, or those at an array of positions, of the array's shape.

        Raises IndexError for what is outside, TypeError for another kind of index, and InputError for a damaged shard.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(self.size)
            if step != 1:
                raise TypeError(f"a slice of tokens has the step 1, got {step}")
            return self._between(start, stop)
        positions = np.asarray(index)
        if positions.size == 0:
            return np.empty(positions.shape, self.dtype)
        if positions.dtype.kind not in "iu":
            raise TypeError(f"positions must be integers, got {positions.dtype}")
        lowest, highest = int(positions.min()), int(positions.max())
        if lowest < -self.size or highest >= self.size:
            wrong = highest if highest >= self.size else lowest
            raise IndexError(f"the position {wrong} is outside of {self.size} tokens")
        if lowest < 0:
            positions = np.where(positions < 0, positions + self.size, positions)
            lowest, highest = int(positions.min()), int(positions.max())
        first, last = lowest // self._shard_tokens, highest // self._shard_tokens
        if first == last:
            return self._shard(first)[positions - first * self._shard_tokens]
        numbers = positions // self._shard_tokens
        found = np.empty(positions.shape, self.dtype)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._shard(number)[positions[here] - number * self._shard_tokens]
        return found

    def _between(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The tokens from start to stop."""
        found = np.empty(max(0, stop - start), self.dtype)
        at = start
        while at < stop:
            number, within = divmod(at, self._shard_tokens)
            part = self._shard(number)[within : within + stop - at]
            found[at - start : at - start + len(part)] = part
            at += len(part)
        return found

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.size, _BLOCK):
            yield from self._between(start, min(start + _BLOCK, self.size))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self._between(0, self.size).astype(dtype or self.dtype, copy=False)

    def _shard(self, number: int) -> npt.NDArray[Any]:
        if number not in self._opened:
            self._opened[number] = self._files[number].opened()
        return self._opened[number]

    def check(self, on_read: Callable[[int], None] | None = None) -> None:
        """Compare every file with its SHA-256; raises InputError for the first that differs."""
        for file in (*self._files, self._starts_file):
            file.require_content(on_read)

    @property
    def bytes_on_disk(self) -> int:
        """Of all its files."""
        files = (*self._files, self._starts_file)
        return sum(HEADER_BYTES + file.length * file.dtype.itemsize for file in files)

    def __getstate__(self) -> dict[str, Any]:
        # Maps would be sent as all of their content; another process opens its own.
        left_out = ("document_starts",)
        return {name: value for name, value in self.__dict__.items() if name not in left_out} | {
            "_opened": {}
        }


class JoinedTokens:
    """Several splits of one tokenizer end to end, in memory: what a mixture is validated on.

    Attributes: as those of TokenShards.
    """

    ndim = 1

    def __init__(self, parts: Sequence[TokenShards]) -> None:
        self._tokens = np.concatenate([part[:] for part in parts])
        begins = np.cumsum([0, *map(len, parts[:-1])])
        self.document_starts: Integers = np.concatenate(
            [part.document_starts + begin for part, begin in zip(parts, begins, strict=True)]
        )
        self.dtype = self._tokens.dtype
        self.characters = sum(part.characters for part in parts)
        self.bytes = sum(part.bytes for part in parts)
        self.digest = hashlib.sha256(json.dumps([part.digest for part in parts]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, places: Any) -> Any:
        return self._tokens[places]


@dataclass(frozen=True)
class Prepared:
    """A folder that `tinyllm prepare` has written."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards


def is_prepared(path: StrPath) -> bool:
    """Whether `path` is a folder that `tinyllm prepare` has written to its end."""
    # Other folders may have an index of that name: those of documentation do.
    ours = (FILE_NAME, f"{SPLITS[0]}-documents.npy")
    return os.path.isfile(Path(path, INDEX_FILE)) and any(os.path.isfile(Path(path, name)) for name in ours)


def is_for_tokens(path: StrPath) -> bool:
    """Whether `path` is a folder that `tinyllm prepare` has written, or has not ended: `open_prepared` tells."""
    return is_prepared(path) or os.path.isfile(Path(path, STATE_FILE))


def open_prepared(path: StrPath) -> Prepared:
    """The tokens and the tokenizer of a folder that `tinyllm prepare` has written; reads no shard.

    Raises:
        InputError: no such folder, one that is unfinished, a damaged index, a file that is missing or of another size,
            a tokenizer.json of another text than the tokens.
    """
    folder = Path(path)
    if not is_prepared(folder):
        raise InputError(_why_not_prepared(folder))
    file = folder / INDEX_FILE
    index = read_json(file)
    try:
        splits, tokenizer_digest = _parsed(index, folder)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise InputError(f"{file}: {what}; {_AGAIN}") from None
    tokenizer_file = folder / FILE_NAME
    try:
        found = file_digest(tokenizer_file)
    except OSError as error:
        raise InputError(f"{tokenizer_file}: cannot be read: {error.strerror or error}; {_AGAIN}") from None
    if found != tokenizer_digest:
        raise InputError(
            f"{tokenizer_file}: not the tokenizer that made these tokens: its SHA-256 is {found[:12]}..., and by the "
            f"index {tokenizer_digest[:12]}...; put the right file back, or {_AGAIN}"
        )
    return Prepared(folder, load_tokenizer(tokenizer_file), splits["train"], splits["validation"])


def _why_not_prepared(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder"
    if not folder.is_dir():
        return (
            f"{folder}: a file, where a folder that tinyllm prepare has written is expected; prepare it first"
        )
    if (folder / STATE_FILE).is_file():
        command = read_json(folder / STATE_FILE).get("command")
        return f"{folder}: unfinished; " + (f"go on with: {command}" if isinstance(command, str) else _AGAIN)
    return f"{folder}: not prepared: no {INDEX_FILE} in it; tinyllm prepare --data FILES --out {folder} makes one"


def _parsed(index: dict[str, Any], folder: Path) -> tuple[dict[str, TokenShards], str]:
    """The splits and the digest of the tokenizer; raises KeyError, TypeError or ValueError where it is damaged."""
    file = folder / INDEX_FILE
    if index["format"] != FORMAT or index["version"] != VERSION:
        raise InputError(
            f"{file}: the format is {shown(index['format'])}, version {shown(index['version'])}; this tinyllm reads "
            f"{FORMAT}, version {VERSION}"
        )
    if index["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"the dtype is {shown(index['dtype'])}")
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    shard_tokens = _count(index["shard_tokens"])
    if not shard_tokens:
        raise ValueError("shard_tokens is 0")
    splits = {}
    for name in SPLITS:
        split = index["splits"][name]
        files = [
            ArrayFile(folder / _name(shard["file"]), dtype, _count(shard["tokens"]), _text(shard["sha256"]))
            for shard in split["shards"]
        ]
        lengths = [file.length for file in files]
        whole = all(length == shard_tokens for length in lengths[:-1])
        if sum(lengths) != _count(split["tokens"]) or not whole or max([0, *lengths]) > shard_tokens:
            raise ValueError(f"the shards of {name} have {shown(lengths)} of {shown(split['tokens'])} tokens")
        starts = split["document_starts"]
        starts_file = ArrayFile(
            folder / _name(starts["file"]),
            np.dtype("<i8"),
            _count(split["documents"]),
            _text(starts["sha256"]),
        )
        characters, bytes = _count(split["characters"]), _count(split["bytes"])
        splits[name] = TokenShards(files, starts_file, dtype, shard_tokens, characters, bytes)
    return splits, _text(index["tokenizer"])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{shown(value)} is where a number is expected")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{shown(value)} is where a text is expected")
    return value


def _name(value: Any) -> str:
    """The name of a file in the folder itself."""
    if Path(_text(value)).name != value:
        raise ValueError(f"{shown(value)} is where the name of a file is expected")
    return value

"""Writing token shards as the tokens come, so that after a crash it goes on from what was last flushed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tinyllm.data.shards import HEADER_BYTES, ArrayFile, Integers, file_digest, npy_header
from tinyllm.system import storage
from tinyllm.system.errors import InputError

Index = dict[str, Any]


class _GrowingArray:
    """A .npy file of one dimension that grows at its end."""

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int, header_length: int) -> None:
        """Keep the first `length` numbers of a file; header_length: what its header says until `close`.

        Raises InputError where there are fewer, and OSError.
        """
        self.path, self.dtype, self.length = path, dtype.newbyteorder("<"), length
        kept = HEADER_BYTES + length * dtype.itemsize
        if length and (not path.is_file() or path.stat().st_size < kept):
            raise InputError(
                f"{path}: shorter than it was when this was stopped; begin again with --overwrite"
            )
        self._file: IO[bytes] = open(path, "r+b" if length else "w+b", buffering=0)  # noqa: SIM115
        self._header_length = header_length
        try:
            self._write_header(header_length)
            self._file.truncate(kept)
            self._file.seek(kept)
        except OSError:
            self.close()
            raise

    def _write_header(self, length: int) -> None:
        self._file.seek(0)
        storage.write_bytes(self._file, npy_header(self.dtype, length))

    def append(self, numbers: npt.NDArray[Any]) -> None:
        """Write these after the others."""
        content = np.ascontiguousarray(numbers, self.dtype)
        if content.size:
            storage.write_bytes(self._file, content.data.cast("B"))
            self.length += len(content)

    def flush(self) -> None:
        """Flush it to disk."""
        storage.flush_file(self._file)

    def end(self) -> Index:
        """Write the header and close the file; returns its name and its SHA-256. After an error it can be closed."""
        if self.length != self._header_length:
            self._write_header(self.length)
        self.flush()
        self.close()
        return {"file": self.path.name, "sha256": file_digest(self.path)}

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


class SplitWriter:
    """Writes one split: shards of shard_tokens tokens, and where in the split documents begin."""

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype[Any],
        shard_tokens: int,
        state: Index | None = None,
    ) -> None:
        """state: what `flush` returned, to go on from; all that was written after it is dropped.

        Raises InputError where files are missing or shorter than they were, and OSError.
        """
        state = state or {"tokens": 0, "documents": 0, "characters": 0, "bytes": 0, "shards": []}
        self.folder, self.name = folder, name
        self.dtype, self.shard_tokens = dtype, shard_tokens
        self.tokens, self.documents = state["tokens"], state["documents"]
        self.characters, self.bytes = state["characters"], state["bytes"]
        self._shards: list[Index] = list(state["shards"])
        known = {shard["file"] for shard in self._shards}
        for shard in self._shards:
            ArrayFile(folder / shard["file"], dtype, shard["tokens"], shard["sha256"]).require_size()
        in_shard = self.tokens - sum(shard["tokens"] for shard in self._shards)
        self._starts = _GrowingArray(
            folder / f"{name}-documents.npy", np.dtype(np.int64), self.documents, self.documents
        )
        self._shard: _GrowingArray | None = None
        try:
            self._shard = self._open_shard(in_shard) if in_shard else None
        except (OSError, InputError):
            self.close()
            raise
        known |= {array.path.name for array in (self._shard, self._starts) if array is not None}
        for path in folder.glob(f"{name}-*.npy"):
            if path.name not in known:
                path.unlink()

    def _open_shard(self, length: int) -> _GrowingArray:
        path = self.folder / f"{self.name}-{len(self._shards):05}.npy"
        # Most shards end full: their header is right from the begin.
        return _GrowingArray(path, self.dtype, length, self.shard_tokens)

    def append(self, tokens: npt.NDArray[Any], starts: Integers, characters: int, bytes: int) -> None:
        """Write the tokens of some text, in which documents begin at `starts`."""
        self._starts.append(starts + self.tokens)
        self.documents += len(starts)
        self.characters += characters
        self.bytes += bytes
        while len(tokens):
            if self._shard is None:
                self._shard = self._open_shard(0)
            part = tokens[: self.shard_tokens - self._shard.length]
            self._shard.append(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if self._shard.length == self.shard_tokens:
                self._end_shard(self._shard)

    def _end_shard(self, shard: _GrowingArray) -> None:
        self._shards.append({"tokens": shard.length, **shard.end()})
        self._shard = None

    def flush(self) -> Index:
        """Flush all to disk; returns what to go on from."""
        for array in (self._shard, self._starts):
            if array is not None:
                array.flush()
        return self._described()

    def _described(self) -> Index:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "characters": self.characters,
            "bytes": self.bytes,
            "shards": list(self._shards),
        }

    def end(self) -> Index:
        """End the files; returns what the index says of the split."""
        if self._shard is not None:
            self._end_shard(self._shard)
        return {**self._described(), "document_starts": self._starts.end()}

    def close(self) -> None:
        """Close the files as they are."""
        for array in (self._shard, self._starts):
            if array is not None:
                with contextlib.suppress(OSError):
                    array.close()

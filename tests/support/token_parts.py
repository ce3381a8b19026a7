"""Tokens in several arrays, as in the shards of a prepared folder: one-dimensional, sliced, and counted when read."""

from typing import Any

import numpy as np
import numpy.typing as npt


class TokenParts:
    """The face of token shards over arrays; `read` counts the tokens that were asked for."""

    ndim = 1

    def __init__(
        self, parts: list[npt.NDArray[Any]], document_starts: Any = None, digest: str = "parts"
    ) -> None:
        self.parts = parts
        self.dtype = parts[0].dtype
        self.document_starts = document_starts
        self.digest = digest
        self.read = 0

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, places: slice) -> npt.NDArray[Any]:
        assert places.step in (None, 1)
        begin, end, _ = places.indices(len(self))
        pieces, before = [self.parts[0][:0]], 0
        for part in self.parts:
            pieces.append(part[max(0, begin - before) : max(0, end - before)])
            before += len(part)
        self.read += end - begin
        return np.concatenate(pieces)


def in_parts(tokens: npt.NDArray[Any], *cuts: int, **how: Any) -> TokenParts:
    """The tokens, cut at these places."""
    return TokenParts(np.split(tokens, cuts), **how)

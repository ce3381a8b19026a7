"""The bytes of tokens, joined by their ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.tokenizer.base import id_array

# So few ids are joined one by one: no array work to set up.
_FEW = 2000


class TokenStrings:
    """The bytes of each id; None where no token has it."""

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        self._tokens = list(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def joined(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes of `ids`, end to end.

        Raises:
            InputError: names the first id that is not in the vocabulary, and its position.
        """
        if not isinstance(ids, np.ndarray | str) and isinstance(ids, Iterable):
            ids = list(ids)
            if len(ids) < _FEW and {*map(type, ids)} <= {int}:  # few ids need no arrays
                try:
                    return b"".join([self._tokens[id] if id >= 0 else None for id in ids])  # type: ignore[misc]
                except (IndexError, TypeError):
                    pass  # the error is said below
        ids = id_array(ids)
        blob, starts, lengths = self._arrays
        out = []
        for begin in range(0, len(ids), 1 << 20):
            part = ids[begin : begin + (1 << 20)].astype(np.int64)
            wrong = (part < 0) | (part >= len(lengths)) | (lengths[np.clip(part, 0, len(lengths) - 1)] == 0)
            if wrong.any():
                place = int(np.argmax(wrong))
                raise InputError(
                    f"the id {part[place]} at position {begin + place} is not in the vocabulary, whose ids are 0 to "
                    f"{len(self) - 1}; is it the tokenizer of this model?"
                )
            sizes = lengths[part]
            within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            out.append(blob[np.repeat(starts[part], sizes) + within].tobytes())
        return b"".join(out)

    @functools.cached_property
    def _arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All tokens end to end, where each begins, and its length; ids without a token have length 0."""
        strings = [token or b"" for token in self._tokens]
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        return np.frombuffer(b"".join(strings), np.uint8), np.cumsum(lengths) - lengths, lengths

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokens": self._tokens}  # the arrays are made again

"""Text under merging, as flat arrays: which token begins, and which ends, at each byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Symbols:
    """Pieces laid end to end, with a border between them, as they are merged.

    first[i] is the token that begins at byte i, last[i] the token that ends there; `border` stands where none
    does. Neighbours are found by the lengths of tokens, so that a merge changes three numbers and moves nothing.

    Args:
        tokens: (n,) the token of each byte, `border` between pieces and at both ends.
        border: a number that is no token.
        lengths: (V,) the bytes of each token, also of those that merges will make.
    """

    def __init__(self, tokens: npt.NDArray[Any], border: int, lengths: npt.NDArray[np.int32]) -> None:
        self.first = tokens
        self.last = tokens.copy()
        self.border = border
        self.lengths = lengths

    def still(self, at: Integers, left: int, right: int) -> Integers:
        """Those of the positions `at` where the token `left` is, with `right` after it."""
        after = at + int(self.lengths[left])
        return at[(self.first[at] == left) & (self.first[after] == right)]

    def merge(self, at: Integers, left: int, right: int, merged: int) -> Integers:
        """Make each pair (left, right) at the ascending positions `at` one token; returns where that was done.

        In a run of equal tokens the pairs overlap, and are taken from the left.
        """
        left_length, length = int(self.lengths[left]), int(self.lengths[merged])
        if left == right and at.size > 1:
            begins = np.diff(at, prepend=-1) != left_length
            place = np.arange(at.size)
            in_run = place - np.maximum.accumulate(np.where(begins, place, 0))
            at = at[in_run & 1 == 0]
        self.first[at + left_length] = self.border
        self.first[at] = merged
        self.last[at + (length - 1)] = merged
        return at

    def before(self, at: Integers) -> npt.NDArray[Any]:
        """The token that ends before each of the positions `at`."""
        return self.last[at - 1]

    def after(self, at: Integers, token: int) -> npt.NDArray[Any]:
        """The token that begins after `token` at each of the positions `at`."""
        return self.first[at + int(self.lengths[token])]

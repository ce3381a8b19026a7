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
        lengths: the bytes of each token; those that merges will make can be set later.
    """

    def __init__(self, tokens: npt.NDArray[Any], border: int, lengths: list[int]) -> None:
        self.first = tokens
        self.last = tokens.copy()
        self.border = border
        # Twice, since one number is read faster from a list and many faster from an array.
        self._length = lengths
        self._lengths = np.array([*lengths, 0], dtype=np.int64)  # the border has none

    def set_length(self, token: int, left: int, right: int) -> None:
        """Say that `token` is `left` and `right` together."""
        self._lengths[token] = self._length[token] = self._length[left] + self._length[right]

    def still(self, at: Integers, left: int, right: int) -> Integers:
        """Those of the positions `at` where the token `left` is, with `right` after it."""
        there = self.first[at] == left
        there &= self.first[at + self._length[left]] == right
        return at[there]

    def merge(self, at: Integers, left: int, right: int, merged: int) -> Integers:
        """Make each pair (left, right) at the ascending positions `at` one token; returns where that was done.

        In a run of equal tokens the pairs overlap, and are taken from the left.
        """
        left_length = self._length[left]
        if left == right and at.size > 1:
            begins = np.diff(at, prepend=-1) != left_length
            place = np.arange(at.size)
            in_run = place - np.maximum.accumulate(np.where(begins, place, 0))
            at = at[in_run & 1 == 0]
        self.first[at + left_length] = self.border
        self.first[at] = merged
        self.last[at + (self._length[merged] - 1)] = merged
        return at

    def before(self, at: Integers) -> npt.NDArray[Any]:
        """The token that ends before each of the positions `at`."""
        return self.last[at - 1]

    def after(self, at: Integers, token: int) -> npt.NDArray[Any]:
        """The token that begins after `token` at each of the positions `at`."""
        return self.first[at + self._length[token]]

    def step_back(self, at: Integers, before: npt.NDArray[Any]) -> Integers:
        """Where the tokens `before`, which end before the positions `at`, begin; `at` itself after a border."""
        return at - self._lengths[before]

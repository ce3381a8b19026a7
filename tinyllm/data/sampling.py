"""Samplers: batches without end, in an order that is computed and not kept, so that the position is one number.

A draw is one window, and draws are numbered from 0 on, whatever the size of a batch is. Which window a draw is depends
on the tokens, the settings and its number alone. Ranks that work on one batch read their own rows of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyllm.data.permutation import permute, random_integers
from tinyllm.data.windows import (
    Batch,
    Ids,
    Tokens,
    as_tokens,
    read_windows,
    require_at_least_one,
    require_one_window,
    token_digest,
)
from tinyllm.system.errors import InputError

ORDER = 2
"""The version of the rule by which draws become windows; the first had lists, of a generator's permutation."""

# Every use of random numbers has a stream of its own.
_PERMUTATION_STREAM = 3
_FIRST_STREAM = 4
_OFFSETS_STREAM = 5

_BLOCK = 1 << 12
"""So many draws are computed at once, since few cost hardly less; a multiple of a mixture's cycle."""


class DrawTable:
    """A function of draws, whose values are computed for a block of draws at once and kept for the next call."""

    def __init__(self, function: Callable[[Ids], Ids]) -> None:
        """function: (N,) -> (..., N), each value of its draw alone."""
        self._function = function
        self._block = -1
        self._values = np.empty(0, dtype=np.int64)

    def __call__(self, draws: Ids) -> Ids:
        """draws (B,) ascending -> (..., B)."""
        first, last = int(draws[0]) // _BLOCK, int(draws[-1]) // _BLOCK
        if first != last:
            cut = int(np.searchsorted(draws, last * _BLOCK))
            return np.concatenate([self(draws[:cut]), self(draws[cut:])], axis=-1)
        if first != self._block:
            self._values = self._function(np.arange(first * _BLOCK, (first + 1) * _BLOCK))
            self._block = first
        return self._values[..., draws - first * _BLOCK]


class BatchSampler(ABC):
    """Training batches without end, whose position can be saved.

    batch(step) depends on the tokens, the settings and `step` alone, so a run that was resumed
    sees the batches that it would have seen. Iterating goes on from the `step` reached:

        sampler = RandomWindows(train, context_length=64, batch_size=12, seed=0)
        inputs, targets = next(sampler)    # both (B, T) int64
        saved = sampler.state_dict()
    """

    def __init__(self, context_length: int, batch_size: int, seed: int) -> None:
        """Raises InputError for a length or size below 1, or a seed outside 0 to 4294967295."""
        require_at_least_one(context_length=context_length, batch_size=batch_size)
        if not 0 <= seed < 1 << 32:
            raise InputError(f"seed must be from 0 to {(1 << 32) - 1}, got {seed}; change --seed")
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0
        """The step of the next batch, which is the number of batches given so far."""
        self._first_draw = 0
        """The draw that the batch of step 0 would begin with; not 0 after a resume with another batch size."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many tokens windows are drawn from."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """The digest of the tokens, see token_digest."""

    @property
    @abstractmethod
    def separates_documents(self) -> bool:
        """Whether batches have a third array, of documents."""

    @abstractmethod
    def windows(self, draws: Ids) -> Batch:
        """The windows of these draws, (B,) ascending."""

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of any step, (inputs, targets), both (B, T) int64; moves nothing.

        With `ranks`, the rows of one of them: together, in order, they are the batch. Rows of others are not read.
        Where documents are kept apart there is a third array, (B, T) int64: the number of each token's document within
        its window, from 0.

        Raises:
            IndexError: a step before the first, or a rank that there is not.
            InputError: more ranks than rows.
        """
        before = self._first_draw + step * self.batch_size
        if step < 0 or before < 0:
            raise IndexError(f"steps begin at 0, got {step}" if step < 0 else f"no batch has step {step}")
        if not 0 <= rank < ranks:
            raise IndexError(f"rank {rank} of {ranks}")
        if ranks > self.batch_size:
            raise InputError(f"{ranks} ranks cannot share {self.batch_size} windows; raise --batch-size")
        # As np.array_split cuts: the first ranks have one more where the rows do not come out even.
        each, more = divmod(self.batch_size, ranks)
        begin = before + rank * each + min(rank, more)
        return self.windows(np.arange(begin, begin + each + (rank < more)))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def identity(self) -> dict[str, Any]:
        """What the order of draws depends on; JSON can hold it."""
        return {
            "sampler": type(self).__name__,
            "order": ORDER,
            "num_tokens": self.num_tokens,
            "context_length": self.context_length,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order of draws depends on; JSON can hold it."""
        position = {"batch_size": self.batch_size, "first_draw": self._first_draw, "step": self.step}
        return {**self.identity(), **position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position with the next draw, also with batches of another size.

        Raises:
            InputError: the state is of other data or settings, or is damaged; nothing is changed.
        """
        if state and "order" not in state:
            raise InputError(
                "the saved data position is of an earlier version of tinyllm, whose windows come in another order; "
                "begin a new run, or go on with that version"
            )
        differing = [
            f"{name} was {state.get(name)!r} and is {here!r}"
            for name, here in self.identity().items()
            if state.get(name) != here
        ]
        if differing:
            raise InputError(
                f"the saved data position belongs to another run: {', '.join(differing)}; "
                "resume with the text and the settings of that run"
            )
        step = _checked(state, "step", 0)
        batch_size = _checked(state, "batch_size", 1)
        first_draw = _checked(state, "first_draw", -step * batch_size)
        self.step = step
        self._first_draw = first_draw + step * (batch_size - self.batch_size)


def _checked(state: dict[str, Any], name: str, least: int) -> int:
    number = state.get(name)
    if type(number) is not int or number < least:
        raise InputError(
            f"the saved data position is damaged: {name} must be {least} or more, got {number!r}"
        )
    return number


class WindowSampler(BatchSampler):
    """Batches of windows of one text; what a window begins with, subclasses say."""

    shortest = 0
    """The fewest tokens after the first that the text must have; 0: a whole window."""

    def __init__(
        self,
        tokens: npt.ArrayLike | Tokens,
        context_length: int,
        batch_size: int,
        seed: int,
        name: str = "text",
        document_starts: Ids | None = None,
    ) -> None:
        """`name` is what errors call the tokens, such as "training text".

        document_starts: ascending positions at which documents begin. With them a batch has a third array, (B, T)
        int64: the number of each token's document within its window, from 0.

        Raises:
            InputError: fewer than context_length + 1 tokens, a length or size below 1, or a seed
                outside 0 to 4294967295.
        """
        super().__init__(context_length, batch_size, seed)
        self.tokens = as_tokens(tokens)
        self.document_starts = document_starts
        require_one_window(self.tokens, self.shortest or context_length, name)
        self._starts_of = DrawTable(self._starts)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str:
        return token_digest(self.tokens)

    @property
    def separates_documents(self) -> bool:
        return self.document_starts is not None

    @abstractmethod
    def _starts(self, draws: Ids) -> Ids:
        """The first positions of the windows of these draws, (B,)."""

    def windows(self, draws: Ids) -> Batch:
        return read_windows(self.tokens, self._starts_of(draws), self.context_length, self.document_starts)


class RandomOffsets(WindowSampler):
    """Windows that start anywhere, drawn with replacement, each independent of the others."""

    def _starts(self, draws: Ids) -> Ids:
        return random_integers(draws, len(self.tokens) - self.context_length, self.seed, _OFFSETS_STREAM)


class EpochSampler(WindowSampler):
    """Windows drawn without replacement: an epoch shows each of its windows once, in an order of its own.

    An epoch has `windows_per_epoch` windows, so the number of a draw alone says where in which epoch it stands; a batch
    may straddle two epochs. The windows start every `stride` tokens: here, end to end.
    """

    @property
    def stride(self) -> int:
        """How many tokens lie from one start to the next."""
        return self.context_length

    @property
    @abstractmethod
    def windows_per_epoch(self) -> int:
        """How many windows an epoch has."""

    def _first_starts(self, epochs: Ids) -> Ids | int:
        """Where the first window of the text starts in each of the epochs, (B,)."""
        return 0

    def _starts(self, draws: Ids) -> Ids:
        epochs, places = np.divmod(draws, self.windows_per_epoch)
        order = permute(places, self.windows_per_epoch, self.seed, _PERMUTATION_STREAM, epochs)
        return self._first_starts(epochs) + order * self.stride


class RandomWindows(EpochSampler):
    """Windows end to end from an offset that is drawn anew for each epoch.

    About one window's worth of tokens is left out of an epoch, and since the offset moves over all
    of that, of no epoch in particular.
    """

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch has, whatever the offset."""
        return max(1, len(self.tokens) // self.context_length - 1)

    def _first_starts(self, epochs: Ids) -> Ids:
        # Up to the last offset that fits, at least context_length - 1 in a text of two windows
        # or more: so every token after the first is a target in some epoch.
        used = self.windows_per_epoch * self.context_length
        return random_integers(epochs, len(self.tokens) - used, self.seed, _FIRST_STREAM)


class StridedWindows(EpochSampler):
    """The windows of SlidingWindows, shuffled: every `stride` tokens from the first on, whole windows alone."""

    def __init__(
        self,
        tokens: npt.ArrayLike | Tokens,
        context_length: int,
        batch_size: int,
        seed: int,
        name: str = "text",
        document_starts: Ids | None = None,
        stride: int = 1,
    ) -> None:
        """As WindowSampler; raises InputError for a stride below 1, too."""
        super().__init__(tokens, context_length, batch_size, seed, name, document_starts)
        require_at_least_one(stride=stride)
        self._stride = stride

    @property
    def stride(self) -> int:
        return self._stride

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch has."""
        return (len(self.tokens) - self.context_length - 1) // self.stride + 1

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "stride": self.stride}


class PackedWindows(EpochSampler):
    """Windows end to end from the first token on: an epoch has every token after the first as a target exactly once.

    The last window is filled up as that of SequentialWindows is. Documents that stand end to end in the tokens are
    thus packed to full windows, and no token is lost. A text of two tokens is enough.
    """

    shortest = 1

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch has, with the one that is filled up."""
        return -(-(len(self.tokens) - 1) // self.context_length)

"""Windows of tokens: pairs (inputs, targets) where targets is inputs moved on by one.

A window that starts at s takes the inputs tokens[s : s + T] and the targets
tokens[s + 1 : s + T + 1], so it needs T + 1 tokens. All tokens stay where they are (an array, or a
memory-mapped file of any length): only the windows asked for are copied.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError

Tokens = npt.NDArray[np.integer[Any]]
Ids = npt.NDArray[np.int64]
Splittable = TypeVar("Splittable", str, Tokens)

IGNORE_INDEX = -100
"""The target that marks a place without a target; the loss leaves it out, as torch's does."""

# Every use of random numbers has its own last word in the seed. Without one, default_rng([5, 0]),
# the order of epoch 0, would be default_rng(5), the very numbers that initialise the weights.
_WINDOWS_STREAM = 1
_OFFSETS_STREAM = 2

_DIGEST_CHUNK = 1 << 18


def _as_tokens(tokens: npt.ArrayLike) -> Tokens:
    """A one-dimensional integer array; a memory-mapped one stays on disk."""
    array: npt.NDArray[Any] = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"tokens must be integers in one dimension, got {array.dtype} of shape {array.shape}")
    return array


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{name} must be at least 1, got {number}; change {flag}")


def _need_one_window(
    tokens: Tokens, context_length: int, name: str, advice: str = "lower --context-length or give more text"
) -> None:
    if len(tokens) < context_length + 1:
        raise InputError(
            f"the {name} is too short: {len(tokens)} tokens, and one window needs {context_length + 1}; {advice}"
        )


def _gather(tokens: Tokens, starts: Ids, context_length: int) -> tuple[Ids, Ids]:
    """starts (B,) -> inputs (B, T), targets (B, T), each its own memory."""
    windows = tokens[starts[:, None] + np.arange(context_length + 1)]  # (B, T + 1)
    return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


def split_by_position(tokens: Splittable, validation_fraction: float) -> tuple[Splittable, Splittable]:
    """(train, validation) of an array or a text: the last part is for validation. Parts of an array are views.

    The split is by position and not by drawing windows, because a drawn validation window would
    overlap the training text around it.

    Raises:
        InputError: the fraction is not in [0, 1).
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise InputError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    split = int(len(tokens) * (1.0 - validation_fraction))
    return tokens[:split], tokens[split:]


def token_digest(tokens: npt.ArrayLike) -> str:
    """The SHA-256 of the tokens as little-endian int64, whatever their dtype is."""
    array = _as_tokens(tokens)
    digest = hashlib.sha256()
    for start in range(0, len(array), _DIGEST_CHUNK):
        digest.update(array[start : start + _DIGEST_CHUNK].astype("<i8").data)
    return digest.hexdigest()


class SlidingWindows:
    """Every window of the text, each `stride` tokens after the one before.

    windows[i] is (inputs, targets), both (T,) int64. Only whole windows: tokens after the last one
    are left out.

        windows = SlidingWindows(np.arange(10), context_length=4, stride=2)
        len(windows)    # 3
        windows[1]      # (array([2, 3, 4, 5]), array([3, 4, 5, 6]))
    """

    def __init__(
        self, tokens: npt.ArrayLike, context_length: int, stride: int = 1, name: str = "text"
    ) -> None:
        """`name` is what errors call the tokens, such as "validation text".

        Raises:
            InputError: fewer than context_length + 1 tokens, or a length or stride below 1.
        """
        self.tokens = _as_tokens(tokens)
        _at_least_one(context_length=context_length, stride=stride)
        _need_one_window(self.tokens, context_length, name)
        self.context_length = context_length
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.context_length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Ids, Ids]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = (index % len(self)) * self.stride
        window = self.tokens[start : start + self.context_length + 1].astype(np.int64)
        return window[:-1].copy(), window[1:].copy()

    def __iter__(self) -> Iterator[tuple[Ids, Ids]]:
        return (self[index] for index in range(len(self)))


class SequentialWindows:
    """The whole text once, in order: every token after the first is a target exactly once.

    Iterating gives (inputs, targets), both (B, T) int64, of windows that stand end to end; the
    last batch may have fewer rows. The last window is filled up, its inputs with token 0 and its
    targets with IGNORE_INDEX (-100): a causal model does not see the filling before it ends.
    A mean loss over the text weighs each batch by its targets: `(targets != -100).sum()`.

        for inputs, targets in SequentialWindows(validation, context_length=64, batch_size=32):
            ...
    """

    def __init__(
        self, tokens: npt.ArrayLike, context_length: int, batch_size: int, name: str = "text"
    ) -> None:
        """`name` is what errors call the tokens, such as "validation text".

        Raises:
            InputError: fewer than two tokens, or a length or size below 1.
        """
        self.tokens = _as_tokens(tokens)
        _at_least_one(context_length=context_length, batch_size=batch_size)
        # One window is not needed here: a shorter text is one window, partly filled up.
        _need_one_window(self.tokens, 1, name, "give more text, or raise --validation-fraction")
        self.context_length = context_length
        self.batch_size = batch_size

    @property
    def num_targets(self) -> int:
        """How many targets there are in all, without the filling."""
        return len(self.tokens) - 1

    @property
    def num_windows(self) -> int:
        """How many windows there are, with the one that is filled up."""
        return -(-self.num_targets // self.context_length)

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self.num_windows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Ids, Ids]]:
        batch_tokens = self.batch_size * self.context_length
        for start in range(0, self.num_targets, batch_tokens):
            piece = self.tokens[start : start + batch_tokens + 1]
            rows = -(-(len(piece) - 1) // self.context_length)
            inputs = np.zeros(rows * self.context_length, dtype=np.int64)
            targets = np.full(rows * self.context_length, IGNORE_INDEX, dtype=np.int64)
            inputs[: len(piece) - 1] = piece[:-1]
            targets[: len(piece) - 1] = piece[1:]
            shape = (rows, self.context_length)
            yield inputs.reshape(shape), targets.reshape(shape)


class BatchSampler(ABC):
    """Training batches without end, whose position can be saved.

    batch(step) depends on the tokens, the settings and `step` alone, so a run that was resumed
    sees the batches that it would have seen. Iterating goes on from the `step` reached:

        sampler = RandomWindows(train, context_length=64, batch_size=12, seed=0)
        inputs, targets = next(sampler)    # both (B, T) int64
        saved = sampler.state_dict()
    """

    def __init__(
        self,
        tokens: npt.ArrayLike,
        context_length: int,
        batch_size: int,
        seed: int,
        name: str = "text",
    ) -> None:
        """`name` is what errors call the tokens, such as "training text".

        Raises:
            InputError: fewer than context_length + 1 tokens, a length or size below 1, or a seed
                outside 0 to 4294967295.
        """
        self.tokens = _as_tokens(tokens)
        _at_least_one(context_length=context_length, batch_size=batch_size)
        _need_one_window(self.tokens, context_length, name)
        # A larger seed would take two words of numpy's seed sequence, and could meet another pair
        # of seed and epoch there.
        if not 0 <= seed < 1 << 32:
            raise InputError(f"seed must be from 0 to {(1 << 32) - 1}, got {seed}; change --seed")
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0
        """The step of the next batch, which is the number of batches given so far."""

    @abstractmethod
    def _starts(self, step: int) -> Ids:
        """The first positions of the windows of one batch, (B,)."""

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """The batch of any step, (inputs, targets), both (B, T) int64; moves nothing."""
        if step < 0:
            raise IndexError(f"steps begin at 0, got {step}")
        return _gather(self.tokens, self._starts(step), self.context_length)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Ids, Ids]:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def _identity(self) -> dict[str, int | str]:
        return {
            "sampler": type(self).__name__,
            "num_tokens": len(self.tokens),
            "context_length": self.context_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, int | str]:
        """The step, and what the order of batches depends on; JSON can hold it."""
        return {**self._identity(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, which may be one of batches of another size.

        Raises:
            InputError: the state is of other data or settings, or is damaged; nothing is changed.
        """
        differing = [
            f"{name} was {state.get(name)!r} and is {here!r}"
            for name, here in self._identity().items()
            if name != "batch_size" and state.get(name) != here
        ]
        if differing:
            raise InputError(
                f"the saved data position belongs to another run: {', '.join(differing)}; "
                "resume with the text and the settings of that run"
            )
        step, batch_size = state.get("step"), state.get("batch_size")
        if type(step) is not int or step < 0:
            raise InputError(f"the saved data position is damaged: step must be 0 or more, got {step!r}")
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(
                f"the saved data position is damaged: batch_size must be 1 or more, got {batch_size!r}"
            )
        self.step = self._step_after(step, batch_size)

    def _step_after(self, step: int, batch_size: int) -> int:
        """The step to go on with after `step` batches of another size, so that no draw comes twice."""
        return step


class RandomOffsets(BatchSampler):
    """Windows that start anywhere, drawn with replacement, each independent of the others."""

    def _starts(self, step: int) -> Ids:
        generator = np.random.default_rng([self.seed, step, _OFFSETS_STREAM])
        return generator.integers(0, len(self.tokens) - self.context_length, size=self.batch_size)


class RandomWindows(BatchSampler):
    """Windows drawn without replacement: an epoch shows each of its windows once.

    An epoch lays windows end to end from a random offset and shuffles them. It has
    `windows_per_epoch` windows whatever the offset, so the step alone says where in which epoch a
    batch stands; a batch may straddle two epochs. About one window's worth of tokens is left out
    of an epoch, and since the offset moves over all of that, of no epoch in particular.
    """

    def __init__(
        self,
        tokens: npt.ArrayLike,
        context_length: int,
        batch_size: int,
        seed: int,
        name: str = "text",
    ) -> None:
        super().__init__(tokens, context_length, batch_size, seed, name)
        self.windows_per_epoch = max(1, len(self.tokens) // context_length - 1)
        # The order of the epoch last asked for. Steps come in order, so one is enough.
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def _epoch_starts(self, epoch: int) -> Ids:
        """The starts of all windows of an epoch in the order they are shown."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch, _WINDOWS_STREAM])
            # Up to the last offset that fits, at least context_length - 1 in a text of two windows
            # or more: so every token after the first is a target in some epoch.
            used = self.windows_per_epoch * self.context_length
            offset = generator.integers(0, len(self.tokens) - used)
            self._order = offset + generator.permutation(self.windows_per_epoch) * (self.context_length)
            self._epoch = epoch
        return self._order

    def _step_after(self, step: int, batch_size: int) -> int:
        """The first whose windows were not shown; some of an epoch are left out where a batch begins among them."""
        return -(-step * batch_size // self.batch_size)

    def _starts(self, step: int) -> Ids:
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(positions, self.windows_per_epoch)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            starts[here] = self._epoch_starts(epoch)[places[here]]
        return starts

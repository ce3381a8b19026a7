"""Windows of tokens: pairs (inputs, targets) where targets is inputs moved on by one.

A window that starts at s takes the inputs tokens[s : s + T] and the targets
tokens[s + 1 : s + T + 1], so it needs T + 1 tokens. All tokens stay where they are (an array, a
memory-mapped file of any length, or anything sliced like one): only the windows asked for are read.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError

Ids = npt.NDArray[np.int64]
Batch = tuple[Ids, ...]
"""(inputs, targets), or where documents are kept apart (inputs, targets, documents); (B, T) each."""


class Tokens(Protocol):
    """What is read of tokens: their number, their type, and slices. NumPy's arrays are such, and token shards.

    A `digest` (str), of what the tokens are, saves reading them all to compare them with others.
    """

    @property
    def ndim(self) -> int:
        """1."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """An integer type."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any, /) -> Any: ...


Splittable = TypeVar("Splittable", str, npt.NDArray[np.integer[Any]])

IGNORE_INDEX = -100
"""The target that marks a place without a target; the loss leaves it out, as torch's does."""

_DIGEST_CHUNK = 1 << 18


def as_tokens(tokens: npt.ArrayLike | Tokens) -> Tokens:
    """One-dimensional integers; what has a dtype, such as a memory-mapped array, stays where it is."""
    array: Any = tokens
    if isinstance(tokens, np.ndarray) or not hasattr(tokens, "dtype"):
        array = np.asarray(tokens)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise TypeError(f"tokens must be integers in one dimension, got {array.dtype} of shape {array.shape}")
    return array


def require_at_least_one(**numbers: int) -> None:
    """Raise InputError for the first number, of a setting of its name, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{name} must be at least 1, got {number}; change {flag}")


def require_one_window(
    tokens: Tokens, context_length: int, name: str, advice: str = "lower --context-length or give more text"
) -> None:
    """Raise InputError where the tokens, called `name`, are fewer than context_length + 1."""
    if len(tokens) < context_length + 1:
        raise InputError(
            f"the {name} is too short: {len(tokens)} tokens, and one window needs {context_length + 1}; {advice}"
        )


def gather(tokens: Tokens, starts: Ids, context_length: int) -> tuple[Ids, Ids]:
    """starts (B,) -> inputs (B, T), targets (B, T), each its own memory.

    A window that passes the end of the tokens is filled up, its inputs with 0 and its targets with IGNORE_INDEX.
    """
    size = context_length + 1
    if isinstance(tokens, np.ndarray) and starts.max(initial=0) + size <= len(tokens):
        windows = tokens[starts[:, None] + np.arange(size)]  # (B, T + 1)
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
    inputs = np.zeros((len(starts), context_length), dtype=np.int64)
    targets = np.full((len(starts), context_length), IGNORE_INDEX, dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        window = tokens[start : start + size]
        inputs[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    return inputs, targets


def count_documents(document_starts: Ids, starts: Ids, context_length: int) -> Ids:
    """The number of each token's document within its window, from 0: starts (B,) -> (B, T).

    document_starts: the positions at which documents begin, ascending; only those in the windows are read.
    """
    ends = starts + context_length
    first, last = np.searchsorted(document_starts, [starts + 1, ends])  # a begin at the start changes nothing
    begins = np.zeros((len(starts), context_length), dtype=np.int64)
    for row, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        if low < high:
            begins[row, document_starts[low:high] - starts[row]] = 1
    return begins.cumsum(axis=1)


def read_windows(tokens: Tokens, starts: Ids, context_length: int, document_starts: Ids | None) -> Batch:
    """The batch of the windows with these starts (B,); with `document_starts`, and the documents of its tokens."""
    batch = gather(tokens, starts, context_length)
    if document_starts is None:
        return batch
    return (*batch, count_documents(document_starts, starts, context_length))


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


def token_digest(tokens: npt.ArrayLike | Tokens) -> str:
    """The digest that tokens know of themselves, or the SHA-256 of them as little-endian int64."""
    known = getattr(tokens, "digest", None)
    if isinstance(known, str):
        return known
    array = as_tokens(tokens)
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
        self, tokens: npt.ArrayLike | Tokens, context_length: int, stride: int = 1, name: str = "text"
    ) -> None:
        """`name` is what errors call the tokens, such as "validation text".

        Raises:
            InputError: fewer than context_length + 1 tokens, or a length or stride below 1.
        """
        self.tokens = as_tokens(tokens)
        require_at_least_one(context_length=context_length, stride=stride)
        require_one_window(self.tokens, context_length, name)
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
    A mean loss over the text weighs each batch by its targets: `(targets != -100).sum()`. Of a long text
    `most_targets` takes whole windows at even distances.

        for inputs, targets in SequentialWindows(validation, context_length=64, batch_size=32):
            ...
    """

    def __init__(
        self,
        tokens: npt.ArrayLike | Tokens,
        context_length: int,
        batch_size: int,
        name: str = "text",
        document_starts: Ids | None = None,
        most_targets: int = 0,
    ) -> None:
        """`name` is what errors call the tokens, such as "validation text".

        document_starts: ascending positions at which documents begin. With them a batch has a third array, (B, T)
        int64: the number of each token's document within its window, from 0. most_targets: 0: all.

        Raises:
            InputError: fewer than two tokens, or a length or size below 1.
        """
        self.tokens = as_tokens(tokens)
        require_at_least_one(context_length=context_length, batch_size=batch_size)
        # One window is not needed here: a shorter text is one window, partly filled up.
        require_one_window(self.tokens, 1, name, "give more text, or raise --validation-fraction")
        self.context_length = context_length
        self.batch_size = batch_size
        self.document_starts = document_starts
        # How many windows there are, of how many, and how many targets in them, without the filling.
        targets = len(self.tokens) - 1
        if 0 < most_targets < targets and targets >= context_length:
            self.num_windows = max(1, most_targets // context_length)
            self._among = targets // context_length
            self.num_targets = self.num_windows * context_length
        else:
            self.num_windows = self._among = -(-targets // context_length)
            self.num_targets = targets

    @property
    def digest(self) -> str:
        """The digest of the tokens, see token_digest."""
        return token_digest(self.tokens)

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self.num_windows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.num_windows, self.batch_size):
            windows = np.arange(first, min(first + self.batch_size, self.num_windows))
            starts = windows * self._among // self.num_windows * self.context_length
            yield read_windows(self.tokens, starts, self.context_length, self.document_starts)

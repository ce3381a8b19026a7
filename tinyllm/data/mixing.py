"""Several sources of windows mixed by weight, in an order that is computed and not kept."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.data.permutation import permute
from tinyllm.data.sampling import BatchSampler, DrawTable
from tinyllm.data.windows import Batch, Ids
from tinyllm.system.errors import InputError

CYCLE = 1024
"""Draws in which each source has its share exactly."""

_CYCLE_STREAM = 6


class Mixture(BatchSampler):
    """Batches whose windows come from several samplers, in proportion to weights.

    Of every 1024 draws each source has a fixed number, in an order that is shuffled anew each time. The next draw of a
    source is its own next draw, so each goes through its own epochs, without replacement where it draws so.

        mixture = Mixture([RandomWindows(code, 64, 12, 0), RandomWindows(prose, 64, 12, 0)], [1, 3])
    """

    def __init__(self, sources: Sequence[BatchSampler], weights: Sequence[float] = ()) -> None:
        """weights: one for each source, of any sum; (): as many as each has tokens. Batch size and seed are those of
        the first source.

        Shares are rounded to 1024ths by largest remainder (Hamilton's method): each to the whole below, and what is
        left over, one each to those with the largest remainders, the first of equals first.

        Raises:
            InputError: no sources, or of different lengths of window, or some that keep documents apart beside some
                that do not; weights that are not as many as sources, or not above 0 and finite, or so small that the
                source would never be drawn.
        """
        if not sources:
            raise InputError("a mixture needs sources; give one at least")
        if len({source.context_length for source in sources}) > 1:
            lengths = ", ".join(str(source.context_length) for source in sources)
            raise InputError(f"the sources of a mixture must have windows of one length, got {lengths}")
        if len({source.separates_documents for source in sources}) > 1:
            raise InputError("the sources of a mixture must all keep documents apart, or none of them")
        first = sources[0]
        super().__init__(first.context_length, first.batch_size, first.seed)
        self.sources = tuple(sources)
        self.counts = _shares(weights or [source.num_tokens for source in sources], len(sources))
        """How many of 1024 draws each source has."""
        self.draws_of_sources = DrawTable(self._draws_of_sources)
        """draws (B,) ascending -> (2, B): which source each is of, and which draw of that source it is."""

    @property
    def num_tokens(self) -> int:
        return sum(source.num_tokens for source in self.sources)

    @property
    def digest(self) -> str:
        return hashlib.sha256(" ".join(source.digest for source in self.sources).encode()).hexdigest()

    @property
    def separates_documents(self) -> bool:
        return self.sources[0].separates_documents

    def identity(self) -> dict[str, Any]:
        sources = [source.identity() for source in self.sources]
        return {**super().identity(), "counts": self.counts.tolist(), "sources": sources}

    def _draws_of_sources(self, draws: Ids) -> Ids:
        """As `draws_of_sources`, of whole cycles."""
        cycles, places = np.divmod(draws, CYCLE)
        order = permute(places, CYCLE, self.seed, _CYCLE_STREAM, cycles)
        sources = np.searchsorted(np.cumsum(self.counts), order, side="right")
        theirs = cycles * self.counts[sources]
        for source in range(len(self.counts)):
            mine = (sources == source).reshape(-1, CYCLE)
            theirs += (mine * (mine.cumsum(axis=1) - 1)).ravel()  # how many it had before in the cycle
        return np.stack([sources, theirs])

    def windows(self, draws: Ids) -> Batch:
        sources, theirs = self.draws_of_sources(draws)
        arrays: list[Ids] = []
        for source in np.unique(sources):
            rows = sources == source
            for number, part in enumerate(self.sources[source].windows(theirs[rows])):
                if number == len(arrays):
                    arrays.append(np.empty((len(draws), self.context_length), dtype=np.int64))
                arrays[number][rows] = part
        return tuple(arrays)


def _shares(weights: Sequence[float], sources: int) -> Ids:
    """How many of CYCLE draws each source has."""
    if len(weights) != sources:
        raise InputError(f"{len(weights)} weights for {sources} sources; give one for each")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise InputError(f"weights must be above 0 and finite, got {', '.join(f'{w:g}' for w in weights)}")
    largest: npt.NDArray[np.float64] = np.asarray(weights, dtype=np.float64) / max(weights)
    exact = CYCLE * largest / largest.sum()
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")  # the largest remainder first
    counts[order[: CYCLE - int(counts.sum())]] += 1
    if not counts.all():
        number = int(counts.argmin())
        raise InputError(
            f"weight {number + 1} of {sources} is {weights[number]:g} of {sum(weights):g}, which is none of {CYCLE} "
            "draws; give it more, or leave the source out"
        )
    return counts

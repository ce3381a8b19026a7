"""The loss of a model over a whole text, batch by batch, by one worker or several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.models import TransformerLM
from tinyllm.parallel.team import Team, is_watched
from tinyllm.training.micro_batches import split_batch
from tinyllm.training.objectives import Batch, Objective

Sum = tuple[float, int]
"""A sum of losses, and how many losses are in it."""


def batch_losses(
    model: TransformerLM, objective: Objective, batches: Iterable[Batch], rank: int = 0, size: int = 1
) -> list[Sum]:
    """The losses of the micro-batches of every `size`-th batch, beginning with number `rank`, with dropout off."""
    model.eval()
    found = []
    for batch in islice(batches, rank, None, size):
        for micro_batch in split_batch(batch, 1, model):
            with no_grad():
                loss, count = objective(model, micro_batch)
            found.append((loss.data, count))
    # Read after all are queued, since a device is waited for at each.
    return [(float(backend.read(loss)), int(backend.read(count))) for loss, count in found]


def mean_of(losses: Iterable[Sum]) -> float:
    """The mean of all losses, with the same bits in whatever order they come."""
    sums, counts = zip(*losses, strict=True)
    return math.fsum(sums) / sum(counts)


def mean_loss(
    model: TransformerLM, objective: Objective, batches: Iterable[Batch], workers: int = 1
) -> float:
    """The mean loss over all batches, in nats for NextToken, by a number of workers."""

    def losses_of_rank(rank: int) -> list[Sum]:
        return batch_losses(model, objective, batches, rank, workers)

    if backend.is_asynchronous():
        workers = 1
    with Team(workers, [losses_of_rank], processes=not is_watched(model)) as team:
        return mean_of(loss for part in team.run(losses_of_rank) for loss in part)

"""The loss of a model over a whole text, batch by batch, by one worker or several, and what it is in other units."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.models import TransformerLM
from tinyllm.parallel.team import Team, is_watched
from tinyllm.tokenizer import TextSize, Tokenizer
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


# ---- Units -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A mean loss over a text, in four units.

    tokens: that were predicted. loss: nats a token. perplexity: e^loss. bits_per_character, bits_per_byte: the loss of
    the whole text by its length, in characters and in bytes of UTF-8, which do not depend on the tokenizer.
    """

    tokens: int
    loss: float
    perplexity: float
    bits_per_character: float
    bits_per_byte: float


@dataclass(frozen=True)
class Predicted:
    """What a loss over a text is about: so many tokens, which stand for so much text."""

    tokens: int
    text: TextSize

    def score(self, loss: float) -> Score:
        """A mean loss in nats a token, in all units."""
        bits = loss / math.log(2) * self.tokens
        # e^710 is no float any more.
        perplexity = math.exp(loss) if not loss > 709 else math.inf
        return Score(self.tokens, loss, perplexity, bits / self.text.characters, bits / self.text.bytes)


def predicted(tokenizer: Tokenizer, tokens: Any, targets: int | None = None) -> Predicted:
    """What the loss over all `tokens` after the first is about, or over so many `targets` among them.

    Tokens that know how much text they are, by attributes `characters` and `bytes`, are not counted. Of a part of the
    tokens, the text is taken to be as large a part of all text.
    """
    count = len(tokens) - 1
    if targets is not None and targets < count:
        text, part = predicted(tokenizer, tokens).text, targets / count
        return Predicted(
            targets, TextSize(max(1, round(text.characters * part)), max(1, round(text.bytes * part)))
        )
    characters, size = getattr(tokens, "characters", None), getattr(tokens, "bytes", None)
    if characters is None or size is None:
        return Predicted(count, tokenizer.text_predicted(tokens))
    first = int(tokens[0])
    # A separator of documents is none of the text.
    begin = b"" if first in tokenizer.special_tokens.values() else tokenizer.decode_bytes([first])
    finished = len(begin.decode("utf-8", "ignore"))
    return Predicted(count, TextSize(max(1, characters - finished), max(1, size - len(begin))))


def loss_in_words(loss: float, perplexity: float, bits_per_character: float, bits_per_byte: float) -> str:
    """A loss in the units of Score, for a line of a terminal."""
    shown = f"{perplexity:.1f}" if perplexity < 1e6 else f"{perplexity:.2g}"
    return (
        f"{loss:.4f} nats, perplexity {shown}, {bits_per_character:.4f} bits per character, "
        f"{bits_per_byte:.4f} per byte"
    )

"""Micro-batches: a batch is cut into parts, each with a graph of its own, whose gradients are added up."""

from __future__ import annotations

import numpy as np

from tinyllm import backend
from tinyllm.models import TransformerLM
from tinyllm.training.objectives import Batch

MICRO_BATCH_TOKENS = 1024
"""A micro-batch has about so many tokens at most: its arrays stay small, and products are large enough already."""
MICRO_BATCH_LOGITS = 1 << 24
"""And so many logits (64 MiB), where the vocabulary is large."""


def count_micro_batches(windows: int, length: int, workers: int, vocab_size: int) -> int:
    """Into how many micro-batches a batch (windows, length) is cut: equally many for each worker, if it has enough."""
    most_tokens = backend.choose(MICRO_BATCH_TOKENS, on_device=1 << 20)
    most_logits = backend.choose(MICRO_BATCH_LOGITS, on_device=1 << 28)
    tokens = min(most_tokens, max(1, most_logits // vocab_size))
    for_each = max(1, -(-windows * length // (tokens * workers)))
    return min(windows, workers * for_each)


def split_batch(batch: Batch, workers: int, model: TransformerLM) -> list[Batch]:
    """The micro-batches of a batch of any objective, in order; the longest of its arrays counts as its tokens."""
    windows = len(batch[0])
    length = max(array.size for array in batch) // windows
    count = count_micro_batches(windows, length, workers, model.config.vocab_size)
    parts = np.array_split(np.arange(windows), count)
    return [tuple(array[part[0] : part[-1] + 1] for array in batch) for part in parts]

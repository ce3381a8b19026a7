"""Data: text from files, tokens from text, kept on disk where they are many, and windows of tokens."""

from tinyllm.data.shards import Prepared, TokenShards, is_prepared, open_prepared
from tinyllm.data.text import embedded_corpus, read_text
from tinyllm.data.windows import (
    IGNORE_INDEX,
    BatchSampler,
    RandomOffsets,
    RandomWindows,
    SequentialWindows,
    SlidingWindows,
    split_by_position,
    token_digest,
)

__all__ = [
    "IGNORE_INDEX",
    "BatchSampler",
    "Prepared",
    "RandomOffsets",
    "RandomWindows",
    "SequentialWindows",
    "SlidingWindows",
    "TokenShards",
    "embedded_corpus",
    "is_prepared",
    "open_prepared",
    "read_text",
    "split_by_position",
    "token_digest",
]

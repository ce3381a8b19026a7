"""Data: text from files, tokens from text, kept on disk where they are many, and windows of tokens."""

from tinyllm.data.documents import Document, Reading, documents_of, find_document_files
from tinyllm.data.mixing import Mixture
from tinyllm.data.sampling import (
    BatchSampler,
    PackedWindows,
    RandomOffsets,
    RandomWindows,
    StridedWindows,
    WindowSampler,
)
from tinyllm.data.shards import JoinedTokens, Prepared, TokenShards, is_for_tokens, is_prepared, open_prepared
from tinyllm.data.text import embedded_corpus, read_text
from tinyllm.data.windows import (
    IGNORE_INDEX,
    SequentialWindows,
    SlidingWindows,
    Tokens,
    split_by_position,
    token_digest,
)

__all__ = [
    "IGNORE_INDEX",
    "BatchSampler",
    "Document",
    "JoinedTokens",
    "Mixture",
    "PackedWindows",
    "Prepared",
    "RandomOffsets",
    "RandomWindows",
    "Reading",
    "SequentialWindows",
    "SlidingWindows",
    "StridedWindows",
    "TokenShards",
    "Tokens",
    "WindowSampler",
    "documents_of",
    "embedded_corpus",
    "find_document_files",
    "is_for_tokens",
    "is_prepared",
    "open_prepared",
    "read_text",
    "split_by_position",
    "token_digest",
]

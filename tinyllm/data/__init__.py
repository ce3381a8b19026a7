"""Data: text from files, and windows of tokens from text."""

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
    "Mixture",
    "PackedWindows",
    "RandomOffsets",
    "RandomWindows",
    "Reading",
    "SequentialWindows",
    "SlidingWindows",
    "StridedWindows",
    "Tokens",
    "WindowSampler",
    "documents_of",
    "embedded_corpus",
    "find_document_files",
    "read_text",
    "split_by_position",
    "token_digest",
]

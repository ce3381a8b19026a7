"""The byte tokenizer: one token for each byte of UTF-8."""

from __future__ import annotations

from typing import Any, Self

from tinyllm.system.errors import InputError
from tinyllm.tokenizer.bpe.tokenizer import BPETokenizer
from tinyllm.tokenizer.bpe.training import NUM_BYTES


class ByteTokenizer(BPETokenizer):
    """Byte-pair encoding without merges: 256 ids, each its byte. It needs no training and knows every text.

    tokenizer = ByteTokenizer()
    tokenizer.encode("hé")    # [104, 195, 169]
    """

    def __init__(self) -> None:
        super().__init__({bytes([i]): i for i in range(NUM_BYTES)}, [])

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        described = BPETokenizer.from_json(content)
        if described.vocab != {bytes([i]): i for i in range(NUM_BYTES)} or described.special_tokens:
            raise InputError("the vocabulary is not that of the 256 bytes in order")
        return cls()

    def __repr__(self) -> str:
        return "ByteTokenizer()"

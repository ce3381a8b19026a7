"""What every tokenizer can do; models and data see only this."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import write_text

FILE_NAME = "tokenizer.json"

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Tokenizer(ABC):
    """Text to token ids and back.

    The ids are 0 to vocab_size - 1. What is saved is the `tokenizer.json` of the Hugging Face
    `tokenizers` library, so the same file opens there with the same ids.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are."""

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """The dtype of encode_to_array: uint16 up to 65,536 ids, else uint32."""
        return np.dtype(np.uint16) if self.vocab_size <= 1 << 16 else np.dtype(np.uint32)

    @abstractmethod
    def encode_to_array(self, text: str) -> TokenArray:
        """The ids of `text` as an array (num_tokens,) of self.dtype.

        Raises:
            InputError: the text holds something that the vocabulary cannot express.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as a list; for long text encode_to_array is faster and smaller."""
        ids: list[int] = self.encode_to_array(text).tolist()
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text on its own."""
        return [self.encode(text) for text in texts]

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the parts of one text, such as an open file, one after the other, in bounded memory.

        They are those of all parts joined, wherever one part ends and the next begins.
        """
        for text in texts:
            yield from self.encode(text)

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The UTF-8 of `ids`; unlike decode, exact also where a token ends inside a character."""
        return self.decode(ids).encode()

    def offsets(self, text: str) -> npt.NDArray[np.int64]:
        """Where each token of `text` lies: (num_tokens, 2), the first character and the one after the last.

        A token that holds a part of a character counts as holding all of it, so neighbours may overlap.
        """
        ids = self.encode_to_array(text)
        distinct, which = np.unique(ids, return_inverse=True)
        sizes = np.array([len(self.decode_bytes([id])) for id in distinct.tolist()], dtype=np.int64)[which]
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        character = np.cumsum(data & 0xC0 != 0x80) - 1  # of each byte
        ends = np.cumsum(sizes)
        return np.stack([character[ends - sizes], character[ends - 1] + 1], axis=1)

    @abstractmethod
    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`, a one-dimensional array (num_tokens,) or any iterable of integers.

        Raises:
            InputError: an id is outside the vocabulary.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The JSON object of tokenizer.json; from_json is its inverse."""

    @classmethod
    @abstractmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The tokenizer that the JSON object of a tokenizer.json describes.

        Raises:
            InputError: the object asks for something that this class does not do.
        """

    def save(self, path: StrPath) -> Path:
        """Write tokenizer.json and return its path.

        `path` is a folder, made if it is missing, or a file name ending in .json.

        Raises:
            InputError: it cannot be written.
        """
        target = Path(path)
        if target.suffix != ".json" or target.is_dir():
            target = target / FILE_NAME
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{target.parent}: cannot make this folder: {reason}") from None
        write_text(target, json.dumps(self.to_json(), ensure_ascii=False, indent=2) + "\n")
        return target

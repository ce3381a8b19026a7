"""What every tokenizer can do; models and data see only this."""

import codecs
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import write_text
from tinyllm.system.wording import shown

FILE_NAME = "tokenizer.json"

_BLOCK = 1 << 20
"""Tokens that are counted together."""
_BEGIN = 64
"""Tokens in which the first that is not empty is looked for."""

T = TypeVar("T")
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class TextSize:
    """How long a text is: in characters, and in bytes of UTF-8."""

    characters: int
    bytes: int


def require_text(text: object, several: str = "encode_batch takes several texts") -> None:
    """Raise InputError, which says what to do instead, unless `text` is a str; `several`: what, if it is a list."""
    if isinstance(text, str):
        return
    advice = ""
    if isinstance(text, bytes | bytearray | memoryview):
        advice = "; decode the bytes first, as in data.decode()"
    elif isinstance(text, os.PathLike):
        advice = "; tinyllm.data.read_text reads files"
    elif isinstance(text, Iterable):
        advice = f"; {several}"
    raise InputError(f"the text must be a str, got {shown(text)} ({type(text).__name__}){advice}")


def texts_of(texts: Iterable[T], advice: str = "encode takes one text") -> Iterable[T]:
    """`texts`; raises InputError for one text or something else where several are meant."""
    if isinstance(texts, str | bytes | bytearray | os.PathLike) or not isinstance(texts, Iterable):
        raise InputError(f"texts must be a list of texts, got {shown(texts)}; {advice}")
    return texts


def id_array(ids: Any) -> npt.NDArray[np.integer[Any]]:
    """`ids` as an array (num_tokens,); raises TypeError for what is not integers in one dimension."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        advice = "; put one id into a list" if isinstance(ids, int | np.integer) else ""
        raise TypeError(
            f"ids must be integers in one dimension, got {shown(ids)} ({type(ids).__name__}){advice}"
        )
    array = ids if isinstance(ids, np.ndarray) else np.asarray(list(ids))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"ids must be integers in one dimension, got {array.dtype} of shape {array.shape}")
    return array


def file_for(path: StrPath) -> Path:
    """The file that Tokenizer.save writes: tokenizer.json in the folder `path`, or `path` if it ends in .json.

    Raises:
        InputError: `path` has the name of another kind of file, and is no folder.
    """
    target = Path(path)
    if target.is_dir() or os.fspath(path).endswith(("/", os.sep)):
        return target / FILE_NAME
    if target.suffix == ".json":
        return target
    # Not every dot begins the name of a kind: a folder may be called run-v1.5.
    if re.fullmatch(r"\.[A-Za-z]\w*", target.suffix):
        raise InputError(
            f"{target}: a tokenizer is saved as a .json file or into a folder; give {target.with_suffix('.json')}, or "
            f"{target}{os.sep} for a folder"
        )
    return target / FILE_NAME


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

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the strings that stand for themselves, such as a separator of documents."""
        return {}

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
        return [self.encode(text) for text in texts_of(texts)]

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the parts of one text, such as an open file, one after the other, in bounded memory.

        They are those of all parts joined, wherever one part ends and the next begins.
        """
        for text in texts if isinstance(texts, str) else texts_of(texts):
            yield from self.encode(text)

    def encode_document(self, text: str, special_tokens: bool = True) -> TokenArray:
        """The ids (num_tokens,) of a text in which special tokens may stand, as separators of documents do.

        Each becomes its id; without `special_tokens` it is text like other text. Raises what encode_to_array does.
        """
        return self.encode_to_array(text)

    def encode_documents(self, texts: Sequence[str], special_tokens: bool = True) -> list[TokenArray]:
        """What encode_document gives for each of the texts; many short ones at once are faster than one by one."""
        return [self.encode_document(text, special_tokens) for text in texts]

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The UTF-8 of `ids`; unlike decode, exact also where a token ends inside a character."""
        return self.decode(ids).encode()

    def token_bytes(self, id: int) -> bytes:
        """What the token `id` stands for inside a text.

        Raises:
            InputError: no token has this id.
        """
        return self.decode_bytes([id])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text that each of `ids` adds to what came before it, as it comes, and last what the end leaves.

        Joined they are decode(ids). A character that ends in a later token than it begins in comes with that one.
        A tokenizer whose tokens do not stand for the same bytes everywhere has its own. Raises what decode does.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            yield decoder.decode(self.token_bytes(id))
        yield decoder.decode(b"", final=True)

    def text_predicted(self, ids: Any) -> TextSize:
        """How much text the tokens after the first add to that of `ids`; at least 1 each, so as to divide by.

        ids: (N,) integers, or what is sliced like an array; nothing of it is decoded but its begin. A character that
        ends in a later token than it begins in comes with that one.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(1, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK].astype(np.int64, copy=False)
            if block.min() < 0 or block.max() >= self.vocab_size:
                self.decode_bytes(block)  # which says what is wrong
            counts += np.bincount(block, minlength=self.vocab_size)
        characters = size = 0
        for id in np.flatnonzero(counts).tolist():
            data, count = self.token_bytes(id), int(counts[id])
            characters += count * _characters_begun(data)
            size += count * len(data)
        begin = ids[:_BEGIN]
        # What the first token that is not empty loses at the begin of a text, such as an added space.
        lost = self._lost_at_begin(begin[:1]) - self._lost_at_begin(begin)
        first = self.decode_bytes(begin[:1])
        unfinished = _characters_begun(first) - len(next(self.decode_stream(begin[:1].tolist())))
        return TextSize(max(1, characters + lost + max(0, unfinished)), max(1, size + lost))

    def _lost_at_begin(self, ids: Any) -> int:
        return sum(len(self.token_bytes(id)) for id in ids.tolist()) - len(self.decode_bytes(ids))

    def offsets(self, text: str) -> npt.NDArray[np.int64]:
        """Where each token of `text` lies: (num_tokens, 2), the first character and the one after the last.

        A token that holds a part of a character counts as holding all of it, so neighbours may overlap.
        """
        return self._places(text, self.encode_to_array(text))

    def _places(self, text: str, ids: TokenArray) -> npt.NDArray[np.int64]:
        """Where each of the tokens `ids` of `text` lies."""
        distinct, which = np.unique(ids, return_inverse=True)
        sizes = np.array([len(self.token_bytes(id)) for id in distinct.tolist()], dtype=np.int64)[which]
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
            InputError: it cannot be written, or has the name of another kind of file.
        """
        target = file_for(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{target.parent}: cannot make this folder: {reason}") from None
        write_text(target, json.dumps(self.to_json(), ensure_ascii=False, indent=2) + "\n")
        return target


def _characters_begun(data: bytes) -> int:
    """How many characters of UTF-8 begin in these bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)

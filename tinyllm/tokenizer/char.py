"""The character tokenizer: one token for each Unicode code point."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.text_files import names_file
from tinyllm.system.wording import shown
from tinyllm.tokenizer.base import TokenArray, Tokenizer, id_array, require_text

# Everything in tokenizer.json but the vocabulary. `tokenizers` runs its patterns in Oniguruma,
# which knows no (?s:.), so "any character, the newline too" is written as [\s\S].
_FRAME: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": r"[\s\S]"},
        "behavior": "Isolated",
        "invert": False,
    },
    "post_processor": None,
    "decoder": {"type": "Fuse"},
}
# `tokenizers` wants a name for the unknown token. It is longer than a character, so it is never in
# the vocabulary, and there as here an unknown character is an error instead of a silent loss.
_UNKNOWN_NAME = "<unk>"

# Long text goes through in pieces of this many characters, which stay in the cache.
_CHUNK = 1 << 18

# (highest code point, dtype, codec) of the codecs that write each code point in one number. The
# narrower ones decode several times faster.
_CODECS = ((0xFF, "u1", "latin-1"), (0xFFFF, "<u2", "utf-16-le"), (0x10FFFF, "<u4", "utf-32-le"))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    """(len(text),) code points. Lone surrogates pass here, so that the caller can name them."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _name(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


class CharTokenizer(Tokenizer):
    """One id for each distinct character (Unicode code point) of a training text.

        tokenizer = CharTokenizer.train("hello")
        tokenizer.encode("hole")          # [1, 3, 2, 0]
        tokenizer.decode([1, 3, 2, 0])    # "hole"

    Nothing is normalised: "é" as one code point and as "e" with a combining accent stay different,
    and decode(encode(text)) == text always.
    """

    def __init__(self, characters: str) -> None:
        """`characters[i]` is the character with id i.

        Raises:
            InputError: no character, one twice, a lone surrogate, or no str.
        """
        require_text(characters, "join them first, as in ''.join(characters)")
        if not characters:
            raise InputError("a character vocabulary needs at least one character, got none")
        codes = _code_points(characters)
        surrogates = np.flatnonzero((codes >= 0xD800) & (codes <= 0xDFFF))
        if surrogates.size:
            raise InputError(
                f"a vocabulary cannot hold {_name(characters[surrogates[0]])}: half of a UTF-16 "
                "pair is no character and no file can hold it; mend how the text was decoded"
            )
        if len(set(characters)) < len(characters):
            twice = next(c for i, c in enumerate(characters) if c in characters[:i])
            raise InputError(f"the vocabulary holds the character {_name(twice)} twice")
        self._characters = characters
        highest = int(codes.max())
        dtype, self._codec = next((d, c) for limit, d, c in _CODECS if highest <= limit)
        self._code_of_id = codes.astype(dtype)
        # -1 is an unknown character. The one entry past the highest code point is unknown too:
        # lookups clip to it.
        self._id_of_code = np.full(highest + 2, -1, dtype=np.int32)
        self._id_of_code[codes] = np.arange(len(codes), dtype=np.int32)

    @classmethod
    def train(cls, text: str) -> Self:
        """The tokenizer of all distinct characters of `text`, in code point order.

        Raises:
            InputError: the text is empty or holds a lone surrogate, or is the name of a file.
        """
        require_text(text, "join several first, as in ''.join(texts)")
        if names_file(text):
            raise InputError(f"the text {shown(text)} is the name of a file; tinyllm.data.read_text reads it")
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self._characters)

    @property
    def characters(self) -> str:
        """The vocabulary: the character at index i has id i."""
        return self._characters

    def encode_to_array(self, text: str) -> TokenArray:
        """The ids of `text`, (len(text),), uint16 up to 65,536 characters, else uint32.

        Raises:
            InputError: names the first character that is not in the vocabulary, and its position.
        """
        require_text(text)
        ids: TokenArray = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), _CHUNK):
            codes = _code_points(text[start : start + _CHUNK])
            found = self._id_of_code.take(codes, mode="clip")
            if found.min() < 0:
                position = start + int(np.argmin(found))
                raise InputError(
                    f"the character {_name(text[position])} at position {position} is not among "
                    f"the {self.vocab_size} of the vocabulary; remove it, or train the tokenizer "
                    "on text that has it"
                )
            ids[start : start + _CHUNK] = found
        return ids

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`, (num_tokens,) of any integer dtype, or any iterable of integers.

        Raises:
            InputError: names the first id that is not in the vocabulary, and its position.
            TypeError: not one-dimensional, or not integers.
        """
        array = id_array(ids)
        pieces = []
        for start in range(0, len(array), _CHUNK):
            piece = array[start : start + _CHUNK]
            if piece.min() < 0 or piece.max() >= self.vocab_size:
                place = int(np.argmax((piece < 0) | (piece >= self.vocab_size)))
                raise InputError(
                    f"the id {piece[place]} at position {start + place} is not in the vocabulary, "
                    f"whose ids are 0 to {self.vocab_size - 1}; is it the tokenizer of this model?"
                )
            pieces.append(self._code_of_id[piece].tobytes().decode(self._codec))
        return "".join(pieces)

    def to_json(self) -> dict[str, Any]:
        vocabulary = {character: id for id, character in enumerate(self._characters)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN_NAME}
        return {**_FRAME, "model": model}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        for key, expected in _FRAME.items():
            if content.get(key, expected) != expected:
                raise InputError(
                    f"{key} is {shown(content[key])}, and a character tokenizer has "
                    f"{shown(expected)}: other tokenizers of words are not supported"
                )
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict) or not vocabulary:
            raise InputError(f"model.vocab must be an object of characters and ids, got {shown(vocabulary)}")
        characters: list[str] = [""] * len(vocabulary)
        for token, id in vocabulary.items():
            if len(token) != 1:
                raise InputError(f"the token {shown(token)} is not one character")
            if type(id) is not int or not 0 <= id < len(characters) or characters[id]:
                raise InputError(
                    f"the id of {_name(token)} is {shown(id)}; {len(characters)} tokens must have "
                    f"the ids 0 to {len(characters) - 1}, each once"
                )
            characters[id] = token
        return cls("".join(characters))

    def __repr__(self) -> str:
        return f"CharTokenizer({shown(self._characters)}, vocab_size={self.vocab_size})"

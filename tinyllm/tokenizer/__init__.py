"""Tokenizers: text to token ids and back, saved as the `tokenizer.json` of Hugging Face."""

from pathlib import Path
from typing import Any

from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.system.storage import StrPath
from tinyllm.system.wording import shown
from tinyllm.tokenizer.base import FILE_NAME, TextSize, Tokenizer
from tinyllm.tokenizer.bpe.learning import VocabularyWarning
from tinyllm.tokenizer.bpe.tokenizer import BPETokenizer
from tinyllm.tokenizer.byte import ByteTokenizer
from tinyllm.tokenizer.char import CharTokenizer
from tinyllm.tokenizer.files import read_gpt2, read_sentencepiece, read_tiktoken, write_gpt2, write_tiktoken
from tinyllm.tokenizer.sentencepiece.tokenizer import SentencePieceTokenizer
from tinyllm.tokenizer.surroundings import TokenizerFileWarning

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "SentencePieceTokenizer",
    "TextSize",
    "Tokenizer",
    "TokenizerFileWarning",
    "VocabularyWarning",
    "load_tokenizer",
    "parse_tokenizer",
    "read_gpt2",
    "read_sentencepiece",
    "read_tiktoken",
    "write_gpt2",
    "write_tiktoken",
]

# The "type" of the "model" in tokenizer.json -> the class that reads it.
_CLASSES: dict[str, type[Tokenizer]] = {"WordLevel": CharTokenizer, "BPE": BPETokenizer}


def load_tokenizer(path: StrPath) -> Tokenizer:
    """Open the tokenizer of a folder, a tokenizer.json itself, or a .model of SentencePiece.

    Raises:
        InputError: missing, damaged, or a kind of tokenizer that is not supported.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if file.suffix == ".model":
        return read_sentencepiece(file)
    return parse_tokenizer(read_json(file), file)


def parse_tokenizer(content: dict[str, Any], where: StrPath) -> Tokenizer:
    """The tokenizer that the JSON object of a tokenizer.json describes; `where` is what errors call it.

    Raises:
        InputError: damaged, or a kind of tokenizer that is not supported.
    """
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind is None and isinstance(model, dict) and "merges" in model:
        kind = "BPE"  # what the tokenizers library takes it for
    if not isinstance(model, dict) or not isinstance(kind, str) or kind not in _CLASSES:
        raise InputError(
            f"{where}: the tokenizer's model type is {shown(kind)}; supported: {', '.join(_CLASSES)}"
        )
    reader = _CLASSES[kind]
    if kind == "BPE" and model.get("byte_fallback") is True:
        reader = SentencePieceTokenizer  # characters are its smallest pieces, not bytes
    try:
        return reader.from_json(content)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: it is nested too deeply") from None

"""How much text a run will have, found without reading more of it than is needed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tinyllm.data import Prepared, embedded_corpus, is_for_tokens, open_prepared, read_text
from tinyllm.models import ModelConfig
from tinyllm.system.errors import InputError
from tinyllm.system.text_files import blocks, find_text_files
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, VocabularyWarning, load_tokenizer
from tinyllm.training.config import TrainConfig

SAMPLE = 1 << 20
"""Characters from which the tokens of byte-pair encoding are estimated."""
READ_WHOLE = 1 << 28
"""Bytes up to which a text is read whole, to be counted."""


@dataclass(frozen=True)
class TextSize:
    """The text of a run in tokens.

    characters_per_token: of this tokenizer on this text. exact: counted and not estimated. in_memory: bytes that a run
    holds of it. prepared: it is on disk as tokens, which are not held in memory.
    """

    train_tokens: int
    validation_tokens: int
    vocab_size: int
    characters_per_token: float
    exact: bool
    prepared: bool = False

    @property
    def in_memory(self) -> int:
        """Bytes of the tokens that a run holds."""
        return 0 if self.prepared else 8 * (self.train_tokens + self.validation_tokens)


def text_size(model: ModelConfig, train: TrainConfig) -> TextSize:
    """The size of the text that `train` names; without one, of what `tinyllm train` takes then.

    Raises InputError for text that cannot be read.
    """
    if any(map(is_for_tokens, train.data)):
        return _prepared([open_prepared(path) for path in train.data])
    files = [file for path in train.data for file in find_text_files(Path(path))]
    size = sum(file.stat().st_size for file in files if file.is_file())
    held_out_files = [file for path in train.validation_data for file in find_text_files(Path(path))]
    held_out = sum(file.stat().st_size for file in held_out_files if file.is_file())
    if size + held_out > READ_WHOLE:
        sample = "".join(_begin(files, SAMPLE))
        whole = size / max(1, len(sample.encode()))
        held_out_characters = held_out * len(sample) / max(1, len(sample.encode()))
    else:
        sample = read_text(train.data) if train.data else embedded_corpus()
        whole = 1.0
        held_out_characters = len(read_text(train.validation_data)) if train.validation_data else 0.0
    tokens, vocab_size, exact = _tokens_of(sample, model, train)
    for_each = len(sample) / max(1, tokens)
    total = tokens * whole
    if train.validation_data:
        split = (total, held_out_characters / for_each)
        exact = exact and train.tokenizer == "char"
    else:
        split = (total * (1 - train.validation_fraction), total * train.validation_fraction)
    return TextSize(int(split[0]), int(split[1]), vocab_size, for_each, exact and whole == 1)


def _begin(files: list[Path], characters: int) -> list[str]:
    """The begin of each file, so many characters of all together."""
    each = max(1, characters // max(1, len(files)))
    return ["".join(islice(blocks(file), 1))[:each] for file in files]


def _tokens_of(text: str, model: ModelConfig, train: TrainConfig) -> tuple[int, int, bool]:
    """(tokens, size of the vocabulary, whether that is exact) of a text."""
    if train.tokenizer == "char":
        return len(text), model.vocab_size or CharTokenizer.train(text).vocab_size, True
    if train.tokenizer == "byte":
        return len(text.encode()), model.vocab_size or 256, True
    # From its middle, since texts begin with contents and licences.
    begin = max(0, (len(text) - SAMPLE) // 2)
    sample = text[begin : begin + SAMPLE]
    if train.tokenizer == "bpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VocabularyWarning)
            tokenizer = BPETokenizer.train([sample], model.vocab_size or 4096)
        # What it is learned from it encodes a little better than the rest.
        tokens = len(tokenizer.encode(sample)) * 1.02
        return int(tokens * len(text) / len(sample)), model.vocab_size or 4096, False
    if not Path(train.tokenizer).exists():
        raise InputError(f"tokenizer={train.tokenizer!r}: neither char, byte or bpe nor a tokenizer.json")
    loaded = load_tokenizer(train.tokenizer)
    tokens = len(loaded.encode(sample)) * len(text) / len(sample)
    return int(tokens), model.vocab_size or loaded.vocab_size, len(sample) == len(text)


def _prepared(folders: Sequence[Prepared]) -> TextSize:
    """The size of text that is prepared as tokens, of which no shard is read."""
    train = sum(len(folder.train) for folder in folders)
    validation = sum(len(folder.validation) for folder in folders)
    characters = sum(folder.train.characters for folder in folders)
    vocab_size = folders[0].tokenizer.vocab_size
    return TextSize(train, validation, vocab_size, characters / max(1, train), exact=True, prepared=True)

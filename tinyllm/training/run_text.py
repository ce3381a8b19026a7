"""What a run is trained and validated on: from settings to a tokenizer and two splits of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm.data import (
    JoinedTokens,
    Prepared,
    embedded_corpus,
    is_for_tokens,
    open_prepared,
    read_text,
    split_by_position,
)
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.progress import print_status
from tinyllm.system.wording import command_line, counted
from tinyllm.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    VocabularyWarning,
    load_tokenizer,
)
from tinyllm.training.config import TrainConfig


@dataclass(frozen=True)
class RunText:
    """The tokens of a run, (N,) integers: arrays, or what is sliced like them; `train` may be a list of several."""

    tokenizer: Tokenizer
    train: Any
    validation: Any


def read_run_text(config: TrainConfig, vocab_size: int, saved: Tokenizer | None, notes: list[str]) -> RunText:
    """The tokens that the settings say, and their tokenizer.

    vocab_size: for a tokenizer that is learned, 0: 4096. saved: the tokenizer of the checkpoint to go on or begin from,
    for TrainConfig.tokenizer "saved"; None: there is none. notes: lines about the text are added to it.

    Folders of `tinyllm prepare` have their own tokenizer and validation split; several are mixed.
    """
    if any(map(is_for_tokens, config.data)):
        return _prepared_text(config, notes)
    texts = _texts(config, notes)
    if config.tokenizer == "saved":
        if saved is None:
            raise InputError(
                "tokenizer='saved' is that of --init-from; give char, byte, bpe or a tokenizer.json"
            )
        tokenizer = saved
    else:
        whole = "".join(texts) if config.tokenizer == "char" else ""
        workers = config.threads or physical_cores()
        tokenizer = build_tokenizer(config.tokenizer, whole, texts[0], vocab_size, workers)
    train, validation = (tokenizer.encode_document(part, config.special_tokens) for part in texts)
    return RunText(tokenizer, train, validation)


def _prepared_text(config: TrainConfig, notes: list[str]) -> RunText:
    """The tokens of prepared folders."""
    folders = [open_prepared(path) for path in config.data]
    tokenizer = folders[0].tokenizer
    for folder in folders[1:]:
        if folder.tokenizer.to_json() != tokenizer.to_json():
            raise InputError(
                f"{folder.folder} and {folders[0].folder} were prepared with different tokenizers; prepare one of them "
                f"again with --tokenizer {folders[0].folder}"
            )
    # The others are defaults, of settings or of presets.
    named = config.tokenizer not in ("char", "bpe", "saved")
    if named and build_tokenizer(config.tokenizer, "", "", 0).to_json() != tokenizer.to_json():
        raise InputError(
            f"tokenizer={config.tokenizer!r} is another than that of {folders[0].folder}, which trains with its own; "
            "leave --tokenizer out, or prepare the text with it"
        )
    notes += [
        f"{folder.folder}: {len(folder.train):,} tokens, {counted(len(folder.train.document_starts), 'document')}"
        for folder in folders
    ]
    settled = ("validation_fraction", "newlines", "special_tokens")
    if not config.validation_data:
        notes += [
            f"{name}={getattr(config, name)!r} has no effect: prepared text has its own"
            for name in settled
            if getattr(config, name) != getattr(TrainConfig, name)
        ]
    trains: list[Any] = [folder.train for folder in folders]
    return RunText(
        tokenizer, trains if len(trains) > 1 else trains[0], _prepared_validation(config, folders, notes)
    )


def _prepared_validation(config: TrainConfig, folders: Sequence[Prepared], notes: list[str]) -> Any:
    """What runs on prepared folders are validated on: other text, or the validation splits of all."""
    if config.validation_data:
        text = read_text(
            config.validation_data, lambda line: notes.append(f"for validation: {line}"), config.newlines
        )
        return folders[0].tokenizer.encode_document(text, config.special_tokens)
    splits = [folder.validation for folder in folders if len(folder.validation)]
    if not splits:
        raise InputError(
            f"{folders[0].folder} was prepared without a validation split; give --validation-data, or prepare it "
            "with a --validation-fraction"
        )
    return splits[0] if len(splits) == 1 else JoinedTokens(splits)


def _texts(config: TrainConfig, notes: list[str]) -> tuple[str, str]:
    """The texts to train on and to validate on."""
    newlines = config.newlines
    text = read_text(config.data, notes.append, newlines) if config.data else embedded_corpus()
    if not config.validation_data:
        # Split as text, so that runs with different tokenizers are validated on the same characters.
        return split_by_position(text, config.validation_fraction)
    say = notes.append
    return text, read_text(config.validation_data, lambda line: say(f"for validation: {line}"), newlines)


def build_tokenizer(choice: str, text: str, train_text: str, vocab_size: int, workers: int = 1) -> Tokenizer:
    """The tokenizer that TrainConfig.tokenizer names.

    A character tokenizer has all characters of `text`; byte-pair encoding is learned from `train_text`, up to
    `vocab_size` tokens (4096 if that is 0).

    Raises InputError for a name that is neither known nor a file, and for a file that cannot be used.
    """
    if choice == "char":
        return CharTokenizer.train(text)
    if choice == "byte":
        return ByteTokenizer()
    if choice == "bpe":
        asked = vocab_size or 4096
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VocabularyWarning)  # said below, without advice for Python
            learned = BPETokenizer.train([train_text], asked, workers=workers, progress=True)
        if learned.vocab_size < asked:
            print_status(
                f"{learned.vocab_size:,} tokens, not {asked:,}: no pair of tokens is left that occurs twice"
            )
        return learned
    if not Path(choice).exists():
        raise InputError(
            f"tokenizer={choice!r}: neither char, byte or bpe nor a tokenizer.json; "
            f"`{command_line('tokenizer', 'train')}` makes one"
        )
    return load_tokenizer(choice)

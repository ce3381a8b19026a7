"""The loss of a saved model on a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllm.data import SequentialWindows, is_for_tokens, open_prepared, read_text
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.progress import print_status
from tinyllm.system.text_files import Newlines
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints import keeping
from tinyllm.training.evaluation import Score, mean_loss, predicted
from tinyllm.training.objectives import NextToken


def evaluate(
    path: Path,
    data: Sequence[str],
    threads: int = 0,
    batch_size: int = 64,
    special_tokens: bool = True,
    newlines: Newlines = "lf",
) -> Score:
    """The loss of the model at `path` over the whole text of `data`, each token after the first predicted once.

    Of a folder of `tinyllm prepare` it is the validation split.

    special_tokens: those of the tokenizer in the text become their ids; without it they are text.
    """
    if threads < 0:
        raise InputError(f"threads={threads}; it must be at least 0 (0: one for each physical core)")
    model, tokenizer = keeping.load(path)
    read: list[str] = []
    tokens: Any
    if any(map(is_for_tokens, data)):
        tokens = _prepared_validation(data, tokenizer)
    else:
        tokens = tokenizer.encode_document(read_text(data, read.append, newlines), special_tokens)
    if len(tokens) < 2:
        raise InputError("the text has one character; the loss needs at least two, so give more text")
    windows = SequentialWindows(tokens, model.config.context_length, batch_size)
    loss = mean_loss(model, NextToken(), windows, threads or physical_cores())
    for line in read:
        print_status(line)
    return predicted(tokenizer, tokens).score(loss)


def _prepared_validation(data: Sequence[str], tokenizer: Tokenizer) -> Any:
    if len(data) > 1:
        raise InputError(f"{len(data)} texts, of which one is prepared; a prepared folder is evaluated alone")
    prepared = open_prepared(data[0])
    if prepared.tokenizer.to_json() != tokenizer.to_json():
        raise InputError(
            f"{data[0]} was prepared with another tokenizer than the model has; prepare it with the model's"
        )
    if not len(prepared.validation):
        raise InputError(
            f"{data[0]} was prepared without a validation split; give a text, or prepare it "
            "with a --validation-fraction"
        )
    return prepared.validation

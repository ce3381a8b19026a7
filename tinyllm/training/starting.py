"""Beginning a run from the weights of a checkpoint, with other settings, text or vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.models import ModelConfig
from tinyllm.system.errors import InputError
from tinyllm.system.settings import settings_of, to_mapping
from tinyllm.system.storage import StrPath
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints import keeping
from tinyllm.training.checkpoints.checkpoint import Checkpoint

Rows = npt.NDArray[np.int64]

OTHERWISE = {"context_length", "dropout"}
"""What the model of a new run may have otherwise than that of the weights it begins from."""
MATRICES = ("embedding.weight", "head.weight")
"""The parameters with a row for each token."""
NEW_ROW_VARIANCE = 1e-5
"""Of new rows, as a part of that of the known ones."""
_NEW_ROWS_STREAM = 3


def read_start(path: StrPath) -> Checkpoint:
    """The checkpoint to begin from: of a run its best one; raises InputError as `keeping.load` does."""
    found = keeping.find_valid(path, ("best", "latest"))
    keeping.report_passed_over(found)
    return found


def require_shape(start: Checkpoint, given: Mapping[str, Any]) -> ModelConfig:
    """The shape of the weights; raises InputError, naming each, for given settings that contradict it.

    given: by name, what was asked for; 0 stands for what is not said, and the vocabulary is left to `weights_for`.
    """
    shape = start.weights()[0]
    settings = {setting.name: setting for setting in settings_of(ModelConfig)}
    contradicting = {}
    for name in given.keys() & settings.keys() - OTHERWISE - {"vocab_size"}:
        value, there = settings[name].check(given[name]), getattr(shape, name)
        unsaid = settings[name].kind is int and value == 0
        if value != there and not unsaid:
            contradicting[name] = f"{name}={there}, and {name}={value} was asked for"
    if contradicting:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(contradicting))
        raise InputError(
            f"the weights of --init-from {start.folder} have another shape: "
            f"{'; '.join(contradicting[name] for name in sorted(contradicting))}; leave {flags} out"
        )
    return shape


def weights_for(
    start: Checkpoint, config: ModelConfig, tokenizer: Tokenizer, widen: bool, seed: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of the model that begins from these weights, and its arrays by name.

    config: what was asked for; its vocab_size 0: as many rows as are needed. With `widen`, tokens that both
    vocabularies have keep their rows, and the others get rows near the mean of the known ones, so that the model gives
    them neither a large nor a vanishing probability (Hewitt, Initializing New Word Embeddings for Pretrained Language
    Models, 2021). seed: of their noise.

    Raises InputError for another shape, and without `widen` for another vocabulary.
    """
    shape = require_shape(start, to_mapping(config))
    _, arrays = start.weights()
    old = start.tokenizer()
    rows = known_rows(old, tokenizer)
    same = np.array_equal(rows, np.arange(old.vocab_size))
    size = config.vocab_size or (shape.vocab_size if same else tokenizer.vocab_size)
    config = replace(config, vocab_size=size)
    if same and size == shape.vocab_size:
        return config, arrays
    if size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size={size}, and the tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    if not widen:
        kept = int((rows >= 0).sum())
        raise InputError(
            f"the vocabulary is another than that of --init-from {start.folder}: {old.vocab_size:,} tokens there "
            f"({shape.vocab_size:,} rows), {tokenizer.vocab_size:,} here ({size:,} rows), {kept:,} of them the same; "
            "leave --tokenizer and --vocab-size out to keep it, or give --widen-vocabulary, which keeps the rows of "
            "these and makes new ones for the others"
        )
    rows = np.concatenate([rows, np.full(size - len(rows), -1)])
    generator = np.random.default_rng([seed, _NEW_ROWS_STREAM])
    for name in MATRICES:
        if name in arrays:
            arrays[name] = _with_rows(arrays[name], rows, old.vocab_size, generator)
    return config, arrays


def known_rows(old: Tokenizer, new: Tokenizer) -> Rows:
    """For each token of `new`, the id of the token of `old` that stands for the same bytes, or -1: (vocab_size,).

    Special tokens are the same where they are written alike.
    """
    before, now = _meanings(old), _meanings(new)
    places: dict[bytes | str, int] = {}
    for id, meaning in enumerate(before):
        places.setdefault(meaning, id)
    # Where several tokens stand for the same bytes, the one of the same id is meant.
    rows = [
        id if id < len(before) and before[id] == meaning else places.get(meaning, -1)
        for id, meaning in enumerate(now)
    ]
    return np.array(rows, dtype=np.int64)


def _meanings(tokenizer: Tokenizer) -> list[bytes | str]:
    special = {id: token for token, id in tokenizer.special_tokens.items()}
    return [special[id] if id in special else tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]


def _with_rows(matrix: Any, rows: Rows, known: int, generator: np.random.Generator) -> Any:
    """matrix (V, D), rows (V',) -> (V', D): the rows named, and new ones for -1, drawn by the first `known`."""
    values = np.asarray(matrix[:known], dtype=np.float64)
    noise = generator.standard_normal((len(rows), matrix.shape[1]))
    new = values.mean(axis=0) + math.sqrt(NEW_ROW_VARIANCE) * values.std(axis=0) * noise
    return np.where((rows >= 0)[:, None], matrix[rows], new).astype(matrix.dtype)

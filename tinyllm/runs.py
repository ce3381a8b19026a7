"""Whole runs: from text and configs to a trained model in a folder, and what is done with it afterwards."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllm import checkpoint
from tinyllm.callbacks import LossCurve, MetricsFile, Progress
from tinyllm.config import write_toml
from tinyllm.data import SequentialWindows, embedded_corpus, read_text, split_by_position
from tinyllm.errors import InputError
from tinyllm.generate import generate_text
from tinyllm.nn import ModelConfig, TransformerLM
from tinyllm.tokenizer import CharTokenizer
from tinyllm.train import TrainConfig, Trainer, mean_loss
from tinyllm.workers import Workers, physical_cores

CONFIG_FILE = "run.toml"


def train(
    model_config: ModelConfig, train_config: TrainConfig, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train a character-level model on text, as the configs say, and print a sample of what it learned.

    Writes into `train_config.out`: run.toml, metrics.jsonl, loss.png, checkpoints.

    Args:
        resume: go on from the latest checkpoint in the folder. overwrite: replace a run that is there.

    Returns the folder. Raises InputError for bad text, settings that do not fit it, or a folder that cannot be
    used.
    """
    if train_config.out is None:
        raise InputError("the run needs a folder; give --out DIR")
    folder = Path(train_config.out)
    _prepare(folder, resume, overwrite)
    text = read_text(train_config.data) if train_config.data else embedded_corpus()
    tokenizer = CharTokenizer.train(text)
    if model_config.vocab_size == 0:
        model_config = replace(model_config, vocab_size=tokenizer.vocab_size)
    if model_config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size={model_config.vocab_size}, the text has {tokenizer.vocab_size} different characters; "
            "set it to that, or to 0"
        )
    train_tokens, validation_tokens = split_by_position(
        tokenizer.encode_to_array(text), train_config.validation_fraction
    )
    _require_memory(model_config)
    model = TransformerLM(model_config, train_config.seed)
    callbacks = [Progress(), MetricsFile(folder, train_config.log_every), LossCurve(folder)]
    trainer = Trainer(model, tokenizer, train_tokens, validation_tokens, train_config, folder, callbacks)
    if resume:
        trainer.resume()
    elif overwrite:
        # Only now, when everything that the user gave has been found good.
        checkpoint.remove_run(folder)
    write_toml(folder / CONFIG_FILE, {"model": model_config, "train": train_config})
    _say(
        f"{model.num_parameters():,} parameters, {tokenizer.vocab_size} characters, {len(train_tokens):,} tokens "
        f"to train on, {len(validation_tokens):,} to validate, {trainer.threads} threads"
    )
    if resume and trainer.step < train_config.steps:
        _say(f"going on from step {trainer.step}")
    elif resume:
        _say(f"the run has made its {trainer.step} steps already; --steps N, with a larger N, goes on")
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if trainer.saved_step < 0:
            _say("stopped; nothing is saved yet")
        else:
            _say(f"stopped; go on from step {trainer.saved_step} with: {_resume_command(folder)}")
        raise
    _say(f"best validation loss {trainer.best_loss:.4f} nats a character; the run is in {folder}")
    if train_config.sample_tokens:
        prompt = first_prompt(tokenizer)
        pieces = generate_text(
            model, tokenizer, prompt, train_config.sample_tokens, temperature=train_config.sample_temperature
        )
        print("".join(pieces).strip("\n"))
    return folder


def _prepare(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make sure, before any work, that the folder can be written and holds no other run."""
    try:
        has_run = bool(checkpoint.checkpoints(folder))
    except OSError:
        has_run = False  # what is wrong with the folder is said below
    if resume and not has_run:
        raise InputError(f"{folder}: no run to resume; leave --resume out to begin one")
    if has_run and not resume and not overwrite:
        raise InputError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, "
            "--out DIR writes elsewhere"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{folder}: cannot be written: {reason or error}; give another --out") from None


def _require_memory(config: ModelConfig) -> None:
    """Refuse a model that cannot be trained in the memory of this machine, before the machine grinds to a halt."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        return
    needed = 16 * config.num_parameters  # float32 weights, gradients and two moments of AdamW
    if needed > memory:
        raise InputError(
            f"a model of this shape needs {needed / 2**30:,.0f} GiB to train, this machine has "
            f"{memory / 2**30:,.0f} GiB; make hidden_size or num_layers smaller"
        )


def _resume_command(folder: Path) -> str:
    return f"tinyllm train --resume --out {shlex.quote(str(folder))}"


def first_prompt(tokenizer: CharTokenizer) -> str:
    """What a sample begins with when nobody says: a line end, or the first character there is."""
    return "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]


@dataclass(frozen=True)
class Score:
    """The loss of a model on a whole text."""

    tokens: int
    loss: float
    bits_per_character: float


def evaluate(path: Path, data: Sequence[str], threads: int = 0, batch_size: int = 64) -> Score:
    """The loss of the model at `path` over the whole text of `data`, each token after the first predicted once."""
    if threads < 0:
        raise InputError(f"threads={threads}; it must be at least 0 (0: one for each physical core)")
    model, tokenizer = checkpoint.load(path)
    tokens = tokenizer.encode_to_array(read_text(data))
    if len(tokens) < 2:
        raise InputError("the text has one character; the loss needs at least two, so give more text")
    windows = SequentialWindows(tokens, model.config.context_length, batch_size)
    with Workers(threads or physical_cores()) as workers:
        loss = mean_loss(model, windows, workers)
    characters = len(tokenizer.decode(tokens[1:]))
    return Score(windows.num_targets, loss, loss / math.log(2) * windows.num_targets / characters)


def sample(path: Path, prompt: str | None, max_new_tokens: int, **settings: Any) -> Iterator[str]:
    """The prompt and its continuation by the model at `path`, piece by piece; see `generate`."""
    model, tokenizer = checkpoint.load(path)
    if prompt is None:
        assert isinstance(tokenizer, CharTokenizer)
        prompt = first_prompt(tokenizer)
    pieces = generate_text(model, tokenizer, prompt, max_new_tokens, **settings)
    yield prompt.lstrip("\n")
    yield from pieces


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

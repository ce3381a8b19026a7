"""Whole runs: from text and configs to a trained model in a folder, and what is done with it afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllm.autograd import use_formulas
from tinyllm.backend import use_backend
from tinyllm.data import SequentialWindows, embedded_corpus, read_text, split_by_position
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.generation.sampling import Window, generate_text, until
from tinyllm.system import storage
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError, WorkerEndedError
from tinyllm.system.lock import FolderLock
from tinyllm.system.progress import print_status
from tinyllm.system.text_files import Newlines
from tinyllm.system.toml_files import write_toml
from tinyllm.system.wording import command_line
from tinyllm.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    VocabularyWarning,
    load_tokenizer,
)
from tinyllm.training.callbacks import Callback, Progress
from tinyllm.training.checkpoints import checkpoint, keeping, resuming
from tinyllm.training.config import TrainConfig
from tinyllm.training.evaluation import mean_loss
from tinyllm.training.loss_curve import LossCurve
from tinyllm.training.memory import estimate_memory, require_memory
from tinyllm.training.metrics import MetricsFile
from tinyllm.training.objectives import NextToken
from tinyllm.training.safeguards import incidents
from tinyllm.training.trainer import Trainer

CONFIG_FILE = "run.toml"


def train(
    model_config: ModelConfig, train_config: TrainConfig, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train a model on text, as the configs say, and print a sample of what it learned.

    Writes into `train_config.out`: run.toml, metrics.jsonl, loss.png, checkpoints.

    Args:
        resume: go on from the latest checkpoint in the folder. overwrite: replace a run that is there.

    Returns the folder. Raises InputError for bad text, settings that do not fit it, or a folder that cannot be
    used.
    """
    if train_config.out is None:
        raise InputError("the run needs a folder; give --out DIR")
    folder = Path(train_config.out)
    notes: list[str] = []  # said once all that was given has been found good
    train_config = _with_fitting_warmup(train_config, notes)
    use_backend(train_config.backend, train_config.precision, train_config.device_memory)
    _check_folder(folder, resume, overwrite)
    with RunFolder(folder) as run_folder:
        found = keeping.find_valid(folder, training=True) if resume else None
        trainer = _build(model_config, train_config, found, notes)
        metrics = MetricsFile(folder, train_config.log_every)
        trainer.callbacks += [run_folder, Progress(), metrics, LossCurve(folder)]
        if found is not None:
            trainer.resume(found)
            del found  # the bytes of its files
        elif overwrite:
            # Only now, when everything that the user gave has been found good.
            incidents.remove_all(folder)
            keeping.remove_run(folder)
        run_folder.write({"model": trainer.model.config, "train": train_config})
        with use_formulas(train_config.formulas):
            _fit(trainer, resume, notes)
    if train_config.sample_tokens:
        at_hand = trainer.best_step == trainer.step
        pieces = generate_text(
            trainer.model if at_hand else keeping.load(folder)[0],
            trainer.tokenizer,
            first_prompt(trainer.tokenizer),
            train_config.sample_tokens,
            train_config.special_tokens,
            temperature=train_config.sample_temperature,
        )
        print("".join(pieces).strip("\n"))
    return folder


def _with_fitting_warmup(config: TrainConfig, notes: list[str]) -> TrainConfig:
    """The config, with a warm-up of half the steps where that has as many as there are: the rate would never fall."""
    if config.warmup_steps < config.steps or not config.warmup_steps:
        return config
    fitting = config.steps // 2
    notes.append(
        f"a warm-up of {config.warmup_steps} steps is too long for {config.steps}: it takes {fitting} (--warmup-steps)"
    )
    return replace(config, warmup_steps=fitting)


class RunFolder(Callback):
    """A run's folder while it is trained into: locked, and made again, with its settings, if somebody deletes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FolderLock(folder)
        self.settings: dict[str, Any] = {}

    def __enter__(self) -> RunFolder:
        try:
            self.lock.hold()
        except OSError as error:
            raise InputError(f"{self.lock.path}: cannot be written: {error.strerror or error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def write(self, settings: dict[str, Any]) -> None:
        """Write the configs of the run, by section."""
        self.settings = settings
        write_toml(self.folder / CONFIG_FILE, settings)

    def on_save(self, step: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.hold()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror or error}") from None
        if not (self.folder / CONFIG_FILE).exists():
            write_toml(self.folder / CONFIG_FILE, self.settings)


def _build(
    model_config: ModelConfig,
    train_config: TrainConfig,
    found: checkpoint.Checkpoint | None,
    notes: list[str],
) -> Trainer:
    """The Trainer of a run, with its text and tokenizer, which byte-pair encoding takes from the run to resume.

    notes: lines about the text are added to it.
    """
    assert train_config.out is not None
    newlines = train_config.newlines
    text = read_text(train_config.data, notes.append, newlines) if train_config.data else embedded_corpus()
    if train_config.validation_data:
        texts = (
            text,
            read_text(
                train_config.validation_data,
                lambda line: notes.append(f"for validation: {line}"),
                newlines,
            ),
        )
        text = "".join(texts)
    else:
        # Split as text, so that runs with different tokenizers are validated on the same characters.
        texts = split_by_position(text, train_config.validation_fraction)
    if found is not None and train_config.tokenizer == "bpe":
        tokenizer = found.tokenizer()
    else:
        workers = train_config.threads or physical_cores()
        tokenizer = build_tokenizer(train_config.tokenizer, text, texts[0], model_config.vocab_size, workers)
    if found is not None:  # before its number of tokens is compared with the model's, which says less
        resuming.check_tokenizer(Path(train_config.out), tokenizer, train_config.tokenizer, found)
    if model_config.vocab_size == 0 or train_config.tokenizer == "bpe":
        model_config = replace(model_config, vocab_size=tokenizer.vocab_size)
    if model_config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size={model_config.vocab_size}, and the tokenizer has {tokenizer.vocab_size} tokens; "
            "set it to that, or to 0"
        )
    train_tokens, validation_tokens = (
        tokenizer.encode_document(part, train_config.special_tokens) for part in texts
    )
    require_memory(model_config, train_config, train_config.threads or physical_cores())
    model = TransformerLM(model_config, train_config.seed)
    return Trainer(model, tokenizer, train_tokens, validation_tokens, train_config, Path(train_config.out))


def _fit(trainer: Trainer, resumed: bool, notes: Sequence[str]) -> None:
    """Train, and say what was read (`notes`), what is trained, how it ended, and how to go on when it was stopped."""
    tokenizer, folder, steps = trainer.tokenizer, trainer.run, trainer.config.steps
    assert folder is not None
    for line in notes:
        print_status(line)
    print_status(
        f"{trainer.model.num_parameters():,} parameters, {tokenizer.vocab_size:,} {_unit(tokenizer)}s, "
        f"{len(trainer.sampler.tokens):,} tokens to train on, {len(trainer.validation.tokens):,} to validate, "
        f"{trainer.threads} thread{'s' * (trainer.threads > 1)}"
    )
    print_status(_step_in_words(trainer))
    if resumed and trainer.stops_early:
        print_status(
            f"the run has stopped: {trainer.without_gain} evaluations without a lower validation loss; --stop-after N, "
            "with a larger N or 0, goes on"
        )
    elif resumed and trainer.step < steps:
        print_status(f"going on from step {trainer.step}")
    elif resumed:
        print_status(
            f"the run has made its {trainer.step} steps already; --steps N, with a larger N, goes on"
        )
    try:
        trainer.fit()
    except MemoryError as error:
        raise InputError(_out_of_memory(trainer, error)) from error
    except WorkerEndedError as error:
        there = f"; go on with: {_resume_command(folder)}" if trainer.checkpoints.saved_step >= 0 else ""
        raise InputError(f"{error}{there}") from None
    except KeyboardInterrupt:
        if trainer.checkpoints.saved_step < 0:
            print_status("stopped; nothing is saved yet")
        else:
            print_status(
                f"stopped; go on from step {trainer.checkpoints.saved_step} with: {_resume_command(folder)}"
            )
        raise
    if not math.isfinite(trainer.best_loss):
        raise InputError(f"no evaluation gave a finite loss, so the run in {folder} has no best checkpoint")
    print_status(_summary(trainer))


def _summary(trainer: Trainer) -> str:
    """How the run ended, and which of its models is the best."""
    bits = trainer.best_loss / math.log(2) * trainer.tokens_per_character
    best = "the last step" if trainer.best_step == trainer.step else f"step {trainer.best_step}"
    if trainer.best_step < 0:
        best = "a step before it went back"
    lines = [
        f"best validation loss {trainer.best_loss:.4f} nats a {_unit(trainer.tokenizer)}, {bits:.4f} bits "
        f"per character, in {best}"
    ]
    if trainer.best_step != trainer.step and math.isfinite(trainer.evaluated_loss):
        since = f", no lower in {trainer.without_gain} evaluations since" if trainer.without_gain > 1 else ""
        lines.append(f"the last, in step {trainer.evaluated_step}, is {trainer.evaluated_loss:.4f}{since}")
    if trainer.stops_early:
        lines.append(
            f"stopped early, after --stop-after {trainer.config.stop_after} evaluations without gain"
        )
    sample = f"; a sample of the model of {best}:" if trainer.config.sample_tokens else ""
    return f"{'; '.join(lines)}\nthe run is in {trainer.run}{sample}"


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make sure, before any work, that the folder holds what the user thinks and can be written."""
    try:
        has_run = bool(keeping.checkpoints(folder))
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
        probe = storage.temporary_name(folder / "probe")
        storage.write_new(probe, b"written")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{folder}: cannot be written: {reason or error}; give another --out") from None


def _step_in_words(trainer: Trainer) -> str:
    """How large a step is, and what memory the run takes, said before the first."""
    windows, tokens = trainer.sampler.batch_size, len(trainer.sampler.tokens)
    step = windows * trainer.model.config.context_length
    times = f", {step / tokens:,.0f} times the text," if step >= 2 * tokens else ""
    memory = estimate_memory(trainer.model.config, trainer.config, trainer.threads)
    return f"a step of {step:,} tokens{times} takes {memory.in_words()}"


def _out_of_memory(trainer: Trainer, error: MemoryError) -> str:
    """What took the memory, and what takes less."""
    needed = estimate_memory(trainer.model.config, trainer.config, trainer.threads)
    return (
        f"out of memory ({str(error).partition(chr(10))[0] or 'no more said'}); a run of these settings takes "
        f"{needed.in_words()}: make context_length, batch_size or the model smaller"
    )


def _resume_command(folder: Path) -> str:
    return command_line("train", "--resume", "--out", folder)


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


def _unit(tokenizer: Tokenizer) -> str:
    return "character" if isinstance(tokenizer, CharTokenizer) else "token"


def first_prompt(tokenizer: Tokenizer) -> str:
    """What a sample begins with when nobody says: a line end, or the first character there is."""
    if isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.characters:
        return tokenizer.characters[0]
    return "\n"


@dataclass(frozen=True)
class Score:
    """The loss of a model on a whole text."""

    tokens: int
    loss: float
    bits_per_character: float


def evaluate(
    path: Path,
    data: Sequence[str],
    threads: int = 0,
    batch_size: int = 64,
    special_tokens: bool = True,
    newlines: Newlines = "lf",
) -> Score:
    """The loss of the model at `path` over the whole text of `data`, each token after the first predicted once.

    special_tokens: those of the tokenizer in the text become their ids; without it they are text.
    """
    if threads < 0:
        raise InputError(f"threads={threads}; it must be at least 0 (0: one for each physical core)")
    model, tokenizer = keeping.load(path)
    read: list[str] = []
    tokens = tokenizer.encode_document(read_text(data, read.append, newlines), special_tokens)
    if len(tokens) < 2:
        raise InputError("the text has one character; the loss needs at least two, so give more text")
    windows = SequentialWindows(tokens, model.config.context_length, batch_size)
    loss = mean_loss(model, NextToken(), windows, threads or physical_cores())
    tokens_per_character = windows.num_targets / tokenizer.characters_predicted(tokens)
    for line in read:
        print_status(line)
    return Score(windows.num_targets, loss, loss / math.log(2) * tokens_per_character)


def sample(
    path: Path,
    prompt: str | None,
    max_new_tokens: int,
    samples: int = 1,
    stop: str | None = None,
    seed: int = 0,
    window: Window = "restart",
    special_tokens: bool = True,
    **settings: Any,
) -> Iterator[str]:
    """The prompt and its continuation by the model at `path`, piece by piece; see `generate`.

    samples: how many, with seeds that follow each other. stop: a sample ends before this text.
    """
    if samples < 1:
        raise InputError(f"samples={samples}; it must be at least 1")
    if stop == "":
        raise InputError("the text to stop at is empty; give one of a character at least, or none")
    model, tokenizer = keeping.load(path)
    if prompt is None:
        prompt = first_prompt(tokenizer)
    settings.update(window=window, special_tokens=special_tokens)
    streams = [
        generate_text(model, tokenizer, prompt, max_new_tokens, seed=seed + number, **settings)
        for number in range(samples)
    ]
    _say_what_is_seen(
        len(tokenizer.encode_document(prompt, special_tokens)),
        max_new_tokens,
        model.config.context_length,
        window,
    )
    for number, pieces in enumerate(streams):
        if samples > 1:
            yield f"{'' if number == 0 else chr(10)}---- sample {number + 1} of {samples}\n"
        yield prompt.lstrip("\n")
        yield from pieces if stop is None else until(pieces, stop)


def _say_what_is_seen(prompt: int, new: int, context: int, window: Window) -> None:
    """Say it where the model does not see all tokens of the prompt, or later not all of the text."""
    if prompt > context and window != "all":
        print_status(
            f"the prompt has {prompt:,} tokens, the model sees its newest {context:,}; --window all: all"
        )
    if min(prompt, context) + new > context + 1:
        then = {
            "restart": "the text goes on from its newest half (--window slide or all: see --help)",
            "slide": f"each token sees the newest {context:,}",
            "all": "each token sees all before it, more than the model was trained on",
        }[window]
        print_status(f"past the context of {context:,} tokens {then}")

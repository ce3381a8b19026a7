"""`tinyllm profile`: where the time and the memory of a training step go."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.backend import HostArray
from tinyllm.cli.flags import add_flags, given_flags
from tinyllm.data import embedded_corpus
from tinyllm.debug.profiler import Profile, profile_step
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.optim import OPTIMIZERS, NonFiniteNormError
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.settings import check_bounds, field, from_mapping, to_mapping
from tinyllm.system.text_files import write_text
from tinyllm.system.toml_files import read_sections
from tinyllm.system.wording import require_known
from tinyllm.tokenizer import ByteTokenizer
from tinyllm.training.checkpoints import keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.memory import require_memory
from tinyllm.training.micro_batches import count_micro_batches
from tinyllm.training.objectives import NextToken
from tinyllm.training.optimization import build_optimizer
from tinyllm.training.profile_report import draw, report
from tinyllm.training.run_folder import CONFIG_FILE
from tinyllm.training.step_profile import TrainingProfile, profile_training


@dataclass(frozen=True)
class ProfileFlags:
    """The flags of `tinyllm profile` itself."""

    steps: int = field(10, "steps to measure; times are means of the middle half", at_least=1)
    json: str | None = field(None, "write all numbers to this file")
    plot: str | None = field(None, "draw the time by op into this PNG; needs matplotlib")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class BatchFlags:
    """The settings of training that say what one step computes, with the names and defaults of TrainConfig."""

    batch_size: int = field(12, "windows in a batch")
    gradient_accumulation: int = field(1, "batches whose gradients are averaged in one step")
    optimizer: str = field("adamw", ", ".join(OPTIMIZERS))
    threads: int = field(0, "workers; 0: one for each physical core")


@dataclass(frozen=True)
class Subject:
    """What is profiled: a model, how it is trained, and what to call it."""

    name: str
    model: TransformerLM
    train: TrainConfig


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `profile` to the commands of a parser."""
    parser = commands.add_parser(
        "profile",
        help="show where the time and the memory of a training step go",
        description="Show where the time and the memory of a training step go, by op and by module, and what the "
        "machine's matrix products leave to gain. The batch is random tokens; nothing is written into DIR.",
        allow_abbrev=False,
    )
    parser.add_argument("path", nargs="?", metavar="DIR", help="a run or a checkpoint")
    parser.add_argument("--preset", metavar="NAME", help=f"a new model instead: {', '.join(PRESETS)}")
    add_flags(parser, ProfileFlags)
    add_flags(parser.add_argument_group("settings of training, over those of the run or preset"), BatchFlags)
    add_flags(parser.add_argument_group("model settings, over those of the preset"), ModelConfig)
    parser.set_defaults(command=profile_command, parser=parser)


def profile_command(args: argparse.Namespace) -> None:
    """`tinyllm profile`."""
    flags = from_mapping(ProfileFlags, given_flags(args, ProfileFlags))
    if flags.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; install it with: pip install 'tinyllm-numpy[plot]'")
    for path in (flags.json, flags.plot):
        if path is not None:
            _require_writable(Path(path))
    subject = _subject(args)
    model, train = subject.model, subject.train
    workers = train.threads or physical_cores()
    inputs, targets = _random_batch(subject)
    windows, length = inputs.shape
    pieces = count_micro_batches(windows, length, workers, model.config.vocab_size)
    largest, most = math.ceil(windows / pieces), math.ceil(pieces / workers)
    step = profile_step(model, inputs[:largest], targets[:largest], flags.steps)
    optimizer = build_optimizer(model, train)
    try:
        whole = profile_training(
            model,
            optimizer,
            NextToken(train.z_loss),
            (inputs, targets),
            workers,
            flags.steps,
            train.clip_norm,
        )
    except NonFiniteNormError as error:
        raise InputError(f"{subject.name}: training cannot go on from this model: {error}") from None
    if flags.json is not None:
        numbers = _numbers(subject, step, whole)
        numbers["micro_batch"] |= {"windows": largest, "length": length, "per_worker": most}
        write_text(flags.json, json.dumps(numbers, indent=2) + "\n")
    if flags.plot is not None:
        draw(step, Path(flags.plot), subject.name)
    # Last, since a reader such as `head` may leave before the end.
    print(subject.name)
    batch = f"{windows:,} windows of {length:,} tokens in a step"
    print(f"{model.num_parameters():,} parameters, {train.optimizer}, {batch}\n")
    print(*report(step, whole, most, largest, length), sep="\n")


# ---- What is profiled --------------------------------------------------------------------------


def _subject(args: argparse.Namespace) -> Subject:
    """The model and the settings that the arguments name; raises InputError where they name none, or two."""
    if args.path is None and args.preset is None:
        raise InputError(
            f"nothing to profile; give DIR, a run or a checkpoint, or --preset {next(iter(PRESETS))}"
        )
    if args.path is not None and args.preset is not None:
        raise InputError("got DIR and --preset; give one of them")
    shape, batch = given_flags(args, ModelConfig), given_flags(args, BatchFlags)
    if args.preset is not None:
        return _of_preset(args.preset, shape, batch)
    if shape:
        flag = "--" + next(iter(shape)).replace("_", "-")
        raise InputError(
            f"got DIR and {flag}; the model in DIR has its shape, so give {flag} with --preset alone"
        )
    return _of_folder(Path(args.path), batch)


def _of_preset(name: str, shape: dict[str, Any], batch: dict[str, Any]) -> Subject:
    require_known("preset", name, PRESETS)
    preset = PRESETS[name]
    train = from_mapping(TrainConfig, {**preset.get("train", {}), **batch}, f"preset {name} [train]")
    config = from_mapping(ModelConfig, {**preset.get("model", {}), **shape}, f"preset {name} [model]")
    if config.vocab_size == 0:
        config = replace(config, vocab_size=_vocab_size(train))
    require_memory(config, train, train.threads or physical_cores())
    return Subject(f"preset {name}", TransformerLM(config, train.seed), train)


def _vocab_size(train: TrainConfig) -> int:
    """The size of the vocabulary that `tinyllm train` would make for the text that it takes by default."""
    if train.tokenizer == "char":
        return len(set(embedded_corpus()))
    if train.tokenizer == "byte":
        return ByteTokenizer().vocab_size
    raise InputError(
        f"the preset's vocabulary comes from its tokenizer, {train.tokenizer}; give --vocab-size"
    )


def _of_folder(path: Path, batch: dict[str, Any]) -> Subject:
    found = keeping.find_valid(path, ("best", "latest"))
    keeping.report_passed_over(found)
    model, folder = found.model(), found.folder.resolve()
    settings: dict[str, Any] = {}
    saved = folder.parent.parent / CONFIG_FILE
    if folder.parent.name == "checkpoints" and saved.exists():
        settings = read_sections(saved, ("model", "train")).get("train", {})
    train = from_mapping(TrainConfig, {**settings, **batch}, f"{saved} [train]" if settings else "flags")
    require_memory(model.config, train, train.threads or physical_cores())
    return Subject(str(path), model, train)


def _random_batch(subject: Subject) -> tuple[HostArray, HostArray]:
    """Tokens and targets of a whole batch, (B, T) each."""
    windows = subject.train.batch_size * subject.train.gradient_accumulation
    shape = (2, windows, subject.model.config.context_length)
    tokens = np.random.default_rng(subject.train.seed).integers(0, subject.model.config.vocab_size, shape)
    return tokens[0], tokens[1]


def _require_writable(path: Path) -> None:
    """Find out before the measurements whether their file can be written; raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


# ---- What is written ---------------------------------------------------------------------------


def _numbers(subject: Subject, step: Profile, whole: TrainingProfile) -> dict[str, Any]:
    """Everything that was measured, in seconds, bytes, FLOPs and FLOP/s."""
    rows = {
        name: [{**asdict(row), "product_rate": row.product_rate} for row in getattr(step, name)]
        for name in ("ops", "modules")
    }
    derived = ("op_seconds", "outside_seconds", "product_flops", "limit_seconds")
    return {
        "name": subject.name,
        "parameters": subject.model.num_parameters(),
        "model": to_mapping(subject.model.config),
        "train": {item.name: getattr(subject.train, item.name) for item in fields(BatchFlags)},
        "training_step": {**asdict(whole), "tokens_per_second": whole.tokens_per_second},
        "micro_batch": {
            **asdict(step),
            **{name: getattr(step, name) for name in derived},
            **rows,
        },
    }

"""`tinyllm train`: settings from flags, a config file and a preset, and a run made of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tinyllm.cli.flags import add_flags, given_flags
from tinyllm.models import ModelConfig
from tinyllm.models.presets import PRESETS
from tinyllm.system.errors import InputError
from tinyllm.system.settings import from_mapping, to_mapping
from tinyllm.system.toml_files import read_sections
from tinyllm.system.wording import require_known, shown
from tinyllm.training import runs
from tinyllm.training.config import TrainConfig
from tinyllm.training.run_folder import CONFIG_FILE
from tinyllm.training.starting import read_start, require_shape

Sections = dict[str, dict[str, Any]]
SECTIONS: dict[str, type] = {"model": ModelConfig, "train": TrainConfig}


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `train` to the commands of a parser."""
    parser = commands.add_parser(
        "train",
        help="train a language model",
        description="Train a language model. Without arguments: the char preset on Python's own "
        "help pages, into runs/char. The defaults below are those of that preset.",
        allow_abbrev=False,
    )
    add_settings(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the run's folder"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a run that is in the folder already"
    )
    parser.set_defaults(command=train_command, parser=parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `resolve` reads."""
    parser.add_argument(
        "--preset", default="char", help=f"settings to begin with: {', '.join(PRESETS)} (default: char)"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a .toml or .json file with [model] and [train] settings"
    )
    for name, config in SECTIONS.items():
        add_flags(parser.add_argument_group(f"{name} settings"), config, PRESETS["char"][name])


def train_command(args: argparse.Namespace) -> None:
    """`tinyllm train`."""
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with a run, --overwrite replaces it; give one of them")
    if args.resume and vars(args).get("init_from"):
        raise InputError("--resume goes on with a run, --init-from begins a new one; give one of them")
    runs.train(*resolve(args), resume=args.resume, overwrite=args.overwrite)


def resolve(args: argparse.Namespace) -> tuple[ModelConfig, TrainConfig]:
    """The settings of a training run: flags over the config file over the preset, or over the run to resume.

    With --init-from, the model is that of the weights, and the preset's settings of the model are left out.
    """
    require_known("preset", args.preset, PRESETS)
    flags = {name: given_flags(args, config) for name, config in SECTIONS.items()}
    in_file = read_sections(args.config, SECTIONS) if args.config else {}
    for name in ("data", "validation_data"):
        if flags["train"].get(name) == ():
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} got no file; give a file or a folder, or leave {flag} out")
    # Read for its folder; what else is wrong with it is said below, when everything is merged.
    out = flags["train"].get("out") or in_file.get("train", {}).get("out") or f"runs/{args.preset}"
    if not isinstance(out, str):
        raise InputError(f"{args.config} [train]: out must be a string or none, got {shown(out)}")
    base: Sections = PRESETS[args.preset]
    origin = f"preset {args.preset}"
    saved = Path(out) / CONFIG_FILE
    if args.resume and saved.exists():
        base, origin = read_sections(saved, SECTIONS), str(saved)
        in_file.get("train", {}).pop("init_from", None)  # the run knows what it began from
    else:
        given = {name: {**in_file.get(name, {}), **flags[name]} for name in SECTIONS}
        base = _begun_from(base, given)
    merged = {name: {**base.get(name, {}), **in_file.get(name, {}), **flags[name]} for name in SECTIONS}
    merged["train"]["out"] = out
    where = args.config or origin
    return (
        from_mapping(ModelConfig, merged["model"], f"{where} [model]"),
        from_mapping(TrainConfig, merged["train"], f"{where} [train]"),
    )


def _begun_from(base: Sections, given: Sections) -> Sections:
    """The settings that lie below those given: of the weights to begin from, where these name some, or `base`."""
    path = given["train"].get("init_from")
    if not isinstance(path, str):
        return base
    shape = to_mapping(require_shape(read_start(path), given["model"]))
    if given["train"].get("tokenizer", "saved") != "saved":
        shape["vocab_size"] = 0
    return {"model": shape, "train": {**base.get("train", {}), "tokenizer": "saved"}}

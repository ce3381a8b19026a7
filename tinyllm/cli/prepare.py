"""`tinyllm prepare`: text to token shards, and the check of their checksums."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tinyllm.cli.flags import add_flags, given_flags
from tinyllm.data import preparing
from tinyllm.data.preparing import Outcome, PrepareConfig
from tinyllm.data.shards import Prepared, open_prepared
from tinyllm.system.errors import InputError
from tinyllm.system.progress import Bar, print_status
from tinyllm.system.settings import from_mapping
from tinyllm.system.wording import counted


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `prepare` to the commands of a parser."""
    parser = commands.add_parser(
        "prepare",
        help="encode text to tokens on disk, to train on",
        description="Encode text of any length to tokens on disk, to train on: in bounded memory, on all cores. "
        "Stopped at any moment, the same command goes on.",
        allow_abbrev=False,
    )
    add_flags(parser, PrepareConfig)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace prepared text that is in the folder"
    )
    parser.add_argument(
        "--check",
        metavar="DIR",
        help="compare the files of a prepared folder with their checksums, and no more",
    )
    parser.set_defaults(command=prepare_command, parser=parser)


def prepare_command(args: argparse.Namespace) -> None:
    """`tinyllm prepare`."""
    given = given_flags(args, PrepareConfig)
    if args.check is not None:
        if given or args.overwrite:
            raise InputError("--check DIR checks a folder and prepares nothing; give it alone")
        _check(open_prepared(args.check))
        return
    config = from_mapping(PrepareConfig, given)
    try:
        outcome = preparing.prepare(config, args.overwrite)
    except KeyboardInterrupt:
        print_status(f"stopped; the same command goes on: {config.command}")
        raise
    print(*_lines(outcome), sep="\n")


def _check(prepared: Prepared) -> None:
    splits = (prepared.train, prepared.validation)
    total = sum(split.bytes_on_disk for split in splits)
    with Bar("checking", total, "B") as bar:
        for split in splits:
            split.check(bar)
    print(f"{prepared.folder}: {total / 1e6:,.1f} MB are as they were written")


def _lines(outcome: Outcome) -> Iterator[str]:
    prepared = outcome.prepared
    for name, split in (("train", prepared.train), ("validation", prepared.validation)):
        if split.size:
            yield (
                f"{name}: {split.size:,} tokens, {counted(len(split.document_starts), 'document')}, "
                f"{split.characters / split.size:.2f} characters a token, {split.bytes_on_disk / 1e6:,.1f} MB"
            )
    if outcome.dropped:
        yield f"{outcome.dropped:,} documents dropped that came before"
    rate = outcome.bytes_read / 1e6 / max(outcome.seconds, 1e-9)
    yield f"{prepared.folder}: {outcome.bytes_read / 1e6:,.1f} MB read in {outcome.seconds:,.1f} s, {rate:.1f} MB/s"

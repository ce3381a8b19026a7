"""The command line of the planted bugs: the table of kills, the list, and the hunt."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinyllm.system.errors import InputError
from tinyllm.system.wording import did_you_mean
from tinyllm.testing.mutants import CHECKS, MUTANTS, Kill, Mutant, survey
from tinyllm.testing.mutants.hunt import interact, new_seed, reveal, run_script

PROGRAM = "python -m tinyllm.testing.mutants"
_NEW: Any = object()
"""--hunt without a seed."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{PROGRAM} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = _Parser(
        prog=PROGRAM,
        description="Plant bugs in this package, one at a time, and print which check kills which.",
        epilog="Exit code: 0 when every check passes without a bug and every bug is killed, 1 otherwise, 2 for bad "
        "input.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these (default: all)")
    parser.add_argument("--all", action="store_true", help="show every check that kills, not the first alone")
    parser.add_argument(
        "--list", action="store_true", help="names and explanations, without running anything"
    )
    parser.add_argument(
        "--hunt",
        nargs="?",
        type=int,
        const=_NEW,
        metavar="SEED",
        help="plant an unnamed bug and open a Python session in which to find it",
    )
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT",
        help="with --hunt, last: run a script, with its own arguments, instead of a session",
    )
    parser.add_argument("--reveal", type=int, metavar="SEED", help="tell which bug a hunt has planted")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = build_parser().parse_args(arguments)
        _refuse_contradictions(args)
        if args.hunt is not None:
            seed = new_seed() if args.hunt is _NEW else args.hunt
            return run_script(seed, args.run) if args.run is not None else interact(seed)
        if args.reveal is not None:
            print(reveal(args.reveal))
            return 0
        chosen = [_mutant(name) for name in args.names] or list(MUTANTS.values())
        return print_list(chosen) if args.list else print_table(chosen, args.all)
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _refuse_contradictions(args: argparse.Namespace) -> None:
    modes = [f"--{name}" for name in ("list", "hunt", "reveal") if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        raise InputError(f"{' and '.join(modes)} do not go together; give one of them")
    for name in ("hunt", "reveal"):
        if modes == [f"--{name}"] and args.names:
            raise InputError(f"--{name} takes no names of mutants; got {args.names[0]!r}")
    if modes and args.all:
        raise InputError(f"--all belongs to the table; it does not go together with {modes[0]}")
    if args.run is not None and args.hunt is None:
        raise InputError("--run belongs to a hunt: give --hunt --run SCRIPT")
    if args.run == []:
        raise InputError("--run needs a script to run")
    if args.run and not Path(args.run[0]).is_file():
        raise InputError(f"{args.run[0]}: no such file; --run needs a Python script")
    for name in ("hunt", "reveal"):
        seed = getattr(args, name)
        if isinstance(seed, int) and seed < 0:
            raise InputError(f"--{name} {seed}: a seed is 0 or more")


def _mutant(name: str) -> Mutant:
    if name not in MUTANTS:
        hint = did_you_mean(name, MUTANTS, "--list shows all names")
        raise InputError(f"no mutant is named {name!r}; {hint}")
    return MUTANTS[name]


def print_list(mutants: Sequence[Mutant]) -> int:
    """Names, places and explanations."""
    for mutant in mutants:
        print(f"{mutant.name}  ({mutant.place})")
        print(_indented(mutant.explanation))
    print(f"{len(mutants)} mutants")
    return 0


def print_table(mutants: Sequence[Mutant], all_kills: bool) -> int:
    """What kills each mutant; 0 when all are killed and all checks pass without any."""

    def report(mutant: Mutant, kills: list[Kill]) -> None:
        print(mutant.name)
        print(_indented(mutant.explanation))
        for kill in kills:
            print(_indented(kill.message, f"  killed by [{kill.check}] "))
        if not kills:
            print("  SURVIVES every check that reaches it")
        sys.stdout.flush()

    result = survey(mutants, all_kills, report)
    for name, message in result.failures.items():
        print(_indented(message, f"without any mutant, [{name}] fails: "))
    passing = len(CHECKS) - len(result.failures)
    killed = len(mutants) - len(result.survivors)
    print(
        f"{killed} of {len(mutants)} mutants killed; {passing} of {len(CHECKS)} checks pass without any; "
        f"{result.seconds:.0f} s"
    )
    if result.survivors:
        print(f"survivors: {', '.join(result.survivors)}")
    return 0 if result.passed else 1


def _indented(text: str, first: str = "  ") -> str:
    return textwrap.fill(text, 110, initial_indent=first, subsequent_indent="    ")

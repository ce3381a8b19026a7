"""The command line: arguments to dataclasses to one library call."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tinyllm
from tinyllm.backend import BACKENDS, use_backend
from tinyllm.cli import profile as cli_profile
from tinyllm.cli import replay as cli_replay
from tinyllm.cli import tokenizer as cli_tokenizer
from tinyllm.cli.flags import add_flags, given_flags
from tinyllm.models import ModelConfig
from tinyllm.models.presets import PRESETS
from tinyllm.system.errors import InputError
from tinyllm.system.interrupts import is_termination
from tinyllm.system.settings import from_mapping
from tinyllm.system.toml_files import read_sections
from tinyllm.system.wording import nearest, require_known, shown
from tinyllm.training import runs
from tinyllm.training.config import TrainConfig

SECTIONS: dict[str, type] = {"model": ModelConfig, "train": TrainConfig}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest known flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse alone takes -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf$|nan$)")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown flags first, since argparse would rather complain of what is then missing."""
        arguments = list(sys.argv[1:] if args is None else args)
        if self._subparsers is not None:
            arguments = list(itertools.takewhile(lambda argument: argument.startswith("-"), arguments))
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            if argument.startswith("--"):
                self._refuse_unknown(argument.split("=")[0], self._option_string_actions)
        return super().parse_known_args(args, namespace)

    def _match_arguments_partial(
        self, actions: Sequence[argparse.Action], arg_strings_pattern: str
    ) -> list[int]:
        """How many arguments each positional takes; one that may have none waits while flags are still to come.

        argparse in older Pythons does not wait, so that in `inspect PATH --show 5 FILE` the file was unknown.
        """
        counts: list[int] = super()._match_arguments_partial(actions, arg_strings_pattern)
        while "O" in arg_strings_pattern and counts and counts[-1] == 0:
            counts.pop()
        return counts

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; raises InputError for those that are unknown or malformed."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parsed.parser._refuse_unknown(unknown[0], ())
        return parsed

    def _refuse_unknown(self, argument: str, known: Collection[str]) -> None:
        if argument in known:
            return
        near = nearest(argument, self._option_string_actions) if argument.startswith("-") else None
        hint = f"did you mean {near}?" if near else f"see `{self.prog} --help`"
        raise InputError(f"unknown argument {argument!r}; {hint}")


def integer(text: str) -> int:
    """The type of a flag that takes an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {shown(text)}") from None


def number(text: str) -> float:
    """The type of a flag that takes a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {shown(text)}") from None


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="tinyllm", description=tinyllm.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinyllm {tinyllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a language model",
        description="Train a language model. Without arguments: the char preset on Python's own "
        "help pages, into runs/char.",
        allow_abbrev=False,
    )
    train.add_argument(
        "--preset", default="char", help=f"settings to begin with: {', '.join(PRESETS)} (default: char)"
    )
    train.add_argument(
        "--config", metavar="FILE", help="a .toml or .json file with [model] and [train] settings"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the run's folder"
    )
    train.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder already")
    for name, config in SECTIONS.items():
        add_flags(train.add_argument_group(f"{name} settings"), config)
    train.set_defaults(command=train_command, parser=train)

    sample = commands.add_parser("sample", help="continue a text with a trained model", allow_abbrev=False)
    sample.add_argument("path", metavar="DIR", help="a run or a checkpoint")
    sample.add_argument("--prompt", help="text to go on from (default: a line end)")
    sample.add_argument(
        "--tokens", type=integer, metavar="INT", default=500, help="tokens to add (default: 500)"
    )
    sample.add_argument(
        "--temperature",
        type=number,
        metavar="FLOAT",
        default=0.8,
        help="0: always the most likely token; 1: as the model says (default: 0.8)",
    )
    sample.add_argument(
        "--top-k", type=integer, metavar="K", help="draw among the K most likely tokens alone"
    )
    sample.add_argument(
        "--top-p",
        type=number,
        metavar="P",
        help="draw among the fewest tokens whose probabilities reach P alone",
    )
    sample.add_argument(
        "--seed",
        type=integer,
        metavar="INT",
        default=0,
        help="the same seed gives the same text (default: 0)",
    )
    _add_backend(sample)
    sample.set_defaults(command=sample_command, parser=sample)

    evaluate = commands.add_parser("eval", help="the loss of a trained model on a text", allow_abbrev=False)
    evaluate.add_argument("path", metavar="DIR", help="a run or a checkpoint")
    evaluate.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="text to evaluate on, all of it"
    )
    evaluate.add_argument(
        "--threads",
        type=integer,
        metavar="INT",
        default=0,
        help="worker threads (default: one for each core)",
    )
    _add_backend(evaluate)
    evaluate.set_defaults(command=eval_command, parser=evaluate)
    cli_tokenizer.add_commands(commands)
    cli_profile.add_command(commands)
    cli_replay.add_command(commands)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, default="numpy", help="cupy: compute on a GPU (default: numpy)"
    )


def resolve(args: argparse.Namespace) -> tuple[ModelConfig, TrainConfig]:
    """The settings of a training run: flags over the config file over the preset, or over the run to resume."""
    require_known("preset", args.preset, PRESETS)
    flags = {name: given_flags(args, config) for name, config in SECTIONS.items()}
    in_file = read_sections(args.config, SECTIONS) if args.config else {}
    if flags["train"].get("data") == ():
        raise InputError("--data got no file; give a file or a folder, or leave --data out")
    # Read for its folder; what else is wrong with it is said below, when everything is merged.
    out = flags["train"].get("out") or in_file.get("train", {}).get("out") or f"runs/{args.preset}"
    if not isinstance(out, str):
        raise InputError(f"{args.config} [train]: out must be a string or none, got {shown(out)}")
    base: dict[str, dict[str, Any]] = PRESETS[args.preset]
    origin = f"preset {args.preset}"
    saved = Path(out) / runs.CONFIG_FILE
    if args.resume and saved.exists():
        base, origin = read_sections(saved, SECTIONS), str(saved)
    merged = {name: {**base.get(name, {}), **in_file.get(name, {}), **flags[name]} for name in SECTIONS}
    merged["train"]["out"] = out
    where = args.config or origin
    return (
        from_mapping(ModelConfig, merged["model"], f"{where} [model]"),
        from_mapping(TrainConfig, merged["train"], f"{where} [train]"),
    )


def train_command(args: argparse.Namespace) -> None:
    """`tinyllm train`."""
    runs.train(*resolve(args), resume=args.resume, overwrite=args.overwrite)


def sample_command(args: argparse.Namespace) -> None:
    """`tinyllm sample`."""
    use_backend(args.backend)
    pieces = runs.sample(
        Path(args.path),
        args.prompt,
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def eval_command(args: argparse.Namespace) -> None:
    """`tinyllm eval`."""
    use_backend(args.backend)
    score = runs.evaluate(Path(args.path), args.data, args.threads)
    print(
        f"{score.tokens:,} tokens  loss {score.loss:.4f} nats  {score.bits_per_character:.4f} bits per character"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        args = build_parser().parse_args(arguments)
        args.command(args)
    except InputError as error:
        print(f"tinyllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (signal.SIGTERM if is_termination(stop) else signal.SIGINT)
    except MemoryError as error:
        print(
            f"tinyllm: error: out of memory ({error}); make the batch, the context or the model smaller",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # The reader of our output has left, for example `| head`. Python would complain again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # A full disk or a folder without permission, met where no function has a better message.
        print(f"tinyllm: error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0

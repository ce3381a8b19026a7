"""`tinyllm eval`: the loss of a trained model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tinyllm.backend import use_backend
from tinyllm.cli.flags import add_backend, add_special_tokens, integer
from tinyllm.training.evaluation import loss_in_words
from tinyllm.training.scoring import evaluate


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `eval` to the commands of a parser."""
    parser = commands.add_parser("eval", help="the loss of a trained model on a text", allow_abbrev=False)
    parser.add_argument("path", metavar="DIR", help="a run or a checkpoint")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text to evaluate on, all of it",
    )
    parser.add_argument(
        "--threads",
        type=integer,
        metavar="INT",
        default=0,
        help="worker threads (default: one for each core)",
    )
    parser.add_argument(
        "--newlines",
        choices=("lf", "keep"),
        default="lf",
        help="lf: line ends of the text become \\n, whatever they are; keep: they stay (default: lf)",
    )
    add_special_tokens(parser, "the text")
    add_backend(parser)
    parser.set_defaults(command=evaluate_command, parser=parser)


def evaluate_command(args: argparse.Namespace) -> None:
    """`tinyllm eval`."""
    use_backend(args.backend)
    score = evaluate(
        Path(args.path),
        args.data,
        args.threads,
        special_tokens=args.special_tokens,
        newlines=args.newlines,
    )
    tokens, *units = vars(score).values()
    print(f"{tokens:,} tokens  loss {loss_in_words(*units)}")

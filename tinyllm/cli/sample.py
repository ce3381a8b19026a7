"""`tinyllm sample`: text from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from tinyllm.autograd import use_formulas
from tinyllm.backend import use_backend
from tinyllm.cli.flags import add_backend, add_special_tokens, integer, number
from tinyllm.models.generation.sampling import Window
from tinyllm.system.errors import InputError
from tinyllm.system.text_files import blocks
from tinyllm.training.samples import sample


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `sample` to the commands of a parser."""
    parser = commands.add_parser("sample", help="continue a text with a trained model", allow_abbrev=False)
    parser.add_argument("path", metavar="DIR", help="a run or a checkpoint")
    parser.add_argument("--prompt", help="text to go on from (default: a line end)")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="a file with the text to go on from; -: standard input"
    )
    parser.add_argument(
        "--samples",
        type=integer,
        metavar="N",
        default=1,
        help="so many texts, the second with the seed after that of the first, and so on (default: 1)",
    )
    parser.add_argument("--stop", metavar="TEXT", help="end before this text")
    parser.add_argument(
        "--window",
        choices=get_args(Window),
        default="restart",
        help="when the context is full, restart: go on from its newest half; slide: each token sees the newest of "
        "them; all: each sees all, as in transformers (default: restart)",
    )
    parser.add_argument(
        "--tokens", type=integer, metavar="INT", default=500, help="tokens to add (default: 500)"
    )
    parser.add_argument(
        "--temperature",
        type=number,
        metavar="FLOAT",
        default=0.8,
        help="0: always the most likely token; 1: as the model says (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", type=integer, metavar="K", help="draw among the K most likely tokens alone"
    )
    parser.add_argument(
        "--top-p",
        type=number,
        metavar="P",
        help="draw among the fewest tokens whose probabilities reach P alone",
    )
    parser.add_argument(
        "--seed",
        type=integer,
        metavar="INT",
        default=0,
        help="the same seed gives the same text (default: 0)",
    )
    parser.add_argument(
        "--formulas",
        action="store_true",
        help="compute by the formulas, not by their fast forms: for a debugger",
    )
    add_special_tokens(parser, "the prompt")
    add_backend(parser)
    parser.set_defaults(command=sample_command, parser=parser)


def sample_command(args: argparse.Namespace) -> None:
    """`tinyllm sample`."""
    use_backend(args.backend)
    prompt = args.prompt
    if args.prompt_file is not None:
        if prompt is not None:
            raise InputError("got --prompt and --prompt-file; give one of them")
        prompt = "".join(blocks(Path(args.prompt_file)))
    pieces = sample(
        Path(args.path),
        prompt,
        args.tokens,
        samples=args.samples,
        stop=args.stop,
        window=args.window,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        special_tokens=args.special_tokens,
    )
    with use_formulas(args.formulas):
        for piece in pieces:
            print(piece, end="", flush=True)
    print()

"""The command line: the commands put together, and what an error becomes for whoever typed one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import tinyllm
from tinyllm.cli import evaluate, profile, replay, sample, tokenizer, train
from tinyllm.cli.parser import Parser
from tinyllm.system.errors import InputError
from tinyllm.system.interrupts import is_termination
from tinyllm.system.wording import command_line


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog=command_line(), description=tinyllm.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinyllm {tinyllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (train, sample, evaluate, tokenizer, profile, replay):
        command.add_command(commands)
    return parser


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

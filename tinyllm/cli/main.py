"""The command line: the commands put together, and what an error becomes for whoever typed one."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import tinyllm
from tinyllm.cli import evaluate, plan, prepare, profile, replay, sample, tokenizer, train
from tinyllm.cli.parser import Parser
from tinyllm.system.errors import InputError
from tinyllm.system.interrupts import is_termination
from tinyllm.system.progress import print_status
from tinyllm.system.streams import flush_standard_streams, mend_standard_streams
from tinyllm.system.wording import command_line


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog=command_line(), description=tinyllm.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinyllm {tinyllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (prepare, train, sample, evaluate, tokenizer, plan, profile, replay):
        command.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM."""
    mend_standard_streams()
    try:
        code = _run(arguments)
    finally:
        lost = flush_standard_streams()
    return code or (0 if lost is None else _code_of(lost))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(arguments)
        args.command(args)
    except InputError as error:
        print_status(f"tinyllm: error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (signal.SIGTERM if is_termination(stop) else signal.SIGINT)
    except MemoryError as error:
        print_status(
            f"tinyllm: error: out of memory ({error}); make the batch, the context or the model smaller"
        )
        return 2
    except OSError as error:
        return _code_of(error)
    return 0


def _code_of(error: OSError) -> int:
    """0 where the reader of our output has left, as `| head` does; otherwise 2, and a line."""
    if isinstance(error, BrokenPipeError):
        return 0
    # A full disk, or a folder without permission.
    print_status(f"tinyllm: error: {error.filename or 'output'}: {error.strerror or error}")
    return 2

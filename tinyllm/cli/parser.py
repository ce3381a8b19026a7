"""The parser of the command line: argparse with errors of one line that name the nearest known flag."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from tinyllm.system.errors import InputError
from tinyllm.system.wording import nearest


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

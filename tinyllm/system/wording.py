"""Pieces of messages: what came, shortened, what was most likely meant, and a command to type."""

import difflib
import reprlib
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tinyllm.system.errors import InputError


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` most likely was meant to be, or None if nothing is close.

    Case, and `-` against `_`, do not count: nearest("Hidden-Size", ["hidden_size"]) finds it.
    """
    if len(name) > 200:  # the search takes far more time and memory than the name, and nothing is so long
        return None
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(plain), n=1)
    return plain[found[0]] if found else None


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str) -> str:
    """The hint of an error about an unknown `name`: the nearest of the candidates, or `otherwise` if none is near."""
    near = nearest(name, candidates)
    return f"did you mean {near!r}?" if near else otherwise


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise InputError, with the near miss, unless `name` is one of the `known` names of a `what`."""
    names = list(known)
    if name not in names:
        hint = did_you_mean(name, names, f"there are: {', '.join(names)}")
        raise InputError(f"unknown {what} {shown(name)}; {hint}")


def shown(value: object) -> str:
    """`value` as a short piece of one line, for error messages about input of any size."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    return shortener.repr(value)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def command_line(*arguments: str | Path) -> str:
    """A command line of this program as whoever started it would type it.

    `tinyllm train` where the shell finds it, else as it was started: `.venv/bin/tinyllm train`, `python -m tinyllm
    train`. From other programs, such as a notebook: `tinyllm train`.
    """
    script = Path(sys.argv[0] if sys.argv else "")
    begin = ["tinyllm"]
    if script.name == "__main__.py" and script.parent.name == "tinyllm":
        begin = [sys.orig_argv[0], "-m", "tinyllm"]
    elif script.stem == "tinyllm" and shutil.which("tinyllm") != str(script):
        begin = [str(script)]
    return " ".join(map(_quoted, [*begin, *map(str, arguments)]))


def _quoted(word: str) -> str:
    """A word as a shell reads it, on one line: line ends and other control characters in the form of $'...'."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = [
        character if character.isprintable() and character not in "\\'" else _escaped(character)
        for character in word
    ]
    return f"$'{''.join(escaped)}'"


def _escaped(character: str) -> str:
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "'": "\\'"}
    return known.get(character) or "".join(
        f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape")
    )

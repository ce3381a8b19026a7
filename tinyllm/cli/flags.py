"""Command-line flags of settings: one for each field of a config dataclass, and the types of the others."""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from tinyllm.backend import BACKENDS
from tinyllm.system.errors import InputError
from tinyllm.system.settings import Setting, settings_of
from tinyllm.system.wording import shown


def _parse_flag(setting: Setting, text: str) -> Any:
    """One flag's text as the field's value; argparse prints the error with the flag's name."""
    value: Any = text
    if setting.kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif setting.kind in (int, float):
        with contextlib.suppress(ValueError):  # what is left as text, _check refuses in good words
            value = setting.kind(text)
    try:
        return setting.check(value)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag_help(setting: Setting, default: Any) -> str:
    kind = setting.kind.__name__
    if setting.kind is tuple:
        kind = "numbers" if setting.item is float else "texts"
    if setting.choices:
        kind = "one of " + ", ".join(map(str, setting.choices))
    if setting.optional:
        kind += " or none"
    if default is dataclasses.MISSING:
        return f"{setting.help} ({kind}; required)".strip().replace("%", "%%")
    elif isinstance(default, tuple):
        default = " ".join(map(str, default)) or "empty"
    elif default == "" and setting.kind is str:
        default = "none"
    elif default is None or isinstance(default, bool):
        default = str(default).lower()
    # argparse formats help with %, so a lone percent sign would end in a traceback.
    return f"{setting.help} ({kind}; default: {default})".strip().replace("%", "%%")


def add_flags(group: argparse._ActionsContainer, cls: type, preset: Mapping[str, Any] = {}) -> None:
    """Add one flag for each field of `cls` to an argparse parser or argument group.

    hidden_size becomes --hidden-size, a bool becomes --tie-embeddings and --no-tie-embeddings, and
    a tuple takes any number of texts or numbers. The word "none" gives None where the field has one and is
    not text. A flag that is not given leaves nothing in the namespace (argparse.SUPPRESS): see
    given_flags. `preset` has other defaults for the help to name.
    """
    for setting in settings_of(cls):
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS}
        if setting.kind is bool and not setting.optional:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.kind is tuple:
            options["nargs"] = "*"
            options["metavar"] = "TEXT"
            if setting.item is float:
                options.update(type=number, metavar="FLOAT")
        else:
            options["type"] = functools.partial(_parse_flag, setting)
            words = [str(choice) for choice in setting.choices]
            plain = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}[setting.kind]
            options["metavar"] = "{" + ",".join(words) + "}" if words else plain
        flag = "--" + setting.name.replace("_", "-")
        group.add_argument(
            flag, help=_flag_help(setting, preset.get(setting.name, setting.default)), **options
        )


def given_flags(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` whose flags were given, by name: lay them over a file's section.

    config = from_mapping(ModelConfig, {**sections["model"], **given_flags(args, ModelConfig)})
    """
    given = vars(namespace)
    return {
        setting.name: tuple(given[setting.name]) if setting.kind is tuple else given[setting.name]
        for setting in settings_of(cls)
        if setting.name in given
    }


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


def add_special_tokens(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--special-tokens`: whether those of the tokenizer in `text`, which the help names so, become their ids."""
    parser.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"special tokens of the tokenizer in {text} become their ids (default); otherwise they are text",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add --backend to a command that computes."""
    parser.add_argument(
        "--backend", choices=BACKENDS, default="numpy", help="cupy: compute on a GPU (default: numpy)"
    )

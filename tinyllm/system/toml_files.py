"""Config files of sections, each a flat table of one dataclass: TOML read and written, JSON read."""

import string
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyllm.system.errors import InputError
from tinyllm.system.json_files import parse_json
from tinyllm.system.settings import NONE_WORD, settings_of
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import decode, read_whole, write_text
from tinyllm.system.wording import nearest, shown

_BARE_KEY = frozenset(string.ascii_letters + string.digits + "_-")


def parse_toml(content: bytes, where: StrPath) -> dict[str, Any]:
    """The tables in the bytes of a TOML file; `where` is what errors call it.

    Raises:
        InputError: not UTF-8, bad syntax, nested too deeply.
    """
    try:
        return tomllib.loads(decode(content, where))
    except RecursionError:
        raise InputError(f"{where}: not usable TOML: nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # bad syntax, and an integer of thousands of digits
        raise InputError(f"{where}: not valid TOML: {error}") from None


def read_sections(path: StrPath, known: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Read a .toml or .json config file of sections, each a flat table of one dataclass.

    `known` lists the sections that may occur; without it, any may. Sections that the file leaves
    out are absent from the result.

        sections = read_sections("run.toml", known=["model", "train"])
        model = from_mapping(ModelConfig, sections.get("model", {}), "run.toml [model]")

    Raises:
        InputError: what read_json refuses, another suffix, an unknown section (names the near
            miss), or a key outside any section.
    """
    path = Path(path)
    parse = {".toml": parse_toml, ".json": parse_json}.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"{path}: a config file ends in .toml or .json")
    names = None if known is None else list(known)
    content = parse(read_whole(path), path)
    for name, section in content.items():
        if not isinstance(section, dict):
            raise InputError(
                f"{path}: the key {shown(name)} stands outside a section; "
                f"put it below a heading such as [{names[0] if names else 'model'}]"
            )
        if names is not None and name not in names:
            near = nearest(name, names)
            hint = f"did you mean [{near}]?" if near else f"the sections are {', '.join(names)}"
            raise InputError(f"{path}: unknown section {shown(name)}; {hint}")
    return content


def _toml_string(text: str) -> str:
    escaped = []
    for character in text:
        code = ord(character)
        if 0xD800 <= code <= 0xDFFF:
            raise InputError(f"{shown(text)} holds a lone surrogate, which UTF-8 cannot write")
        if character in '"\\':
            escaped.append("\\" + character)
        elif code < 0x20 or code == 0x7F:  # the control characters that TOML forbids in a string
            escaped.append(f"\\u{code:04x}")
        else:
            escaped.append(character)
    return '"' + "".join(escaped) + '"'


def _toml_key(name: str) -> str:
    return name if name and _BARE_KEY.issuperset(name) else _toml_string(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        # repr of a float is the shortest text that reads back as the same bits.
        return repr(value)
    if isinstance(value, str):
        return _toml_string(value)
    return "[" + ", ".join(map(_toml_value, value)) + "]"


def format_toml(sections: Mapping[str, Any]) -> str:
    """TOML text of config dataclasses, one section each; reading it gives equal dataclasses.

    A None is left out where None is the default, and written as the string "none" where the
    default is something else.

    Raises:
        InputError: a value that is not of its field's type, or a string with a lone surrogate.
    """
    lines = []
    for name, config in sections.items():
        lines += ["", f"[{_toml_key(name)}]"]
        for setting in settings_of(type(config)):
            try:
                value = setting.check(getattr(config, setting.name))
                if value is None and setting.default is None:
                    continue
                text = _toml_value(NONE_WORD if value is None else value)
            except InputError as error:
                raise InputError(f"[{name}] {setting.name}: {error}") from None
            lines.append(f"{_toml_key(setting.name)} = {text}")
    return "\n".join(lines[1:]) + "\n" if lines else ""


def write_toml(path: StrPath, sections: Mapping[str, Any]) -> None:
    """Write format_toml(sections) to a file, whole or not at all."""
    write_text(path, format_toml(sections))

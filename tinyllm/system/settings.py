"""Flat frozen dataclasses to and from mappings, JSON, TOML and command-line flags.

A config is a frozen dataclass whose fields have one of these types: int, float, str, bool,
tuple[str, ...], Literal[...] of strings or integers, or one of them `| None`:

    @dataclass(frozen=True)
    class ModelConfig:
        hidden_size: int = field(128, "width of the residual stream")
        num_kv_heads: int | None = field(None, "key and value heads; none: as many as num_heads")

    config = from_mapping(ModelConfig, {"hidden_size": 256})
    text = format_toml({"model": config})

Whatever a person wrote wrongly is an InputError; a dataclass that this module cannot serve is a
TypeError, since only its author can mend it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import reprlib
import string
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from tinyllm.system import storage
from tinyllm.system.errors import InputError

C = TypeVar("C")
StrPath = str | os.PathLike[str]

_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "a list of strings",
}
_BARE_KEY = frozenset(string.ascii_letters + string.digits + "_-")
# TOML has no null and a flag is always text, so this word stands for None in both.
_NONE_WORD = "none"


def field(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text.

    Returns Any, as dataclasses.field does for the type checker, so that
    `hidden_size: int = field(128, "width of the residual stream")` passes it.
    """
    return dataclasses.field(default=default, metadata={"help": help})


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` most likely was meant to be, or None if nothing is close.

    Case, and `-` against `_`, do not count: nearest("Hidden-Size", ["hidden_size"]) finds it.
    """
    if len(name) > 200:  # the search takes far more time and memory than the name, and nothing is so long
        return None
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(plain), n=1)
    return plain[found[0]] if found else None


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise InputError, with the near miss, unless `name` is one of the `known` names of a `what`."""
    names = list(known)
    if name not in names:
        near = nearest(name, names)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(names)}"
        raise InputError(f"unknown {what} {shown(name)}; {hint}")


def shown(value: object) -> str:
    """`value` as a short piece of one line, for error messages about input of any size."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    return shortener.repr(value)


# ---- What the fields of a dataclass are --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Field:
    """One field of a config dataclass, its type taken apart."""

    name: str
    kind: type  # a key of _KINDS
    choices: tuple[str | int, ...]  # empty: no Literal
    optional: bool
    default: Any  # dataclasses.MISSING: required
    help: str

    @property
    def expected(self) -> str:
        text = _KINDS[self.kind]
        if self.choices:
            text = "one of " + ", ".join(repr(choice) for choice in self.choices)
        return text + " or none" if self.optional else text

    @property
    def none_is_a_word(self) -> bool:
        """Whether the string "none" means None here: not where it is a value of its own."""
        free_text = self.kind in (str, tuple) and not self.choices
        return self.optional and not free_text and _NONE_WORD not in self.choices


def _take_apart(annotation: Any) -> tuple[type, tuple[str | int, ...], bool]:
    """(kind, choices, optional) of one annotation; TypeError if it is not a supported one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1 and len(arguments) == 2:
            kind, choices, _ = _take_apart(inner[0])
            return kind, choices, True
    elif origin is Literal:
        choices = tuple(choice for choice in arguments if choice is not None)
        kinds = {type(choice) for choice in choices}
        if kinds in ({str}, {int}):
            return kinds.pop(), choices, None in arguments
    elif annotation == tuple[str, ...]:
        return tuple, (), False
    elif annotation in (int, float, str, bool):
        return annotation, (), False
    raise TypeError(
        f"{annotation!r} is not a type that a config can hold: use int, float, str, bool, "
        "tuple[str, ...], Literal[...] of strings or of integers, or one of them | None"
    )


def _fields(cls: type) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(cls)
    result = []
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        try:
            kind, choices, optional = _take_apart(hints[item.name])
        except TypeError as error:
            raise TypeError(f"{cls.__name__}.{item.name}: {error}") from None
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        help_text = item.metadata.get("help", "")
        spec = _Field(item.name, kind, choices, optional, default, help_text)
        if optional and default is not None and not spec.none_is_a_word:
            raise TypeError(
                f"{cls.__name__}.{item.name}: its None could not be written, as TOML has no null "
                f"and {_NONE_WORD!r} is a value of this field; make its default None"
            )
        result.append(spec)
    return tuple(result)


def _check(spec: _Field, value: Any) -> Any:
    """`value` as the field's type, or InputError that says what was expected and what came."""
    if value is None or (value == _NONE_WORD and spec.none_is_a_word):
        if spec.optional:
            return None
    elif spec.choices:
        # The type is compared too, because True == 1.
        if any(type(value) is type(choice) and value == choice for choice in spec.choices):
            return value
    elif spec.kind is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif spec.kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.nan
            if not math.isnan(number):
                return number
    elif isinstance(value, spec.kind) and (spec.kind is bool or not isinstance(value, bool)):
        return value
    hint = ""
    if spec.choices and isinstance(value, str):
        near = nearest(value, [str(choice) for choice in spec.choices])
        hint = f"; did you mean {near!r}?" if near else ""
    raise InputError(f"{spec.name} must be {spec.expected}, got {shown(value)}{hint}")


# ---- Mappings ----------------------------------------------------------------------------------


def from_mapping(cls: type[C], mapping: Mapping[str, Any], where: str = "config") -> C:
    """Build the dataclass `cls` from a mapping of field names to values.

    Fields that the mapping leaves out take their defaults. An integer is accepted for a float
    field, a list for a tuple field. `where` names the source in errors, such as "run.toml [model]".

    Raises:
        InputError: an unknown key (names the near miss), a missing required key, a value of the
            wrong type or outside the Literal's choices, or whatever the class itself refuses.
    """
    specs = {spec.name: spec for spec in _fields(cls)}
    values = {}
    for key, value in mapping.items():
        if key not in specs:
            near = nearest(str(key), specs)
            hint = f"did you mean {near!r}?" if near else f"the keys are {', '.join(specs)}"
            raise InputError(f"{where}: unknown key {shown(key)}; {hint}")
        try:
            values[key] = _check(specs[key], value)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    for spec in specs.values():
        if spec.default is dataclasses.MISSING and spec.name not in values:
            raise InputError(f"{where}: missing key {spec.name!r}; give {spec.expected}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass by name, in order; from_mapping is its inverse.

    The values are JSON's own types and tuples of strings, so json.dumps takes the result.
    """
    return {spec.name: getattr(config, spec.name) for spec in _fields(type(config))}


# ---- Files -------------------------------------------------------------------------------------


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json, whose default keeps the last of two equal keys and tells nobody."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} comes twice in one object")
            seen.add(key)
    return result


LARGEST_FILE = 1 << 27
_MOST_ITEMS = 1 << 22
"""Of JSON. What it becomes takes up to 100 bytes an item, and tokenizers of 256,000 tokens have some 2 million."""


def _read(path: Path) -> bytes:
    try:
        return storage.read_file(path, LARGEST_FILE)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(content: bytes, where: StrPath) -> str:
    try:
        # "utf-8-sig" drops the byte order mark that some Windows editors write.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); is it the right file?") from None


def _parse(content: bytes, language: str, where: StrPath) -> dict[str, Any]:
    text = _decode(content, where)
    if language == "JSON" and sum(map(text.count, ",[{")) > _MOST_ITEMS:
        raise InputError(f"{where}: not usable JSON: more than {_MOST_ITEMS:,} items")
    try:
        if language == "TOML":
            return tomllib.loads(text)
        parsed = json.loads(text, object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise InputError(f"{where}: not usable {language}: nested too deeply") from None
    except ValueError as error:  # bad syntax, and an integer of thousands of digits
        raise InputError(f"{where}: not valid {language}: {error}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: must hold a JSON object {{...}}, got {shown(parsed)}")
    return parsed


def parse_json(content: bytes, where: StrPath) -> dict[str, Any]:
    """The JSON object in the bytes of a file; `where` is what errors call it. Raises InputError as read_json does."""
    return _parse(content, "JSON", where)


def read_json(path: StrPath) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: no such file, unreadable, not UTF-8, bad syntax, a key given twice, nested too
            deeply, too large, or something other than an object at the top.
    """
    return parse_json(_read(Path(path)), path)


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
    languages = {".toml": "TOML", ".json": "JSON"}
    language = languages.get(path.suffix.lower())
    if language is None:
        raise InputError(f"{path}: a config file ends in .toml or .json")
    names = None if known is None else list(known)
    content = _parse(_read(path), language, path)
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


def write_text(path: StrPath, text: str) -> None:
    """Write UTF-8 text so that a crash leaves the old file or the new one, never half of one.

    Raises:
        InputError: the folder is missing, the disk is full, writing is not allowed.
    """
    path = Path(path)
    try:
        storage.replace(path, text.encode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


# ---- TOML out ----------------------------------------------------------------------------------


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
    return "[" + ", ".join(_toml_string(item) for item in value) + "]"


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
        for spec in _fields(type(config)):
            try:
                value = _check(spec, getattr(config, spec.name))
                if value is None and spec.default is None:
                    continue
                text = _toml_value(_NONE_WORD if value is None else value)
            except InputError as error:
                raise InputError(f"[{name}] {spec.name}: {error}") from None
            lines.append(f"{_toml_key(spec.name)} = {text}")
    return "\n".join(lines[1:]) + "\n" if lines else ""


def write_toml(path: StrPath, sections: Mapping[str, Any]) -> None:
    """Write format_toml(sections) to a file, whole or not at all."""
    write_text(path, format_toml(sections))


# ---- Command-line flags ------------------------------------------------------------------------


def _parse_flag(spec: _Field, text: str) -> Any:
    """One flag's text as the field's value; argparse prints the error with the flag's name."""
    value: Any = text
    if spec.kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif spec.kind in (int, float):
        with contextlib.suppress(ValueError):  # what is left as text, _check refuses in good words
            value = spec.kind(text)
    try:
        return _check(spec, value)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag_help(spec: _Field) -> str:
    kind = "texts" if spec.kind is tuple else spec.kind.__name__
    if spec.choices:
        kind = "one of " + ", ".join(map(str, spec.choices))
    if spec.optional:
        kind += " or none"
    default = spec.default
    if default is dataclasses.MISSING:
        return f"{spec.help} ({kind}; required)".strip().replace("%", "%%")
    elif isinstance(default, tuple):
        default = " ".join(default) or "empty"
    elif default is None or isinstance(default, bool):
        default = str(default).lower()
    # argparse formats help with %, so a lone percent sign would end in a traceback.
    return f"{spec.help} ({kind}; default: {default})".strip().replace("%", "%%")


def add_flags(group: argparse._ActionsContainer, cls: type) -> None:
    """Add one flag for each field of `cls` to an argparse parser or argument group.

    hidden_size becomes --hidden-size, a bool becomes --tie-embeddings and --no-tie-embeddings, and
    a tuple takes any number of texts. The word "none" gives None where the field has one and is
    not text. A flag that is not given leaves nothing in the namespace (argparse.SUPPRESS): see
    given_flags.
    """
    for spec in _fields(cls):
        options: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS}
        if spec.kind is bool and not spec.optional:
            options["action"] = argparse.BooleanOptionalAction
        elif spec.kind is tuple:
            options["nargs"] = "*"
            options["metavar"] = "TEXT"
        else:
            options["type"] = functools.partial(_parse_flag, spec)
            words = [str(choice) for choice in spec.choices]
            plain = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}[spec.kind]
            options["metavar"] = "{" + ",".join(words) + "}" if words else plain
        flag = "--" + spec.name.replace("_", "-")
        group.add_argument(flag, help=_flag_help(spec), **options)


def given_flags(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` whose flags were given, by name: lay them over a file's section.

    config = from_mapping(ModelConfig, {**sections["model"], **given_flags(args, ModelConfig)})
    """
    given = vars(namespace)
    return {
        spec.name: tuple(given[spec.name]) if spec.kind is tuple else given[spec.name]
        for spec in _fields(cls)
        if spec.name in given
    }

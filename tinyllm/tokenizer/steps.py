"""The steps of a tokenizer.json, each a small class with the fields that its JSON object has."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import regex

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.oniguruma import require_same
from tinyllm.tokenizer.patterns import Pattern

S = TypeVar("S", bound="Step")

# What the steps of a Sequence are called in each section.
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
# A text that is put into another; longer ones would let a short text take all memory.
_LONGEST_TEXT = 16


@dataclass(frozen=True)
class Expression:
    """What is looked for in a text: a string, or a regular expression.

    Raises:
        InputError: it is empty, no expression, or one that the tokenizers library may read otherwise.
    """

    text: str
    literal: bool = False

    @functools.cached_property
    def pattern(self) -> Pattern:
        return Pattern(f"(?:{regex.escape(self.text)})" if self.literal else self.text, is_name=False)

    def to_json(self) -> dict[str, str]:
        """The pattern as the tokenizers library writes it."""
        return {"String" if self.literal else "Regex": self.text}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of to_json; raises InputError for another form."""
        kind, text = next(iter(content.items()), (None, None)) if isinstance(content, dict) else (None, None)
        if kind not in ("String", "Regex") or not isinstance(text, str) or not text or len(content) > 1:
            raise InputError(
                f'a pattern is {shown(content)}; it must be {{"String": ...}} or {{"Regex": ...}}'
            )
        expression = cls(text, kind == "String")
        _ = expression.pattern
        if not expression.literal:
            require_same(text)
        return expression


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Step:
    """A step, a dataclass whose fields are those of its JSON object; a field with a default may be left out there."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object; its "type" is the name of the class."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"type": type(self).__name__} | {
            name: value.to_json() if isinstance(value, Expression) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of to_json.

        Raises:
            InputError: a field that is unknown, missing, or has another kind of value.
        """
        given = {key: value for key, value in content.items() if key not in ("type", "regex_version")}
        types = typing.get_type_hints(cls)
        for key, value in given.items():
            if key not in types:
                raise InputError(f"{cls.__name__} has {key} {shown(value)}, which is not understood")
            choices = typing.get_args(types[key])
            if types[key] is Expression:
                given[key] = Expression.from_json(value)
            elif (value not in choices) if choices else (type(value) is not types[key]):
                raise InputError(f"{cls.__name__} has {key} {shown(value)}, which is not understood")
            elif types[key] is str and (len(value) > _LONGEST_TEXT or not _is_text(value)):
                raise InputError(
                    f"{cls.__name__} has {key} {shown(value)}; at most {_LONGEST_TEXT} characters are allowed, none of "
                    "them half of a UTF-16 pair"
                )
        try:
            return cls(**given)
        except TypeError:
            raise InputError(f"{cls.__name__} lacks one of {', '.join(types)}") from None


def read_steps(content: Any, where: str, kinds: Mapping[str, type[S]]) -> tuple[S, ...]:
    """The steps of a section of tokenizer.json, those of a Sequence one after the other.

    Args:
        where: the name of the section.
        kinds: the classes of its steps by name.

    Raises:
        InputError: a step that is not known, or not like this.
    """
    if content is None:
        return ()
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "Sequence":
        steps = content.get(_LISTS[where])
        if isinstance(steps, list) and len(content) == 2:
            return tuple(
                step for one in steps for step in read_steps(one if one is not None else {}, where, kinds)
            )
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{where} has {shown(content)}; supported: {', '.join(kinds)}")
    return (kinds[kind].from_json(content),)


def write_steps(steps: tuple[Step, ...], where: str) -> dict[str, Any] | None:
    """The inverse of read_steps."""
    if len(steps) < 2:
        return steps[0].to_json() if steps else None
    return {"type": "Sequence", _LISTS[where]: [step.to_json() for step in steps]}

"""Settings: flat frozen dataclasses to and from mappings, and the bounds of their numbers.

A config is a frozen dataclass whose fields have one of these types: int, float, str, bool,
tuple[str, ...], tuple[float, ...], Literal[...] of strings or integers, or one of them `| None`:

    @dataclass(frozen=True)
    class ModelConfig:
        hidden_size: int = field(128, "width of the residual stream", at_least=1)
        num_kv_heads: int | None = field(None, "key and value heads; none: as many as num_heads")

        def __post_init__(self) -> None:
            check_bounds(self)

    config = from_mapping(ModelConfig, {"hidden_size": 256})

Whatever a person wrote wrongly is an InputError; a dataclass that this module cannot serve is a
TypeError, since only its author can mend it.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from tinyllm.system.errors import InputError
from tinyllm.system.wording import did_you_mean, nearest, shown

C = TypeVar("C")

_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "a list of strings",
}
NONE_WORD = "none"
"""TOML has no null and a flag is always text, so this word stands for None in both."""
LARGEST_INTEGER = 2**31 - 1
"""The upper bound of an integer that has a lower one alone: sizes and counts that 32 bits hold."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The interval that a number must lie in; an end that is None is open."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, number: float) -> bool:
        """Whether `number` lies in the interval."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(
            "finite" if end == math.inf else f"{name} {end}" for name, end in ends.items() if end is not None
        )


def field(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a default, a help text, and the bounds that `check_bounds` holds it to.

    `below=math.inf` makes a number finite; an integer with a lower bound alone is at most LARGEST_INTEGER.
    Returns Any, as dataclasses.field does for the type checker, so that
    `hidden_size: int = field(128, "width of the residual stream")` passes it.
    """
    bounds = Bounds(at_least, above, at_most, below)
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


# ---- What the fields of a dataclass are --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a config dataclass, its type taken apart."""

    name: str
    kind: type  # a key of _KINDS
    item: type  # of a tuple's items, str or float; else as kind
    choices: tuple[str | int, ...]  # empty: no Literal
    optional: bool
    default: Any  # dataclasses.MISSING: required
    help: str
    bounds: Bounds

    @property
    def expected(self) -> str:
        """What its value must be, for errors."""
        text = "a list of numbers" if (self.kind, self.item) == (tuple, float) else _KINDS[self.kind]
        if self.choices:
            text = "one of " + ", ".join(repr(choice) for choice in self.choices)
        return text + " or none" if self.optional else text

    @property
    def none_is_a_word(self) -> bool:
        """Whether the string "none" means None here: not where it is a value of its own."""
        free_text = self.kind in (str, tuple) and not self.choices
        return self.optional and not free_text and NONE_WORD not in self.choices

    def check(self, value: Any) -> Any:
        """`value` as the field's type; raises InputError, which says what was expected and what came."""
        if value is None or (value == NONE_WORD and self.none_is_a_word):
            if self.optional:
                return None
        elif self.choices:
            # The type is compared too, because True == 1.
            if any(type(value) is type(choice) and value == choice for choice in self.choices):
                return value
        elif self.kind is tuple:
            if isinstance(value, list | tuple):
                items = [_as_number(item) if self.item is float else item for item in value]
                if all(isinstance(item, self.item) for item in items):
                    return tuple(items)
        elif self.kind is float:
            if (number := _as_number(value)) is not None:
                return number
        elif isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool)):
            return value
        near = nearest(value, map(str, self.choices)) if isinstance(value, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"{self.name} must be {self.expected}, got {shown(value)}{hint}")


def _as_number(value: Any) -> float | None:
    """`value` as a float; None: it is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _take_apart(annotation: Any) -> tuple[type, type, tuple[str | int, ...], bool]:
    """(kind, item, choices, optional) of one annotation; TypeError if it is not a supported one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1 and len(arguments) == 2:
            return *_take_apart(inner[0])[:3], True
    elif origin is Literal:
        choices = tuple(choice for choice in arguments if choice is not None)
        kinds = {type(choice) for choice in choices}
        if kinds in ({str}, {int}):
            kind = kinds.pop()
            return kind, kind, choices, None in arguments
    elif annotation in (tuple[str, ...], tuple[float, ...]):
        return tuple, arguments[0], (), False
    elif annotation in (int, float, str, bool):
        return annotation, annotation, (), False
    raise TypeError(
        f"{annotation!r} is not a type that a config can hold: use int, float, str, bool, "
        "tuple[str, ...], tuple[float, ...], Literal[...] of strings or of integers, or one of them | None"
    )


def settings_of(cls: type) -> tuple[Setting, ...]:
    """The fields of a config dataclass; raises TypeError for one whose type a config cannot hold."""
    hints = typing.get_type_hints(cls)
    result = []
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        try:
            kind, of, choices, optional = _take_apart(hints[item.name])
        except TypeError as error:
            raise TypeError(f"{cls.__name__}.{item.name}: {error}") from None
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        help_text = item.metadata.get("help", "")
        bounds = item.metadata.get("bounds", Bounds())
        if kind is int and bounds.at_least is not None and bounds.at_most is None:
            bounds = dataclasses.replace(bounds, at_most=LARGEST_INTEGER)
        setting = Setting(item.name, kind, of, choices, optional, default, help_text, bounds)
        if optional and default is not None and not setting.none_is_a_word:
            raise TypeError(
                f"{cls.__name__}.{item.name}: its None could not be written, as TOML has no null "
                f"and {NONE_WORD!r} is a value of this field; make its default None"
            )
        result.append(setting)
    return tuple(result)


# ---- Mappings ----------------------------------------------------------------------------------


def from_mapping(cls: type[C], mapping: Mapping[str, Any], where: str = "config") -> C:
    """Build the dataclass `cls` from a mapping of field names to values.

    Fields that the mapping leaves out take their defaults. An integer is accepted for a float
    field, a list for a tuple field. `where` names the source in errors, such as "run.toml [model]".

    Raises:
        InputError: an unknown key (names the near miss), a missing required key, a value of the
            wrong type or outside the Literal's choices, or whatever the class itself refuses.
    """
    settings = {setting.name: setting for setting in settings_of(cls)}
    values = {}
    for key, value in mapping.items():
        if key not in settings:
            hint = did_you_mean(str(key), settings, f"the keys are {', '.join(settings)}")
            raise InputError(f"{where}: unknown key {shown(key)}; {hint}")
        try:
            values[key] = settings[key].check(value)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    for setting in settings.values():
        if setting.default is dataclasses.MISSING and setting.name not in values:
            raise InputError(f"{where}: missing key {setting.name!r}; give {setting.expected}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass by name, in order; from_mapping is its inverse.

    The values are JSON's own types and tuples of them, so json.dumps takes the result.
    """
    return {setting.name: getattr(config, setting.name) for setting in settings_of(type(config))}


def check_bounds(config: Any) -> None:
    """Raise InputError for the first field of a config that lies outside its bounds, or an item of it does.

    A None has none.
    """
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        items = value if setting.kind is tuple else (value,)
        if value is not None and not all(map(setting.bounds.hold, items)):
            raise InputError(f"{setting.name}={shown(value)}; it must be {setting.bounds}")

"""What cuts a text into pieces: the steps of `pre_tokenizer` in tokenizer.json."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.byte_level import to_bytes, to_characters
from tinyllm.tokenizer.patterns import PATTERNS, Pattern
from tinyllm.tokenizer.steps import Expression, Step

Behavior = Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


class Splitter(Step):
    """A step from a piece to pieces."""

    def pieces(self, text: str) -> Iterator[str]:
        """The pieces that a text is cut into, in order."""
        raise TypeError(f"{type(self).__name__} defines no pieces(); a Splitter must")


@dataclass(frozen=True)
class Split(Splitter):
    """Cuts at the matches of `pattern`; with `invert`, at what lies between them. `behavior`: what becomes of these."""

    pattern: Expression
    behavior: Behavior
    invert: bool = False

    def pieces(self, text: str) -> Iterator[str]:
        return _cut(text, self.pattern.pattern, self.behavior, self.invert)


@dataclass(frozen=True)
class Digits(Splitter):
    """Cuts around runs of numbers, or around each of their characters."""

    individual_digits: bool = False

    def pieces(self, text: str) -> Iterator[str]:
        return _cut(text, _NUMBER, "Isolated" if self.individual_digits else "Contiguous")


@dataclass(frozen=True)
class Punctuation(Splitter):
    """Cuts at punctuation, that of Unicode and all of ASCII."""

    behavior: Behavior = "Isolated"

    def pieces(self, text: str) -> Iterator[str]:
        return _cut(text, _PUNCTUATION, self.behavior)


@dataclass(frozen=True)
class ByteLevel(Splitter):
    """Writes the bytes of UTF-8 in GPT-2's alphabet, after a space in front and its pattern if these are wanted."""

    add_prefix_space: bool = True
    trim_offsets: bool = True  # of places in the text, which have no influence on ids
    use_regex: bool = True

    def prefixed(self, text: str) -> str:
        """The text with a space in front, where one is wanted and none is there."""
        return " " + text if self.add_prefix_space and not text.startswith(" ") else text

    def pieces(self, text: str) -> Iterator[str]:
        text = self.prefixed(text)
        for piece in _GPT2.split(text) if self.use_regex else [text]:
            yield to_characters(piece.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Metaspace(Splitter):
    """Writes spaces as `replacement`, puts one in front of the text, and cuts in front of each."""

    replacement: str = "\u2581"
    prepend_scheme: Literal["always", "first", "never"] = "always"
    split: bool = True

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        # As it was written before there were schemes.
        old = {
            "str_rep": content.get("replacement"),
            "add_prefix_space": content.get("prepend_scheme") != "never",
        }
        for key, value in old.items():
            if content.get(key, value) != value:
                raise InputError(f"Metaspace has {key} {shown(content[key])}, which is not understood")
        if len(content.get("replacement", " ")) != 1:
            raise InputError(
                f"Metaspace has replacement {shown(content['replacement'])}; it must be a character"
            )
        return super().from_json({key: value for key, value in content.items() if key not in old})

    def pieces(self, text: str, first: bool = True) -> Iterator[str]:
        """The pieces; `first`: whether the text begins with this one."""
        text = text.replace(" ", self.replacement)
        wanted = self.prepend_scheme == "always" or (self.prepend_scheme == "first" and first)
        if wanted and not text.startswith(self.replacement):
            text = self.replacement + text
        if not self.split:
            return iter([text])
        return _cut(text, Expression(self.replacement, literal=True).pattern, "MergedWithNext")


SPLITTERS: dict[str, type[Splitter]] = {
    kind.__name__: kind for kind in (Split, Digits, Punctuation, ByteLevel, Metaspace)
}

_NUMBER = Pattern(r"\p{N}")
_PUNCTUATION = Pattern(r"[!-/:-@\[-`{-~\p{P}]")
_GPT2 = Pattern(PATTERNS["gpt2"])


def _cut(text: str, pattern: Pattern, behavior: Behavior, invert: bool = False) -> Iterator[str]:
    spans = [(start, end, is_match != invert) for start, end, is_match in pattern.marked_spans(text)]
    if behavior == "Removed":
        spans = [span for span in spans if not span[2]]
    elif behavior == "Contiguous":
        groups = (list(group) for _, group in itertools.groupby(spans, key=lambda span: span[2]))
        spans = [(group[0][0], group[-1][1], True) for group in groups]
    elif behavior == "MergedWithPrevious":
        # Of several matches in a row, the first alone joins what is before it.
        joins = [i for i in range(1, len(spans)) if spans[i][2] and not spans[i - 1][2]]
        for i in reversed(joins):
            spans[i - 1 : i + 1] = [(spans[i - 1][0], spans[i][1], True)]
    elif behavior == "MergedWithNext":
        joins = [i for i in range(len(spans) - 1) if spans[i][2] and not spans[i + 1][2]]
        for i in reversed(joins):
            spans[i : i + 2] = [(spans[i][0], spans[i + 1][1], True)]
    return (text[start:end] for start, end, _ in spans if end > start)


def split(steps: Sequence[Splitter], text: str, first: bool = True) -> list[str]:
    """The pieces of `text` after all steps; `first`: whether no added token stands before it."""
    pieces = [text] if text else []
    for step in steps:
        if isinstance(step, Metaspace):
            pieces = [p for i, whole in enumerate(pieces) for p in step.pieces(whole, first and i == 0)]
        else:
            pieces = [piece for whole in pieces for piece in step.pieces(whole)]
    return pieces


class Splits:
    """Splits text by several steps into pieces that stand for bytes; of other borders in the text nothing is known.

    It is used like a Pattern without a name.
    """

    name = None

    def __init__(self, steps: Sequence[Splitter]) -> None:
        self.steps = tuple(steps)
        self.expression = ", ".join(map(repr, self.steps))

    def split(self, text: str) -> list[str]:
        """The pieces of `text`; bytes that are no UTF-8 are half pairs, as in the error handler surrogateescape."""
        return [to_bytes(piece).decode("utf-8", "surrogateescape") for piece in split(self.steps, text)]

    def __repr__(self) -> str:
        return f"Splits({self.expression})"


def as_pattern(steps: Sequence[Splitter]) -> Pattern | None:
    """The pattern that splits as the steps do, which end with ByteLevel; None if there is no such one.

    The space that ByteLevel alone puts in front of a text is not a part of this.
    """
    *splits, last = steps
    if not isinstance(last, ByteLevel) or len(splits) != (not last.use_regex):
        return None
    if not splits:
        return _GPT2
    split = splits[0]
    if not isinstance(split, Split) or last.add_prefix_space:
        return None
    pattern = split.pattern.pattern
    # A pattern with a name leaves nothing between its matches.
    whole = (split.behavior, split.invert) == ("Removed", True) and pattern.name is not None
    return pattern if whole or (split.behavior, split.invert) == ("Isolated", False) else None

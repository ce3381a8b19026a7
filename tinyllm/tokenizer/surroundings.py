"""What stands around the merging in a tokenizer.json: added tokens, normalizer, splits, and what comes after."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.added_tokens import AddedToken
from tinyllm.tokenizer.normalizers import NORMALIZERS, Normalizer, normalized
from tinyllm.tokenizer.splits import SPLITTERS, ByteLevel, Splitter
from tinyllm.tokenizer.steps import Step, read_steps, write_steps

# Sections that are no part of the ids of a text, and are saved as they came.
_KEPT = ("truncation", "padding", "post_processor", "decoder")
_SECTIONS = ("version", "added_tokens", "normalizer", "pre_tokenizer", "model", *_KEPT)


class TokenizerFileWarning(UserWarning):
    """A tokenizer.json asks for something that is not done here."""


@dataclass(frozen=True)
class Surroundings:
    """Args:
    added_tokens: in the order of their ids.
    normalizers: change a text between added tokens.
    splitters: cut it into pieces.
    kept: sections of the file that are saved as they are.
    around: the ids that the post-processor puts before and after a text.
    """

    added_tokens: tuple[AddedToken, ...] = ()
    normalizers: tuple[Normalizer, ...] = ()
    splitters: tuple[Splitter, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @classmethod
    def of_special(
        cls, special_tokens: Mapping[str, int], splitters: tuple[Splitter, ...], decoder: Step
    ) -> Self:
        """Those of a tokenizer that has special tokens and splits alone."""
        tokens = [AddedToken(token, id) for token, id in special_tokens.items()]
        return cls(_by_id(tokens), (), splitters, {"decoder": decoder.to_json()})

    @property
    def is_plain(self) -> bool:
        """Whether a text stays as it is, and each added token is what stands in it."""
        return not self.normalizers and all(token.plain for token in self.added_tokens) and not self._prefixes

    @property
    def _prefixes(self) -> bool:
        return any(isinstance(step, ByteLevel) and step.add_prefix_space for step in self.splitters)

    def normalized(self, text: str) -> str:
        """`text` after all normalizers."""
        return normalized(self.normalizers, text)

    def prefixed(self, text: str) -> str:
        """`text` with the space that ByteLevel puts in front of it."""
        return " " + text if self._prefixes and not text.startswith(" ") else text

    @classmethod
    def from_json(cls, content: Mapping[str, Any], **kept: Any) -> Self:
        """Those of the JSON object of a tokenizer.json. Warns once of truncation and padding, which are not done.

        Args:
            kept: what of the model has no influence on ids, and is saved as it came.

        Raises:
            InputError: a section that is not understood.
        """
        for key in content:
            if key not in _SECTIONS:
                raise InputError(f"it has a section {key}, which is not understood")
        added = content.get("added_tokens") or []
        if not isinstance(added, list):
            raise InputError(f"added_tokens must be a list, got {shown(added)}")
        tokens = _by_id(map(AddedToken.from_json, added))
        seen: set[str] = set()
        for token in tokens:
            if token.content in seen:
                raise InputError(f"the added token {shown(token.content)} stands twice")
            seen.add(token.content)
        wanted = [key for key in ("truncation", "padding") if content.get(key) is not None]
        if wanted:
            warnings.warn(
                f"the tokenizer.json asks for {' and '.join(wanted)}, which is kept but not applied: ids are those of "
                "the whole text, and nothing is added",
                TokenizerFileWarning,
                stacklevel=2,
            )
        return cls(
            tokens,
            read_steps(content.get("normalizer"), "normalizer", NORMALIZERS),
            read_steps(content.get("pre_tokenizer"), "pre_tokenizer", SPLITTERS),
            {key: content.get(key) for key in _KEPT} | kept,
            _around(content.get("post_processor")),
        )

    def to_json(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object of tokenizer.json around that of the model."""
        return {
            "version": "1.0",
            "truncation": self.kept.get("truncation"),
            "padding": self.kept.get("padding"),
            "added_tokens": [token.to_json() for token in self.added_tokens],
            "normalizer": write_steps(self.normalizers, "normalizer"),
            "pre_tokenizer": write_steps(self.splitters, "pre_tokenizer"),
            "post_processor": self.kept.get("post_processor"),
            "decoder": self.kept.get("decoder"),
            "model": dict(model),
        }


def _by_id(tokens: Iterable[AddedToken]) -> tuple[AddedToken, ...]:
    # By what an id looks like, since one that is no number is refused later, with its token.
    return tuple(sorted(tokens, key=lambda token: (isinstance(token.id, int), token.id)))


def _around(processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor puts before and after a text.

    Raises:
        InputError: it is of a kind that is not understood.
    """
    kind = processor.get("type") if isinstance(processor, dict) else None
    try:
        if processor is None or kind == "ByteLevel":
            return (), ()
        if kind in ("RobertaProcessing", "BertProcessing"):
            return _ids([processor["cls"][1]]), _ids([processor["sep"][1]])
        if kind == "TemplateProcessing":
            return _of_template(processor)
        if kind == "Sequence":
            before: tuple[int, ...] = ()
            after: tuple[int, ...] = ()
            for one in processor["processors"]:
                begin, end = _around(one)
                before, after = begin + before, after + end
            return before, after
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        pass
    raise InputError(f"post_processor is {shown(processor)}, which is not understood")


def _of_template(processor: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    parts: list[list[int]] = [[]]
    for part in processor["single"]:
        if "Sequence" in part:
            parts.append([])
        else:
            parts[-1] += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    before, after = parts  # one text, once
    return _ids(before), _ids(after)


def _ids(ids: Sequence[Any]) -> tuple[int, ...]:
    if any(type(id) is not int for id in ids):
        raise ValueError(f"no ids: {ids}")
    return tuple(ids)

"""The tokens of a tokenizer that are found in a text before it is split or merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import regex

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.bpe.sources import Special, special_regex, wanted_and_refused

# The words and white space of Rust's expressions.
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]"
_BEGINS_WITH_WORD = regex.compile(_WORD)
_ENDS_WITH_WORD = regex.compile(rf"(?r){_WORD}")
_SPACES = regex.compile(r"\p{White_Space}*")
_SPACES_BEFORE = regex.compile(r"(?r)\p{White_Space}*")

# Choices of allowed and refused tokens whose expressions are kept.
_MOST_SEARCHES = 64


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it stands in a text.

    Args:
        content: the string. id: of the token.
        special: it means something, such as the end of a text, and is recognised only where that is allowed.
        single_word: not found where a letter or digit stands beside it.
        lstrip, rstrip: the white space before it, after it, is a part of it.
        normalized: it is looked for in the normalized text, and normalized itself.
    """

    content: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @property
    def plain(self) -> bool:
        """Whether it stands for its own characters, whatever is around it."""
        return not (self.single_word or self.lstrip or self.rstrip or self.normalized)

    def to_json(self) -> dict[str, Any]:
        """The object of tokenizer.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of to_json; raises InputError for what is no such object."""
        token = content.get("content") if isinstance(content, dict) else None
        if not isinstance(token, str) or not token:
            raise InputError(f"added_tokens holds {shown(content)}; each must be an object with a content")
        names = [field.name for field in fields(cls)]
        unknown = [key for key in content if key not in names]
        wrong = [key for key in names[2:] if not isinstance(content.get(key, False), bool)]
        if unknown or wrong or type(content.get("id")) is not int:
            key = (unknown or wrong or ["id"])[0]
            raise InputError(
                f"the added token {shown(token)} has {key} {shown(content.get(key))}, which is not understood; known "
                f"are an integer id and, true or false, {', '.join(names[2:])}"
            )
        return cls(**{"special": False, **content})


class AddedTokens:
    """Finds added tokens in texts as the tokenizers library does.

    Those that are not normalized are found first; what lies between is normalized, and searched for the others. Of
    several at one place the longest is taken. A special one that is allowed is found inside one that is neither
    allowed nor refused, as tiktoken does.
    """

    def __init__(self, tokens: Sequence[AddedToken], normalize: Callable[[str], str]) -> None:
        self.tokens = tuple(tokens)
        self.special = {token.content: token.id for token in tokens if token.special}
        self._normalize = normalize
        self._normalized = any(token.normalized for token in tokens)
        self._searches: dict[tuple[frozenset[str], frozenset[str], bool], _Search] = {}

    def changed(self) -> dict[int, str]:
        """What the tokens that normalizing changes are decoded to."""
        texts = {token.id: self._normalize(token.content) for token in self.tokens if token.normalized}
        return {
            token.id: texts[token.id]
            for token in self.tokens
            if texts.get(token.id, "") not in ("", token.content)
        }

    def split(self, text: str, allowed: Special, disallowed: Special) -> Iterator[tuple[str, int | None]]:
        """(text, None) for normalized text between the tokens, (the token, its id) for those that are recognised.

        Special ones are if they are among the `allowed`, and the others always.

        Raises:
            InputError: a disallowed token in the text, an allowed one that is not special.
        """
        wanted, refused = wanted_and_refused(self.special, allowed, disallowed)
        for part, id in self._search(wanted, refused, normalized=False).split(text):
            if id is not None:
                yield part, id
            elif self._normalized:
                yield from self._search(wanted, refused, normalized=True).split(self._normalize(part))
            else:
                yield self._normalize(part), None

    def _search(self, wanted: frozenset[str], refused: frozenset[str], normalized: bool) -> _Search:
        key = (wanted, refused, normalized)
        search = self._searches.get(key)
        if search is None:
            tokens = [token for token in self.tokens if token.normalized == normalized]
            texts = {self._normalize(t.content) if normalized else t.content: t for t in tokens}
            search = _Search(texts, wanted, refused)
            if len(self._searches) >= _MOST_SEARCHES:
                self._searches = {}
            self._searches[key] = search
        return search


class _Search:
    """Finds some tokens, given by the text that each is in a text."""

    def __init__(
        self, tokens: Mapping[str, AddedToken], wanted: Collection[str], refused: Collection[str]
    ) -> None:
        self._tokens = {
            t: token for t, token in tokens.items() if token.content in wanted or not token.special
        }
        self._regex = special_regex(self._tokens)
        self._refused = special_regex(t for t, token in tokens.items() if token.content in refused)

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """(text, None) for text that is not empty between the tokens, (its text, its id) for each of them."""
        wrong = self._refused.search(text) if self._refused is not None else None
        if wrong is not None:
            token = wrong.group()
            raise InputError(
                f"the text holds the special token {token!r} at position {wrong.start()}; pass "
                f"allowed_special={{{token!r}}} if it is meant as one, disallowed_special=() to encode it as text"
            )
        start = 0
        for match in self._regex.finditer(text) if self._regex is not None else ():
            found = self._tokens[match.group()]
            begin, end = match.span()
            if found.single_word and (
                _ENDS_WITH_WORD.match(text, 0, begin) or _BEGINS_WITH_WORD.match(text, end)
            ):
                continue
            if found.lstrip:
                begin = max(start, _SPACES_BEFORE.match(text, 0, begin).start())
            if found.rstrip:
                end = _SPACES.match(text, end).end()
            if begin > start:
                yield text[start:begin], None
            yield text[begin:end], found.id
            start = end
        if start < len(text):
            yield text[start:], None


def numbers_in_tokenizers(vocab: Mapping[str, int], contents: Iterable[str]) -> list[int]:
    """The ids that the tokenizers library gives added tokens, whatever the file says.

    One that is in the vocabulary of the model has the id that it has there. Others follow the number of tokens of
    the vocabulary, or the greatest id of an added token before them that is not below it.
    """
    ids: list[int] = []
    for content in contents:
        id = vocab.get(content)
        ids.append(max([len(vocab), *(before + 1 for before in ids)]) if id is None else id)
    return ids

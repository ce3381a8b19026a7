"""What changes a text before it is split: the steps of `normalizer` in tokenizer.json."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllm.system.errors import InputError
from tinyllm.tokenizer.steps import Expression, Step

# No character becomes more than 18 by a normalization form.
_MOST_GROWTH = 20


class Normalizer(Step):
    """A step from text to text."""

    def __call__(self, text: str) -> str:
        """The normalized text."""
        raise TypeError(f"{type(self).__name__} defines no __call__(); a Normalizer must")


@dataclass(frozen=True)
class _UnicodeForm(Normalizer):
    """A normalization form of Unicode (Unicode Standard Annex 15), which has the name of the class."""

    def __call__(self, text: str) -> str:
        return unicodedata.normalize(type(self).__name__, text)  # type: ignore[arg-type]


class NFC(_UnicodeForm):
    """Unicode's canonical composition."""


class NFD(_UnicodeForm):
    """Unicode's canonical decomposition."""


class NFKC(_UnicodeForm):
    """Unicode's compatibility composition."""


class NFKD(_UnicodeForm):
    """Unicode's compatibility decomposition."""


@dataclass(frozen=True)
class Lowercase(Normalizer):
    """Small letters, each character on its own."""

    def __call__(self, text: str) -> str:
        # Not of the whole text, where a sigma at the end of a word would become another letter.
        return text.lower() if text.isascii() else "".join(map(str.lower, text))


@dataclass(frozen=True)
class Prepend(Normalizer):
    """Text in front of what is not empty."""

    prepend: str

    def __call__(self, text: str) -> str:
        return self.prepend + text if text else text


@dataclass(frozen=True)
class Replace(Normalizer):
    """Each match of `pattern` becomes `content`."""

    pattern: Expression
    content: str

    def __call__(self, text: str) -> str:
        if self.pattern.literal:
            return text.replace(self.pattern.text, self.content)
        spans = self.pattern.pattern.marked_spans(text)
        return "".join(self.content if is_match else text[start:end] for start, end, is_match in spans)


NORMALIZERS: dict[str, type[Normalizer]] = {
    kind.__name__: kind for kind in (NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace)
}


def normalized(steps: Sequence[Normalizer], text: str) -> str:
    """`text` after each of the steps.

    Raises:
        InputError: they make far more of it than text is.
    """
    most = _MOST_GROWTH * (1 + len(text))
    for step in steps:
        text = step(text)
        if len(text) > most:
            raise InputError(
                f"the normalizer makes a text more than {_MOST_GROWTH} times as long; is the file meant well?"
            )
    return text

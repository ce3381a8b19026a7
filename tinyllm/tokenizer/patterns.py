"""The regular expressions that split text into pieces before byte-pair encoding, by name.

A merge never crosses the border of a piece. The named patterns are those of published models; every
match is at least one character long, and together the matches are the whole text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from tinyllm.system.errors import InputError
from tinyllm.system.wording import require_known, shown

# The suffixes of English that o200k and llama3 split off, in either case.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# No possessive quantifiers: Oniguruma, which the tokenizers library uses, reads {1,3}+ otherwise than
# `regex` and Rust do. For the same reason the end of the text is (?![\s\S]) and not $.
PATTERNS: dict[str, str] = {
    # Radford et al. (2019), GPT-2
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # cl100k_base: white space at the end of the text stays in one piece, unlike in llama3
    "gpt4": _LLAMA3.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+"),
    # Dubey et al. (2024), Llama 3; llama.cpp calls it llama-bpe
    "llama3": _LLAMA3,
    # Qwen 2 and 3: each numeral on its own
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    # o200k_base: words split where a capital follows a small letter
    "o200k": "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
}

# What other files call the same splits: expression -> name.
_ALIASES: dict[str, str] = {
    **{expression: name for name, expression in PATTERNS.items()},
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s": "gpt4",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+": "llama3",
}

# What else people call them, in small letters and digits alone: other name -> name.
_OTHER_NAMES = {
    **dict.fromkeys(("r50k", "r50kbase", "p50k", "p50kbase", "gpt3", "roberta"), "gpt2"),
    **dict.fromkeys(("cl100k", "cl100kbase", "gpt35", "gpt35turbo", "gpt4turbo"), "gpt4"),
    **dict.fromkeys(("llamabpe", "llama31", "llama32", "llama33"), "llama3"),
    **dict.fromkeys(("qwen", "qwen15", "qwen25", "qwen3"), "qwen2"),
    **dict.fromkeys(("o200kbase", "o200kharmony", "gpt4o", "gpt4omini", "gpt41", "gpt5"), "o200k"),
    **{name: name for name in PATTERNS},
}

# Longest time that an expression may take on a text: this many seconds, and as many again for each
# million characters. The named patterns take about 0.3.
_SECONDS_PER_MILLION = 10.0

# An expression may be a stranger's, and these let a short one take all memory, or minutes to compile.
_LONGEST = 10_000
_MOST_REPEATS = 100_000
_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_RECURSION = re.compile(r"\(\?(?:R|[+-]?\d+|&|P>)")


class Pattern:
    """A compiled pattern: its expression, its name if it is one of PATTERNS, and the splitting by `regex`.

    Args:
        pattern: a name of PATTERNS, or a regular expression in the syntax of `regex`. Text between its matches
            becomes pieces too, so nothing is lost.
        is_name: whether a name is meant where it is one, and not the expression that finds it.

    Raises:
        InputError: the expression is not valid, or what somebody else calls one of PATTERNS.
    """

    def __init__(self, pattern: str, is_name: bool = True) -> None:
        if not isinstance(pattern, str):
            raise InputError(f"the pattern must be a str, got {shown(pattern)}: one of {', '.join(PATTERNS)}")
        meant = _OTHER_NAMES.get(re.sub(r"[-_.]", "", pattern.lower()), pattern)
        if is_name and meant != pattern:
            raise InputError(f"unknown pattern {shown(pattern)}; did you mean {meant!r}?")
        self.expression = PATTERNS.get(pattern, pattern) if is_name else pattern
        self.name: str | None = _ALIASES.get(self.expression)
        if self.name is not None:
            self.expression = PATTERNS[self.name]
        try:
            self.expression.encode()  # half of a UTF-16 pair could not be saved
            _require_small(self.expression)
            self._regex = regex.compile(self.expression)
            if self._regex.flags & regex.REVERSE:
                raise ValueError("it searches backwards")
        except (regex.error, ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise InputError(
                f"the pattern {shown(pattern)} is neither one of {', '.join(PATTERNS)} nor a regular "
                f"expression: {error}"
            ) from None

    def split(self, text: str) -> list[str]:
        """The pieces of `text`, in order; joined they are the text.

        Raises:
            InputError: the expression takes far longer than a text of this length should.
        """
        return [text[start:end] for start, end in self.spans(text)]

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of each piece of `text`, in characters."""
        for start, end, _ in self.marked_spans(text):
            if end > start:
                yield start, end

    def marked_spans(self, text: str) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it is a match) of each match and of what lies between matches; a match may be empty."""
        seconds = _SECONDS_PER_MILLION * (1 + len(text) / 1e6)
        end = 0
        try:
            for match in self._regex.finditer(text, timeout=seconds):
                if match.start() > end:
                    yield end, match.start(), False
                yield match.start(), match.end(), True
                end = match.end()
        except (RecursionError, MemoryError) as error:
            raise InputError(f"the pattern {shown(self.expression)} ran out of memory: {error}") from None
        except TimeoutError:
            raise InputError(
                f"the pattern {shown(self.expression)} took more than {seconds:.0f} s on a text of {len(text):,} "
                "characters; it backtracks too much, so take one of " + ", ".join(PATTERNS)
            ) from None
        if end < len(text):
            yield end, len(text), False

    def __repr__(self) -> str:
        return f"Pattern({self.name or self.expression!r})"


def chosen_pattern(pattern: str) -> Pattern:
    """Pattern(pattern), where a person chose it.

    Raises:
        InputError: what Pattern refuses, and a word that is no name: as an expression it would hardly match anything.
    """
    compiled = Pattern(pattern)
    if re.fullmatch(r"[\w-]*", pattern):
        require_known("pattern", pattern, PATTERNS)
    return compiled


def _require_small(expression: str) -> None:
    """Raise ValueError for an expression that may need far more memory or time than text can be worth."""
    if len(expression) > _LONGEST:
        raise ValueError(f"it has {len(expression):,} characters, at most {_LONGEST:,} are allowed")
    if _RECURSION.search(expression):
        raise ValueError("it calls itself, which is not supported")
    repeats = 1
    for counts in _COUNT.findall(expression):
        # All multiplied, since repeats may stand inside each other.
        repeats *= max(1, *(int(count[:9] or "1") for count in counts))
    if repeats > _MOST_REPEATS:
        raise ValueError(f"its repeats make more than {_MOST_REPEATS:,}")


# What a code point is to the patterns: one flag each, in one byte.
LETTER, NUMBER, SPACE, MARK, UPPER, LOWER, NEWLINE, END = (1 << i for i in range(8))

# Stands between texts that are split together, as if each were alone. No text can hold it: it is half of a UTF-16 pair.
END_CHARACTER = "\ud800"

_CLASSES = (
    (r"[\p{Lu}\p{Lt}]", LETTER | UPPER),
    (r"\p{Ll}", LETTER | LOWER),
    (r"[\p{Lm}\p{Lo}]", LETTER),
    (r"\p{N}", NUMBER),
    (r"\p{M}", MARK),
    (r"\s", SPACE),
)


@functools.cache
def code_point_classes() -> npt.NDArray[np.uint8]:
    """(0x110000,) the flags of each code point, asked of `regex`, so that both agree on what a letter is."""
    codes = np.arange(0x110000, dtype="<u4")
    codes[0xD800:0xE000] = 0xFFFF  # half pairs cannot be in a text; U+FFFF is no character
    text = codes.tobytes().decode("utf-32-le")
    flags = np.zeros(0x110000, dtype=np.uint8)
    values = [value for _, value in _CLASSES]
    expression = "|".join(f"({characters}+)" for characters, _ in _CLASSES)
    match: Any
    for match in regex.finditer(expression, text):
        flags[match.start() : match.end()] = values[match.lastindex - 1]
    flags[[0x0A, 0x0D]] |= NEWLINE
    flags[ord(END_CHARACTER)] = END
    flags.flags.writeable = False
    return flags

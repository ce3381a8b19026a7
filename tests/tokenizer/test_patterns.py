"""Splitting as array work gives the pieces that the `regex` expression gives, on any text."""

import itertools
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import patterns as patterns_module
from tinyllm.tokenizer.patterns import (
    LETTER,
    LOWER,
    MARK,
    NEWLINE,
    NUMBER,
    PATTERNS,
    SPACE,
    UPPER,
    Pattern,
    code_point_classes,
)
from tinyllm.tokenizer.pretokenize import chunks, code_points, last_border, piece_starts

OF_CATEGORY = LETTER | NUMBER | MARK | UPPER | LOWER
MANY = 4 * settings().max_examples

# What the expressions treat by itself, and what Unicode makes hard.
HARD = (
    "aAzZsStTlLvVeErRdDmM'’ſ \t\n\r01१!/.-–中ǅʰ\u0301\U0001f469\u200d\ufe0f\xa0\u2028\x1c\x85\x00½Ⅷ\u0903ªK"
)
hard_texts = st.text(st.sampled_from(HARD), max_size=60)
any_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# Contractions, runs and line ends come together more often than single characters would.
PARTS = [
    "'s",
    "'LL",
    "'re",
    "'ſ",
    "  ",
    "\n\n",
    "\r\n",
    " \n",
    "/\n/",
    "word",
    "Word",
    "WORD",
    "1234",
    "!?",
    "中A",
]
joined_texts = st.lists(st.one_of(st.sampled_from(PARTS), st.sampled_from(HARD)), max_size=25).map("".join)


def pieces_of(text: str, pattern: Pattern) -> list[str]:
    """The pieces by the array splitter."""
    if not text:
        return []
    starts = piece_starts(text, pattern).tolist()
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def expected_pieces(text: str, pattern: Pattern) -> list[str]:
    """The matches of the expression, which for a named pattern are the whole text."""
    found = regex.findall(PATTERNS[str(pattern.name)], text)
    assert "".join(found) == text
    return list(found)


@pytest.mark.parametrize("name", PATTERNS)
class TestNamedPattern:
    @given(text=any_texts)
    @settings(max_examples=MANY)
    def test_any_text(self, name: str, text: str) -> None:
        pattern = Pattern(name)
        assert pieces_of(text, pattern) == pattern.split(text) == expected_pieces(text, pattern)

    @given(text=st.one_of(hard_texts, joined_texts))
    @settings(max_examples=3 * MANY)
    @example("'S't'LL're'ſ don'tX 'd'")
    @example("ab'sC'LLd中'reA")
    @example("!\r\n/a\n/\n b  c \n\n d1234 5!  ")
    @example("!\u0301a 中A\u0301b中Ab A中B aA\u0301A")
    @example("  \n \n  x   ")
    def test_hard_characters(self, name: str, text: str) -> None:
        pattern = Pattern(name)
        assert pieces_of(text, pattern) == pattern.split(text) == expected_pieces(text, pattern)

    def test_every_short_text(self, name: str) -> None:
        """All texts of up to three characters, one of each class, by themselves; those of four side by side."""
        pattern = Pattern(name)
        characters = "aA中\u03011 \n'!/s"
        for length in (1, 2, 3):
            for text in map("".join, itertools.product(characters, repeat=length)):
                assert pieces_of(text, pattern) == pattern.split(text), repr(text)
        side_by_side = "x x".join(map("".join, itertools.product(characters, repeat=4)))
        assert pieces_of(side_by_side, pattern) == pattern.split(side_by_side)

    @given(text=st.one_of(any_texts, hard_texts, joined_texts), size=st.integers(1, 12))
    @settings(max_examples=MANY)
    @example("a b c d", 1)
    @example("a \n\n b  c'll d中 A1 2", 3)
    def test_chunks(self, name: str, text: str, size: int) -> None:
        pattern = Pattern(name)
        parts = list(chunks(text, pattern, size))
        assert all(parts)
        assert "".join(parts) == text
        assert [piece for part in parts for piece in pieces_of(part, pattern)] == pattern.split(text)

    def test_chunks_are_small_where_they_can_be(self, name: str) -> None:
        parts = list(chunks("word " * 1000, Pattern(name), 64))
        assert len(parts) > 50
        assert max(map(len, parts)) <= 65

    @given(text=joined_texts, rest=joined_texts)
    @settings(max_examples=MANY)
    def test_last_border(self, name: str, text: str, rest: str) -> None:
        """A border stays one, whatever stands after the text."""
        end = last_border(text)
        pattern = Pattern(name)
        assert 0 <= end <= max(0, len(text) - 1)
        assert pattern.split(text[:end]) + pattern.split(text[end:] + rest) == pattern.split(text + rest)


def test_texts_longer_than_a_window() -> None:
    """A border far from the end is found too, and text without one stays whole."""
    text = "a " + "中" * 5000
    assert last_border(text) == 1
    assert list(chunks(text, Pattern("llama3"), 10)) == ["a", text[1:]]
    assert list(chunks("中" * 5000, Pattern("llama3"), 10)) == ["中" * 5000]


def test_worked_examples() -> None:
    """Pieces as a reader of the expressions would cut them."""
    text = "I'LL pay 12345\u0301 camelCase's  end\n"
    assert Pattern("gpt2").split(text) == [
        "I", "'", "LL", " pay", " 12345", "\u0301", " camelCase", "'s", " ", " end", "\n",
    ]  # fmt: skip
    assert Pattern("llama3").split(text) == [
        "I", "'LL", " pay", " ", "123", "45", "\u0301", " camelCase", "'s", " ", " end", "\n",
    ]  # fmt: skip
    assert Pattern("o200k").split(text) == [
        "I'LL", " pay", " ", "123", "45", "\u0301", " camel", "Case's", " ", " end", "\n",
    ]  # fmt: skip
    # The only difference of the two: white space at the end of a text with a line end in it.
    assert Pattern("gpt4").split("a \n ") == ["a", " \n "]
    assert Pattern("llama3").split("a \n ") == ["a", " \n", " "]


@given(text=any_texts)
def test_own_expression_loses_nothing(text: str) -> None:
    """Text between the matches becomes pieces; the matches are those of `regex`."""
    for expression in (r"\d+", r"\w*", "b", r"(?<=a)", r"[^a]+?"):
        pattern = Pattern(expression)
        assert pattern.name is None
        pieces = pattern.split(text)
        assert "".join(pieces) == text
        assert all(pieces)
        assert pieces_of(text, pattern) == pieces
        assert set(filter(None, regex.findall(expression, text))) <= set(pieces)
        assert list(chunks(text, pattern, 2)) == ([text] if text else [])


# ---- Classes of code points --------------------------------------------------------------------


def test_classes_agree_with_unicodedata() -> None:
    """For code points that Python's version of Unicode and that of `regex` both have assigned."""
    classes = code_point_classes()
    assert classes.shape == (0x110000,)
    unassigned = regex.compile(r"\p{Cn}")
    flags = {"Lu": LETTER | UPPER, "Lt": LETTER | UPPER, "Ll": LETTER | LOWER, "Lm": LETTER, "Lo": LETTER}
    flags |= dict.fromkeys(("Nd", "Nl", "No"), NUMBER) | dict.fromkeys(("Mn", "Mc", "Me"), MARK)
    known = of_other_case = 0
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category in ("Cn", "Cs") or unassigned.match(chr(code)):
            continue
        known += 1
        expected = flags.get(category, 0)
        assert int(classes[code]) & (LETTER | NUMBER | MARK) == expected & ~(UPPER | LOWER), f"U+{code:04X}"
        of_other_case += int(classes[code]) & (UPPER | LOWER) != expected & (UPPER | LOWER)
    assert known > 280_000
    assert of_other_case < 10  # letters such as U+0295 have lost their case in later versions of Unicode


def test_classes_are_those_of_regex() -> None:
    """White space and line ends, of every code point; half pairs have no class."""
    classes = code_point_classes()
    space = regex.compile(r"\s")
    for code in np.flatnonzero(classes & SPACE).tolist():
        assert space.fullmatch(chr(code)), f"U+{code:04X}"
    for character in " \t\n\v\f\r\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000":
        assert classes[ord(character)] & SPACE, f"U+{ord(character):04X}"
    assert len(space.findall("".join(map(chr, range(0xD800))))) == np.count_nonzero(classes[:0xD800] & SPACE)
    assert np.flatnonzero(classes & NEWLINE).tolist() == [10, 13]
    assert not (classes[0xD800:0xE000] & (OF_CATEGORY | SPACE | NEWLINE)).any()


# ---- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PATTERNS, "b+"])
@pytest.mark.parametrize("text", ["ab\ud800", "ab\udfffc", "ab\ud83d\ude00"])
def test_half_pairs_are_refused(name: str, text: str) -> None:
    with pytest.raises(InputError, match=r"U\+D[8F].. at position 2"):
        piece_starts(text, Pattern(name))
    with pytest.raises(InputError, match=r"U\+D[8F].. at position 2"):
        code_points(text)


@pytest.mark.parametrize("expression", ["(a|aa)+$", "(?:a|a)+$"])
def test_catastrophic_expression_ends(monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    monkeypatch.setattr(patterns_module, "_SECONDS_PER_MILLION", 0.1)
    text = "a" * 40 + "!"
    with pytest.raises(InputError, match="backtracks too much"):
        Pattern(expression).split(text)
    with pytest.raises(InputError, match="backtracks too much"):
        piece_starts(text, Pattern(expression))


def test_expression_that_only_looks_catastrophic(monkeypatch: pytest.MonkeyPatch) -> None:
    """`regex` sees through this one; were it otherwise, it would have to end with an error."""
    monkeypatch.setattr(patterns_module, "_SECONDS_PER_MILLION", 0.1)
    text = "a" * 40 + "b"
    try:
        pieces = Pattern("(a+)+$").split(text)
    except InputError:
        return
    assert pieces == [text]


@pytest.mark.parametrize(
    "expression",
    [
        *["(", "[a", "*", "(?<=", r"\p{Nonsense}", "(?P<1>a)", "(" * 100_000, r"\1", "gpt3(", r"\L<words>"],
        *["(?au)a", "(?V0)(?V1)a"],  # `regex` refuses these with a ValueError
    ],
)
def test_invalid_expression(expression: str) -> None:
    with pytest.raises(InputError, match="neither one of gpt2, gpt4, llama3, qwen2, o200k nor") as error:
        Pattern(expression)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("expression", [r"(?r)\w+", r"(?=ab\K)", r"(?=a\Kb)"])
def test_expression_that_goes_backwards(monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    """Either refused, or the pieces are the text."""
    monkeypatch.setattr(patterns_module, "_SECONDS_PER_MILLION", 0.1)
    text = "xab abba ab"
    try:
        pieces = Pattern(expression).split(text)
    except InputError:
        return
    assert "".join(pieces) == text


# ---- Names -------------------------------------------------------------------------------------

# What tiktoken 0.14 and Llama 3's tokenizer.json call the same splits.
OTHER_SPELLINGS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


PHI4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


@given(text=st.one_of(any_texts, hard_texts, joined_texts))
@settings(max_examples=MANY)
def test_phi4_splits_as_llama3(text: str) -> None:
    assert Pattern(PHI4).name == "llama3"
    assert [match.group() for match in regex.finditer(PHI4, text)] == Pattern("llama3").split(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_other_spellings_give_the_name(name: str) -> None:
    for expression in (name, PATTERNS[name], OTHER_SPELLINGS[name]):
        assert Pattern(expression).name == name
        assert Pattern(expression).expression == PATTERNS[name]


@pytest.mark.parametrize("name", PATTERNS)
@given(text=st.one_of(any_texts, hard_texts, joined_texts))
@settings(max_examples=MANY)
def test_other_spellings_split_the_same(name: str, text: str) -> None:
    assert regex.findall(OTHER_SPELLINGS[name], text) == Pattern(name).split(text)


def test_first_spelling_of_gpt2() -> None:
    """That of the GPT-2 repository and of the tokenizers library."""
    expression = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert Pattern(expression).name == "gpt2"
    assert Pattern("gpt2 ").name is None

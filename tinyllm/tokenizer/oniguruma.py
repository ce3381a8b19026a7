"""Which regular expressions mean the same to `regex` and to Oniguruma, the engine of the tokenizers library.

Much that both accept differs: `^` is the start of each line to Oniguruma, `\\h` a hexadecimal digit, `{1,3}+` a
repeat of a repeat, `&&` in a class an intersection. So what is known to be the same is read, and all else refused.
"""

from __future__ import annotations

import re

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown

# Of the classes, \w and \b are left out: to `regex` a half is a character of a word.
_CLASS_ESCAPES = "sSdD"
_CHARACTER_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_CATEGORIES = "L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?"
_SCRIPTS = "Arabic|Cyrillic|Devanagari|Greek|Han|Hangul|Hebrew|Hiragana|Katakana|Latin|Thai"
_PROPERTY = re.compile(rf"[pP]\{{(?:{_CATEGORIES}|{_SCRIPTS})\}}")
_CODE = re.compile(r"x[0-7][0-9A-Fa-f]|u[0-9A-Fa-f]{4}")
_GROUP = re.compile(r"\?(:|>|=|!|<=|<!|i:)")
_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d{1,4})\}(?![?+])|\{(\d{1,4}),(\d{0,4})\}\??")
# Without regard to case, Oniguruma also takes one character for two of these, as a ligature.
_LIGATURE = re.compile(r"[fs\]][fistl\[]", re.IGNORECASE)


def require_same(expression: str) -> None:
    """Raise InputError unless `expression`, which `regex` accepts, is known to split alike in Oniguruma."""
    _Reader(expression).read()


class _Reader:
    """Reads an expression from left to right; what it is about to read begins at `at`."""

    def __init__(self, expression: str) -> None:
        self.text = expression
        self.at = 0
        self.sets: set[str] = set()  # the classes in the brackets that are being read

    def read(self) -> None:
        if self.alternatives() == 0:
            # After an empty match one engine looks on at the same place, and the other at the next.
            self.refuse("which can match nothing")
        if self.at < len(self.text):
            self.refuse(f"with {shown(self.text[self.at :])}")

    def refuse(self, why: str) -> None:
        raise InputError(
            f"the tokenizers library, which reads expressions as Oniguruma does, may read {shown(self.text)} {why} "
            "otherwise than is meant here; use what means the same to both: literals, classes such as [^\\s\\p{L}], "
            "groups, and repeats"
        )

    def alternatives(self, fixed: bool = False) -> int:
        """Read up to the end of a group; the fewest characters that it matches. `fixed`: repeats are refused."""
        fewest = [0]
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                fewest.append(0)
            else:
                fewest[-1] += self.repeated(fixed)
        return min(fewest)

    def repeated(self, fixed: bool) -> int:
        start = self.at
        least = self.atom()
        quantifier = _QUANTIFIER.match(self.text, self.at)
        if quantifier is None:
            return least
        self.at = quantifier.end()
        if (
            fixed
            or least == 0
            or _QUANTIFIER.match(self.text, self.at)
            or self.text[self.at :][:1] in ("+", "{")
        ):
            self.refuse(f"with the repeat {shown(self.text[start : self.at + 1])}")
        if quantifier.group().startswith("{"):
            smallest, largest = quantifier[1] or quantifier[2], quantifier[3]
            if largest and int(largest) < int(smallest):
                self.refuse(f"with the repeat {shown(quantifier.group())}")
            return least * int(smallest)
        return least * quantifier.group().startswith("+")

    def atom(self) -> int:
        """Read one character, class or group."""
        character = self.text[self.at]
        self.at += 1
        if character == "(":
            return self.group()
        if character == "[":
            self.character_class()
        elif character == "\\":
            if self.text[self.at :][:1] == "A":
                self.at += 1
                return 0
            self.escape()
        elif character in "^$*+?{}]":
            self.refuse(f"with {character!r}")
        return 1

    def group(self) -> int:
        kind = _GROUP.match(self.text, self.at)
        if kind is None and self.text[self.at :][:1] == "?":
            self.refuse(f"with the group {shown(self.text[self.at - 1 : self.at + 3])}")
        self.at = kind.end() if kind else self.at
        start = self.at
        name = kind[1] if kind else ":"
        least = self.alternatives(fixed=name.startswith("<"))
        if name == "i:":
            body = self.text[start : self.at]
            if not re.fullmatch(r"[A-Za-z'| \[\]]*", body) or _LIGATURE.search(body):
                self.refuse(f"with {shown(body)} without regard to case")
        self.at += 1
        return least if name in (":", ">", "i:") else 0

    def escape(self) -> str | None:
        """Read what stands behind a backslash; the character, unless it is a class."""
        rest = self.text[self.at : self.at + 24]
        found = _PROPERTY.match(rest)
        if found is not None or (rest and rest[0] in _CLASS_ESCAPES):
            end = found.end() if found is not None else 1
            self.at += end
            self.sets.add(rest[:end])
            return None
        code = _CODE.match(rest)
        if code is not None:
            self.at += code.end()
            return chr(int(code.group()[1:], 16))
        if not rest or (rest[0].isalnum() and rest[0] not in _CHARACTER_ESCAPES) or not rest[0].isascii():
            self.refuse(f"with {shown(chr(92) + rest[:1])}")
        self.at += 1
        return _CHARACTER_ESCAPES.get(rest[0], rest[0])

    def character_class(self) -> None:
        negated = self.text[self.at :][:1] == "^"
        self.at += negated
        start = self.at
        self.sets = set()
        before: str | None = None  # the character that a range may begin with
        while self.at < len(self.text) and (self.text[self.at] != "]" or self.at == start):
            character: str | None = self.text[self.at]
            pair = self.text[self.at : self.at + 2]
            if (
                character == "["
                or pair in ("&&", "||", "--", "~~")
                or (character == "]" and self.at == start)
            ):
                self.refuse(f"with {shown(pair)} in a class")
            self.at += 1
            if character == "-" and self.at - 1 > start and self.text[self.at :][:1] != "]":
                end: str | None = self.text[self.at]
                self.at += 1
                if end == "\\":
                    end = self.escape()
                if before is None or end is None or end == "[" or end < before:
                    self.refuse(f"with a range to {shown(end)}")
                before = None
                continue
            before = self.escape() if character == "\\" else character
        self.at += 1
        if negated and any(name[0].swapcase() + name[1:] in self.sets for name in self.sets):
            self.refuse("with a class and its opposite in [^]")  # nothing, but to `regex` everything

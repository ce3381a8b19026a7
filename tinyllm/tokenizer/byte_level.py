"""GPT-2's way to write bytes as printable characters, in which vocab.json and tokenizer.json hold tokens."""

from __future__ import annotations


def _alphabet() -> list[str]:
    """The character of each byte: itself where Latin-1 prints it, else the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


ALPHABET = _alphabet()
_BYTE_OF = {ord(character): byte for byte, character in enumerate(ALPHABET)}
_CHARACTER_OF = dict(enumerate(ALPHABET))


def to_characters(token: bytes) -> str:
    """One character for each byte."""
    return token.decode("latin-1").translate(_CHARACTER_OF)


def to_bytes(characters: str) -> bytes:
    """The inverse of to_characters; raises ValueError for a character that stands for no byte."""
    return characters.translate(_BYTE_OF_OR_REFUSED).encode("latin-1")


# Latin-1 cannot encode the replacement, so that what stands for no byte is an error (UnicodeEncodeError is a
# ValueError).
_BYTE_OF_OR_REFUSED = {**dict.fromkeys(range(256), 512), **_BYTE_OF}

"""tokenizer.json of byte-level byte-pair encoding, as the tokenizers library of Hugging Face writes it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.added_tokens import AddedToken, numbers_in_tokenizers
from tinyllm.tokenizer.byte_level import ALPHABET, to_bytes, to_characters
from tinyllm.tokenizer.splits import ByteLevel
from tinyllm.tokenizer.steps import read_steps
from tinyllm.tokenizer.surroundings import Surroundings

DECODER = ByteLevel(add_prefix_space=False, use_regex=False)

# What the object of a model may hold besides its vocabulary and merges -> the values that are supported; None: any.
_MODEL: dict[str, tuple[Any, ...] | None] = {
    "type": ("BPE", None),
    "dropout": (None, 0, 0.0),
    "unk_token": None,
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": None,
    "fuse_unk": (None, False, True),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False, True),
    "regex_version": None,
    "vocab": None,
    "merges": None,
}


@dataclass(frozen=True)
class Content:
    """What a tokenizer.json says, with tokens as bytes."""

    vocab: Mapping[bytes, int]
    merges: Sequence[tuple[bytes, bytes]]
    surroundings: Surroundings
    ignore_merges: bool = False
    end_of_word_suffix: str = ""


def to_json(content: Content) -> dict[str, Any]:
    """The JSON object of tokenizer.json.

    Raises:
        InputError: the tokenizers library would give other ids to a special token.
    """
    vocab = {to_characters(token): id for token, id in content.vocab.items()}
    _add_numbered(vocab, content)
    kept = content.surroundings.kept
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": kept.get("unk_token"),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": content.end_of_word_suffix or None,
        "fuse_unk": kept.get("fuse_unk", False),
        "byte_fallback": False,
        "ignore_merges": content.ignore_merges,
        # The ids of young characters depend on the version of Unicode that this package follows.
        "regex_version": regex.__version__,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": [[to_characters(left), to_characters(right)] for left, right in content.merges],
    }
    return content.surroundings.to_json(model)


def _add_numbered(vocab: dict[str, int], content: Content) -> None:
    """Put the added tokens into the vocabulary of the file where the tokenizers library would else number them
    otherwise.

    Raises:
        InputError: there it would have another meaning.
    """
    tokens = content.surroundings.added_tokens
    contents = [token.content for token in tokens]
    if numbers_in_tokenizers(vocab, contents) == [token.id for token in tokens]:
        return
    for token in tokens:
        id = vocab.setdefault(token.content, token.id)
        if id != token.id:
            raise InputError(
                f"the special token {shown(token.content)} with id {token.id} is written like the token of id {id} in "
                "tokenizer.json, so that the tokenizers library would take one for the other; name it otherwise"
            )
        if content.ignore_merges and _is_a_piece(token):
            raise InputError(
                f"the special token {shown(token.content)} with id {token.id} must stand in the vocabulary of "
                "tokenizer.json, where the tokenizers library would take it for a piece of text; name it otherwise"
            )


def _is_a_piece(token: AddedToken) -> bool:
    """Whether the token, written in the vocabulary, is also a piece of a text in which it is not recognised."""
    in_alphabet = set(token.content) <= set(ALPHABET)
    return in_alphabet and not (token.plain and to_bytes(token.content) == token.content.encode())


def from_json(content: Mapping[str, Any]) -> Content:
    """What the JSON object of a tokenizer.json says.

    Raises:
        InputError: it is damaged, or asks for something other than byte-level byte-pair encoding.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise InputError(f"model must be an object, got {shown(model)}")
    for key, value in model.items():
        supported = _MODEL.get(key, ())
        if supported is not None and (value not in supported or type(value) not in map(type, supported)):
            raise InputError(f"model.{key} is {shown(value)}, which is not supported")
    suffix, unknown = model.get("end_of_word_suffix"), model.get("unk_token")
    if not isinstance(suffix, str | None) or not isinstance(unknown, str | None):
        raise InputError(
            f"model has the suffix {shown(suffix)} and unk_token {shown(unknown)}; they must be texts"
        )
    surroundings = Surroundings.from_json(content, unk_token=unknown, fuse_unk=bool(model.get("fuse_unk")))
    if sum(isinstance(step, ByteLevel) for step in surroundings.splitters) != 1:
        raise InputError(
            f"pre_tokenizer is {shown(content.get('pre_tokenizer'))}; it must have one step ByteLevel, without which "
            "tokens are not bytes"
        )
    decoders = read_steps(content.get("decoder"), "decoder", {"ByteLevel": ByteLevel})
    if content.get("decoder") is not None and len(decoders) != 1:
        raise InputError(f"decoder is {shown(content['decoder'])}; supported: ByteLevel")
    merges = parse_merges(model.get("merges"))
    added = {token.content: token.id for token in surroundings.added_tokens}
    parts = {token for pair in merges for token in (*pair, pair[0] + pair[1])}
    vocab = parse_vocab(model.get("vocab"), added, parts)
    # Of a merge that stands twice, the tokenizers library knows the last place.
    once = [*dict.fromkeys(reversed(merges))][::-1]
    return Content(vocab, once, surroundings, bool(model.get("ignore_merges")), suffix or "")


def parse_vocab(
    vocab: Any, added: Mapping[str, int], parts_of_merges: Container[bytes] = ()
) -> dict[bytes, int]:
    """The ids of the tokens of a vocabulary in GPT-2's alphabet, but for the added ones that no text is merged to.

    Raises:
        InputError: it is no vocabulary, a token is not in the alphabet, an added one has another id.
    """
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(f"the vocabulary must be an object of tokens and ids, got {shown(vocab)}")
    result: dict[bytes, int] = {}
    for token, id in vocab.items():
        if token in added and added[token] != id:
            raise InputError(
                f"the added token {shown(token)} has the id {shown(added[token])}, and {shown(id)} in the vocabulary"
            )
        try:
            string = to_bytes(token)
        except ValueError:
            if token in added:
                continue
            raise InputError(
                f"the token {shown(token)} of the vocabulary is not written in GPT-2's characters for bytes"
            ) from None
        if token not in added or len(string) == 1 or string in parts_of_merges:
            result[string] = id
    return result


def parse_merges(merges: Any) -> list[tuple[bytes, bytes]]:
    """Merges written as "left right" or as [left, right], in GPT-2's alphabet."""
    if not isinstance(merges, list):
        raise InputError(f"merges must be a list, got {shown(merges)}")
    result: list[tuple[bytes, bytes]] = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) and t for t in pair):
            raise InputError(f"merge {rank} must be two tokens, got {shown(merge)}")
        try:
            result.append((to_bytes(pair[0]), to_bytes(pair[1])))
        except ValueError:
            raise InputError(
                f"merge {rank}, {shown(merge)}, is not written in GPT-2's characters for bytes"
            ) from None
    return result

"""tokenizer.json of byte-pair encoding on characters with byte fallback: Llama 2, Mistral, Gemma."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.added_tokens import AddedToken
from tinyllm.tokenizer.normalizers import Normalizer, Prepend, Replace
from tinyllm.tokenizer.sentencepiece.pieces import BYTE_NAME, SPACE, Kind, Piece
from tinyllm.tokenizer.splits import Split, Splitter
from tinyllm.tokenizer.steps import Expression
from tinyllm.tokenizer.surroundings import Surroundings

_DECODERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

# What the object of a model may hold besides its vocabulary and merges -> the values that are supported.
_MODEL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE", None),
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False, True),
    "byte_fallback": (True,),
    "ignore_merges": (None, False, True),
}


@dataclass(frozen=True)
class Content:
    """What a tokenizer.json says."""

    pieces: Sequence[Piece]
    merges: Sequence[tuple[str, str]]
    surroundings: Surroundings
    ignore_merges: bool
    strips_space: bool


def spaces(add_dummy_prefix: bool, space: str) -> tuple[Normalizer, ...]:
    """The normalizers that write a space as `space`, with one in front of the text if wanted."""
    prefix = (Prepend(space),) if add_dummy_prefix else ()
    return prefix + ((Replace(Expression(" ", literal=True), space),) if space != " " else ())


def isolating(defined: Iterable[str]) -> tuple[Splitter, ...]:
    """The splits that isolate the user-defined pieces, the longest at each place."""
    parts = [re.sub(r"([\\.^$*+?()\[\]{}|])", r"\\\1", text) for text in longest_first(defined)]
    return (Split(Expression("|".join(parts)), "Isolated"),) if parts else ()


def longest_first(texts: Iterable[str]) -> list[str]:
    """The texts, longer ones first, so that an expression of them tries those first."""
    return sorted(texts, key=lambda text: (-len(text), text))


def decoder(strips_space: bool) -> dict[str, Any]:
    """The decoder that joins pieces, their bytes and spaces, and takes the space in front away."""
    return {"type": "Sequence", "decoders": [*_DECODERS, *[_STRIP] * strips_space]}


def of_pieces(pieces: Sequence[Piece], add_dummy_prefix: bool, space: str) -> Surroundings:
    """What stands around the pieces of a .model in tokenizer.json."""
    special = (Kind.CONTROL, Kind.UNKNOWN)
    return Surroundings(
        tuple(AddedToken(p.text, id) for id, p in enumerate(pieces) if p.kind in special),
        spaces(add_dummy_prefix, space),
        isolating(p.text for p in pieces if p.kind == Kind.USER_DEFINED),
        {
            "decoder": decoder(add_dummy_prefix and space == SPACE),
            "unk_token": next(p.text for p in pieces if p.kind == Kind.UNKNOWN),
        },
    )


def merges_of_scores(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that are a piece, the best score first.

    Raises:
        InputError: two pieces that are made have one score, or a piece has a character that is none.
    """
    score = {p.text: p.score for p in pieces if p.kind == Kind.NORMAL}
    known = {p.text for p in pieces}
    for text in score:
        lost = [c for c in text if c not in known]
        if lost and len(text) > 1:
            raise InputError(
                f"the piece {shown(text)} holds {lost[0]!r}, no piece, which tokenizer.json cannot say"
            )
    best_first = sorted(score, key=lambda text: -score[text])
    pairs = [(text[:i], text[i:]) for text in best_first for i in range(1, len(text))]
    merges = [pair for pair in pairs if pair[0] in score and pair[1] in score]
    made = dict.fromkeys(left + right for left, right in merges)
    for one, other in itertools.pairwise(made):
        if score[one] == score[other]:
            raise InputError(
                f"{shown(one)} and {shown(other)} have the same score, and tokenizer.json needs an order"
            )
    return merges


def to_json(content: Content) -> dict[str, Any]:
    """The JSON object of tokenizer.json; the vocabulary has the added tokens too, which so keep their ids."""
    kept = content.surroundings.kept
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": kept.get("unk_token"),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": kept.get("fuse_unk", True),
        "byte_fallback": True,
        "ignore_merges": content.ignore_merges,
        "vocab": {piece.text: id for id, piece in enumerate(content.pieces)},
        "merges": [list(merge) for merge in content.merges],
    }
    return content.surroundings.to_json(model)


def from_json(content: Mapping[str, Any]) -> Content:
    """What the JSON object of a tokenizer.json says.

    Raises:
        InputError: it is damaged, or asks for something other than this kind of byte-pair encoding.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("byte_fallback") is not True:
        raise InputError(f"model is {shown(model)}; it must be an object with byte_fallback true")
    for key, value in model.items():
        if key in ("vocab", "merges", "unk_token"):
            continue
        supported = _MODEL.get(key, ())
        if value not in supported or type(value) not in map(type, supported):
            raise InputError(f"model.{key} is {shown(value)}, which is not supported")
    surroundings = Surroundings.from_json(
        content, unk_token=model.get("unk_token"), fuse_unk=bool(model.get("fuse_unk"))
    )
    given = content.get("decoder")
    strips = given == decoder(True)
    if given != decoder(strips):
        raise InputError(
            f"decoder is {shown(given)}; supported: {shown(decoder(True))}, with Strip or without"
        )
    pieces = _pieces(model, surroundings)
    return Content(pieces, _merges(model, pieces), surroundings, bool(model.get("ignore_merges")), strips)


def _pieces(model: Mapping[str, Any], surroundings: Surroundings) -> list[Piece]:
    """The vocabulary by id, with the added tokens."""
    vocab, unknown = model.get("vocab"), model.get("unk_token")
    if not isinstance(vocab, dict) or not isinstance(unknown, str | None):
        raise InputError(
            f"model.vocab must be an object, got {shown(vocab)}, and model.unk_token a text or null, got "
            f"{shown(unknown)}"
        )
    kinds = {text: Kind.BYTE for text in vocab if BYTE_NAME.fullmatch(text)}
    ids: dict[str, Any] = dict(vocab)
    for token in surroundings.added_tokens:
        if ids.setdefault(token.content, token.id) != token.id:
            raise InputError(
                f"added_tokens has {shown(token.content)} with id {token.id}, and the vocabulary with "
                f"{shown(ids[token.content])}"
            )
        if token.special:
            kinds[token.content] = Kind.CONTROL
        elif token.content not in vocab:
            kinds[token.content] = Kind.USER_DEFINED
    if unknown is not None:
        kinds[unknown] = Kind.UNKNOWN
    if set(map(repr, ids.values())) != set(map(repr, range(len(ids)))):
        raise InputError(
            f"model.vocab and added_tokens must have the ids from 0, one each, got {shown(vocab)}"
        )
    return [Piece(text, 0.0, kinds.get(text, Kind.NORMAL)) for text in sorted(ids, key=ids.__getitem__)]


def _merges(model: Mapping[str, Any], pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Merges written as "left right" or as [left, right]; of one that stands twice the last."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise InputError(f"model.merges must be a list, got {shown(merges)}")
    known = {piece.text for piece in pieces}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"model.merges holds {shown(merge)}; each must be two pieces")
        left, right = pair
        if not {left, right, left + right} <= known:
            raise InputError(
                f"model.merges holds {shown(merge)}, of or to a piece that is not in the vocabulary"
            )
        pairs.append((left, right))
    return [*dict.fromkeys(reversed(pairs))][::-1]

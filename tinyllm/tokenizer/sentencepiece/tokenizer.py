"""SentencePiece's byte-pair encoding: characters are joined to the piece of the best score, unknown ones are bytes."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.base import TokenArray, Tokenizer, id_array, require_text, texts_of
from tinyllm.tokenizer.bpe.sources import Special, split_at_special
from tinyllm.tokenizer.pretokenize import code_points
from tinyllm.tokenizer.sentencepiece.pieces import (
    BYTE_NAME,
    SPACE,
    UNKNOWN_SURFACE,
    Kind,
    Piece,
    check,
    joined,
    surface,
)

# Text goes through in parts of about this many characters.
_WINDOW = 1 << 16
# Parts whose ids are kept, and the longest that are.
_MOST_KEPT = 1 << 16
_LONGEST_KEPT = 64


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's byte-pair encoding with byte fallback (Kudo and Richardson, 2018), as in Llama 2 and Mistral.

        tokenizer = read_sentencepiece("tokenizer.model")
        tokenizer.encode("To be")
        tokenizer.save("tokenizer.json")    # which the tokenizers library and transformers open

    Of all neighbours that together are a piece, those with the best score are joined, the leftmost first, until
    none are. What is then no piece becomes the tokens of its bytes, so every text has tokens. User-defined pieces
    are found first, the longest at each place, and never joined to anything. Control pieces and the unknown one
    are special tokens: as in SentencePiece they are never made from text, unless they are allowed; then the text
    on each side of one is encoded on its own, as by the tokenizers library.

    Args:
        pieces: the vocabulary by id: the 256 bytes, one unknown piece, and no piece twice.
        add_dummy_prefix: the text begins with a space that is not in it; decoding takes it away.
        escape_whitespaces: spaces become U+2581.
        unknown_surface: what the unknown piece is decoded to.

    Raises:
        InputError: the vocabulary is not like this, or has unused pieces.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        add_dummy_prefix: bool = True,
        escape_whitespaces: bool = True,
        unknown_surface: str = UNKNOWN_SURFACE,
    ) -> None:
        self.pieces = tuple(pieces)
        self.add_dummy_prefix = add_dummy_prefix
        self._space = SPACE if escape_whitespaces else " "
        self._byte_ids = check(self.pieces)
        self._normal = {p.text: id for id, p in enumerate(self.pieces) if p.kind == Kind.NORMAL}
        self._defined = {p.text: id for id, p in enumerate(self.pieces) if p.kind == Kind.USER_DEFINED}
        special = (Kind.CONTROL, Kind.UNKNOWN)
        self._special = {p.text: id for id, p in enumerate(self.pieces) if p.kind in special}
        self._defined_regex = re.compile("|".join(map(re.escape, _longest_first(self._defined))))
        self._priority = {text: -self.pieces[id].score for text, id in self._normal.items()}
        # Two characters that follow each other in no piece are never joined: text is cut between them.
        bigrams = {text[i : i + 2] for text in self._normal for i in range(len(text) - 1)}
        self._bigrams = np.sort(
            np.array([ord(pair[0]) << 21 | ord(pair[1]) for pair in bigrams], dtype=np.int64)
        )
        self._surfaces = [surface(piece, unknown_surface) for piece in self.pieces]
        self._kept: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._special)

    # ---- text to tokens ----

    def encode(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = ()
    ) -> list[int]:
        """The ids of `text` as a list; the arguments are those of encode_to_array."""
        ids: list[int] = self.encode_to_array(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        ).tolist()
        return ids

    def encode_to_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = ()
    ) -> TokenArray:
        """The ids of `text`, (num_tokens,), uint16 up to 65,536 pieces, else uint32.

        Args:
            allowed_special: the special tokens that are recognised in the text, or "all".
            disallowed_special: those that must not occur in it, or "all" that are not allowed.

        Raises:
            InputError: the text holds half of a UTF-16 pair, or a special token that is not allowed.
        """
        require_text(text)
        code_points(text)  # refuses what has no UTF-8, and says where in the whole text
        ids = np.fromiter(self._encode_parts(text, allowed_special, disallowed_special), np.uint32)
        return ids if self.dtype == np.uint32 else ids.astype(np.uint16)

    def _encode_parts(self, text: str, allowed: Special, disallowed: Special) -> Iterator[int]:
        for part, special in split_at_special(text, self._special, allowed, disallowed):
            if special is not None:
                yield special
            else:
                windows = (part[start : start + _WINDOW] for start in range(0, len(part), _WINDOW))
                yield from self.encode_iterable(windows)

    def encode_document(self, text: str, special_tokens: bool = True) -> TokenArray:
        return self.encode_to_array(text, allowed_special="all" if special_tokens else ())

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the parts of one text, such as an open file, one after the other, in bounded memory.

        They are those of all parts joined, wherever one part ends and the next begins.
        """
        held: list[str] = []
        length, wanted = 0, _WINDOW
        begun = False
        for text in texts if isinstance(texts, str) else texts_of(texts):
            require_text(text)
            held.append(self._normalized(text, first=not begun))
            begun = begun or bool(text)
            length += len(text)
            if length >= wanted:
                pending = "".join(held)
                end = self._last_border(pending)
                yield from self._encode_part(pending[:end])
                held, length = [pending[end:]], len(pending) - end
                # Text without a border is looked through again only when it has doubled.
                wanted = max(_WINDOW, 2 * length)
        yield from self._encode_part("".join(held))

    def _normalized(self, text: str, first: bool = True) -> str:
        prefix = self._space if self.add_dummy_prefix and first and text else ""
        return prefix + text.replace(" ", self._space)

    def _borders(self, text: str) -> npt.NDArray[np.int64]:
        """The places (n,) in `text` that no merge crosses, in order."""
        codes = code_points(text).astype(np.int64)
        pairs = codes[:-1] << 21 | codes[1:]
        if not self._bigrams.size:
            return np.arange(1, len(codes))
        at = np.minimum(np.searchsorted(self._bigrams, pairs), len(self._bigrams) - 1)
        return np.flatnonzero(self._bigrams[at] != pairs) + 1

    def _last_border(self, text: str) -> int:
        """The last place where `text` can be cut whatever follows it; 0 if there is none."""
        borders = self._borders(text)
        if self._defined:
            # A longer user-defined piece may begin where fewer characters than it has are left.
            borders = borders[borders <= len(text) - max(map(len, self._defined))]
            inside = np.zeros(len(text) + 1, dtype=np.bool_)
            for match in self._defined_regex.finditer(text):
                inside[match.start() + 1 : match.end()] = True
            borders = borders[~inside[borders]]
        return int(borders[-1]) if borders.size else 0

    def _encode_part(self, text: str) -> Iterator[int]:
        """The ids of normalized text."""
        start = 0
        for match in self._defined_regex.finditer(text) if self._defined else ():
            yield from self._encode_plain(text[start : match.start()])
            yield self._defined[match.group()]
            start = match.end()
        yield from self._encode_plain(text[start:])

    def _encode_plain(self, text: str) -> Iterator[int]:
        """The ids of normalized text without user-defined pieces."""
        if not text:
            return
        kept = self._kept
        for start, end in itertools.pairwise([0, *self._borders(text).tolist(), len(text)]):
            part = text[start:end]
            ids = kept.get(part)
            if ids is None:
                ids = self._merge(part)
                if len(part) <= _LONGEST_KEPT:
                    if len(kept) >= _MOST_KEPT:
                        kept.clear()
                    kept[part] = ids
            yield from ids

    def _merge(self, text: str) -> list[int]:
        """The ids of normalized text, looked at as one part."""
        ids: list[int] = []
        for symbol in joined(text, self._priority.get):
            id = self._normal.get(symbol)
            ids += [id] if id is not None else [self._byte_ids[byte] for byte in symbol.encode()]
        return ids

    def offsets(self, text: str) -> npt.NDArray[np.int64]:
        """Where each token of `text` lies, like Tokenizer.offsets; a token of the added space alone is at (0, 0)."""
        ids = self.encode_to_array(text)
        lengths = np.array(
            [1 if p.kind == Kind.BYTE else len(p.text.encode()) for p in self.pieces], np.int64
        )
        ends = np.cumsum(lengths[ids])
        data = np.frombuffer(self._normalized(text).encode(), dtype=np.uint8)
        character = np.cumsum(data & 0xC0 != 0x80) - 1  # of each byte
        found = np.stack([character[ends - lengths[ids]], character[ends - 1] + 1], axis=1)
        return np.maximum(found - self.add_dummy_prefix, 0)

    # ---- tokens to text ----

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`; each byte that belongs to no character of UTF-8 becomes U+FFFD.

        Raises:
            InputError: names the first id that is not in the vocabulary, and its position.
            TypeError: not one-dimensional, or not integers.
        """
        # A control piece, which is empty, keeps the bytes on its sides from making one character.
        runs = itertools.groupby(self._decoded(ids), key=bool)
        text = "".join(b"".join(run).decode("utf-8", "surrogateescape") for _, run in runs)
        return _without_surrogates(text)

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes of `ids`, exactly, without the added space. Raises what decode does."""
        return b"".join(self._decoded(ids))

    def token_bytes(self, id: int) -> bytes:
        """What the piece `id` stands for inside a text, its space included. Raises what decode does."""
        self._decoded([id])
        return self._surfaces[id]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text that each of `ids` adds, as Tokenizer.decode_stream gives it."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        begun = not self.add_dummy_prefix
        for id in ids:
            part = self.token_bytes(id)
            if part and not begun:
                begun = True
                part = part[self.pieces[id].text.startswith(SPACE) :]
            # What is empty keeps the bytes on its sides from making one character, as in decode.
            yield _without_surrogates(decoder.decode(part, final=not part))
        yield _without_surrogates(decoder.decode(b"", final=True))

    def _decoded(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> list[bytes]:
        """The bytes of each id, the added space taken away."""
        array = id_array(ids)
        wrong = (array < 0) | (array >= self.vocab_size)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise InputError(
                f"the id {array[place]} at position {place} is not in the vocabulary, whose ids are 0 to "
                f"{self.vocab_size - 1}; is it the tokenizer of this model?"
            )
        numbers = array.tolist()
        parts = [self._surfaces[id] for id in numbers]
        first = next((i for i, part in enumerate(parts) if part), None)
        if self.add_dummy_prefix and first is not None and self.pieces[numbers[first]].text.startswith(SPACE):
            parts[first] = parts[first][1:]
        return parts

    # ---- files ----

    def to_json(self) -> dict[str, Any]:
        """The JSON object of tokenizer.json. What the unknown piece is decoded to is not in it.

        The tokenizers library makes the same ids of it, but for two things: it takes the text of a control piece
        for this piece, and, of a model with user-defined pieces, text such as "<0x0A>" that stands alone between
        them for this byte.

        Raises:
            InputError: the tokenizers library could not make the same ids of it.
        """
        self._check_expressible()
        escape = self._space == SPACE
        prefix = {"type": "Prepend", "prepend": self._space}
        to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        steps = [prefix] * self.add_dummy_prefix + [_ESCAPE] * escape
        strip = [_STRIP] * (self.add_dummy_prefix and escape)
        special = [id for id, p in enumerate(self.pieces) if p.kind in (Kind.CONTROL, Kind.UNKNOWN)]
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id, "content": self.pieces[id].text, **dict.fromkeys(flags, False), "special": True}
                for id in special
            ],
            "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
            "pre_tokenizer": _split(self._defined),
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [to_space, *_DECODERS, *strip]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": next(p.text for p in self.pieces if p.kind == Kind.UNKNOWN),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                # The tokenizers library has no other way to keep what the split has found from being merged anew.
                "ignore_merges": bool(self._defined),
                "vocab": {piece.text: id for id, piece in enumerate(self.pieces)},
                "merges": [list(merge) for merge in self._merges()],
            },
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        model = content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(model, dict) or model.get("byte_fallback") is not True:
            raise InputError(f"model is {shown(model)}; it must be an object with byte_fallback true")
        if not isinstance(vocab, dict) or set(map(repr, vocab.values())) != set(map(repr, range(len(vocab)))):
            raise InputError(
                f"model.vocab must be an object of pieces with the ids from 0, got {shown(vocab)}"
            )
        kinds = {text: Kind.BYTE for text in vocab if BYTE_NAME.fullmatch(text)}
        kinds |= dict.fromkeys(_special(content.get("added_tokens"), vocab), Kind.CONTROL)
        kinds |= dict.fromkeys(_defined(content.get("pre_tokenizer")), Kind.USER_DEFINED)
        kinds |= {text: Kind.UNKNOWN for text in [model.get("unk_token")] if isinstance(text, str)}
        # The texts of special tokens are found before any merge.
        found = (Kind.CONTROL, Kind.UNKNOWN)
        merges = [pair for pair in _pairs(model.get("merges")) if kinds.get("".join(pair)) not in found]
        rank = {"".join(pair): place for place, pair in reversed(list(enumerate(merges)))}
        pieces = [
            Piece(t, -float(rank.get(t, 0)), kinds.get(t, Kind.NORMAL))
            for t in sorted(vocab, key=vocab.__getitem__)
        ]
        normalizer = content.get("normalizer") or {"type": "Sequence", "normalizers": []}
        steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
        steps = steps if isinstance(steps, list) else [normalizer]
        prepends = any(isinstance(step, dict) and step.get("type") == "Prepend" for step in steps)
        tokenizer = cls(pieces, prepends, _ESCAPE in steps)
        made = [rank["".join(pair)] for pair in merges]
        if made != sorted(made) or set(merges) != set(tokenizer._merges()):
            raise InputError(
                "model.merges are not all pairs that make a piece, piece by piece, as scores would order them"
            )
        expected = tokenizer.to_json()
        wanted = (expected["normalizer"] or {"normalizers": []})["normalizers"]
        checks: list[tuple[str, Any, Any]] = [("normalizer", steps, wanted)]
        checks += [(key, content.get(key), expected[key]) for key in ("pre_tokenizer", "decoder")]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            checks.append((f"model.{key}", model.get(key) or None, expected["model"][key] or None))
        for key, given, supported in checks:
            if given != supported:
                raise InputError(f"{key} is {shown(given)}; supported with these pieces: {shown(supported)}")
        return tokenizer

    def _merges(self) -> list[tuple[str, str]]:
        """All pairs of pieces that are a piece, the best score first."""
        normal = self._normal
        pairs = (
            (text[:i], text[i:])
            for text in sorted(normal, key=self._priority.__getitem__)
            for i in range(1, len(text))
        )
        return [pair for pair in pairs if pair[0] in normal and pair[1] in normal]

    def _check_expressible(self) -> None:
        """Raise InputError where tokenizer.json means something other than these pieces."""
        made = list(dict.fromkeys("".join(pair) for pair in self._merges()))
        for one, other in itertools.pairwise(made):
            if self._priority[one] == self._priority[other]:
                raise InputError(
                    f"{shown(one)} and {shown(other)} have the same score, and tokenizer.json needs an order"
                )
        for text, id in self._normal.items():
            lost = [c for c in text if c not in self._normal and c not in self._defined]
            if lost and len(text) > 1:
                raise InputError(
                    f"the piece {shown(text)} holds {lost[0]!r}, no piece, which tokenizer.json cannot say"
                )
            if self._defined and self._merge(text) != [id] and not self._defined_regex.search(text):
                raise InputError(
                    f"merging never makes the piece {shown(text)}, and tokenizer.json would take it whole beside "
                    "user-defined pieces; keep the .model file"
                )

    def __repr__(self) -> str:
        return (
            f"SentencePieceTokenizer(vocab_size={self.vocab_size}, add_dummy_prefix={self.add_dummy_prefix})"
        )


_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODERS = [{"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _without_surrogates(text: str) -> str:
    """`text` with U+FFFD for each byte that was not UTF-8."""
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


def _longest_first(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: (-len(text), text))


def _split(defined: Iterable[str]) -> dict[str, Any] | None:
    """The pre-tokenizer that isolates the user-defined pieces."""
    if not defined:
        return None
    parts = [re.sub(r"([\\.^$*+?()\[\]{}|])", r"\\\1", text) for text in _longest_first(defined)]
    return {"type": "Split", "pattern": {"Regex": "|".join(parts)}, "behavior": "Isolated", "invert": False}


def _defined(pre_tokenizer: Any) -> list[str]:
    """The inverse of _split; what is not made by it gives something else, which shows when it is made again."""
    pattern = pre_tokenizer.get("pattern") if isinstance(pre_tokenizer, dict) else None
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    parts = re.findall(r"(?s)(?:\\.|[^|\\])+", expression) if isinstance(expression, str) else []
    return [re.sub(r"(?s)\\(.)", r"\1", part) for part in parts]


def _special(added: Any, vocab: Mapping[str, Any]) -> list[str]:
    if not isinstance(added, list | None):
        raise InputError(f"added_tokens must be a list, got {shown(added)}")
    for token in added or []:
        text = token.get("content") if isinstance(token, dict) else None
        if (
            not isinstance(text, str)
            or not token.get("special")
            or text not in vocab
            or vocab[text] != token.get("id")
        ):
            raise InputError(f"added_tokens holds {shown(token)}; each must be special and in model.vocab")
    return [token["content"] for token in added or []]


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges written as "left right" or as [left, right]."""
    if not isinstance(merges, list):
        raise InputError(f"model.merges must be a list, got {shown(merges)}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for merge in pairs:
        if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(text, str) for text in merge):
            raise InputError(f"model.merges holds {shown(merge)}; each must be two pieces")
    return [(left, right) for left, right in pairs]

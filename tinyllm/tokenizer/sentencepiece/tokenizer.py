"""SentencePiece's byte-pair encoding: characters are joined to the piece of the best score, unknown ones are bytes."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.added_tokens import AddedTokens
from tinyllm.tokenizer.base import TokenArray, Tokenizer, id_array, require_text, texts_of
from tinyllm.tokenizer.bpe.sources import Special
from tinyllm.tokenizer.pretokenize import code_points
from tinyllm.tokenizer.sentencepiece import json_format as sentencepiece_json
from tinyllm.tokenizer.sentencepiece.json_format import longest_first, merges_of_scores, of_pieces, spaces
from tinyllm.tokenizer.sentencepiece.pieces import SPACE, UNKNOWN_SURFACE, Kind, Piece, check, joined, surface
from tinyllm.tokenizer.splits import split
from tinyllm.tokenizer.surroundings import Surroundings

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
        merges: pairs of pieces that are joined, the first in front, instead of those that the scores say.
        surroundings: what else a tokenizer.json says, instead of the dummy prefix and the escaping.
        ignore_merges: what the splits leave and the vocabulary has is that piece.

    Raises:
        InputError: the vocabulary is not like this, or has unused pieces.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        add_dummy_prefix: bool = True,
        escape_whitespaces: bool = True,
        unknown_surface: str = UNKNOWN_SURFACE,
        merges: Sequence[tuple[str, str]] | None = None,
        surroundings: Surroundings | None = None,
        ignore_merges: bool = False,
    ) -> None:
        self.pieces = tuple(pieces)
        self.add_dummy_prefix = add_dummy_prefix
        self._space = SPACE if escape_whitespaces else " "
        self._byte_ids = check(self.pieces, needs_unknown=surroundings is None)
        self._normal = {p.text: id for id, p in enumerate(self.pieces) if p.kind == Kind.NORMAL}
        defined = [p.text for p in self.pieces if p.kind == Kind.USER_DEFINED and surroundings is None]
        self._defined_regex = re.compile("|".join(map(re.escape, longest_first(defined))))
        self._id = {p.text: id for id, p in enumerate(self.pieces)}
        self._longest_defined = max(map(len, defined), default=0)
        self._surroundings = surroundings or of_pieces(self.pieces, add_dummy_prefix, self._space)
        # Else nothing is known of where a text may be cut before it is normalized.
        self._simple = (surroundings is None or not surroundings.splitters) and (
            self._surroundings.normalizers == spaces(add_dummy_prefix, self._space)
            and all(token.plain and token.special for token in self._surroundings.added_tokens)
        )
        self._added = AddedTokens(
            self._surroundings.added_tokens, str if self._simple else self._surroundings.normalized
        )
        self._ignore_merges = ignore_merges
        self._given_merges = None if merges is None else list(merges)
        self._priority = {text: -self.pieces[id].score for text, id in self._normal.items()}
        self._rank = {pair: i for i, pair in enumerate(merges or ()) if "".join(pair) in self._normal}
        texts = self._normal if merges is None else {left + right for left, right in self._rank}
        # Two characters that follow each other in no piece are never joined: text is cut between them.
        bigrams = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
        self._bigrams = np.sort(
            np.array([ord(pair[0]) << 21 | ord(pair[1]) for pair in bigrams], dtype=np.int64)
        )
        changed = self._added.changed()
        decoded = [piece._replace(text=changed.get(id, piece.text)) for id, piece in enumerate(self.pieces)]
        self._surfaces = [surface(piece, unknown_surface) for piece in decoded]
        self._begins_with_space = [piece.text.startswith(SPACE) for piece in decoded]
        self._kept: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._added.special)

    @property
    def tokens_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor of the file puts before and after a text; encode does not add them."""
        return self._surroundings.around

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
        first = True
        for part, id in self._added.split(text, allowed, disallowed):
            if id is not None:
                yield id
            elif self._simple:
                windows = (part[start : start + _WINDOW] for start in range(0, len(part), _WINDOW))
                yield from self.encode_iterable(windows)
            else:
                for piece in split(self._surroundings.splitters, part, first):
                    whole = self._id.get(piece) if self._ignore_merges else None
                    yield from self._encode_plain(piece) if whole is None else [whole]
            first = False

    def encode_document(self, text: str, special_tokens: bool = True) -> TokenArray:
        return self.encode_to_array(text, allowed_special="all" if special_tokens else ())

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the parts of one text, such as an open file, one after the other, in bounded memory.

        They are those of all parts joined, wherever one part ends and the next begins.
        """
        if not self._simple:
            yield from self.encode_to_array("".join(texts_of(texts))).tolist()
            return
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
        if self._longest_defined:
            # A longer user-defined piece may begin where fewer characters than it has are left.
            borders = borders[borders <= len(text) - self._longest_defined]
            inside = np.zeros(len(text) + 1, dtype=np.bool_)
            for match in self._defined_regex.finditer(text):
                inside[match.start() + 1 : match.end()] = True
            borders = borders[~inside[borders]]
        return int(borders[-1]) if borders.size else 0

    def _encode_part(self, text: str) -> Iterator[int]:
        """The ids of normalized text."""
        start = 0
        for match in self._defined_regex.finditer(text) if self._longest_defined else ():
            yield from self._encode_plain(text[start : match.start()])
            yield self._id[match.group()]
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
        for symbol in joined(text, self._priority_of):
            id = self._normal.get(symbol)
            ids += [id] if id is not None else [self._byte_ids[byte] for byte in symbol.encode()]
        return ids

    def _priority_of(self, left: str, right: str) -> float | None:
        return (
            self._priority.get(left + right) if self._given_merges is None else self._rank.get((left, right))
        )

    def offsets(self, text: str) -> npt.NDArray[np.int64]:
        """Where each token of `text` lies, like Tokenizer.offsets; a token of the added space alone is at (0, 0)."""
        ids = self.encode_to_array(text)
        lengths = np.array(
            [1 if p.kind == Kind.BYTE else len(p.text.encode()) for p in self.pieces], np.int64
        )
        ends = np.cumsum(lengths[ids])
        normalized = self._normalized(text) if self._simple else self._joined_parts(text)
        added = len(normalized) - len(text)
        if normalized[max(added, 0) :].replace(SPACE, " ") != text.replace(SPACE, " ") or added > 1:
            raise InputError(
                "tokens have no places in this text, which the tokenizer changes in more than its spaces"
            )
        data = np.frombuffer(normalized.encode(), dtype=np.uint8)
        character = np.cumsum(data & 0xC0 != 0x80) - 1  # of each byte
        found = np.stack([character[ends - lengths[ids]], character[ends - 1] + 1], axis=1)
        return np.maximum(found - added, 0)

    def _joined_parts(self, text: str) -> str:
        """The normalized text, with the added tokens that are in it."""
        parts: list[str] = []
        for part, id in self._added.split(text, (), ()):
            parts += [part] if id is not None else split(self._surroundings.splitters, part, not parts)
        return "".join(parts)

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
                part = part[self._begins_with_space[id] :]
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
        if self.add_dummy_prefix and first is not None and self._begins_with_space[numbers[first]]:
            parts[first] = parts[first][1:]
        return parts

    # ---- files ----

    def to_json(self) -> dict[str, Any]:
        """The JSON object of tokenizer.json. What the unknown piece is decoded to is not in it.

        The tokenizers library makes the same ids of it, but for two things: it takes the text of a control piece
        for this piece, and, of a .model with user-defined pieces, text such as "<0x0A>" that stands alone between
        them for this byte.

        Raises:
            InputError: the tokenizers library could not make the same ids of it.
        """
        merges = self._given_merges
        if merges is None:
            merges = merges_of_scores(self.pieces)
            if self._longest_defined:
                self._check_merged()
        return sentencepiece_json.to_json(
            sentencepiece_json.Content(
                self.pieces,
                merges,
                self._surroundings,
                # The tokenizers library has no other way to keep what the split has found from being merged anew.
                self._ignore_merges or bool(self._longest_defined),
                self.add_dummy_prefix,
            )
        )

    def _check_merged(self) -> None:
        """Raise InputError for a piece that tokenizer.json would take whole, and that is not merged to be whole."""
        for text, id in self._normal.items():
            if self._merge(text) != [id] and not self._defined_regex.search(text):
                raise InputError(
                    f"merging never makes the piece {shown(text)}, and tokenizer.json would take it whole beside "
                    "user-defined pieces; keep the .model file"
                )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        parsed = sentencepiece_json.from_json(content)
        escapes = parsed.surroundings.normalizers != spaces(parsed.strips_space, " ")
        return cls(
            parsed.pieces,
            parsed.strips_space,
            escapes,
            merges=parsed.merges,
            surroundings=parsed.surroundings,
            ignore_merges=parsed.ignore_merges,
        )

    def __repr__(self) -> str:
        return (
            f"SentencePieceTokenizer(vocab_size={self.vocab_size}, add_dummy_prefix={self.add_dummy_prefix})"
        )


def _without_surrogates(text: str) -> str:
    """`text` with U+FFFD for each byte that was not UTF-8."""
    return re.sub("[\udc80-\udcff]", "\ufffd", text)

"""Byte-pair encoding: text to tokens that are frequent strings of bytes, learned from text."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.progress import Bar
from tinyllm.system.wording import shown
from tinyllm.tokenizer.base import TokenArray, Tokenizer
from tinyllm.tokenizer.bpe import json_format as bpe_json
from tinyllm.tokenizer.bpe.bulk import BulkEncoder
from tinyllm.tokenizer.bpe.merging import Merges
from tinyllm.tokenizer.bpe.parallel import ordered_map
from tinyllm.tokenizer.bpe.sources import joined_at_borders, lists_of_parts, special_regex
from tinyllm.tokenizer.bpe.training import NUM_BYTES, count_pieces, learn_merges
from tinyllm.tokenizer.bpe.vocabulary import by_id, numbered, special_bytes
from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pretokenize import CHUNK, chunks, code_points

DEFAULT_PATTERN = "llama3"

Special = Literal["all"] | Collection[str]

# Shorter texts are split by the expression itself and looked up piece by piece: no array work to set up.
_SHORT = 2000
# Pieces whose tokens are kept for short texts.
_MOST_KEPT = 1 << 16
# Chunks that one process encodes at a time: what is new in all of them is merged together.
_CHUNKS_TOGETHER = 32
# Below so many characters another process costs more than it saves.
_WORTH_A_PROCESS = 1 << 23


class BPETokenizer(Tokenizer):
    """Byte-pair encoding on bytes (Sennrich et al., 2016; Radford et al., 2019, section 2.2).

        tokenizer = BPETokenizer.train([Path("shakespeare.txt")], vocab_size=1024)
        tokenizer.encode("To be")
        tokenizer.save("tokenizer.json")      # which the tokenizers library and transformers open

    Text is split into pieces by a pattern; within a piece, the earliest of the merges that apply is applied, until
    none does. Every byte is a token, so every text has tokens, and decoding gives it back exactly.

    Args:
        vocab: the id of each token, given as bytes; the 256 bytes must be among them.
        merges: pairs of tokens that are joined, the one to be applied first in front.
        pattern: a name in PATTERNS, or a regular expression.
        special_tokens: ids of strings that stand for themselves and are never split or merged.
        ignore_merges: a piece that is in the vocabulary is that token, whatever merges would make of it.

    Raises:
        InputError: ids that are no numbering, a byte that is missing, a merge of or to an unknown token.
    """

    def __init__(
        self,
        vocab: Mapping[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        pattern: str = DEFAULT_PATTERN,
        special_tokens: Mapping[str, int] | None = None,
        ignore_merges: bool = False,
    ) -> None:
        self._pattern = Pattern(pattern)
        self._special = dict(special_tokens or {})
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.ignore_merges = ignore_merges
        self._tokens = by_id(self.vocab, self._special)
        # Inside, the bytes come first, so that a byte is its own symbol; the others follow by id.
        every_byte = [bytes([i]) for i in range(NUM_BYTES)]
        missing = [byte for byte in every_byte if byte not in self.vocab]
        if missing:
            raise InputError(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, such as {missing[0]!r}: it is not one of "
                "byte-level byte-pair encoding"
            )
        longer = sorted((token for token in self.vocab if len(token) != 1), key=self.vocab.__getitem__)
        symbols = [*every_byte, *longer]
        self._id_of_symbol = np.array([self.vocab[token] for token in symbols], dtype=np.int32)
        number = {token: symbol for symbol, token in enumerate(symbols)}
        pairs, results = numbered(self.merges, number)
        self._merges = Merges(pairs, results, [len(token) for token in symbols])
        self._special_regex = special_regex(self._special)
        self._kept: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str | os.PathLike[str]],
        vocab_size: int,
        pattern: str = DEFAULT_PATTERN,
        special_tokens: Sequence[str] = (),
        min_frequency: int = 2,
        workers: int = 1,
        progress: bool = False,
    ) -> Self:
        """Learn a vocabulary from texts, read as a stream.

        The most frequent pair of neighbouring tokens becomes a token, again and again; among equally frequent ones
        the pair whose left token has the smaller id, then whose right one has. So the same text gives the same
        vocabulary, in whatever order and with however many processes. Ids 0 to 255 are the bytes, then come the
        tokens in the order in which they were learned, and the special tokens last.

        Args:
            texts: each a str, which is text, or a Path, which is a file or a folder of text files.
            vocab_size: ids in all. There are fewer when no pair is frequent enough.
            special_tokens: such as "<|endoftext|>". Where they occur in the texts, nothing is learned.
            min_frequency: pairs that occur less often are not merged.
            workers: processes. progress: show it on standard error.

        Raises:
            InputError: no text, a file that cannot be read, or a vocab_size below 256 and the special tokens.
        """
        if isinstance(texts, str | os.PathLike):
            raise InputError(f"texts must be a list of texts or of paths, got {shown(texts)}; write [it]")
        least = NUM_BYTES + len(special_tokens)
        if vocab_size < least:
            raise InputError(
                f"vocab_size={vocab_size}; it must be at least {least}: 256 bytes and {len(special_tokens)} "
                "special tokens"
            )
        if min_frequency < 1:
            raise InputError(f"min_frequency={min_frequency}; it must be at least 1")
        for token in special_tokens:
            special_bytes(token)
        if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
            raise InputError(
                f"special tokens must be different and not empty, got {shown(list(special_tokens))}"
            )
        compiled = Pattern(pattern)
        parts = lists_of_parts(texts, compiled, special_tokens)
        first = next(parts, None)
        if first is None:
            raise InputError("no text to learn from: all of it is empty; give text")
        with Bar("counting", None, "characters") if progress else nullcontext(lambda _: None) as bar:
            counts = count_pieces(itertools.chain([first], parts), compiled, workers, bar)
        num_merges = vocab_size - least
        with Bar("merging", num_merges, "merges") if progress else nullcontext(lambda _: None) as bar:
            pairs = learn_merges(counts, num_merges, min_frequency, bar)
        tokens = [bytes([i]) for i in range(NUM_BYTES)]
        for left, right in pairs:
            tokens.append(tokens[left] + tokens[right])
        vocab = {token: id for id, token in enumerate(tokens)}
        merges = [(tokens[left], tokens[right]) for left, right in pairs]
        return cls(vocab, merges, pattern, {token: len(tokens) + i for i, token in enumerate(special_tokens)})

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def pattern(self) -> str:
        """The regular expression that splits text into pieces."""
        return self._pattern.expression

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self._special)

    def token_bytes(self, id: int) -> bytes:
        """What the token `id` stands for.

        Raises:
            InputError: no token has this id.
        """
        return self.decode_bytes([id])

    # ---- text to tokens ----

    def encode(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> list[int]:
        """The ids of `text` as a list.

        Args:
            allowed_special: the special tokens that are recognised in the text, or "all".
            disallowed_special: those that must not occur in it; "all" means all that are not allowed. What is
                neither is text like other text.

        Raises:
            InputError: the text holds a special token that is not allowed, or half of a UTF-16 pair.
        """
        if len(text) > _SHORT:
            return self.encode_to_array(
                text, allowed_special=allowed_special, disallowed_special=disallowed_special
            ).tolist()
        if not text.isascii():
            code_points(text)
        ids: list[int] = []
        for part, special in self._without_special(text, allowed_special, disallowed_special):
            if special is not None:
                ids.append(special)
            else:
                self._encode_short(part, ids)
        return ids

    def encode_to_array(
        self,
        text: str,
        *,
        allowed_special: Special = (),
        disallowed_special: Special = "all",
        workers: int = 1,
    ) -> TokenArray:
        """The ids of `text`, (num_tokens,) of self.dtype; the fastest way for long text. Otherwise like encode.

        Args:
            workers: processes to use, where the text is long enough to be worth it.
        """
        parts = self._without_special(text, allowed_special, disallowed_special)
        try:
            return np.concatenate([np.zeros(0, self.dtype), *self._arrays(parts, workers)])
        except (InputError, UnicodeEncodeError):
            code_points(text)  # says where in the text half of a UTF-16 pair is
            raise

    def _arrays(self, parts: Iterable[tuple[str, int | None]], workers: int) -> Iterator[Any]:
        """The ids of what _without_special gives."""
        dtype = self.dtype
        for part, special in parts:
            if special is not None:
                yield np.array([special], dtype)
            elif not self.merges and not self._whole:
                yield self._id_of_symbol[np.frombuffer(part.encode(), np.uint8)].astype(dtype)
            elif part:
                useful = min(workers, 1 + len(part) // _WORTH_A_PROCESS)
                yield from ordered_map(self._encode_chunks, self._groups(part, useful), useful)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of `data`, which need not be UTF-8; special tokens are not recognised in it.

        What is not UTF-8 counts as punctuation, byte by byte, where text is split into pieces.
        """
        ids: list[int] = []
        text = data.decode("utf-8", "surrogateescape")
        for piece in self._pattern.split(text):
            ids += self._merge_one(piece.encode("utf-8", "surrogateescape"))
        return ids

    def encode_iterable(
        self, texts: Iterable[str], *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> Iterator[int]:
        """The ids of the parts of one text, such as an open file, one after the other, in bounded memory.

        They are those of all parts joined, wherever one part ends and the next begins. With a pattern of your own
        nothing is known of where it splits, so all parts are held in memory.
        """
        for part in joined_at_borders(texts, self._pattern, self._special):
            yield from self.encode(
                part, allowed_special=allowed_special, disallowed_special=disallowed_special
            )

    def _without_special(
        self, text: str, allowed: Special, disallowed: Special
    ) -> Iterator[tuple[str, int | None]]:
        """(text, None) for text between special tokens, (the token, its id) for those that are allowed."""
        if self._special_regex is None:
            yield text, None
            return
        allowed_set = set(self._special) if allowed == "all" else set(allowed)
        unknown = allowed_set - set(self._special)
        if unknown:
            raise InputError(
                f"allowed_special has {shown(min(unknown))}, which is no special token of this vocabulary; those are "
                f"{', '.join(self._special)}"
            )
        refused = set(self._special) - allowed_set if disallowed == "all" else set(disallowed) - allowed_set
        start = 0
        for match in self._special_regex.finditer(text):
            token = match.group()
            if token in refused:
                raise InputError(
                    f"the text holds the special token {token!r} at position {match.start()}; pass "
                    f"allowed_special={{{token!r}}} if it is meant as one, disallowed_special=() to encode it as text"
                )
            if token in allowed_set:
                if match.start() > start:
                    yield text[start : match.start()], None
                yield token, self._special[token]
                start = match.end()
        if start < len(text):
            yield text[start:], None

    def _encode_short(self, text: str, ids: list[int]) -> None:
        """Append the ids of `text`, piece by piece."""
        kept = self._kept
        for piece in self._pattern.split(text):
            found = kept.get(piece)
            if found is None:
                found = self._merge_one(piece.encode())
                if len(kept) >= _MOST_KEPT:
                    kept.clear()
                kept[piece] = found
            ids += found

    def _merge_one(self, piece: bytes) -> list[int]:
        whole = self._whole.get(piece)
        if whole is not None:
            return [whole]
        return [int(self._id_of_symbol[symbol]) for symbol in self._merges.merge_one(piece)]

    def _groups(self, text: str, workers: int) -> Iterator[list[str]]:
        """The chunks of `text` in groups to be encoded together, small ones last, so that all workers end together."""
        parts = chunks(text, self._pattern)
        left = len(text)
        while True:
            size = max(1, min(_CHUNKS_TOGETHER, left // (2 * workers * CHUNK)))
            group = list(itertools.islice(parts, size))
            if not group:
                return
            left -= sum(map(len, group))
            yield group

    def _encode_chunks(self, group: list[str]) -> TokenArray:
        ids: Any = np.concatenate(self._bulk.encode(group))
        return ids.astype(self.dtype)

    @functools.cached_property
    def _whole(self) -> dict[bytes, int]:
        """With ignore_merges, the tokens that merging would not make of their own bytes."""
        if not self.ignore_merges:
            return {}
        return {
            token: id
            for token, id in self.vocab.items()
            if [int(self._id_of_symbol[symbol]) for symbol in self._merges.merge_one(token)] != [id]
        }

    @functools.cached_property
    def _bulk(self) -> BulkEncoder:
        return BulkEncoder(self._merges, self._id_of_symbol, self._pattern, self._whole)

    def __getstate__(self) -> dict[str, Any]:
        # What can be made again is not sent to other processes.
        made_again = ("_bulk", "_kept", "_decoding")
        return {name: value for name, value in self.__dict__.items() if name not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept={})

    # ---- tokens to text ----

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes of `ids`, exactly.

        Raises:
            InputError: names the first id that is not in the vocabulary, and its position.
        """
        if not isinstance(ids, np.ndarray):
            ids = list(ids)
            if len(ids) < _SHORT and {*map(type, ids)} <= {int}:  # few ids need no arrays
                try:
                    return b"".join([self._tokens[id] if id >= 0 else None for id in ids])  # type: ignore[misc]
                except (IndexError, TypeError):
                    pass  # the error is said below
            ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TypeError(f"ids must be integers in one dimension, got {ids.dtype} of shape {ids.shape}")
        blob, starts, lengths = self._decoding
        out = []
        for begin in range(0, len(ids), 1 << 20):
            part = ids[begin : begin + (1 << 20)].astype(np.int64)
            wrong = (part < 0) | (part >= len(lengths)) | (lengths[np.clip(part, 0, len(lengths) - 1)] == 0)
            if wrong.any():
                place = int(np.argmax(wrong))
                raise InputError(
                    f"the id {part[place]} at position {begin + place} is not in the vocabulary, whose ids are 0 to "
                    f"{self.vocab_size - 1}; is it the tokenizer of this model?"
                )
            sizes = lengths[part]
            within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            out.append(blob[np.repeat(starts[part], sizes) + within].tobytes())
        return b"".join(out)

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as a part of a character, become U+FFFD.

        Raises:
            InputError: names the first id that is not in the vocabulary, and its position.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @functools.cached_property
    def _decoding(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All tokens end to end, where each begins, and its length; ids without a token have length 0."""
        strings = [token or b"" for token in self._tokens]
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        return np.frombuffer(b"".join(strings), np.uint8), np.cumsum(lengths) - lengths, lengths

    # ---- files ----

    def to_json(self) -> dict[str, Any]:
        return bpe_json.to_json(
            bpe_json.Content(self.vocab, self.merges, self.pattern, self._special, self.ignore_merges)
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        parsed = bpe_json.from_json(content)
        return cls(parsed.vocab, parsed.merges, parsed.pattern, parsed.special_tokens, parsed.ignore_merges)

    def __repr__(self) -> str:
        special = f", special_tokens={list(self._special)}" if self._special else ""
        return f"BPETokenizer(vocab_size={self.vocab_size}, pattern={self._pattern.name or self.pattern!r}{special})"

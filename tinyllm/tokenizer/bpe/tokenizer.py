"""Byte-pair encoding: text to tokens that are frequent strings of bytes, learned from text."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.text_files import Newlines
from tinyllm.system.wording import shown
from tinyllm.tokenizer.added_tokens import AddedTokens
from tinyllm.tokenizer.base import TokenArray, Tokenizer, require_text, texts_of
from tinyllm.tokenizer.bpe import json_format as bpe_json
from tinyllm.tokenizer.bpe.bulk import BulkEncoder
from tinyllm.tokenizer.bpe.learning import learned, require_count
from tinyllm.tokenizer.bpe.merging import Merges
from tinyllm.tokenizer.bpe.parallel import ordered_map
from tinyllm.tokenizer.bpe.sources import (
    Special,
    joined_at_borders,
)
from tinyllm.tokenizer.bpe.vocabulary import END_BYTE, NumberedTokens, by_id
from tinyllm.tokenizer.oniguruma import require_same
from tinyllm.tokenizer.patterns import Pattern
from tinyllm.tokenizer.pretokenize import CHUNK, chunks, code_points
from tinyllm.tokenizer.splits import Split, Splits, as_pattern
from tinyllm.tokenizer.steps import Expression
from tinyllm.tokenizer.surroundings import Surroundings
from tinyllm.tokenizer.token_strings import TokenStrings

DEFAULT_PATTERN = "llama3"

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
        end_of_word_suffix: what ends the tokens that end a piece, such as "</w>".
        surroundings: what else a tokenizer.json says, instead of `pattern` and `special_tokens`. With a normalizer,
            or splits that remove something, decoding gives the normalized text.

    What is a letter depends on the version of Unicode that the installed `regex` follows (and Python, for NFC), so the
    ids of young characters may differ between machines; the version of `regex` is saved.

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
        end_of_word_suffix: str = "",
        surroundings: Surroundings | None = None,
    ) -> None:
        if special_tokens is not None and not isinstance(special_tokens, Mapping):
            raise InputError(
                f"special_tokens must map each token to its id, such as {{'<|endoftext|>': {len(vocab)}}}, got "
                f"{shown(special_tokens)}; BPETokenizer.train takes a list"
            )
        if surroundings is None:
            steps = (Split(Expression(Pattern(pattern).expression), "Isolated"), bpe_json.DECODER)
            surroundings = Surroundings.of_special(special_tokens or {}, steps, bpe_json.DECODER)
        if end_of_word_suffix and ignore_merges:
            raise InputError("end_of_word_suffix with ignore_merges is not supported")
        single = None if end_of_word_suffix else as_pattern(surroundings.splitters)
        # Where several steps split a text, nothing is known of where it may be cut.
        self._pattern = single or Pattern(r"[\s\S]+")
        self._splits = None if single else Splits(surroundings.splitters)
        self._surroundings = surroundings
        self._added = AddedTokens(surroundings.added_tokens, surroundings.normalized)
        self._special = self._added.special
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.ignore_merges = ignore_merges
        self.end_of_word_suffix = end_of_word_suffix
        tokens = by_id(self.vocab, self._added.tokens)
        for id, text in self._added.changed().items():
            tokens[id] = text.encode()
        self._strings = TokenStrings(tokens)
        numbered = NumberedTokens.of(self.vocab, self.merges, end_of_word_suffix)
        self._id_of_symbol = np.array(numbered.ids, dtype=np.int32)
        self._merges = Merges(numbered.pairs, numbered.results, numbered.lengths)
        self._kept: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        vocab_size: int,
        pattern: str = DEFAULT_PATTERN,
        special_tokens: Collection[str] = (),
        min_frequency: int = 2,
        workers: int = 1,
        progress: bool = False,
        newlines: Newlines = "lf",
    ) -> Self:
        """Learn a vocabulary from texts, read as a stream.

        The most frequent pair of neighbouring tokens becomes a token, again and again; among equally frequent ones
        the pair whose left token has the smaller id, then whose right one has. So the same text gives the same
        vocabulary, in whatever order and with however many processes. Ids 0 to 255 are the bytes, then come the
        tokens in the order in which they were learned, and the special tokens last.

        Args:
            texts: each a str, which is text, or a Path, which is a file or a folder of text files; or one of them.
            vocab_size: ids in all. There are fewer, with a warning, when no pair is frequent enough.
            special_tokens: such as "<|endoftext|>". Where they occur in the texts, nothing is learned.
            min_frequency: pairs that occur less often are not merged.
            workers: processes. progress: show it on standard error.
            newlines: "lf": all line ends of files become \\n; "keep": they stay, as those of a str do.

        Raises:
            InputError: no text, a text that seems to be the name of a file, a file that cannot be read, or a
                vocab_size below 256 and the special tokens.
        """
        vocab, merges, special = learned(
            texts, vocab_size, pattern, special_tokens, min_frequency, workers, progress, newlines
        )
        return cls(vocab, merges, pattern, special)

    @property
    def vocab_size(self) -> int:
        return len(self._strings)

    @property
    def pattern(self) -> str:
        """The regular expression that splits text into pieces."""
        return self._pattern.expression if self._splits is None else self._splits.expression

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self._special)

    @property
    def is_plain(self) -> bool:
        """Whether a pattern, merges, and special tokens are all that there is."""
        special = all(token.special for token in self._added.tokens)
        return special and self._splits is None and self._surroundings.is_plain

    @property
    def tokens_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor of the file puts before and after a text; encode does not add them."""
        return self._surroundings.around

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
            InputError: the text holds a special token that is not allowed, or half of a UTF-16 pair, or is no str.
        """
        require_text(text)
        if len(text) > _SHORT:
            return self.encode_to_array(
                text, allowed_special=allowed_special, disallowed_special=disallowed_special
            ).tolist()
        if not text.isascii():
            code_points(text)
        ids: list[int] = []
        for part, special in self._split(text, allowed_special, disallowed_special):
            ids += [special] if special is not None else self._encode_short(part)
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
        require_text(text)
        require_count("workers", workers)
        parts = self._split(text, allowed_special, disallowed_special)
        try:
            return np.concatenate([np.zeros(0, self.dtype), *self._arrays(parts, workers)])
        except (InputError, UnicodeEncodeError):
            code_points(text)  # says where in the text half of a UTF-16 pair is
            raise

    def _split(self, text: str, allowed: Special, disallowed: Special) -> Iterator[tuple[str, int | None]]:
        """(text, None) for text that is ready to be split into pieces, (token, id) for added tokens."""
        for part, id in self._added.split(text, allowed, disallowed):
            if id is None and self._splits is None:
                part = self._surroundings.prefixed(part)
            yield part, id

    def _arrays(self, parts: Iterable[tuple[str, int | None]], workers: int) -> Iterator[Any]:
        """The ids of what _split gives."""
        dtype = self.dtype
        for part, special in parts:
            if special is not None:
                yield np.array([special], dtype)
            elif self._splits is not None:
                code_points(part)  # whose half pairs would stand for bytes
                yield np.array(self._encode_short(part), dtype)
            elif not self.merges and not self._whole:
                yield self._id_of_symbol[np.frombuffer(part.encode(), np.uint8)].astype(dtype)
            elif part:
                useful = min(workers, 1 + len(part) // _WORTH_A_PROCESS)
                yield from ordered_map(self._encode_chunks, self._groups(part, useful), useful)

    def encode_document(self, text: str, special_tokens: bool = True) -> TokenArray:
        allowed = "all" if special_tokens else ()
        return self.encode_to_array(text, allowed_special=allowed, disallowed_special=())

    def encode_batch(
        self, texts: Iterable[str], *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> list[list[int]]:
        """The ids of each text on its own; otherwise like encode."""
        return [
            self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
            for text in texts_of(texts)
        ]

    def offsets(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> npt.NDArray[np.int64]:
        """Where each token of `text` lies, like Tokenizer.offsets; special tokens as in encode."""
        chosen: dict[str, Any] = {
            "allowed_special": allowed_special,
            "disallowed_special": disallowed_special,
        }
        ids = self.encode_to_array(text, **chosen)
        if self.decode_bytes(ids) != text.encode():
            raise InputError(
                "tokens have no places in this text, which the tokenizer changes before it splits it"
            )
        return self._places(text, ids)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of `data`, which need not be UTF-8; special tokens are not recognised in it.

        What is not UTF-8 counts as punctuation, byte by byte, where text is split into pieces.
        """
        ids: list[int] = []
        text = data.decode("utf-8", "surrogateescape")
        for piece in self._pieces(text):
            ids += self._merge_one(piece.encode("utf-8", "surrogateescape"))
        return ids

    def encode_iterable(
        self, texts: Iterable[str], *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> Iterator[int]:
        """The ids of the parts of one text, such as an open file, one after the other, in bounded memory.

        They are those of all parts joined, wherever one part ends and the next begins. With a pattern of your own,
        or a normalizer, nothing is known of where it splits, so all parts are held in memory.
        """
        held = texts if self._surroundings.is_plain else ["".join(texts_of(texts))]
        for part in joined_at_borders(held, self._pattern, [token.content for token in self._added.tokens]):
            yield from self.encode(
                part, allowed_special=allowed_special, disallowed_special=disallowed_special
            )

    def _pieces(self, text: str) -> list[str]:
        return self._pattern.split(text) if self._splits is None else self._splits.split(text)

    def _encode_short(self, text: str) -> list[int]:
        """The ids of `text`, piece by piece."""
        kept = self._kept
        ids: list[int] = []
        for piece in self._pieces(text):
            found = kept.get(piece)
            if found is None:
                found = self._merge_one(piece.encode("utf-8", "surrogateescape"))
                if len(kept) >= _MOST_KEPT:
                    kept.clear()
                kept[piece] = found
            ids += found
        return ids

    def _merge_one(self, piece: bytes) -> list[int]:
        if self.end_of_word_suffix:
            piece += END_BYTE
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
        made_again = ("_bulk", "_kept")
        return {name: value for name, value in self.__dict__.items() if name not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept={})

    # ---- tokens to text ----

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes of `ids`, exactly.

        Raises:
            InputError: names the first id that is not in the vocabulary, and its position.
        """
        return self._strings.joined(ids)

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises what decode_bytes does."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # ---- files ----

    def to_json(self) -> dict[str, Any]:
        """The JSON object of tokenizer.json.

        Raises:
            InputError: the tokenizers library would number or split it otherwise.
        """
        if self._splits is None and self._pattern.name is None:
            require_same(self.pattern)
        around, suffix = self._surroundings, self.end_of_word_suffix
        return bpe_json.to_json(bpe_json.Content(self.vocab, self.merges, around, self.ignore_merges, suffix))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        parsed = bpe_json.from_json(content)
        rest = parsed.ignore_merges, parsed.end_of_word_suffix, parsed.surroundings
        return cls(parsed.vocab, parsed.merges, DEFAULT_PATTERN, None, *rest)

    def __repr__(self) -> str:
        special = f", special_tokens={list(self._special)}" if self._special else ""
        pattern = self.pattern if self._splits is not None else self._pattern.name or self.pattern
        return f"BPETokenizer(vocab_size={self.vocab_size}, pattern={pattern!r}{special})"

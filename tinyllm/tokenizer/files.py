"""Vocabularies of byte-pair encoding in the files of GPT-2, of tiktoken and of SentencePiece."""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import write_text
from tinyllm.system.wording import shown
from tinyllm.tokenizer.bpe.json_format import parse_merges, parse_vocab
from tinyllm.tokenizer.bpe.tokenizer import BPETokenizer
from tinyllm.tokenizer.byte_level import to_characters
from tinyllm.tokenizer.patterns import PATTERNS
from tinyllm.tokenizer.sentencepiece.pieces import UNKNOWN_SURFACE, Kind, Piece, joined
from tinyllm.tokenizer.sentencepiece.tokenizer import SentencePieceTokenizer

Merge = tuple[bytes, bytes]

_VERSION = "#version: 0.2"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


# ---- GPT-2: vocab.json and merges.txt ----


def read_gpt2(
    vocab_path: StrPath, merges_path: StrPath, special_tokens: Sequence[str] = ("<|endoftext|>",)
) -> BPETokenizer:
    """The tokenizer of GPT-2's two files, with its pattern.

    Args:
        vocab_path: vocab.json, the ids of the tokens, the special ones among them.
        merges_path: merges.txt, a merge in each line.
        special_tokens: those tokens that stand for themselves.

    Raises:
        InputError: a file is missing or damaged, or a special token is not in the vocabulary.
    """
    vocab = read_json(vocab_path)
    for token in special_tokens:
        if token not in vocab:
            raise InputError(
                f"{vocab_path}: has no special token {shown(token)}; pass in special_tokens those that it has, () "
                "for none"
            )
    special = {token: vocab[token] for token in special_tokens}
    path = Path(merges_path)
    try:
        lines = _read(path).decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); is it merges.txt?") from None
    if lines[0].startswith("#version") or lines == [""]:
        del lines[0]
    try:
        merges = parse_merges(lines)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        tokens = parse_vocab(vocab, special)
        made = {left + right for left, right in merges}
        never = next((token for token in tokens if len(token) > 1 and token not in made), None)
        if never is not None:
            raise InputError(
                f"no merge makes the token {shown(to_characters(never))}; is merges.txt cut off? A token that is never "
                "made of text belongs in special_tokens"
            )
        return BPETokenizer(tokens, merges, "gpt2", special)
    except InputError as error:
        raise InputError(f"{vocab_path} with {path}: {error}") from None


def write_gpt2(tokenizer: BPETokenizer, folder: StrPath) -> None:
    """Write vocab.json and merges.txt into a folder, made if it is missing; vocab.json holds the special tokens too.

    Raises:
        InputError: the files cannot say it, because the pattern is not GPT-2's, a token is only ever taken whole, or
            a special token is written like another token; or they cannot be written.
    """
    _require_plain(tokenizer, "vocab.json and merges.txt")
    if tokenizer.pattern != PATTERNS["gpt2"]:
        raise InputError(
            f"the pattern is {shown(tokenizer.pattern)}; vocab.json and merges.txt mean that of gpt2: use "
            "tokenizer.save, whose tokenizer.json holds the pattern"
        )
    whole = next(iter(tokenizer._whole), None)
    if whole is not None:
        raise InputError(
            f"the merges do not make the token {shown(whole)}, and vocab.json and merges.txt cannot say that it is "
            "taken whole: use tokenizer.save"
        )
    vocab = {to_characters(token): id for token, id in tokenizer.vocab.items()}
    for token, id in tokenizer.special_tokens.items():
        if vocab.setdefault(token, id) != id:
            raise InputError(
                f"the special token {shown(token)} and the token of id {vocab[token]} are written alike in vocab.json; "
                "use tokenizer.save"
            )
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target}: cannot make this folder: {error.strerror or error}") from None
    ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
    merges = [f"{to_characters(left)} {to_characters(right)}" for left, right in tokenizer.merges]
    write_text(target / "vocab.json", json.dumps(ordered, ensure_ascii=False) + "\n")
    write_text(target / "merges.txt", "\n".join([_VERSION, *merges]) + "\n")


def _require_plain(tokenizer: BPETokenizer, file: str) -> None:
    """Raise InputError for a tokenizer that does more to a text than a pattern, merges and special tokens do."""
    if not tokenizer.is_plain:
        raise InputError(
            f"the tokenizer changes texts, splits them in several steps, or has added tokens that are not special, "
            f"which {file} cannot say: use tokenizer.save"
        )


# ---- tiktoken: a token and its rank in each line ----


def read_tiktoken(
    path: StrPath, pattern: str, special_tokens: Mapping[str, int] | None = None
) -> BPETokenizer:
    """The tokenizer of a file of tiktoken, whose ids are the ranks.

    The file says neither the pattern nor the special tokens. A token's merge joins the two parts that the tokens of
    lower rank make of it. Where they leave more than two of any token, every pair of tokens that is a token is a
    merge, as it is to tiktoken.

    Args:
        pattern: a name in PATTERNS, or a regular expression.
        special_tokens: their ids.

    Raises:
        InputError: the file is missing or damaged, or lacks a byte.
    """
    file = Path(path)
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(_read(file).split(b"\n"), 1):
        if not line.strip():
            continue
        token, rank = _token_and_rank(line.strip(), f"{file}, line {number}")
        if token in ranks or rank in lines:
            came = f"the token {shown(token)}" if token in ranks else f"the rank {rank}"
            raise InputError(
                f"{file}, line {number}: {came} stands in line {lines[ranks.get(token, rank)]} already; is "
                "the file damaged?"
            )
        ranks[token] = rank
        lines[rank] = number
    merges, whole = _merges_of_ranks(ranks)
    try:
        return BPETokenizer(ranks, merges, pattern, special_tokens, ignore_merges=whole)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _token_and_rank(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.split()
    try:
        if len(fields) == 2 and re.fullmatch(rb"\d{1,10}", fields[1]):
            return base64.b64decode(fields[0], validate=True), int(fields[1])
    except binascii.Error:
        pass
    raise InputError(
        f"{where}: a token in base64 and its rank are expected, got {shown(line)}; is the file damaged?"
    )


def write_tiktoken(tokenizer: BPETokenizer, path: StrPath) -> None:
    """Write the tokens with their ids as ranks; tiktoken is told the pattern and the special tokens otherwise.

    Raises:
        InputError: tiktoken would make other ids of it, because the ids of the tokens are not in the order of the
            merges or the merges are not those that follow from this order; or the file cannot be written.
    """
    _require_plain(tokenizer, "a file of tiktoken")
    ids = tokenizer.vocab
    last: Merge | None = None
    for left, right in tokenizer.merges:
        if last is not None and ids[left + right] < ids[last[0] + last[1]]:
            raise InputError(
                f"tiktoken merges in the order of the ids, and here {shown(left + right)} with id "
                f"{ids[left + right]} is merged after {shown(last[0] + last[1])} with id "
                f"{ids[last[0] + last[1]]}: use tokenizer.save"
            )
        last = (left, right)
    merges, whole = _merges_of_ranks(ids)
    missing = set(merges) - set(tokenizer.merges)
    if missing:
        left, right = min(missing, key=lambda merge: ids[merge[0] + merge[1]])
        raise InputError(
            f"tiktoken would merge {shown(left)} and {shown(right)}, which is no merge here: use tokenizer.save"
        )
    if whole and not tokenizer.ignore_merges:
        raise InputError(
            "tiktoken takes a piece that is a token whole, and here merging makes something else of some: use "
            "tokenizer.save, or ignore_merges=True"
        )
    rows = sorted(ids.items(), key=lambda item: item[1])
    write_text(path, "".join(f"{base64.b64encode(token).decode()} {id}\n" for token, id in rows))


def _merges_of_ranks(ranks: Mapping[bytes, int]) -> tuple[list[Merge], bool]:
    """The merges of tokens that are merged by rank, and whether merging fails to make some token of its bytes."""
    merges: list[Merge] = []
    others: list[bytes] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _parts_below(token, ranks, ranks[token])
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
            else:
                others.append(token)
    if not others:
        return merges, False
    # Such a token may be made of what comes after it, so that no single merge makes it everywhere.
    whole = any(len(joined(token, lambda left, right: ranks.get(left + right))) > 1 for token in others)
    lengths = sorted(set(map(len, ranks)))
    return [
        merge for token in sorted(ranks, key=ranks.__getitem__) for merge in _splits(token, ranks, lengths)
    ], whole


def _splits(token: bytes, ranks: Mapping[bytes, int], lengths: Sequence[int]) -> Iterator[Merge]:
    """All pairs of tokens that joined are `token`."""
    for length in lengths:
        if length >= len(token):
            break
        if token[:length] in ranks and token[length:] in ranks:
            yield token[:length], token[length:]


def _parts_below(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """What merging by rank, below the rank `limit`, makes of the bytes of `token`."""

    def priority(left: bytes, right: bytes) -> int | None:
        rank = ranks.get(left + right)
        return rank if rank is not None and rank < limit else None

    return joined(token, priority)


# ---- SentencePiece: a protocol buffer ----


def read_sentencepiece(path: StrPath) -> SentencePieceTokenizer:
    """The tokenizer of a .model of SentencePiece: byte-pair encoding with byte fallback that leaves the text as it is.

    Raises:
        InputError: the file is missing or damaged, or is of another kind.
    """
    file = Path(path)
    data = _read(file)
    try:
        return _from_model(data)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _from_model(data: bytes) -> SentencePieceTokenizer:
    """The tokenizer of a ModelProto; the numbers are those of the fields in sentencepiece_model.proto."""
    pieces: list[Piece] = []
    # A message that comes in parts is the one that its parts make end to end.
    parts: dict[int, bytes] = {2: b"", 3: b"", 5: b""}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value), len(pieces)))
        elif number in parts:
            parts[number] += _bytes(value)
    if not pieces:
        raise InputError("no pieces in it; is it a .model file of SentencePiece?")
    trainer, normalizer, denormalizer = (dict(_fields(parts[number])) for number in (2, 3, 5))
    kind = trainer.get(3, 1)
    if kind != 2:
        names = {1: "unigram", 3: "word", 4: "char"}
        raise InputError(f"the model type is {names.get(kind, shown(kind))}; supported: bpe")  # type: ignore[arg-type]
    if not trainer.get(35, 0):
        raise InputError("the model has no byte fallback; train it with byte_fallback")
    if normalizer.get(2) or denormalizer.get(2):
        name = _text(normalizer.get(1) or denormalizer.get(1) or b"", "the name of the normalization")
        raise InputError(
            f"the model normalizes text ({shown(name)}), which is not supported; train it with "
            "normalization_rule_name=identity"
        )
    if normalizer.get(4, 1):
        raise InputError(
            "the model removes spaces, which is not supported; train it with remove_extra_whitespaces=false"
        )
    if trainer.get(24, 0):
        raise InputError(
            "the model has spaces at the end of pieces (treat_whitespace_as_suffix), which is not supported"
        )
    surface = _text(trainer.get(44, UNKNOWN_SURFACE.encode()), "unk_surface")
    return SentencePieceTokenizer(pieces, bool(normalizer.get(3, 1)), bool(normalizer.get(5, 1)), surface)


def _piece(data: bytes, id: int) -> Piece:
    values = dict(_fields(data))
    score = values.get(2, b"\0\0\0\0")
    kind = values.get(3, 1)
    if not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int) or not 1 <= kind <= 6:
        raise InputError(
            f"piece {id} has the score {shown(score)} and the type {shown(kind)}; is the file damaged?"
        )
    return Piece(_text(values.get(1, b""), f"piece {id}"), struct.unpack("<f", score)[0], Kind(kind))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise InputError(f"a number, {value}, is where a message or text is expected; is the file damaged?")
    return value


def _text(value: int | bytes, what: str) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise InputError(f"{what} is {shown(value)}, which is not UTF-8; is the file damaged?") from None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message in the wire format of protocol buffers.

    A value is an integer, or bytes: those of a text or message, and the 4 or 8 of a number of this size.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise InputError(
                f"byte {at} is no field of a protocol buffer; is it a .model file of SentencePiece?"
            )
        if size > len(data) - at:
            raise InputError(
                f"cut off: {size} bytes are needed from byte {at} of {len(data)}; copy the file again"
            )
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer at `at`, 7 bits to a byte, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise InputError(
        f"the number at byte {at} of {len(data)} does not end; is it a .model file of SentencePiece?"
    )

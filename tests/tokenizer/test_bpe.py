"""BPETokenizer: all ways to encode give the reference's ids, text comes back, and wrong input is named."""

import copy
import functools
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import BPETokenizer, load_tokenizer, parse_tokenizer
from tinyllm.tokenizer import patterns as patterns_module
from tinyllm.tokenizer.bpe import bulk as bulk_module
from tinyllm.tokenizer.bpe import merging as merging_module
from tinyllm.tokenizer.bpe import reference
from tinyllm.tokenizer.bpe import tokenizer as bpe_module
from tinyllm.tokenizer.bpe.merging import Merges
from tinyllm.tokenizer.bpe.sources import special_regex
from tinyllm.tokenizer.patterns import PATTERNS

MANY = 4 * settings().max_examples

SAMPLE = (
    "The quick brown fox jumps over the lazy dog. Don't, I'LL see; it's the 12345th thing, isn't it?\n\n"
    "  aaaaaaaa aaaa aa banana bandana abababab\tthe other there then these\r\n中文字 中文 日本語 é "
    "e\u0301 ñandú Straße \U0001f469\u200d\U0001f4bb \U0001f600\U0001f600 ½ ٤٤ \u3000\xa0 \x00\x00 "
    "incomprehensibilities "
) * 4
SPECIAL = ["<|end|>", "<|end of text|>", "<|x|>", "<|x|><|y|>"]
PARTS = [
    "the",
    " the",
    "aaaa",
    " ",
    "\n",
    "'s",
    "12",
    "中文",
    "\U0001f600",
    "é",
    "<|x|>",
    "<|end",
    "|>",
    "\0",
    "b" * 20,
]
any_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
texts = st.one_of(any_texts, st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
names = st.sampled_from(sorted(PATTERNS))


@functools.cache
def trained(name: str = "llama3", special: bool = True, size: int = 400) -> BPETokenizer:
    return BPETokenizer.train([SAMPLE], size, name, SPECIAL if special else ())


def expected_ids(tokenizer: BPETokenizer, text: str) -> list[int]:
    """The textbook's ids of each piece that the expression finds."""
    merges = [(tokenizer.vocab[left], tokenizer.vocab[right]) for left, right in tokenizer.merges]
    return [id for piece in tokenizer._pattern.split(text) for id in reference.encode(piece.encode(), merges)]


# ---- Encoding and decoding ---------------------------------------------------------------------


@given(text=texts, name=names)
@settings(max_examples=2 * MANY)
@example("", "gpt2")
@example("\0" * 8 + "a" * 17 + "\0" * 16, "gpt4")
@example("incomprehensibilities incomprehensibilitie " * 3, "o200k")
def test_every_way_equals_the_reference(text: str, name: str) -> None:
    tokenizer = trained(name, special=False)
    ids = expected_ids(tokenizer, text)
    assert tokenizer.encode(text) == ids
    array = tokenizer.encode_to_array(text)
    assert array.dtype == tokenizer.dtype == np.uint16
    assert array.tolist() == ids
    assert tokenizer.encode_bytes(text.encode()) == ids
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    assert list(tokenizer.encode_iterable([text])) == ids
    assert tokenizer.decode(ids) == tokenizer.decode(array) == tokenizer.decode(iter(ids)) == text
    assert tokenizer.decode_bytes(ids) == tokenizer.decode_bytes(array) == text.encode()
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(text=texts, name=names)
def test_array_path_of_merging(text: str, name: str) -> None:
    """As above, with all new pieces merged as arrays, in a tokenizer that knows none of them yet."""
    tokenizer = copy.copy(trained(name, special=False))  # without the pieces kept by others
    tokenizer.__setstate__(tokenizer.__getstate__())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_module, "_FEWEST_FOR_ARRAYS", 0)
        patch.setattr(merging_module, "_LONGEST_SIDE_BY_SIDE", 24)
        patch.setattr(bpe_module, "_SHORT", 0)
        ids = expected_ids(tokenizer, text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("name", PATTERNS)
def test_long_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, a table of pieces that grows and begins anew, and a second process."""
    text = " ".join(f"{SAMPLE[i % 300 : i % 300 + 9 + i % 23]}{i}" for i in range(3000))
    tokenizer = BPETokenizer.train([SAMPLE], 400, name)
    ids = [id for begin in pieces_joined(tokenizer, text) for id in tokenizer.encode(begin)]
    assert tokenizer.encode_to_array(text).tolist() == ids
    assert tokenizer.encode(text) == ids
    monkeypatch.setattr(bulk_module, "_LARGEST_TABLE", 1 << 10)
    monkeypatch.setattr(bpe_module.chunks, "__defaults__", (5000,))
    again = BPETokenizer.train([SAMPLE], 400, name)
    assert again.encode_to_array(text).tolist() == ids
    assert again.encode_to_array(text[::-1]).tolist() == again.encode(text[::-1])
    assert again.encode_to_array(text).tolist() == ids
    monkeypatch.setattr(bpe_module, "_WORTH_A_PROCESS", 100)
    assert again.encode_to_array(text, workers=2).tolist() == ids
    assert again.decode(np.array(ids)) == text


def pieces_joined(tokenizer: BPETokenizer, text: str) -> list[str]:
    """The text in parts, each of some pieces, that are short enough to be encoded piece by piece."""
    pieces = tokenizer._pattern.split(text)
    return pieces if max(map(len, pieces)) < bpe_module._SHORT else []


@given(text=texts, name=names, data=st.data())
@settings(max_examples=MANY)
def test_encode_iterable(text: str, name: str, data: st.DataObject) -> None:
    """Any split into parts gives the ids of the whole, also where the parts held are short."""
    tokenizer = trained(name)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    joined = bpe_module.joined_at_borders
    size = data.draw(st.integers(1, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_module, "joined_at_borders", lambda *arguments: joined(*arguments, size))
        for allowed in ((), ["<|x|>"], "all"):
            arguments: Any = {"allowed_special": allowed, "disallowed_special": ()}
            ids = tokenizer.encode(text, **arguments)
            assert list(tokenizer.encode_iterable(parts, **arguments)) == ids
            assert list(tokenizer.encode_iterable(text, **arguments)) == ids
            assert tokenizer.decode(ids) == text


def test_encode_iterable_is_a_stream() -> None:
    """Ids come before all of the text is read."""
    taken = []

    def parts() -> Any:
        for i in range(100):
            taken.append(i)
            yield "some words " * 1000

    ids = trained().encode_iterable(parts())
    next(ids)
    assert len(taken) < 20
    assert trained().decode([next(ids) for _ in range(3)]) in "some words " * 5


def test_encode_iterable_special_with_spaces() -> None:
    tokenizer = trained()
    text = "<|end of text|>" * 3000 + " a <|end of"
    parts = [text[i : i + 7] for i in range(0, len(text), 7)]
    expected = tokenizer.encode(text, allowed_special="all")
    assert list(tokenizer.encode_iterable(parts, allowed_special="all")) == expected
    with pytest.raises(InputError, match="special token"):
        list(tokenizer.encode_iterable(parts))


@given(data=st.one_of(st.binary(max_size=60), texts.map(str.encode)), name=names)
@settings(max_examples=MANY)
@example(b"\xff\xfe the \xed\xa0\x80the\xf0\x9f\x98 the\xe4", "llama3")
def test_any_bytes(data: bytes, name: str) -> None:
    tokenizer = trained(name)
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


@given(text=texts, name=names)
@settings(max_examples=MANY)
def test_offsets(text: str, name: str) -> None:
    """Each token lies in the characters of its offsets, and in no fewer."""
    tokenizer = trained(name, special=False)
    offsets = tokenizer.offsets(text)
    ids = tokenizer.encode(text)
    assert offsets.shape == (len(ids), 2)
    borders = np.cumsum([0, *(len(character.encode()) for character in text)])  # in bytes
    begin = 0
    for id, (first, last) in zip(ids, offsets.tolist(), strict=True):
        end = begin + len(tokenizer.token_bytes(id))
        assert borders[first] <= begin < borders[first + 1]
        assert borders[last - 1] < end <= borders[last]
        begin = end
    assert begin == borders[-1]


def test_offsets_of_a_known_text() -> None:
    tokenizer = trained(special=False)
    tokens = [tokenizer.token_bytes(id) for id in tokenizer.encode("the 日x")]
    assert tokens == [b"the", b" \xe6\x97\xa5", b"x"]
    assert tokenizer.offsets("the 日x").tolist() == [[0, 3], [3, 5], [5, 6]]
    assert tokenizer.offsets("\U0010ffff").tolist() == [[0, 1]] * 4
    assert tokenizer.offsets("").shape == (0, 2)


@pytest.mark.parametrize("length", [10**5, 2 * 10**5])
@pytest.mark.parametrize("unit", ["a", "ab", "aab", "中", "\U0001f600", "\0"])
def test_long_repeats(length: int, unit: str) -> None:
    """A piece of 100,000 characters: the three ways give the same, and quickly."""
    text = (unit * length)[:length]
    tokenizer = trained()
    began = time.perf_counter()
    ids = tokenizer.encode_to_array(text).tolist()
    assert time.perf_counter() - began < 10
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_bytes(text.encode()) == ids


# ---- Merging -----------------------------------------------------------------------------------

alphabets = st.sampled_from(["a", "ab", "abc", "aé中"])


@given(data=st.data(), alphabet=alphabets)
@settings(max_examples=2 * MANY)
def test_three_ways_to_merge(data: st.DataObject, alphabet: str) -> None:
    """One at a time, side by side and merge by merge give what the reference gives."""
    pieces = [
        piece.encode()
        for piece in data.draw(st.lists(st.text(alphabet, min_size=1, max_size=40), min_size=1, max_size=6))
    ]
    learned_from = {piece: 1 + i % 3 for i, piece in enumerate(pieces)}
    pairs = reference.train(learned_from, data.draw(st.integers(0, 30)))
    lengths = [1] * 256
    for left, right in pairs:
        lengths.append(lengths[left] + lengths[right])
    merges = Merges(pairs, list(range(256, 256 + len(pairs))), lengths)
    assert merges.in_order
    others = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=60), min_size=1, max_size=4))
    pieces += [piece.encode() for piece in others]
    expected = [reference.encode(piece, pairs) for piece in pieces]
    assert [merges.merge_one(piece) for piece in pieces] == expected
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    buffer = np.frombuffer(b"?" + b"".join(pieces), np.uint8)
    starts = 1 + np.cumsum(sizes) - sizes
    for way in (merges._merge_matrix, merges._merge_long):
        symbols, counts = way(buffer, starts, sizes)
        found = np.split(symbols, np.cumsum(counts)[:-1])
        assert [part.tolist() for part in found] == expected, way.__name__
    for longest, fewest in ((128, 400), (128, 0), (5, 0), (0, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merging_module, "_LONGEST_SIDE_BY_SIDE", longest or 1)
            patch.setattr(merging_module, "_FEWEST_FOR_ARRAYS", fewest)
            merged = merges.merge_all(buffer, starts, sizes)
        for place, count, ids in zip(merged.places.tolist(), merged.counts.tolist(), expected, strict=True):
            assert merged.symbols[place : place + count].tolist() == ids


def test_earliest_merge_first() -> None:
    """By hand: in abcab, bc (rank 0) goes before ab (rank 1), and a bc (rank 2) needs bc."""
    vocab = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
    tokenizer = BPETokenizer(vocab, [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")], r"[\s\S]+")
    assert tokenizer.encode("abcab") == [258, 257]
    assert tokenizer.encode_to_array("abcab" * 500).tolist() == [258, 257] * 500


def test_merges_out_of_order() -> None:
    """A merge of a token that only a later merge makes is applied once that is made, as others do."""
    vocab = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    tokenizer = BPETokenizer(vocab, [(b"ab", b"c"), (b"a", b"b")], r"\w+")
    text = "abcabc ab abcab " * 300 + "abc" * 300
    assert tokenizer.encode("abcab abc") == [257, 256, 32, 257]
    assert tokenizer.encode_to_array(text).tolist() == (
        [257, 257, 32, 256, 32, 257, 256, 32] * 300 + [257] * 300
    )


@pytest.mark.parametrize("merges", [[], [(b"h", b"e")]])
def test_ignore_merges(merges: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    """A piece that is in the vocabulary is that token, on every path, also where there are no merges."""
    vocab = {bytes([i]): i for i in range(256)} | {b"he": 256, b"hello": 257}
    tokenizer = BPETokenizer(vocab, merges, ignore_merges=True)
    plain = BPETokenizer(vocab, merges)
    assert tokenizer.encode("hello") == tokenizer.encode_bytes(b"hello") == [257]
    assert tokenizer.encode_to_array("hello").tolist() == [257]
    assert tokenizer.encode_to_array("hello\n" * 1000).tolist() == [257, 10] * 1000
    assert plain.encode("hello") == [256, *b"llo"] if merges else [*b"hello"]
    assert load_tokenizer(tokenizer.save(tmp_path)).encode("hello") == [257]


# ---- Special tokens ----------------------------------------------------------------------------


def both_ways(tokenizer: BPETokenizer, text: str, **arguments: Any) -> list[int]:
    ids = tokenizer.encode(text, **arguments)
    assert tokenizer.encode_to_array(text, **arguments).tolist() == ids
    return ids


def test_special_tokens() -> None:
    tokenizer = trained()
    end, x, xy = (tokenizer.special_tokens[token] for token in ("<|end|>", "<|x|>", "<|x|><|y|>"))
    assert sorted(tokenizer.special_tokens.values()) == list(range(396, 400))
    the = tokenizer.encode("the")
    text = "the<|end|>the<|x|><|y|><|x|>"
    assert both_ways(tokenizer, text, allowed_special="all") == [*the, end, *the, xy, x]
    assert both_ways(tokenizer, "<|end|>", allowed_special={"<|end|>"}) == [end]
    assert both_ways(tokenizer, "", allowed_special="all") == []
    as_text = both_ways(tokenizer, text, disallowed_special=())
    assert max(as_text) < 396
    assert tokenizer.decode(as_text) == text
    mixed = both_ways(tokenizer, "<|x|>the<|end|>", allowed_special=["<|end|>"], disallowed_special=())
    assert mixed[-1] == end
    assert max(mixed[:-1]) < 396
    assert tokenizer.decode([end, *the, xy]) == "<|end|>the<|x|><|y|>"
    assert both_ways(tokenizer, "the <|en", allowed_special=()) == tokenizer.encode("the <|en")


@pytest.mark.parametrize("prefix", ["", "the 中 ", "the " * 2000])
def test_special_tokens_are_refused(prefix: str) -> None:
    tokenizer = trained()
    for arguments in ({}, {"allowed_special": {"<|x|>"}}, {"disallowed_special": {"<|end|>"}}):
        for encode in (tokenizer.encode, tokenizer.encode_to_array):
            with pytest.raises(InputError) as error:
                encode(prefix + "<|end|> the", **arguments)  # type: ignore[operator]
            message = str(error.value)
            assert f"the special token '<|end|>' at position {len(prefix)};" in message
            assert "allowed_special={'<|end|>'}" in message
            assert "disallowed_special=()" in message
    with pytest.raises(InputError, match=r"'<\|end\|>'"):
        tokenizer.encode_batch([prefix, "<|end|>"])
    assert max(tokenizer.encode(prefix + "<|end|>", disallowed_special={"<|x|>"})) < 396
    with pytest.raises(InputError, match=r"allowed_special has '<\|z\|>', which is no special token"):
        tokenizer.encode("the", allowed_special={"<|z|>"})


@given(parts=st.lists(st.sampled_from([*SPECIAL, "the", " ", "<|", "|>", "\n"]), max_size=12))
@settings(max_examples=MANY)
def test_special_tokens_anywhere(parts: list[str]) -> None:
    tokenizer = trained()
    text = "".join(parts)
    ids = both_ways(tokenizer, text, allowed_special="all")
    assert tokenizer.decode(ids) == text
    expected: list[int] = []
    special = special_regex(tokenizer.special_tokens)
    assert special is not None
    begin = 0
    for match in [*special.finditer(text), None]:
        expected += expected_ids(tokenizer, text[begin : match.start() if match else len(text)])
        if match:
            expected.append(tokenizer.special_tokens[match.group()])
            begin = match.end()
    assert ids == expected


# ---- Wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 1000, 2001, 70_000, 300_000])
@pytest.mark.parametrize("special", [False, True])
def test_lone_surrogates_are_refused(position: int, special: bool) -> None:
    """The position is that in the text as it was given, behind a special token too."""
    tokenizer = trained(special=special)
    text = ("<|x|>" if special else "") + "ab " * 100_000
    text = text[:position] + "\udc80" + text[position:]
    if special and position in (0, 1):
        return  # that would break the special token
    for encode in (tokenizer.encode, tokenizer.encode_to_array):
        with pytest.raises(InputError, match=rf"U\+DC80 at position {position}\b"):
            encode(text, **({"allowed_special": "all"} if special else {}))  # type: ignore[operator]
    with pytest.raises(InputError, match=rf"U\+DC80 at position {position}\b"):
        tokenizer.encode(text[: position + 1], **({"allowed_special": "all"} if special else {}))  # type: ignore
    with pytest.raises(InputError, match=r"U\+DC80"):
        list(tokenizer.encode_iterable([text], allowed_special=["<|x|>"] if special else ()))


@pytest.mark.parametrize("ids", [[0, 400], [0, -1], [0, 2**40], np.array([0, 65535], dtype=np.uint16)])
def test_unknown_id_is_named(ids: Any) -> None:
    with pytest.raises(InputError, match=rf"the id {ids[1]} at position 1 .*0 to 399"):
        trained().decode(ids)
    with pytest.raises(InputError, match=rf"the id {ids[1]} at position 1 .*0 to 399"):
        trained().decode_bytes(iter([int(id) for id in ids]))


@pytest.mark.parametrize(
    "ids", [[0.0], [True], ["a"], [[0]], np.zeros((1, 1), int), [2**70], [None], np.zeros(1)]
)
def test_ids_must_be_integers_in_one_dimension(ids: Any) -> None:
    with pytest.raises(TypeError, match="ids must be integers"):
        trained().decode(ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_decode_takes_any_integer_dtype(dtype: type) -> None:
    ids = trained().encode("the lazy dog")
    assert trained().decode(np.array(ids, dtype=dtype)) == "the lazy dog"
    assert trained().decode([dtype(id) for id in ids]) == "the lazy dog"  # type: ignore[operator]


def test_gaps_between_ids() -> None:
    """Ids without a token are no error until they are decoded."""
    tokenizer = BPETokenizer({bytes([i]): 2 * i for i in range(256)}, [], special_tokens={"<s>": 1001})
    assert tokenizer.vocab_size == 1002
    ids = tokenizer.encode("ab<s>", allowed_special="all")
    assert ids == [194, 196, 1001]
    assert tokenizer.encode_to_array("ab").tolist() == [194, 196]
    assert tokenizer.decode(ids) == "ab<s>"
    for wrong in ([194, 1], np.array([194, 1])):
        with pytest.raises(InputError, match="the id 1 at position 1"):
            tokenizer.decode(wrong)


def test_dtype() -> None:
    bytes_only = {bytes([i]): i for i in range(256)}
    assert BPETokenizer(bytes_only, [], special_tokens={"<s>": 65535}).dtype == np.uint16
    large = BPETokenizer(bytes_only, [], special_tokens={"<s>": 65536})
    assert large.dtype == np.uint32
    array = large.encode_to_array("a<s>", allowed_special="all")
    assert array.dtype == np.uint32
    assert array.tolist() == [97, 65536]


# ---- Files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PATTERNS, r"[^\s\d]+|\s+"])
def test_save_and_load(tmp_path: Path, name: str) -> None:
    tokenizer = BPETokenizer.train([SAMPLE], 380, name, SPECIAL)
    assert tokenizer.save(tmp_path / "new") == tmp_path / "new" / "tokenizer.json"
    loaded = load_tokenizer(tmp_path / "new")
    assert isinstance(loaded, BPETokenizer)
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.vocab == tokenizer.vocab
        assert other.merges == tokenizer.merges
        assert other.pattern == tokenizer.pattern
        assert other.special_tokens == tokenizer.special_tokens
        assert other.vocab_size == 380
        assert repr(other) == repr(tokenizer)
        for text in (SAMPLE, SAMPLE[:300], ""):
            assert other.encode(text) == tokenizer.encode(text)
    assert load_tokenizer(loaded.save(tmp_path / "again.json")).to_json() == tokenizer.to_json()
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "tokenizer.json").read_bytes()


def test_merges_as_strings(tmp_path: Path) -> None:
    """The older way to write them."""
    content = trained().to_json()
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    assert BPETokenizer.from_json(content).encode(SAMPLE) == trained().encode(SAMPLE)


def test_truncated_file(tmp_path: Path) -> None:
    path = trained().save(tmp_path)
    content = path.read_bytes()
    end = len(content.rstrip())
    for length in [*range(0, end, end // 60), *range(end - 20, end)]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError) as error:
            load_tokenizer(path)
        assert str(error.value).startswith(str(path))


WRONG = [None, True, 0, -1, 1.5, 1e300, 10**30, "", "x\n" * 999, "\ud800", [], {}, [[]], [None], {"a": None}]
# Where the wrong values are put, and which of them are allowed there.
PLACES: list[tuple[tuple[Any, ...], list[Any]]] = [
    (("model",), []),
    (("model", "type"), [None]),
    (("model", "vocab"), []),
    (("model", "vocab", "a"), []),
    (("model", "merges"), [[]]),
    (("model", "merges", 0), []),
    (("model", "merges", 3, 0), []),
    (("model", "merges", 3, 1), []),
    (("model", "dropout"), [None, 0]),
    (("model", "continuing_subword_prefix"), [None, ""]),
    (("model", "end_of_word_suffix"), [None, ""]),
    (("model", "byte_fallback"), [None]),
    (("model", "ignore_merges"), [None, True]),
    (("normalizer",), [None]),
    (("pre_tokenizer",), []),
    (("pre_tokenizer", "type"), []),
    (("pre_tokenizer", "pretokenizers"), []),
    (("pre_tokenizer", "pretokenizers", 0), []),
    (("pre_tokenizer", "pretokenizers", 0, "type"), []),
    (("pre_tokenizer", "pretokenizers", 0, "pattern"), []),
    (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), ["x\n" * 999]),
    (("pre_tokenizer", "pretokenizers", 0, "behavior"), []),
    (("pre_tokenizer", "pretokenizers", 1), []),
    (("pre_tokenizer", "pretokenizers", 1, "type"), []),
    (("added_tokens",), [None, 0, "", [], {}]),
    (("added_tokens", 0), []),
    (("added_tokens", 0, "content"), ["x\n" * 999]),
    (("added_tokens", 0, "id"), []),
    (("added_tokens", 0, "special"), [True]),
    (("added_tokens", 0, "lstrip"), [True]),
    (("added_tokens", 0, "unheard of"), []),
    (("post_processor",), [None]),
    (("decoder",), [None]),
    (("unheard of",), []),
    (("model", "unheard of"), []),
]


@pytest.mark.parametrize("place", [place for place, _ in PLACES], ids=lambda place: ".".join(map(str, place)))
def test_wrong_types_everywhere(tmp_path: Path, place: tuple[Any, ...]) -> None:
    allowed = dict(PLACES)[place]
    path = tmp_path / "tokenizer.json"
    for wrong in WRONG:
        content = trained().to_json()
        inner: Any = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        path.write_text(json.dumps(content), encoding="utf-8")
        if any(wrong == value and type(wrong) is type(value) for value in allowed):
            load_tokenizer(path)
            continue
        with pytest.raises(InputError) as error:
            load_tokenizer(path)
        message = str(error.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        assert len(message) < 900, wrong


def changed(**parts: Any) -> dict[str, Any]:
    """A good tokenizer.json with parts of it, or of its model or added token, replaced or, if callable, changed."""
    content = copy.deepcopy(trained().to_json())
    for key, value in parts.items():
        inner = content["model"] if key in content["model"] and key != "type" else content
        inner[key] = value(inner[key]) if callable(value) else value
    return content


def added(**parts: Any) -> dict[str, Any]:
    return changed(added_tokens=lambda tokens: [{**tokens[0], **parts}, *tokens[1:]])


SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def steps(*pretokenizers: Any) -> dict[str, Any]:
    return changed(pre_tokenizer={"type": "Sequence", "pretokenizers": list(pretokenizers)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(merges=lambda m: [*m, ["Q", "Q"]]), "makes b'QQ', which is not in the vocabulary"),
        (changed(merges=lambda m: [["QQ", "Q"], *m]), "merge 0 joins b'QQ'"),
        (changed(merges=lambda m: [*m, "a"]), "must be two tokens"),
        (changed(merges=lambda m: [*m, "a b c"]), "must be two tokens"),
        (changed(merges=lambda m: [*m, ["a", "b", "c"]]), "must be two tokens"),
        (changed(merges=lambda m: [*m, ["", "a"]]), "must be two tokens"),
        (changed(merges=lambda m: [*m, ["中", "a"]]), "not written in GPT-2's characters"),
        (changed(vocab=lambda v: {**v, "QQ": 97}), "the id 97 is given to two tokens"),
        (changed(vocab=lambda v: {**v, "QQ": 396}), "the id 396 is given to two tokens"),
        (changed(vocab=lambda v: {**v, "QQ": -1}), "is -1; it must be an integer from 0"),
        (changed(vocab=lambda v: {**v, "QQ": 10**9}), "is 1000000000; it must be"),
        (changed(vocab=lambda v: {**v, "QQ": 2**63}), "it must be an integer"),
        (changed(vocab=lambda v: {**v, "QQ": 500.0}), "is 500.0; it must be"),
        (changed(vocab=lambda v: {**v, "QQ": True}), "is True; it must be"),
        (changed(vocab=lambda v: {**v, "": 500}), "is empty"),
        (changed(vocab=lambda v: {**v, "中": 500}), "not written in GPT-2's characters"),
        (
            changed(vocab=lambda v: {t: id for t, id in v.items() if t != "a"}, merges=[]),
            "lacks 1 of the 256",
        ),
        (changed(vocab={"a": 0}, merges=[]), "lacks 255 of the 256 bytes"),
        (changed(vocab={}), "the vocabulary must be an object of tokens"),
        (changed(normalizer={"type": "BertNormalizer"}), "normalizer has"),
        (changed(normalizer={"type": "NFC", "x": 1}), "NFC has x 1"),
        (changed(normalizer={"type": "Replace", "pattern": {"Regex": "^a"}, "content": ""}), "Oniguruma"),
        (changed(decoder={"type": "Sequence", "decoders": []}), "decoder is"),
        (changed(decoder={"type": "WordPiece"}), "decoder has"),
        (changed(post_processor={"type": "Unheard"}), "post_processor is"),
        (
            changed(post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {}}] * 2}),
            "post_processor is",
        ),
        (changed(dropout=0.1), "model.dropout is 0.1"),
        (changed(end_of_word_suffix="</w>"), "marks the ends of pieces"),
        (changed(continuing_subword_prefix="##"), "model.continuing_subword_prefix is"),
        (changed(byte_fallback=1), "model.byte_fallback is 1"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer has"),
        (steps(), "must have one step ByteLevel"),
        (steps(SPLIT), "must have one step ByteLevel"),
        (steps(BYTES, BYTES), "must have one step ByteLevel"),
        (changed(pre_tokenizer=lambda p: {**p, "x": 1}), "pre_tokenizer has"),
        (changed(pre_tokenizer={"type": "Sequence", "normalizers": [BYTES]}), "pre_tokenizer has"),
        (changed(normalizer={"type": "Prepend", "prepend": "a" * 17}), "at most 16 characters"),
        (changed(normalizer={"type": "Prepend", "prepend": "\ud800"}), "half of a UTF-16 pair"),
        (steps({**SPLIT, "behavior": "Isolate"}, BYTES), "Split has behavior 'Isolate'"),
        (steps({**SPLIT, "invert": 1}, BYTES), "Split has invert 1"),
        (steps({"type": "Split", "pattern": {"String": "a"}}, BYTES), "Split lacks one of"),
        (steps({**SPLIT, "pattern": {"Regex": r"\p{N}{1,3}+"}}, BYTES), "Oniguruma"),
        (steps({**SPLIT, "pattern": {"Regex": r"\h+"}}, BYTES), "Oniguruma"),
        (steps({**SPLIT, "pattern": {"Regex": "("}}, BYTES), "nor a regular expression"),
        (steps({**SPLIT, "pattern": {"Regex": "(?au)a"}}, BYTES), "nor a regular expression"),
        (steps({**SPLIT, "pattern": {"Regex": "(" * 5000}}, BYTES), "nor a regular expression"),
        (added(content="<|x|>"), "stands twice"),
        (added(content="\ud800"), "half of a UTF-16 pair"),
        (added(id=0), "the id 0 is given to two tokens"),
        (added(id=10**30), "it must be an integer"),
        (added(id=None), "an integer id"),
        (added(content="a"), "has the id 396, and 97 in the vocabulary"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message
    assert len(message) < 900
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("section", "steps"),
    [("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("post_processor", "processors")],
)
def test_sequences_in_each_other(section: str, steps: str) -> None:
    inner: dict[str, Any] = {"type": "Sequence", steps: []}
    for _ in range(5000):
        inner = {"type": "Sequence", steps: [inner]}
    with pytest.raises(InputError, match="file: it is nested too deeply"):
        parse_tokenizer(changed(**{section: inner}), "file")


def test_a_normalizer_that_lets_a_text_grow() -> None:
    """A short file does not make a short text take all memory."""
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer = BPETokenizer.from_json(changed(normalizer={"type": "Sequence", "normalizers": [double] * 60}))
    assert tokenizer.encode("b") == [98]
    with pytest.raises(InputError, match="times as long"):
        tokenizer.encode("a" * 9)


def test_numbers_too_long_and_nesting_too_deep(tmp_path: Path) -> None:
    path = trained().save(tmp_path)
    content = path.read_text(encoding="utf-8")
    for old, new in (
        ('"a": 97', '"a": 1' + "0" * 5000),
        ('"truncation": null', '"truncation": ' + "[" * 100_000),
    ):
        assert old in content
        path.write_text(content.replace(old, new), encoding="utf-8")
        with pytest.raises(InputError):
            load_tokenizer(path)


def test_catastrophic_expression_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns_module, "_SECONDS_PER_MILLION", 0.1)
    content = steps({**SPLIT, "pattern": {"Regex": r"(a|aa)+(?![\s\S])"}}, BYTES)
    tokenizer = BPETokenizer.from_json(content)
    text = "a" * 60 + "b"
    for encode in (
        tokenizer.encode,
        tokenizer.encode_to_array,
        tokenizer.offsets,
        lambda text: tokenizer.encode_bytes(text.encode()),
        lambda text: tokenizer.encode_batch([text]),
        lambda text: list(tokenizer.encode_iterable([text])),
        lambda text: BPETokenizer.train([text], 300, tokenizer.pattern),
    ):
        began = time.perf_counter()
        with pytest.raises(InputError, match="backtracks too much"):
            encode(text)  # type: ignore[operator]
        assert time.perf_counter() - began < 2


@given(data=st.data())
@settings(max_examples=MANY)
def test_a_changed_character_of_a_file(data: st.DataObject) -> None:
    """What is not refused works: it loads, and encodes and decodes text."""
    content = json.dumps(trained(size=300).to_json(), ensure_ascii=False)
    position = data.draw(st.integers(0, len(content) - 1))
    character = data.draw(
        st.one_of(st.sampled_from('0-1"\\{}[],: aA'), st.characters(exclude_categories=["Cs"]))
    )
    try:
        parsed = json.loads(content[:position] + character + content[position + 1 :])
    except json.JSONDecodeError:
        return
    try:
        tokenizer = BPETokenizer.from_json(parsed)
        ids = tokenizer.encode(SAMPLE[:200])
    except InputError:
        return
    assert tokenizer.decode(ids) == SAMPLE[:200]

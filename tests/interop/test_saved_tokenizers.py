"""What we save means the same ids to the tokenizers library, or is refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import BPETokenizer, TokenizerFileWarning, parse_tokenizer, read_gpt2, write_gpt2
from tinyllm.tokenizer.oniguruma import require_same
from tinyllm.tokenizer.patterns import PATTERNS, Pattern

tokenizers = pytest.importorskip(
    "tokenizers", reason="compares with the tokenizers package: pip install tokenizers"
)

BYTES = {bytes([i]): i for i in range(256)}
MERGES = [(b"l", b"o"), (b"lo", b"w"), (b" ", b"low")]
TEXT = "low slow, the lowest <s> b Ġlow 12 é\n"


def with_merges(start: int = 0) -> dict[bytes, int]:
    """Ids of the bytes and of what the merges make, from `start` on."""
    tokens = [*BYTES, *(left + right for left, right in MERGES)]
    return {token: start + i for i, token in enumerate(tokens)}


def opened(ours: BPETokenizer) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()))


def check(ours: BPETokenizer, text: str = TEXT) -> None:
    theirs = opened(ours)
    for token, id in ours.special_tokens.items():
        assert theirs.token_to_id(token) == id
        for words in (token, f"a{token}b", f" low {token} {text}"):
            ids = ours.encode(words, allowed_special="all")
            assert theirs.encode(words).ids == ids
            if token.isascii():  # theirs decodes other special tokens as if they were written in bytes
                assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    again = parse_tokenizer(json.loads(theirs.to_str()), "theirs")
    assert isinstance(again, BPETokenizer)
    assert again.special_tokens == ours.special_tokens
    assert again.vocab == ours.vocab
    assert again.encode(text, disallowed_special=()) == ours.encode(text, disallowed_special=())
    parse_tokenizer(json.loads(json.dumps(again.to_json())), "ours")


# ---- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "special"),
    [
        (0, {"<s>": 259}),
        (0, {"<s>": 259, "</s>": 260}),
        (2, {"<s>": 0, "</s>": 1}),
        (1, {"<s>": 0, "</s>": 260}),
        (0, {"<s>": 261, "</s>": 259}),
        (0, {"<s>": 259, "<|fim|>": 263, "</s>": 276}),
        (7, {"<s>": 3}),
        (0, {"Ġnew": 300, "lowest": 259}),
        (0, {"low": 257}),
    ],
)
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_numbers_of_special_tokens(start: int, special: dict[str, int], ignore_merges: bool) -> None:
    """Numbered first, last, with gaps, in another order, and spelled like a token that has the same id."""
    ours = BPETokenizer(with_merges(start), MERGES, "gpt2", special, ignore_merges)
    if ignore_merges and "Ġnew" in special:
        with pytest.raises(InputError, match="for a piece of text"):
            ours.to_json()
        return
    check(ours)


def test_trained_by_them_with_special_tokens_first() -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT * 9], trainer)
    ours = parse_tokenizer(json.loads(model.to_str()), "theirs")
    assert isinstance(ours, BPETokenizer)
    assert ours.special_tokens == {"<s>": 0, "</s>": 1}
    check(ours)


@pytest.mark.parametrize("token", ["b", "Ġlow", "low", "Ċ", "é"])
def test_special_tokens_spelled_like_others(token: str) -> None:
    """In the file a special token "b" and the byte of b are one entry."""
    ours = BPETokenizer(with_merges(), MERGES, "gpt2", {token: 259})
    with pytest.raises(InputError, match="is written like the token of id"):
        ours.to_json()


@given(
    st.dictionaries(
        st.sampled_from(["<s>", "b", "Ġlow", "low", "x y", "日", "Ā", "lowlow", " b"]),
        st.integers(250, 270),
        max_size=4,
    ),
    st.booleans(),
    st.integers(0, 3),
)
@example({"<s>": 260, "b": 98}, True, 0)
def test_any_numbers(special: dict[str, int], ignore_merges: bool, start: int) -> None:
    try:
        ours = BPETokenizer(with_merges(start), MERGES, "gpt2", special, ignore_merges)
        saved = ours.to_json()
    except InputError:
        return
    theirs = tokenizers.Tokenizer.from_str(json.dumps(saved))
    for text in (TEXT, *special, *(f"a{token} low" for token in special)):
        assert theirs.encode(text).ids == ours.encode(text, allowed_special="all")


# ---- Expressions -------------------------------------------------------------------------------

CLASSES = [
    r"\s",
    r"\S",
    r"\d",
    r"\D",
    r"\p{L}",
    r"\P{L}",
    r"\p{Lu}",
    r"\p{Ll}",
    r"\p{N}",
    r"\p{P}",
    r"\p{Han}",
]
ATOMS = [
    *CLASSES,
    ".",
    "a",
    "b",
    "A",
    "1",
    "'",
    "-",
    " ",
    r"\n",
    r"\.",
    r"\|",
    r"\x41",
    r"\u4e2d",
    r"\A",
    "é",
]
# Some of these are refused, some differ only now and then.
ODD = [
    "^",
    "$",
    r"\h",
    r"\w",
    r"\b",
    r"\Z",
    r"\z",
    r"\G",
    r"\X",
    r"\R",
    "[a&&b]",
    "[a-z&&[^b]]",
    "[[:alpha:]]",
    "]",
    "{",
]
classes = st.lists(
    st.sampled_from([*CLASSES, "a", "-", "1-3", "a-c", "^", "é", r"\]", r"\-", "b", "&", "|", "~"]),
    min_size=1,
    max_size=4,
)
atoms = (
    st.sampled_from(ATOMS)
    | st.sampled_from(ODD)
    | st.tuples(st.sampled_from(["[", "[^"]), classes).map(lambda parts: parts[0] + "".join(parts[1]) + "]")
)
QUANTIFIERS = [
    "",
    "",
    "",
    "+",
    "*",
    "?",
    "+?",
    "*?",
    "??",
    "++",
    "*+",
    "?+",
    "{2}",
    "{1,2}",
    "{2,}",
    "{1,2}?",
    "{1,2}+",
    "{2}?",
]


def groups(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    kinds = st.sampled_from(["(?:", "(", "(?>", "(?=", "(?!", "(?<=", "(?<!", "(?i:", "(?s:", "(?m:", "(?x:"])
    joined = st.lists(inner, min_size=1, max_size=3).map("|".join)
    return st.tuples(kinds, joined).map(lambda parts: parts[0] + parts[1] + ")")


def sequences(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    part = st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(
        lambda parts: parts[0] + parts[1].replace(";", ",")
    )
    return st.lists(part, min_size=1, max_size=3).map("".join)


expressions = sequences(st.recursive(atoms, lambda inner: groups(sequences(inner)), max_leaves=5))
PROBES = [
    "aAb 1-2\n\nab.'a|",
    "  bÉé中文A1 a\r\n",
    "aaabbb111 AAa",
    "&-^]~ a-b&c\ta",
    "ß ſs ﬁ st ﬀ ss K k",
    "",
]


@given(st.lists(expressions, min_size=1, max_size=3).map("|".join), st.text("aAb1 -\n'é中.K", max_size=12))
@settings(max_examples=600)
@example("a{1,2}+", "aaa")
@example("(?i:ss|st)", "ß ﬆ")
@example("[a-z&&[^b]]+", "abc")
@example("(?=a)|a+", "aa")
@example(r"[^\p{L}\P{L}]", "aa")
@example(r"[^a\s\S]", "aa")
def test_expressions_that_are_taken_split_alike(expression: str, text: str) -> None:
    try:
        regex.compile(expression)
        require_same(expression)
    except (regex.error, InputError):
        return
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    for probe in (*PROBES, text):
        assert [piece for piece, _ in split.pre_tokenize_str(probe)] == Pattern(
            expression, is_name=False
        ).split(probe)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_with_names_are_taken(name: str) -> None:
    require_same(PATTERNS[name])


@pytest.mark.parametrize(
    "expression",
    [
        r"^a|.",
        r"\h+",
        r"\p{N}{1,3}+",
        r"[\p{L}&&a]+",
        r"\w+",
        "a$|.",
        r"\Z|.",
        r"\b.",
        "(?i:ss)|.",
        "a*",
        "(?m:.)",
    ],
)
def test_expressions_of_ones_own(expression: str, tmp_path: Path) -> None:
    """Those that the other library may read otherwise are refused before anything is learned, and on save."""
    with pytest.raises(InputError, match="Oniguruma"):
        BPETokenizer.train(["a b"], 300, expression)
    with pytest.raises(InputError, match="Oniguruma"):
        BPETokenizer(BYTES, [], expression).save(tmp_path)
    saved = json.dumps(BPETokenizer(BYTES, [], "[ab]+").to_json()).replace(
        "[ab]+", json.dumps(expression)[1:-1]
    )
    with pytest.raises(InputError, match="Oniguruma"):
        parse_tokenizer(json.loads(saved), "file")


# ---- What stands around ------------------------------------------------------------------------


def test_what_comes_after_is_kept_and_offered() -> None:
    content = BPETokenizer(with_merges(), MERGES, "gpt2", {"<s>": 259, "</s>": 260}).to_json()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 259), ("</s>", 260)]
    )
    theirs.enable_truncation(7)
    theirs.enable_padding(length=9)
    content = json.loads(theirs.to_str())
    with pytest.warns(TokenizerFileWarning, match="truncation and padding") as warned:
        ours = parse_tokenizer(content, "file")
    assert len(warned) == 1
    assert isinstance(ours, BPETokenizer)
    assert ours.tokens_around == ((259,), (260,))
    saved = ours.to_json()
    for section in ("truncation", "padding", "post_processor", "decoder"):
        assert saved[section] == content[section]
    again = tokenizers.Tokenizer.from_str(json.dumps(saved))
    assert again.encode("low " * 20).ids == theirs.encode("low " * 20).ids


def test_version_of_regex_is_saved() -> None:
    content = BPETokenizer(BYTES, []).to_json()
    assert content["model"]["regex_version"] == regex.__version__
    tokenizers.Tokenizer.from_str(json.dumps(content))


def test_other_forms_of_files() -> None:
    """No type of the model, merges that stand twice, a normalizer without steps."""
    content = BPETokenizer(with_merges(), MERGES, "gpt2").to_json()
    content["normalizer"] = {"type": "Sequence", "normalizers": []}
    del content["model"]["type"]
    first = content["model"]["merges"][0]
    content["model"]["merges"] += [["o", "w"], first]
    content["model"]["vocab"]["ow"] = 259
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    ours = parse_tokenizer(content, "file")
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids
    assert theirs.encode("low").tokens == ["l", "ow"]


def lines(merges: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{left} {right}\n" for left, right in merges)


@pytest.mark.parametrize(
    "merges", ["", "#version: 0.2\n", lines([("l", "o")]), lines([("l", "o"), ("lo", "w")])]
)
def test_cut_merges_are_refused(merges: str, tmp_path: Path) -> None:
    write_gpt2(BPETokenizer(with_merges(), MERGES, "gpt2"), tmp_path)
    assert read_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", ()).merges == MERGES
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(InputError, match=r"merges\.txt cut off"):
        read_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", ())

"""Byte-pair encoding gives the ids that tokenizers, tiktoken and transformers give with the same merges."""

import functools
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm.testing.strategies import PROFILE_VARIABLE
from tinyllm.tokenizer import BPETokenizer, load_tokenizer
from tinyllm.tokenizer.patterns import PATTERNS

tokenizers = pytest.importorskip(
    "tokenizers", reason="compares with the tokenizers package: pip install tokenizers"
)
tiktoken = pytest.importorskip("tiktoken", reason="compares with the tiktoken package: pip install tiktoken")

pytestmark = pytest.mark.filterwarnings("ignore::tinyllm.tokenizer.VocabularyWarning")

EXAMPLES = 10_000 if os.environ.get(PROFILE_VARIABLE) == "thorough" else 200
DATA = Path(__file__).parents[3] / "shared/data"
SPECIAL = ["<|endoftext|>", "<|x|>"]
SAMPLE = (
    "The quick brown fox jumps over the lazy dog. Don't, I'LL see; it's the 12345th thing, isn't it?\n\n"
    "  aaaaaaaa aaaa aa banana bandana abababab\tthe other there then\r\n中文字 中文 日本語 é e\u0301 ñandú "
    "Straße \U0001f469\u200d\U0001f4bb \U0001f600\U0001f600 ½ ٤٤ \u3000\xa0 \x00\x00 camelCase CamelCASE "
) * 4


def file_text(name: str) -> str:
    """The beginning of a text file that lies beside the repository."""
    file = DATA / name
    if not file.is_file():
        pytest.skip(f"needs {name} in a folder shared/data beside the repository")
    with open(file, encoding="utf-8", newline="") as stream:
        return stream.read(1 << 20)


@functools.cache
def trained(name: str) -> BPETokenizer:
    return BPETokenizer.train([SAMPLE], 420, name, SPECIAL)


def encoding(ours: BPETokenizer) -> Any:
    """tiktoken's encoding with our merges; its ranks are the ids of the tokens."""
    return tiktoken.Encoding(
        "ours", pat_str=ours.pattern, mergeable_ranks=dict(ours.vocab), special_tokens=ours.special_tokens
    )


def opened(ours: BPETokenizer, folder: Path) -> Any:
    """The saved tokenizer.json as tokenizers opens it."""
    return tokenizers.Tokenizer.from_file(str(ours.save(folder)))


@functools.cache
def theirs(name: str) -> Any:
    """trained(name) in tokenizers."""
    return tokenizers.Tokenizer.from_str(json.dumps(trained(name).to_json()))


@functools.cache
def their_encoding(name: str) -> Any:
    return encoding(trained(name))


# ---- Characters that all engines know ----------------------------------------------------------

CLASSES = (r"\p{L}", r"\p{N}", r"\p{M}", r"\s", r"[\p{Lu}\p{Lt}]", r"\p{Ll}")


def members_by_tokenizers(expression: str) -> set[str]:
    """The characters that Oniguruma, the engine of tokenizers, puts into a class.

    Behind each character stands U+0001, which is in no class: so a match is one character, and what lies between
    two matches has an even number more.
    """
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    found: set[str] = set()
    for block in blocks_of_characters():
        pieces = split.pre_tokenize_str("\x01".join(block) + "\x01")
        found.update(piece for piece, _ in pieces if len(piece) == 1 and piece != "\x01")
    return found


def members_by_tiktoken(expression: str) -> set[str]:
    """The characters that Rust's fancy-regex, the engine of tiktoken, puts into a class."""
    ranks = {bytes([i]): i for i in range(256)}
    probe = tiktoken.Encoding("probe", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    # tiktoken drops what the expression does not match.
    return {
        c for block in blocks_of_characters() for c in probe.decode(probe.encode_ordinary("".join(block)))
    }


def members_by_regex(expression: str) -> set[str]:
    return {c for block in blocks_of_characters() for c in regex.findall(expression, "".join(block))}


@functools.cache
def blocks_of_characters() -> list[list[str]]:
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code != 1]
    return [every[i : i + 4096] for i in range(0, len(every), 4096)]


@functools.cache
def common_characters() -> str:
    """All characters whose classes are the same in `regex`, Oniguruma and Rust's engine.

    These follow different versions of Unicode, so a letter of a young script is one to some of them only. For each
    class that a pattern names, every engine is asked once which of all code points are in it; code points
    about which two of them differ are left out.
    """
    engines: tuple[Callable[[str], set[str]], ...] = (
        members_by_regex,
        members_by_tokenizers,
        members_by_tiktoken,
    )
    differing: set[str] = set()
    for expression in CLASSES:
        first, *others = (members(expression) for members in engines)
        assert len(first) > 20
        for other in others:
            differing |= first ^ other
    assert len(differing) < 30_000
    return "".join(c for block in blocks_of_characters() for c in block if c not in differing)


HARD = [
    *"aAzsStT '’ſ\t\n\r01१!/.-–中ǅʰ\u0301\u200d\ufe0f\xa0\u2028\x1c\x85\x00½",
    "\U0001f469",
    "'s",
    "'LL",
    "  ",
]


@functools.cache
def texts() -> st.SearchStrategy[str]:
    common = common_characters()
    known = set(common)
    assigned = [c for c in common if unicodedata.category(c) not in ("Cn", "Co")]
    hard = [part for part in HARD if known.issuperset(part)]
    assert len(hard) > 30
    parts = st.one_of(st.sampled_from(common), st.sampled_from(assigned), st.sampled_from(hard))
    return st.lists(parts, max_size=60).map("".join)


# ---- Ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_any_text(name: str, data: st.DataObject) -> None:
    check(name, data.draw(texts()))


def check(name: str, text: str) -> None:
    ids = trained(name).encode(text)
    assert trained(name).encode_to_array(text).tolist() == ids
    assert their_encoding(name).encode_ordinary(text) == ids
    assert theirs(name).encode(text).ids == ids
    assert theirs(name).decode(ids) == their_encoding(name).decode(ids) == text


@pytest.mark.parametrize("name", PATTERNS)
@given(parts=st.lists(st.sampled_from(HARD), max_size=40))
@settings(max_examples=EXAMPLES)
@example(list("don'ts I'LL 12345 !\n/a"))
def test_hard_characters(name: str, parts: list[str]) -> None:
    check(name, "".join(parts))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("file", ["tinyshakespeare.txt", "multilingual.txt"])
def test_files(file: str, name: str, tmp_path: Path) -> None:
    """Learned from the first tenth of the text, whose characters all engines know."""
    text = file_text(file)
    known = set(common_characters())
    text = text.translate({ord(character): None for character in set(text) - known})
    ours = BPETokenizer.train([text[: len(text) // 10]], 2000, name)
    assert ours.vocab_size == 2000
    ids = ours.encode_to_array(text).tolist()
    assert encoding(ours).encode_ordinary(text) == ids
    lines = text.splitlines(keepends=True)
    # tokenizers is slow on long texts, so it gets them in parts.
    parts = ["".join(lines[i : i + 200]) for i in range(0, len(lines), 200)]
    found = [encoded.ids for encoded in opened(ours, tmp_path).encode_batch_fast(parts)]
    assert found == ours.encode_batch(parts)
    assert ours.decode(ids) == text


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [1000, 10_000])
def test_long_repeats(name: str, length: int) -> None:
    for unit in ("a", "ab", "中", " ", "\n ", "1", "!"):
        check(name, (unit * length)[:length])


def test_very_long_repeats() -> None:
    for length in (10**5, 2 * 10**5):
        for unit in ("a", "ab", "aab"):
            text = (unit * length)[:length]
            assert their_encoding("o200k").encode_ordinary(text) == trained("o200k").encode(text)


# ---- Special tokens and files ------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_special_tokens(name: str) -> None:
    text = "the<|x|><|endoftext|> fox <|x| <|endoftext|>\n"
    ids = trained(name).encode(text, allowed_special="all")
    assert their_encoding(name).encode(text, allowed_special="all") == ids
    assert theirs(name).encode(text).ids == ids
    assert theirs(name).decode(ids, skip_special_tokens=False) == text
    as_text = trained(name).encode(text, disallowed_special=())
    assert their_encoding(name).encode(text, disallowed_special=()) == as_text
    one = {"allowed_special": {"<|x|>"}, "disallowed_special": ()}
    assert their_encoding(name).encode(text, **one) == trained(name).encode(text, **one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="special token"):
        their_encoding(name).encode(text)
    with pytest.raises(ValueError, match="special token"):
        trained(name).encode(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_transformers_opens_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers: pip install transformers"
    )
    ours = trained(name)
    path = ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    text = SAMPLE + "<|x|>the<|endoftext|>"
    ids = ours.encode(text, allowed_special="all")
    for fast in (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(path)),
        transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path)),
    ):
        assert fast.encode(text, add_special_tokens=False) == ids
        assert fast.decode(ids, clean_up_tokenization_spaces=False) == text
        assert len(fast) == ours.vocab_size


def test_auto_tokenizer(tmp_path: Path) -> None:
    """With the tokenizer_config.json that transformers itself writes."""
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers: pip install transformers"
    )
    ours = trained("gpt2")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(ours.save(tmp_path / "ours")))
    fast.save_pretrained(tmp_path / "theirs")
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "theirs"))
    text = SAMPLE + "<|x|>the<|endoftext|>"
    ids = ours.encode(text, allowed_special="all")
    assert again.encode(text, add_special_tokens=False) == ids
    assert again.decode(ids, clean_up_tokenization_spaces=False) == text
    assert load_tokenizer(tmp_path / "theirs").encode(text, allowed_special="all") == ids  # type: ignore[call-arg]


@pytest.mark.parametrize("name", PATTERNS)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    """What tokenizers writes after reading ours, we read again."""
    ours = trained(name)
    opened(ours, tmp_path).save(str(tmp_path / "theirs.json"))
    again = load_tokenizer(tmp_path / "theirs.json")
    assert isinstance(again, BPETokenizer)
    assert (again.vocab, again.merges, again.special_tokens) == (ours.vocab, ours.merges, ours.special_tokens)
    assert again.pattern == ours.pattern


def test_a_tokenizer_that_they_trained(tmp_path: Path) -> None:
    """One that tokenizers learned and saved, with its own numbering of the bytes."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([SAMPLE], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, BPETokenizer)
    assert ours.encode(SAMPLE) == ours.encode_to_array(SAMPLE).tolist() == model.encode(SAMPLE).ids
    assert ours.encode("<s>a", allowed_special="all") == model.encode("<s>a").ids

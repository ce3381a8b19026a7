"""Tokenizers of other families, made with the tokenizers library, give the same ids and text here, loaded and saved."""

import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import Tokenizer, parse_tokenizer
from tinyllm.tokenizer.patterns import PATTERNS

tokenizers = pytest.importorskip(
    "tokenizers", reason="compares with the tokenizers package: pip install tokenizers"
)
AddedToken, Regex = tokenizers.AddedToken, tokenizers.Regex
decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
pre_tokenizers, processors = tokenizers.pre_tokenizers, tokenizers.processors

# Characters that every version of Unicode in use knows, with and without composition.
WORDS = re.findall(
    r"\S+",
    "the The THE them don't I'LL it's low lower 12345 1st 3.14 ½²³ ٣٤ naïve "
    "na\u0308\u0131ve Å A\u030a ﬁ Σίσυφος ΟΔΟΣ İstanbul 日本語 中文字 ひらがな カタカナ 한국어 русский "
    "текст हिन्दी العربية שלום ไทย \U0001f600 \U0001f469\u200d\U0001f4bb foo_bar "
    "x+=1; <b> {} [] ... --- $5 a/b \\n '' ’s fOOBarBaz",
)
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", "\u3000", "\xa0", "   "]
# What is special to some of the families.
MARKS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|x|>",
    "<|left|>",
    "<|right|>",
    "<|word|>",
    "<tool>",
    "▁",
    "<0x0A>",
    "</w>",
    "Ġlow",
    "é",
]


def generated_text(length: int) -> str:
    draw = random.Random(length)
    return "".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(length))


@functools.cache
def sample() -> str:
    """The multilingual text, where it lies beside the repository, and generated text."""
    file = Path(__file__).parents[3] / "shared/data/multilingual.txt"
    text = file.read_text("utf-8")[:60_000] if file.is_file() else ""
    return text + generated_text(4000)


TEXTS = st.lists(
    st.sampled_from(WORDS + SPACES + MARKS) | st.text(st.characters(max_codepoint=0x24F), max_size=3),
    max_size=12,
).map("".join)

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PHI = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_level(
    splits: list[Any], normalizer: Any = None, special: list[Any] | None = None, suffix: str | None = None
) -> Any:
    ends = {"end_of_word_suffix": suffix} if suffix else {}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**ends))
    model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>"] if special is None else special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **ends,
        show_progress=False,
    )
    model.train_from_iterator(sample().splitlines(keepends=True), trainer)
    return model


def split(expression: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior, invert)


def bytes_only(prefix: bool = False, use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def qwen() -> Any:
    model = byte_level([split(QWEN), bytes_only()], normalizers.NFC(), [])
    model.add_special_tokens(["<s>", "<|x|>"])
    model.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("Å", normalized=True)])
    return model


def smollm() -> Any:
    return byte_level([pre_tokenizers.Digits(individual_digits=True), bytes_only(use_regex=True)])


def roberta() -> Any:
    model = byte_level([bytes_only(prefix=True, use_regex=True)], special=["<s>", "</s>", "<unk>"])
    model.add_special_tokens([AddedToken("<|left|>", lstrip=True, normalized=False)])
    model.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return model


def added_tokens() -> Any:
    model = byte_level([bytes_only(use_regex=True)], normalizers.Lowercase())
    model.add_special_tokens(
        [AddedToken("<|right|>", rstrip=True), AddedToken("<|left|>", lstrip=True, rstrip=True)]
    )
    model.add_tokens(
        [AddedToken("low", single_word=True, normalized=False), AddedToken("The", single_word=True)]
    )
    model.add_tokens(
        [
            AddedToken("<|Word|>", lstrip=True),
            AddedToken("日本", normalized=False),
            AddedToken("日", normalized=False),
        ]
    )
    return model


def llama3() -> Any:
    model = byte_level([split(PATTERNS["llama3"]), bytes_only()], special=[])
    model.add_special_tokens(["<s>", "</s>"])
    template = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", model.token_to_id("<s>")), ("</s>", model.token_to_id("</s>"))]
    )
    model.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    model.enable_truncation(5)
    model.enable_padding()
    return model


def falcon() -> Any:
    digits = split("[0-9][0-9][0-9]")
    return byte_level(
        [
            pre_tokenizers.Punctuation("contiguous"),
            bytes_only(use_regex=True),
            pre_tokenizers.Digits(False),
            digits,
        ]
    )


def clip() -> Any:
    text = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    model = byte_level([split(CLIP, "removed", True), bytes_only()], text, ["<s>"], "</w>")
    return with_all_ends(model)


def with_all_ends(model: Any) -> Any:
    """The same with every byte of the alphabet also at the end of a word, as in CLIP."""
    content = json.loads(model.to_str())
    vocab = content["model"]["vocab"]
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(character + "</w>", len(vocab))
    return tokenizers.Tokenizer.from_str(json.dumps(content))


FORMS: dict[str, Callable[[], Any]] = {
    "Qwen": qwen,
    "SmolLM": smollm,
    "RoBERTa": roberta,
    "added tokens": added_tokens,
    "Llama 3": llama3,
    "Phi-4": lambda: byte_level([split(PHI, "removed", True), bytes_only()]),
    "DeepSeek": lambda: byte_level([*map(split, DEEPSEEK), bytes_only()], normalizers.Sequence([])),
    "prefix after splits": lambda: byte_level([split(r" ?\p{L}+|\s+"), bytes_only(prefix=True)]),
    "merged": lambda: byte_level(
        [
            split(r"\s+", "merged_with_previous"),
            split("[.,]", "merged_with_next"),
            split("[0-9]", "contiguous"),
            bytes_only(),
        ]
    ),
    "NFKC": lambda: byte_level([bytes_only(use_regex=True)], normalizers.NFKC()),
    "CLIP": clip,
    "Falcon": falcon,
}


def characters(
    normalizer: Any = None,
    splits: Any = None,
    strip: bool = True,
    unknown: str | None = "<unk>",
    ignore_merges: bool = False,
) -> Any:
    """A tokenizer of characters with byte fallback, with merges that the tokenizers library has learned."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special + names, limit_alphabet=200, show_progress=False
    )
    learner.train_from_iterator(sample().splitlines(), trainer)
    learned = json.loads(learner.to_str())["model"]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            learned["vocab"],
            list(map(tuple, learned["merges"])),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=ignore_merges,
        )
    )
    if normalizer is not None:
        model.normalizer = normalizer
    if splits is not None:
        model.pre_tokenizer = splits
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    model.add_special_tokens(special)
    return model


def to_space() -> Any:
    return normalizers.Replace(" ", "▁")


def phi3() -> Any:
    model = characters(normalizers.Sequence([normalizers.Prepend("▁"), to_space()]))
    model.add_special_tokens(
        [AddedToken("<|right|>", rstrip=True, normalized=False), AddedToken("<|x|>", normalized=False)]
    )
    model.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("low", single_word=True)])
    return model


def gemma() -> Any:
    model = characters(to_space(), pre_tokenizers.Split(" ", "merged_with_previous"), strip=False)
    model.add_tokens(
        [
            AddedToken("\n\n", normalized=False),
            AddedToken("▁▁", normalized=False),
            AddedToken("<b>", normalized=False),
        ]
    )
    return model


PIECES: dict[str, Callable[[], Any]] = {
    "Llama 2": lambda: characters(normalizers.Sequence([normalizers.Prepend("▁"), to_space()])),
    "Llama 2, Metaspace": lambda: characters(
        None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), unknown=None
    ),
    "Metaspace, always": lambda: characters(
        None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    ),
    "Metaspace, never": lambda: characters(
        None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), strip=False
    ),
    "Phi-3": phi3,
    "Gemma": gemma,
    "NFKC and ignored merges": lambda: characters(
        normalizers.Sequence([normalizers.NFKC(), to_space()]),
        split("▁?[^▁]+"),
        strip=False,
        ignore_merges=True,
    ),
}


@functools.cache
def family(name: str) -> tuple[Any, Tokenizer, Tokenizer, Any]:
    """Theirs; ours, opened from their file, and from what we saved of it; and theirs from what we saved."""
    theirs = {**FORMS, **PIECES}[name]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        ours = parse_tokenizer(json.loads(theirs.to_str()), name)
        saved = json.dumps(ours.to_json())
        again = parse_tokenizer(json.loads(saved), name)
    reopened = tokenizers.Tokenizer.from_str(saved)
    for one in (theirs, reopened):
        one.no_truncation()
        one.no_padding()
    return theirs, ours, again, reopened


def check(name: str, text: str) -> None:
    theirs, ours, again, reopened = family(name)
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allowed_special="all") == ids  # type: ignore[call-arg]
    assert ours.encode_to_array(text, allowed_special="all").tolist() == ids  # type: ignore[call-arg]
    assert again.encode(text, allowed_special="all") == ids  # type: ignore[call-arg]
    assert reopened.encode(text, add_special_tokens=False).ids == ids
    special = set(ours.special_tokens.values())
    ordinary = [id for id in ids if id not in special]
    assert ours.decode(ordinary) == theirs.decode(ordinary)


@pytest.mark.parametrize("name", [*FORMS, *PIECES])
@given(text=TEXTS)
def test_any_text(name: str, text: str) -> None:
    check(name, text)


@pytest.mark.parametrize("name", [*FORMS, *PIECES])
def test_long_text(name: str) -> None:
    check(name, sample())


@pytest.mark.parametrize("name", [*FORMS, *PIECES])
def test_marks(name: str) -> None:
    for first in MARKS:
        for second in MARKS:
            for between in ("", " ", "low", " low \n"):
                check(name, f"a {first}{between}{second}b")


@pytest.mark.parametrize("name", [*FORMS, *PIECES])
def test_saved_again(name: str) -> None:
    """The other library says the same of what we saved as of its own file."""
    theirs, ours, again, reopened = family(name)
    assert again.to_json() == ours.to_json()
    assert reopened.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()
    before, after = json.loads(theirs.to_str()), json.loads(reopened.to_str())
    for section in ("post_processor", "decoder"):
        assert after[section] == before[section]


@pytest.mark.parametrize("name", [*FORMS, *PIECES])
def test_parts_of_a_text(name: str) -> None:
    """A stream in parts gives the ids of the whole, half of a UTF-16 pair is refused, and so are wrong places."""
    _, ours, _, _ = family(name)
    text = "The low 123 na\u0308\u0131ve\n 日本語  Å<tool>'s " * 3
    assert list(ours.encode_iterable([text[:7], "", text[7:20], text[20:]])) == ours.encode(text)
    for broken in ("a\udc80b", "\ud800"):
        for encode in (ours.encode, ours.encode_to_array):
            with pytest.raises(InputError, match="half of a UTF-16 pair"):
                encode(broken)
    ids = ours.encode(text)
    if ours.decode_bytes(ids) != text.encode():
        with pytest.raises(InputError, match="have no places in this text"):
            ours.offsets(text)
        return
    places = ours.offsets(text)
    assert len(places) == len(ids)
    for (start, end), id in zip(places.tolist(), ids, strict=True):
        assert ours.token_bytes(id).decode("utf-8", "ignore").strip() in text[start:end]

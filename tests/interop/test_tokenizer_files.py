"""tiktoken, sentencepiece and the tokenizers library make the same ids of the same files as we do."""

import base64
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.tokenizer import BPETokenizer
from tinyllm.tokenizer.files import read_gpt2, read_sentencepiece, read_tiktoken, write_gpt2, write_tiktoken
from tinyllm.tokenizer.sentencepiece.tokenizer import SentencePieceTokenizer

DATA = Path(__file__).parents[3] / "shared/data"
LENGTH = 300_000  # characters of each text

pytestmark = pytest.mark.skipif(
    not (DATA / "gpt2").exists(), reason="needs the texts and GPT-2's files in shared/data"
)

# What sentencepiece is trained with -> its flags.
SETTINGS: dict[str, dict[str, Any]] = {
    "as Llama 2": {},
    "user-defined": {
        "user_defined_symbols": ["<x>", "<xy>", "e t", "et", "|", "\\", "(.*)"],
        "control_symbols": ["<c>"],
    },
    "no dummy prefix": {"add_dummy_prefix": False},
    "across spaces": {
        "split_by_whitespace": False,
        "split_by_unicode_script": False,
        "split_by_number": False,
    },
}
# Parts of texts in which what is special in these settings meets.
PARTS = [
    "<x>",
    "<xy>",
    "<",
    "x",
    ">",
    " ",
    "  ",
    "▁",
    "et",
    "e t",
    "|",
    "\\",
    "(.*)",
    "日本",
    "é",
    "\n",
    "\0",
    "\U0001f600",
    "tion",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(PARTS)).map("".join)


def text_of(name: str) -> str:
    with open(DATA / name, encoding="utf-8") as file:
        return file.read(LENGTH)


def peer(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"compares with the {name} package: pip install {name}")


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return read_gpt2(DATA / "gpt2/vocab.json", DATA / "gpt2/merges.txt")


def encoding(path: Path, ours: BPETokenizer) -> Any:
    """What tiktoken makes of a file of ours."""
    ranks = peer("tiktoken.load").load_tiktoken_bpe(str(path))
    return peer("tiktoken").Encoding(
        "ours", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens=ours.special_tokens
    )


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "multilingual.txt"])
def test_gpt2_files_in_tokenizers(gpt2: BPETokenizer, name: str, tmp_path: Path) -> None:
    tokenizers = peer("tokenizers")
    write_gpt2(gpt2, tmp_path)
    model = tokenizers.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = text_of(name)
    assert gpt2.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "multilingual.txt"])
def test_gpt2_in_tiktoken(
    gpt2: BPETokenizer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    write_tiktoken(gpt2, tmp_path / "gpt2.tiktoken")
    theirs = encoding(tmp_path / "gpt2.tiktoken", gpt2)
    text = text_of(name)
    ids = gpt2.encode(text)
    assert ids == theirs.encode(text)
    again = read_tiktoken(tmp_path / "gpt2.tiktoken", "gpt2", gpt2.special_tokens)
    assert again.encode(text) == ids


@given(
    st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=12),
    st.lists(st.text("abc "), max_size=5),
)
def test_ranks_of_any_tokens(tokens: list[str], texts: list[str]) -> None:
    """Also tokens that merging makes of later ones, or never."""
    tiktoken = peer("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {token.encode(): 256 + i for i, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("any", pat_str=r" +|[^ ]+", mergeable_ranks=ranks, special_tokens={})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ranks")
        path.write_text(
            "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        )
        ours = read_tiktoken(path, r" +|[^ ]+")
    for text in [*texts, *tokens]:
        assert ours.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceTokenizer, Any]:
    """A model that sentencepiece has trained, opened by us and by it."""
    sentencepiece = peer("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text(text_of("multilingual.txt")[: LENGTH // 3], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "trained"),
        vocab_size=2500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
        **SETTINGS[request.param],
    )
    path = folder / "trained.model"
    return read_sentencepiece(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_sentencepiece_on_the_rest_of_the_text(pair: tuple[SentencePieceTokenizer, Any]) -> None:
    ours, theirs = pair
    text = text_of("multilingual.txt")[LENGTH // 3 :]
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.decode_bytes(ids) == text.encode()
    opened = peer("tokenizers").Tokenizer.from_str(json.dumps(ours.to_json()))
    assert opened.encode(text).ids == ids
    assert opened.decode(ids) == text
    assert SentencePieceTokenizer.from_json(json.loads(opened.to_str())).encode(text) == ids


@given(text=ANY_TEXT)
def test_sentencepiece_on_any_text(pair: tuple[SentencePieceTokenizer, Any], text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)
    assert list(ours.encode_iterable(text)) == ours.encode(text)


@given(data=st.data())
def test_sentencepiece_decodes_any_ids(pair: tuple[SentencePieceTokenizer, Any], data: st.DataObject) -> None:
    ours, theirs = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(0, 300)))
    assert ours.decode(ids) == theirs.decode(ids)

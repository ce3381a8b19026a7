"""A stream of tokens gives the text of the whole, each token what it adds, whatever the tokenizer."""

import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import generate, generate_text
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    TextSize,
    Tokenizer,
    base,
    inspection,
)
from tinyllm.tokenizer.sentencepiece.pieces import Kind, Piece
from tinyllm.training.objectives import NextToken
from tinyllm.training.safeguards.incidents import worst_tokens

BYTES = {bytes([i]): i for i in range(256)}


def byte_pairs() -> BPETokenizer:
    """Tokens that begin and end inside characters, and an id without a token."""
    merges = [(b" ", b"t"), (b"\xe6", b"\x97"), (b"\xa5", b"a"), (b"\x97", b"\xa5")]
    vocab = BYTES | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    return BPETokenizer(vocab, merges, special_tokens={"<|end|>": 261, "é": 262})


def sentence_pieces(prefix: bool, escape: bool = True) -> SentencePieceTokenizer:
    pieces = [Piece("<unk>", kind=Kind.UNKNOWN), Piece("<s>", kind=Kind.CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
    pieces += [Piece("▁", -1.0), Piece("▁to", -2.0), Piece("日", -3.0), Piece("▁▁", -4.0), Piece("a", -5.0)]
    pieces += [Piece("to▁", kind=Kind.USER_DEFINED), Piece(" ", -6.0)]
    return SentencePieceTokenizer(pieces, prefix, escape)


TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer(" \nabotsé日🙂<>"),
    "byte": ByteTokenizer(),
    "bpe": byte_pairs(),
    "sentencepiece": sentence_pieces(prefix=True),
    "sentencepiece without a space in front": sentence_pieces(prefix=False),
    "sentencepiece with plain spaces": sentence_pieces(prefix=True, escape=False),
}
# Where a character of several bytes may be cut, what begins with a space, what has no text.
INTERESTING = {
    "char": list(range(12)),
    "byte": [0x20, 0x61, *"日🙂".encode(), 0x80, 0xC3, 0xFF],
    "bpe": [0x20, 0x61, *"日🙂".encode(), 0xFF, *range(256, 260), 261, 262],
    "sentencepiece": [0, 1, *range(258, 265), *(2 + byte for byte in (0x20, 0x61, *"日🙂".encode(), 0xFF))],
}
each = pytest.mark.parametrize("name", TOKENIZERS)


@each
@given(data=st.data())
def test_joined_stream_equals_whole_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    one = st.sampled_from(INTERESTING[name.partition(" ")[0]])
    ids = data.draw(st.lists(one | st.integers(0, min(259, tokenizer.vocab_size - 1)), max_size=30))
    texts = list(tokenizer.decode_stream(ids))
    assert len(texts) == len(ids) + 1
    assert "".join(texts) == tokenizer.decode(ids)
    # What has come by any moment stays: it is the beginning of the whole, and waits for no more than one character.
    came = "".join(itertools.islice(tokenizer.decode_stream(ids), len(ids) // 2))
    assert tokenizer.decode(ids).startswith(came)
    assert len(tokenizer.decode(ids[: len(ids) // 2])) - len(came) <= 3


# With plain spaces SentencePiece's own decoding keeps the space that it added.
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "plain" not in name])
@given(text=st.text(" \nabé日🙂", max_size=30))
@example(text=" to to")
@example(text="  ")
def test_stream_of_a_text_is_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert "".join(tokenizer.decode_stream(tokenizer.encode_document(text, special_tokens=False))) == text
    assert "".join(inspection.segments(tokenizer, tokenizer.encode_document(text, False), 99)) == text


def test_what_each_token_adds() -> None:
    pieces = sentence_pieces(prefix=True)
    to = 259
    assert list(pieces.decode_stream([to, to, 1, to])) == ["to", " to", "", " to", ""]
    # The first piece with text loses its space, whatever comes before it.
    assert list(pieces.decode_stream([1, to, 258])) == ["", "to", " ", ""]
    assert list(pieces.decode_stream([258, to])) == ["", " to", ""]
    # A control piece keeps the bytes on its sides from making one character.
    first, second, third = (2 + byte for byte in "日".encode())
    assert list(pieces.decode_stream([first, second, third])) == ["", "", "日", ""]
    assert list(pieces.decode_stream([first, second, 1, third])) == ["", "", "\ufffd\ufffd", "\ufffd", ""]
    assert list(byte_pairs().decode_stream([0xE6, 0x97, 0x20])) == ["", "", "\ufffd ", ""]
    assert list(byte_pairs().decode_stream([257, 258])) == ["", "日a", ""]
    assert list(ByteTokenizer().decode_stream([0xE6])) == ["", "\ufffd"]


@each
def test_a_stream_reads_no_further_than_it_tells(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    taken = []

    def ids() -> Iterator[int]:
        for id in tokenizer.encode("ab a"):
            taken.append(id)
            yield id

    for told, _ in enumerate(tokenizer.decode_stream(ids()), 1):
        assert len(taken) == min(told, len(tokenizer.encode("ab a")))


@each
def test_each_token_is_decoded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work for a token does not grow with what came before it."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("a b" * 500)
    decoded = {}
    for method in ("decode", "decode_bytes", "_decoded"):
        real = getattr(type(tokenizer), method, None)
        if real is None:
            continue

        def counted(self: Tokenizer, ids: list[int], method: str = method, real: Any = real) -> Any:
            decoded[method] = decoded.get(method, 0) + len(ids)
            return real(self, ids)

        monkeypatch.setattr(type(tokenizer), method, counted)
    list(tokenizer.decode_stream(ids))
    assert decoded
    assert set(decoded.values()) == {len(ids)}


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "char"])
@pytest.mark.parametrize("id", [-1, 10**6])
def test_an_id_without_a_token_is_refused(name: str, id: int) -> None:
    with pytest.raises(InputError, match="is not in the vocabulary"):
        list(TOKENIZERS[name].decode_stream([id]))
    with pytest.raises(InputError, match="is not in the vocabulary"):
        TOKENIZERS[name].token_bytes(id)


def test_what_a_token_stands_for_inside_a_text() -> None:
    pieces = sentence_pieces(prefix=True)
    assert (pieces.token_bytes(259), pieces.decode([259])) == (b" to", "to")
    assert inspection.token_strings(pieces)[258:261] == [b" ", b" to", "日".encode()]


def test_reports_of_incidents_name_a_token_with_its_space() -> None:
    step: Any = SimpleNamespace(
        objective=NextToken(),
        batch=(np.array([[260, 259]]), np.array([[259, 258]])),
        each_loss=lambda: np.array([[2.0, 1.0]]),
    )
    assert [found["text"] for found in worst_tokens(step, sentence_pieces(prefix=True))] == [" to", " "]


@pytest.mark.parametrize("prompt", ["to", " to", "to to <s>", "日", "a\n"])
@pytest.mark.parametrize("name", ["sentencepiece", "bpe", "char"])
def test_generated_text_is_what_the_whole_gains(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    model = TransformerLM(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=8, num_layers=1, num_heads=2, context_length=16
        ),
        seed=3,
    )
    seen = tokenizer.encode_document(prompt).tolist()
    for seed in range(5):
        settings = {"seed": seed, "temperature": 5.0, "vocab_size": min(260, tokenizer.vocab_size)}
        new = list(generate(model, seen, 40, **settings))
        pieces = list(generate_text(model, tokenizer, prompt, 40, **settings))
        assert len(pieces) == 41
        assert tokenizer.decode(seen) + "".join(pieces) == tokenizer.decode(seen + new)


def test_the_prompt_is_what_new_tokens_are_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*arguments: Any, **settings: Any) -> Iterator[int]:
        return iter([259, 258, 1, 259])

    monkeypatch.setattr(sys.modules["tinyllm.models.generation.sampling"], "generate", drawn)
    model: Any = None
    for prompt in ("to", "a日", "<s>a"):
        assert list(generate_text(model, sentence_pieces(True), prompt, 4)) == [" to", " ", "", " to", ""]
    assert list(generate_text(model, sentence_pieces(True), "<s>", 4)) == ["to", " ", "", " to", ""]
    as_text = generate_text(model, sentence_pieces(True), "<s>", 4, special_tokens=False)
    assert list(as_text) == [" to", " ", "", " to", ""]


def test_text_predicted_is_that_of_the_tokens_after_the_first() -> None:
    pieces = sentence_pieces(prefix=True)
    assert pieces.text_predicted(np.array([259, 259, 259])) == TextSize(6, 6)  # " to to"
    assert byte_pairs().text_predicted(np.array([0x61, 256, 0x61])) == TextSize(3, 3)  # " ta"
    assert pieces.text_predicted(np.array([1, 1])) == TextSize(1, 1)
    # The text begins with the second token, which loses its space there.
    assert pieces.text_predicted(np.array([1, 259, 259])) == TextSize(5, 5)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_text_predicted_is_what_decoding_all_adds(
    prefix: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_BLOCK", 7)
    rng = np.random.default_rng(seed)
    words = ["to", " to", "a", "\u65e5", "\u65e5\u672c", "\U0001f600", "\u00e9", "<s>", "\n"]
    text = "".join(rng.choice(words, 200))
    for tokenizer in (sentence_pieces(prefix), byte_pairs(), ByteTokenizer(), CharTokenizer.train(text)):
        ids = tokenizer.encode_document(text)
        begins = next(tokenizer.decode_stream(ids[:1].tolist()))
        whole = tokenizer.decode(ids)
        found = tokenizer.text_predicted(ids)
        assert found.characters == len(whole) - len(begins)
        assert found.bytes == len(whole.encode()) - len(tokenizer.decode_bytes(ids[:1]))
    with pytest.raises(InputError, match="id 300 at position 1"):
        ByteTokenizer().text_predicted(np.array([0, 1, 300]))

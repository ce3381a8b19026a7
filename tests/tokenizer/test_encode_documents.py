"""Documents encoded together have the tokens of each alone, whatever the tokenizer."""

import numpy as np
import pytest

from tinyllm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from tinyllm.tokenizer.sentencepiece.pieces import Kind, Piece

END = "<|endoftext|>"
CHARACTERS = "abcdefgh  \n\n'éß中😀12<|>"


def random_texts(count: int, seed: int) -> list[str]:
    """Short and long documents, empty ones, the same twice, and the special token inside, alone and in halves."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, 2, 5, 30, 300, 5000], count, p=[0.05, 0.1, 0.1, 0.25, 0.3, 0.19, 0.01])
    texts = ["".join(rng.choice(list(CHARACTERS), length)) for length in lengths]
    texts += [END, END + END, f"a{END}", f"{END}b", f" {END} ", "a<|endof", "text|>b", texts[0], "x" * 3000]
    return [texts[i] for i in rng.permutation(len(texts))]


def gpt2() -> BPETokenizer:
    return BPETokenizer.train(random_texts(300, 1), 400, pattern="gpt2", special_tokens=[END])


def sentence_pieces() -> SentencePieceTokenizer:
    pieces = [Piece("<unk>", kind=Kind.UNKNOWN), Piece(END, kind=Kind.CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
    pieces += [Piece("▁", -1.0), Piece("▁a", -2.0), Piece("中", -3.0), Piece("ab", -4.0), Piece("a", -5.0)]
    return SentencePieceTokenizer(pieces, True, True)


TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer("".join(sorted(set(CHARACTERS + END + "x")))),
    "byte": ByteTokenizer(),
    "bpe": BPETokenizer.train(random_texts(300, 1), 400, special_tokens=[END]),
    "bpe with the pattern of GPT-2": gpt2(),
    "bpe without merges": BPETokenizer({bytes([i]): i for i in range(256)}, [], special_tokens={END: 256}),
    "bpe with ids above 65,535": BPETokenizer(
        {bytes([i]): i for i in range(256)} | {b"ab": 66_000, b" a": 256},
        [(b"a", b"b"), (b" ", b"a")],
        special_tokens={END: 66_001},
    ),
    "sentencepiece": sentence_pieces(),
}


@pytest.mark.parametrize("special_tokens", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_together_and_alone_are_the_same(name: str, special_tokens: bool) -> None:
    tokenizer = TOKENIZERS[name]
    for seed in range(3):
        texts = random_texts(150, seed + 10)
        together = tokenizer.encode_documents(texts, special_tokens)
        assert len(together) == len(texts)
        for text, ids in zip(texts, together, strict=True):
            assert ids.dtype == tokenizer.dtype
            assert ids.tolist() == tokenizer.encode_document(text, special_tokens).tolist(), text
            if name != "sentencepiece" or not special_tokens:  # whose control pieces have no text
                assert tokenizer.decode(ids) == text
    assert tokenizer.encode_documents([], special_tokens) == []
    assert [ids.tolist() for ids in tokenizer.encode_documents(["", ""], special_tokens)] == [[], []]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "bpe" in name])
def test_the_special_token_is_one_id_only_where_it_is_asked_for(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    id = tokenizer.special_tokens[END]
    texts = random_texts(100, 3)
    for special_tokens in (True, False):
        found = [int((ids == id).sum()) for ids in tokenizer.encode_documents(texts, special_tokens)]
        assert found == [text.count(END) * special_tokens for text in texts]

"""A loss in other units: how much text its tokens stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinyllm.tokenizer import BPETokenizer, ByteTokenizer, TextSize, Tokenizer
from tinyllm.training.evaluation import Predicted, loss_in_words, predicted


class Counted:
    """Tokens that know how much text they are, and cannot be read but for the first."""

    def __init__(self, first: int, count: int, characters: int, size: int) -> None:
        self.first, self.count, self.characters, self.bytes = first, count, characters, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        assert index == 0
        return self.first


def separated() -> BPETokenizer:
    return BPETokenizer({bytes([i]): i for i in range(256)}, [], special_tokens={"<|endoftext|>": 256})


@pytest.mark.parametrize(
    ("tokenizer", "first", "expected"),
    [
        (separated(), 256, TextSize(70, 90)),  # a separator is none of the text
        (separated(), 0x61, TextSize(69, 89)),
        (separated(), 0xC3, TextSize(70, 89)),  # the character ends in the next token
    ],
)
def test_counted_tokens_are_not_decoded(tokenizer: Tokenizer, first: int, expected: TextSize) -> None:
    assert predicted(tokenizer, Counted(first, 50, 70, 90)) == Predicted(49, expected)


def test_counted_tokens_have_the_units_of_others() -> None:
    text = "日本 is Japan\n" * 20
    ids = ByteTokenizer().encode_to_array(text)
    counted = Counted(int(ids[0]), len(ids), len(text), len(text.encode()))
    assert predicted(ByteTokenizer(), counted) == predicted(ByteTokenizer(), ids)


def test_units() -> None:
    score = Predicted(10, TextSize(20, 40)).score(math.log(8))
    assert vars(score) == pytest.approx(
        {
            "tokens": 10,
            "loss": math.log(8),
            "perplexity": 8.0,
            "bits_per_character": 1.5,
            "bits_per_byte": 0.75,
        }
    )
    assert Predicted(1, TextSize(1, 1)).score(1000.0).perplexity == math.inf
    assert math.isnan(Predicted(1, TextSize(1, 1)).score(math.nan).perplexity)
    assert np.isinf(Predicted(1, TextSize(1, 1)).score(math.inf).bits_per_byte)


def test_units_in_words() -> None:
    assert (
        loss_in_words(3.21006, 24.78, 1.12336, 1.03209)
        == "3.2101 nats, perplexity 24.8, 1.1234 bits per character, 1.0321 per byte"
    )
    assert "perplexity 2.2e+08," in loss_in_words(19.2, 2.2e8, 1.0, 1.0)

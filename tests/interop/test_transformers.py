"""What is saved here opens in transformers with the same logits and the same ids."""

import errno
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tinyllm import generate, no_grad
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from tinyllm.tokenizer.sentencepiece.pieces import Kind, Piece
from tinyllm.training.checkpoints import checkpoint, keeping

torch = pytest.importorskip("torch", reason="needs the interop-test extra")
transformers = pytest.importorskip("transformers", reason="needs the interop-test extra")

TEXT = "The quick brown fox\njumps over the lazy dog.\tÆØÅ 😀"

SHAPES = {
    "qwen3": ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, context_length=32),
    "llama": ModelConfig(num_layers=2, num_heads=2, hidden_size=16, context_length=32, qk_norm=False),
    "tied": ModelConfig(num_layers=1, num_heads=2, hidden_size=16, context_length=32, tie_embeddings=True),
    "wide heads": ModelConfig(num_layers=1, num_heads=2, head_dim=24, hidden_size=16, rope_theta=500.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(shape: str, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.train(TEXT)
    config = ModelConfig(**{**vars(SHAPES[shape]), "vocab_size": tokenizer.vocab_size})
    model = TransformerLM(config, seed=3)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():  # norms of one would hide a norm in the wrong place
        parameter.data += rng.normal(scale=0.1, size=parameter.shape).astype(np.float32)
    checkpoint.save(tmp_path / "model", model, tokenizer)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = rng.integers(0, tokenizer.vocab_size, size=(3, 20))
    with no_grad():
        ours = model.eval()(tokens).data
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if shape == "llama" else "Qwen3ForCausalLM")
    # Two float32 evaluations of sums of some 50 terms, several layers deep.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_transformers_opens_the_best_checkpoint_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, refuse)
    tokenizer = CharTokenizer.train(TEXT)
    model = TransformerLM(
        ModelConfig(**{**vars(SHAPES["qwen3"]), "vocab_size": tokenizer.vocab_size}), seed=3
    )
    for step, scale in enumerate([1.0, 2.0]):  # over a link that is there, too
        model.head.weight.data *= scale
        folder = keeping.folder_of(tmp_path, step)
        folder.parent.mkdir(exist_ok=True)
        checkpoint.save(folder, model, tokenizer)
        keeping.link_to(tmp_path, "best", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert np.array_equal(theirs.lm_head.weight.detach().numpy(), model.head.weight.data)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "best")("fox")["input_ids"] == list(
        tokenizer.encode("fox")
    )


def test_transformers_opens_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.train(TEXT)
    model = TransformerLM(ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, hidden_size=16))
    checkpoint.save(tmp_path / "model", model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT


def pieces() -> SentencePieceTokenizer:
    """A tokenizer of bytes and a few pieces, with control pieces."""
    special = [Piece("<unk>", kind=Kind.UNKNOWN), Piece("</s>", kind=Kind.CONTROL)]
    as_bytes = [Piece(f"<0x{byte:02X}>", kind=Kind.BYTE) for byte in range(256)]
    return SentencePieceTokenizer(
        [*special, *as_bytes, Piece("▁fox", -1.0), *(Piece(c, -3.0) for c in "▁fox")]
    )


PADDED = {
    "characters": (CharTokenizer.train(TEXT), None),
    "bytes": (ByteTokenizer(), None),
    "separator": (BPETokenizer.train([TEXT * 9], 265, special_tokens=["<|endoftext|>"]), "<|endoftext|>"),
    "padding token": (BPETokenizer.train([TEXT * 9], 265, special_tokens=["<s>", "[PAD]"]), "[PAD]"),
    "control pieces": (pieces(), "<unk>"),
}


@pytest.mark.parametrize("name", PADDED)
def test_transformers_pads_batches_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    """Ids, vocabulary and decoded text stay; the logits of each row are those of the row alone."""
    tokenizer: Tokenizer
    tokenizer, pad = PADDED[name]
    model = TransformerLM(
        ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, num_heads=2, hidden_size=16), seed=2
    )
    checkpoint.save(tmp_path / "model", model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.pad_token == pad
    if pad is None:  # README's way
        theirs.pad_token = theirs.convert_ids_to_tokens(0)
    assert len(theirs) == tokenizer.vocab_size
    texts = [TEXT, "fox", " dog. fox"]
    batch = theirs(texts, padding=True, padding_side="right", return_tensors="pt")
    logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(**batch).logits
    for text, ids, mask, row in zip(texts, batch["input_ids"], batch["attention_mask"], logits, strict=True):
        expected = tokenizer.encode(text)
        assert ids[mask.bool()].tolist() == expected
        assert theirs.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected)
        with no_grad():
            ours = model.eval()(np.array([expected])).data[0]
        # Two float32 evaluations of sums of some 50 terms.
        found = row[: len(expected)].detach().numpy()
        np.testing.assert_allclose(found, ours, rtol=0, atol=2e-5 * np.abs(ours).max())


@pytest.mark.parametrize("window", ["all", "slide"])
@pytest.mark.parametrize("length", [5, 16, 40])
def test_transformers_goes_on_in_the_same_way_past_the_context(
    window: Literal["all", "slide"], length: int, tmp_path: Path
) -> None:
    """Greedy text of 80 tokens, of a context of 16; slide: with a sliding window of 16 in every layer there."""
    tokenizer = CharTokenizer.train(TEXT)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        hidden_size=32,
    )
    model = TransformerLM(config, seed=4)
    model.head.weight.data *= 10  # so that no two tokens are equally likely but for rounding
    checkpoint.save(tmp_path / "model", model, tokenizer)
    other = {} if window == "all" else {
        "use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 3,
    }  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **other)
    prompt = np.random.default_rng(length).integers(0, tokenizer.vocab_size, length)
    seen = prompt if window == "all" else prompt[-16:]
    ours = list(generate(model, prompt, 80, temperature=0, window=window))
    ids = torch.from_numpy(seen)[None]
    # It would take the ids of the padding token for padding.
    whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    expected = whole[0, len(seen) :].tolist()
    assert ours == expected
    assert len(set(ours)) > 5


def test_what_transformers_saves_opens_here(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1000.0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    CharTokenizer("".join(chr(0x4E00 + i) for i in range(40))).save(tmp_path)
    model, _ = keeping.load(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 40, size=(2, 16))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    with no_grad():
        ours = model(tokens).data
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

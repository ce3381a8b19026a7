"""Documents kept apart, against PyTorch's attention with the same mask and transformers' rotary positions."""

from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, gradients, no_grad, ops
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn.attention import Documents
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.checkpoints import checkpoint

torch = pytest.importorskip("torch", reason="needs the interop-test extra")
transformers = pytest.importorskip("transformers", reason="needs the interop-test extra")

NUMBERS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 3, 3, 3], [5] * 9])
DOCUMENTS = Documents.of(NUMBERS)


def seen_by_hand() -> Any:
    """(B, 1, T, T): whether a token may look at another, by the definition."""
    B, T = NUMBERS.shape
    seen = [
        [[s <= t and NUMBERS[b, s] == NUMBERS[b, t] for s in range(T)] for t in range(T)] for b in range(B)
    ]
    return torch.tensor(seen)[:, None]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_gradients_are_torchs_with_the_same_mask(kv_heads: int) -> None:
    rng = np.random.default_rng(kv_heads)
    arrays = [rng.standard_normal((3, heads, 9, 6)) for heads in (4, kv_heads, kv_heads)]
    cotangent = rng.standard_normal((3, 4, 9, 6))
    xs = [Tensor(x, requires_grad=True) for x in arrays]
    out = ops.scaled_dot_product_attention(*xs, causal=True, mask=DOCUMENTS.together)
    peers = [torch.tensor(x, requires_grad=True) for x in arrays]
    query, *shared = peers
    key, value = (x.repeat_interleave(4 // kv_heads, dim=1) for x in shared)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_by_hand())
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(expected, peers, torch.tensor(cotangent))
    for mine, other in zip(gradients(out, xs, cotangent), theirs, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=1e-11, atol=1e-12)


def test_rotation_at_positions_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import (
        LlamaConfig,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 2, 9, 8)).astype(np.float32)
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, head_dim=8)
    position_ids = torch.tensor(DOCUMENTS.positions)
    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(q), position_ids)
    for mine, theirs in zip(
        (q, k), apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin), strict=True
    ):
        found = ops.rope(mine, DOCUMENTS.positions, 10000.0).data
        np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=2e-6)


def test_logits_are_those_of_transformers_with_mask_and_positions(tmp_path: Any) -> None:
    config = ModelConfig(
        vocab_size=11, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, context_length=16
    )
    model = TransformerLM(config, seed=3)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data += rng.normal(scale=0.1, size=parameter.shape).astype(np.float32)
    checkpoint.save(tmp_path / "model", model, CharTokenizer("abcdefghijk"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    tokens = rng.integers(0, 11, NUMBERS.shape)
    with no_grad():
        ours = model.eval()(tokens, documents=NUMBERS).data
    blocked = torch.where(seen_by_hand(), 0.0, -torch.inf)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens), attention_mask=blocked, position_ids=torch.tensor(DOCUMENTS.positions)
        ).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

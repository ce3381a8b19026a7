"""Derivatives of a small transformer, to third order, against PyTorch."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllm import gradients, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.models import ModelConfig, TransformerLM

torch = pytest.importorskip("torch", reason="needs the interop-test extra")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/speed"))
torch_model = pytest.importorskip("torch_model")

CONFIG = ModelConfig(
    vocab_size=7,
    context_length=5,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    hidden_size=8,
    intermediate_size=12,
)


def test_first_second_and_third_derivatives_agree_with_torch() -> None:
    """Each order is the gradient of the one before along a random direction, for all parameters."""
    rng = np.random.default_rng(0)
    model = TransformerLM(CONFIG, seed=1).astype(np.float64)
    for parameter in model.parameters():
        parameter.data += rng.normal(scale=0.2, size=parameter.shape)
    peer = torch_model.copy_of(model).double()
    with torch.no_grad():  # copy_of goes through the default dtype
        for theirs, ours in zip(_in_our_order(peer, model), model.parameters(), strict=True):
            theirs.copy_(torch.from_numpy(ours.data))
    # The tables of the peer are float32; ours are double here.
    K = CONFIG.head_dim
    angles = torch.arange(CONFIG.context_length)[:, None] * CONFIG.rope_theta ** (
        -torch.arange(0, K, 2, dtype=torch.float64) / K
    )
    peer.cos, peer.sin = angles.cos(), angles.sin()
    tokens = rng.integers(0, CONFIG.vocab_size, size=(2, CONFIG.context_length + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    ours = ops.cross_entropy(model(inputs), targets)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = peer(torch.from_numpy(inputs), torch.from_numpy(targets))
    assert abs(ours.item() - theirs.item()) < 1e-12
    our_parameters, their_parameters = list(model.parameters()), _in_our_order(peer, model)
    for order in (1, 2, 3):
        our_gradients = gradients(ours, our_parameters, create_graph=True)
        their_gradients = torch.autograd.grad(theirs, their_parameters, create_graph=True)
        for (name, _), mine, other in zip(
            model.named_parameters(), our_gradients, their_gradients, strict=True
        ):
            scale = max(1.0, float(other.detach().abs().max()))
            np.testing.assert_allclose(
                mine.data, other.detach().numpy(), rtol=0, atol=1e-8 * scale, err_msg=f"order {order}, {name}"
            )
        directions = [rng.normal(size=parameter.shape) for parameter in our_parameters]
        ours = _dot(our_gradients, directions)
        theirs = sum(
            (g * torch.from_numpy(v)).sum() for g, v in zip(their_gradients, directions, strict=True)
        )


def _dot(tensors: list[Tensor], vectors: list[np.ndarray]) -> Tensor:
    total = (tensors[0] * vectors[0]).sum()
    for tensor, vector in zip(tensors[1:], vectors[1:], strict=True):
        total = total + (tensor * vector).sum()
    return total


def _in_our_order(peer: "torch.nn.Module", model: TransformerLM) -> list["torch.Tensor"]:
    from tinyllm.models.formats.hugging_face import to_external

    named = dict(peer.named_parameters())
    return [named[to_external(name, model.config)] for name, _ in model.named_parameters()]

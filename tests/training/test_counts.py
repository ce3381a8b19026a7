"""Counts of parameters and FLOPs against published ones, and against the models of this package."""

from dataclasses import replace

import pytest

from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.training.counts import KNOWN, architecture_of

PARAMETERS = {
    "GPT-2 124M": 123_653_376,  # nanoGPT, without position embeddings
    "Llama 7B": 6_738_415_616,
    "Llama 13B": 13_015_864_320,
    "Llama 33B": 32_528_943_616,
    "Llama 65B": 65_285_660_672,
    "Llama 2 70B": 68_976_648_192,
    "Llama 3 8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_models(name: str) -> None:
    assert KNOWN[name].parameters == PARAMETERS[name]


def test_flops_are_those_of_nanogpts_notebook() -> None:
    # transformer_sizing.ipynb, which leaves out biases and counts the positions as parameters.
    plain = replace(KNOWN["GPT-2 124M"], biases=False)
    assert plain.parameters + plain.positions * plain.hidden_size == 124_337_664
    assert plain.forward_flops(1024) == 291_648_307_200
    assert plain.training_flops(1024) == 874_944_921_600


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True, "qk_norm": False}, {"num_kv_heads": 2}])
def test_models_of_this_package_have_as_many(settings: dict[str, int]) -> None:
    config = ModelConfig(vocab_size=37, num_layers=2, num_heads=4, hidden_size=24, **settings)
    model = TransformerLM(config, 0)
    sizes = architecture_of(config)
    assert sizes.parameters == model.num_parameters()
    matrices = {name: p.size for name, p in model.named_parameters() if p.ndim == 2}
    head = matrices.pop("embedding.weight") if config.tie_embeddings else matrices["head.weight"]
    in_blocks = sum(size for name, size in matrices.items() if name.startswith("blocks."))
    assert sizes.weights_in_products == in_blocks + head

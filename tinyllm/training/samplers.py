"""Which batches a TrainConfig asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinyllm.data import (
    BatchSampler,
    Mixture,
    PackedWindows,
    RandomOffsets,
    RandomWindows,
    StridedWindows,
    WindowSampler,
)
from tinyllm.system.errors import InputError
from tinyllm.training.config import TrainConfig

SAMPLERS: dict[str, type[WindowSampler]] = {
    "windows": RandomWindows,
    "offsets": RandomOffsets,
    "sliding": StridedWindows,
    "packed": PackedWindows,
}


def document_starts(tokens: Any, config: TrainConfig, name: str) -> Any:
    """Where the documents of tokens, called `name`, begin; None where the config does not keep documents apart.

    Raises InputError for tokens that do not know it.
    """
    if not config.separate_documents:
        return None
    starts = getattr(tokens, "document_starts", None)
    if starts is None:
        raise InputError(
            f"separate_documents is set, and the {name} does not say where its documents begin; train on a folder of "
            "`tinyllm prepare`, or leave --separate-documents out"
        )
    return starts


def build_sampler(tokens: Any, context_length: int, config: TrainConfig) -> BatchSampler:
    """The sampler of the config, over the tokens of one text (N,), or over a list or tuple of several texts, mixed.

    Raises InputError for tokens or settings that do not go together.
    """
    mixed = isinstance(tokens, list | tuple)
    sources: Sequence[Any] = tokens if mixed else [tokens]
    if config.weights and not mixed:
        raise InputError(f"{len(config.weights)} weights for one text; weights are for a mixture of several")
    if config.stride and config.sampling != "sliding":
        raise InputError(
            f"stride is for --sampling sliding, and sampling is {config.sampling!r}; give one of the two"
        )
    strided = {"stride": config.stride or context_length} if config.sampling == "sliding" else {}
    samplers = []
    for number, source in enumerate(sources, 1):
        name = f"training text {number}" if mixed else "training text"
        samplers.append(
            SAMPLERS[config.sampling](
                source,
                context_length,
                config.batch_size * config.gradient_accumulation,
                config.seed,
                name,
                document_starts(source, config, name),
                **strided,
            )
        )
    return Mixture(samplers, config.weights) if mixed else samplers[0]

"""The objective of a language model: each token from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.data import IGNORE_INDEX
from tinyllm.models import TransformerLM
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.objectives.objective import Batch, Objective

CONTEXT_TOKENS = 24
"""So many tokens before a target are shown with it."""


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the next token. A batch is inputs and targets, (B, T) integers each; a target of
    IGNORE_INDEX has no loss. A third array keeps documents apart (see TransformerLM.forward).

    z_loss: times (ln sum e^logits)^2, added in training alone, keeps logits small (see ops.cross_entropy).
    """

    z_loss: float = 0.0
    names: ClassVar[tuple[str, ...]] = ("inputs", "targets", "documents")

    def __call__(self, model: TransformerLM, batch: Batch) -> tuple[Tensor, Array | int]:
        z_loss = self.z_loss if model.training else 0.0
        logits, targets = _logits(model, batch), batch[1]
        loss = ops.cross_entropy(logits, backend.asarray(targets), reduction="sum", z_loss=z_loss)
        return loss, (targets != IGNORE_INDEX).sum()

    def count(self, batch: Batch) -> int:
        return max(1, int((batch[1] != IGNORE_INDEX).sum()))

    def each_loss(self, model: TransformerLM, batch: Batch) -> Array:
        """The cross-entropy of each target, (B, T), without the z-loss."""
        with no_grad():
            logits, targets = _logits(model, batch), batch[1]
            losses = ops.cross_entropy(logits, backend.asarray(targets), reduction="none")
        return backend.to_numpy(losses.data)

    def describe(self, batch: Batch, index: tuple[int, ...], tokenizer: Tokenizer) -> dict[str, Any]:
        inputs, targets = batch[:2]
        window, place = index
        target = int(targets[window, place])
        return {
            "place": place,
            "target": target,
            "text": ""
            if target == IGNORE_INDEX
            else tokenizer.token_bytes(target).decode("utf-8", "replace"),
            "context": tokenizer.decode(inputs[window, max(0, place + 1 - CONTEXT_TOKENS) : place + 1]),
        }

    def text(self, batch: Batch, tokenizer: Tokenizer) -> str:
        """Each window's text; where targets are not the inputs moved on by one, they follow."""
        lines = []
        for number, (inputs, targets) in enumerate(zip(*batch[:2], strict=True)):
            moved = bool((inputs[1:] == targets[:-1]).all())
            whole = np.concatenate([inputs, targets[-1:]]) if moved else inputs
            lines += [f"---- window {number}", _text_of(whole, tokenizer)]
            if not moved:
                lines += [
                    f"---- targets of window {number}, which are not its inputs moved on",
                    _text_of(targets, tokenizer),
                ]
        return "\n".join(lines) + "\n"


def _logits(model: TransformerLM, batch: Batch) -> Tensor:
    """Logits of the inputs, (B, T, V), with documents kept apart where the batch has them."""
    inputs = backend.asarray(batch[0])
    return model(inputs, documents=backend.asarray(batch[2])) if len(batch) > 2 else model(inputs)


def _text_of(ids: Array, tokenizer: Tokenizer) -> str:
    """The text of ids, without the targets that have no loss."""
    return tokenizer.decode(ids[ids != IGNORE_INDEX])

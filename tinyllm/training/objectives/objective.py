"""What is trained for: the loss of a batch, and how many things it is the loss of."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array
from tinyllm.models import TransformerLM
from tinyllm.tokenizer import Tokenizer

Batch = tuple[Array, ...]
"""Arrays that share their first axis (B, ...), so that a batch is cut into micro-batches whatever it means."""


class Objective(Protocol):
    """The loss that training makes small, and that evaluation measures.

    `names` says what the arrays of a batch are called, in their order; a batch may lack the last. A subclass defines
    `__call__` and `count`; what it says of a batch in the report of a rejected step it may leave as it is here.
    """

    names: ClassVar[tuple[str, ...]]

    def __call__(self, model: TransformerLM, batch: Batch) -> tuple[Tensor, Array | int]:
        """The sum of the losses of a batch, of shape (), and how many losses these are.

        What training alone adds is left out where `model.training` is false. The arrays of the batch may lie in the
        memory of this machine: `backend.asarray` takes them to where the model is. Where they lie on a device, so may
        the count, as an array of shape (): to read it would be to wait for the device.
        """

    def count(self, batch: Batch) -> int:
        """How many losses a batch in the memory of this machine has, at least 1; gradients are divided by it."""

    def each_loss(self, model: TransformerLM, batch: Batch) -> Array:
        """The losses that a report shows, (B, ...), in the memory of this machine; here the sum of each window."""
        losses = []
        with no_grad():
            for window in range(len(batch[0])):
                loss, _ = self(model, tuple(array[window : window + 1] for array in batch))
                losses.append(float(backend.read(loss.data)))
        return np.asarray(losses)

    def describe(self, batch: Batch, index: tuple[int, ...], tokenizer: Tokenizer) -> dict[str, Any]:
        """What stands in the batch where `each_loss` has this index, as plain values for a report."""
        return {name: array[index[0]].tolist() for name, array in zip(self.names, batch, strict=False)}

    def text(self, batch: Batch, tokenizer: Tokenizer) -> str:
        """The batch as a person reads it, window by window."""
        lines = []
        for window in range(len(batch[0])):
            lines.append(f"---- window {window}")
            lines += [
                f"{name}: {array[window].tolist()}" for name, array in zip(self.names, batch, strict=False)
            ]
        return "\n".join(lines) + "\n"

"""What happens in training, as plain records: engines, safeguards and the trainer tell each other and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllm.training.objectives import Batch


@dataclass(frozen=True)
class StepMetrics:
    """One step: the mean loss of its batch in nats, the rate's peak times its factor, the norm before clipping.

    The loss has the z-loss in it, where there is one.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over the whole validation split: nats a token, e^nats, bits a character, bits a byte of UTF-8."""

    step: int
    val_loss: float
    val_perplexity: float
    val_bits_per_character: float
    val_bits_per_byte: float


@dataclass(frozen=True)
class Changes:
    """What is other than before in a run that goes on after `step`.

    settings: what each was and is, by name. rates: of the last step, and of the next; None where no setting that they
    depend on is another.
    """

    step: int
    settings: Mapping[str, tuple[Any, Any]]
    rates: tuple[float, float] | None = None


@dataclass(frozen=True)
class Limits:
    """The highest loss and gradient norm with which a step is accepted; infinity: any that is finite."""

    loss: float
    norm: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one step: the mean loss in nats, the gradient norm before clipping, and whether it was made.

    overflowed: it was not made since its scaled gradients overflowed in float16, which is no fault of the batch.
    """

    loss: float
    norm: float
    made: bool
    overflowed: bool = False


@dataclass(frozen=True)
class Rejection:
    """A step that was not made.

    step: the number that it would have had. position: the number of its batch. loss, grad_norm: of the batch.
    reason: in plain words. batch: its arrays, which
    share their first axis. replayable: whether the Trainer still has the
    state before the step. incident: the folder that tells more.
    """

    step: int
    position: int
    loss: float
    grad_norm: float
    reason: str
    batch: Batch = field(repr=False)
    replayable: bool = True
    incident: Path | None = None


@dataclass(frozen=True)
class Rollback:
    """Training went back to a checkpoint.

    step: the number of the step that was rejected last. to_step: the checkpoint's. skipped: batches that are passed
    over beside the rejected ones. number: how often training went back for this trouble.
    """

    step: int
    to_step: int
    skipped: int
    number: int

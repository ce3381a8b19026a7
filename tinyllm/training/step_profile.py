"""How long a whole training step takes, with all workers and the optimizer."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from statistics import fmean

from tinyllm import backend
from tinyllm.debug.profiler import WARM_UP, middle_half
from tinyllm.models import TransformerLM
from tinyllm.optim import NonFiniteNormError, OptimizerGroup, clip_scale
from tinyllm.training.engines import build_host_engine
from tinyllm.training.objectives import Batch, Objective


@dataclass(frozen=True)
class TrainingProfile:
    """Where a whole training step spends its time: all workers and the optimizer.

    Attributes:
        workers: how many. tokens: in the batch.
        gradients_seconds, add_up_seconds, update_seconds: each worker's gradients, their sum and its norm, the update.
        step_seconds: the whole step.
        gradient_bytes: of the arrays in which all workers add up. optimizer_bytes: of the optimizer's state.
    """

    workers: int
    tokens: int
    gradients_seconds: float
    add_up_seconds: float
    update_seconds: float
    step_seconds: float
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the batch for each second of a step."""
        return self.tokens / self.step_seconds


def profile_training(
    model: TransformerLM,
    optimizer: OptimizerGroup,
    objective: Objective,
    batch: Batch,
    workers: int,
    steps: int = 10,
    clip_norm: float = 1.0,
) -> TrainingProfile:
    """Measure whole training steps as the Trainer makes them; batch: that of all workers.

    The learning rate is zero, so parameters keep their values, but the optimizer's state changes. As in training,
    parameters and state are in shared memory afterwards (Processes). Times are means over the
    middle half of the steps.

    Raises NonFiniteNormError when the gradients are not finite.
    """
    phases: list[tuple[float, ...]] = []
    with backend.ignore_non_finite(), build_host_engine(model, optimizer, objective, workers) as engine:
        for number in range(WARM_UP + steps):
            times = [time.perf_counter()]
            engine.gradients(number, batch)
            times.append(time.perf_counter())
            norm = engine.gradient_norm()
            if not math.isfinite(norm):
                raise NonFiniteNormError(norm)
            times.append(time.perf_counter())
            engine.update(0.0, clip_scale(norm, clip_norm))
            times.append(time.perf_counter())
            phases.append((*(b - a for a, b in itertools.pairwise(times)), times[-1] - times[0]))
        middle = middle_half(phases[WARM_UP:], lambda times: times[-1])
        gradients_s, add_up_s, update_s, step_s = map(fmean, zip(*middle, strict=True))
        return TrainingProfile(
            workers=workers,
            tokens=objective.count(batch),
            gradients_seconds=gradients_s,
            add_up_seconds=add_up_s,
            update_seconds=update_s,
            step_seconds=step_s,
            gradient_bytes=workers * sum(int(x.nbytes) for x in engine.total.values()),
            optimizer_bytes=sum(int(x.nbytes) for x in optimizer.state_dict().values()),
        )

"""What a run will take and give, from a few real steps of its real model on this machine."""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyllm import backend
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.optim import clip_scale
from tinyllm.system import storage
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.memory import memory_allowed, memory_in_use
from tinyllm.system.progress import duration, print_status
from tinyllm.training import scaling
from tinyllm.training.callbacks import Callback
from tinyllm.training.config import TrainConfig
from tinyllm.training.counts import architecture_of
from tinyllm.training.engines import Engine, Serial, build_engine
from tinyllm.training.events import Limits, StepMetrics
from tinyllm.training.memory import estimate_memory
from tinyllm.training.micro_batches import count_micro_batches
from tinyllm.training.objectives import Batch, NextToken
from tinyllm.training.optimization import build_optimizer, rate_factor
from tinyllm.training.scaling import BESIROGLU, HOFFMANN, Fit, ScalingLaw
from tinyllm.training.text_size import TextSize

FAMILY = (
    (64, 2), (96, 3), (128, 4), (192, 4), (256, 6), (320, 6), (384, 8), (512, 8), (640, 10), (768, 12), (1024, 16)
)  # fmt: skip
"""Width and blocks of the models that a proposal is chosen from; heads are 32 wide, from a width of 256 on 64."""
METRICS_BYTES = 160
"""Of a line of metrics.jsonl."""


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine.

    step: seconds of a training step. evaluated_tokens: a second. saved_bytes: a second, written and hashed.
    memory: bytes of all processes after steps and an evaluation; None where the system does not tell.
    """

    step: float
    evaluated_tokens: float
    saved_bytes: float
    memory: int | None


def measure(model_config: ModelConfig, train: TrainConfig, seconds: float = 8.0) -> Measured:
    """Make parts of training steps on random tokens for so many seconds, then an evaluation, then write a file.

    The model, the optimizer and the engine are those of the run. Where a step has several micro-batches for each
    worker, one for each is timed, since the others take the same; a device makes whole steps. The first, which is not
    timed, has two, so that the memory has the sums of gradients beside those of a micro-batch.
    """
    generator = np.random.default_rng(train.seed)
    T, V = model_config.context_length, model_config.vocab_size

    def random_batch(windows: int) -> Batch:
        tokens = generator.integers(0, V, (2, windows, T))
        return tokens[0], tokens[1]

    workers = 1 if backend.is_asynchronous() else train.threads or physical_cores()
    windows = train.batch_size * train.gradient_accumulation
    pieces = count_micro_batches(windows, T, workers, V)
    largest = -(-windows // pieces)
    evaluated = -(-train.eval_batch_size // count_micro_batches(train.eval_batch_size, T, 1, V))
    validation = [random_batch(evaluated) for _ in range(workers)]
    model = TransformerLM(model_config, train.seed)
    optimizer = build_optimizer(model, train)
    engine = build_engine(model, optimizer, NextToken(train.z_loss), workers, train.seed, validation)
    rounds = 1.0 if backend.is_asynchronous() or pieces <= workers else windows / (largest * workers)
    batch = random_batch(windows if rounds == 1 else largest * workers)
    first = batch if rounds == 1 else random_batch(2 * largest * workers)
    steps: list[float] = []
    with backend.ignore_non_finite(), engine:
        _step_seconds(engine, first, 0, train, 1)
        begun = time.perf_counter()
        while len(steps) < 2 or time.perf_counter() - begun < seconds:
            steps.append(_step_seconds(engine, batch, 1 + len(steps), train, rounds))
        evaluations = []
        for _ in range(2):  # the first has memory to find
            before = time.perf_counter()
            engine.evaluate()
            evaluations.append(time.perf_counter() - before)
        memory = memory_in_use()
    step = statistics.median(steps)
    return Measured(step, workers * evaluated * T / min(evaluations), _saving_rate(train), memory)


def _step_seconds(engine: Engine, batch: Batch, number: int, train: TrainConfig, rounds: float) -> float:
    """Seconds of a step of `rounds` micro-batches for each worker, of which `batch` is one."""
    begun = time.perf_counter()
    factor = rate_factor(train, min(number, train.steps - 1))
    if not isinstance(engine, Serial):
        engine.run(number, [batch], [factor], train.clip_norm, Limits(math.inf, math.inf))
        return time.perf_counter() - begun
    engine.gradients(number, batch)
    gradients = time.perf_counter() - begun
    engine.update(factor, clip_scale(engine.gradient_norm(), train.clip_norm))
    return time.perf_counter() - begun + (rounds - 1) * gradients


def _saving_rate(train: TrainConfig) -> float:
    """Bytes a second that are hashed and written, to disk and not to a cache, where the run will be."""
    folder = Path(train.out or ".").absolute()
    while not folder.is_dir():
        folder = folder.parent
    content = np.random.default_rng(0).bytes(1 << 24)
    begun = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            hashlib.sha256(content).digest()
            storage.write_new(Path(made) / "measured", content)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written: {error.strerror or error}; give another --out"
        ) from None
    return len(content) / (time.perf_counter() - begun)


# ---- What a run takes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Of a whole run: seconds of each part, and bytes.

    memory is the measured one where there is one, with the text's tokens; disk is what is kept at once.
    """

    training: float
    evaluations: float
    checkpoints: float
    memory: int
    disk: int
    num_evaluations: int
    num_checkpoints: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.training + self.evaluations + self.checkpoints


def tokens_a_step(model: ModelConfig, train: TrainConfig) -> int:
    """The tokens of all batches of a step."""
    return train.batch_size * train.gradient_accumulation * model.context_length


def checkpoint_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """Of the weights and the optimizer's state, in float32."""
    memory = estimate_memory(model, train, 1)
    return memory.weights + memory.optimizer


def costs(model: ModelConfig, train: TrainConfig, measured: Measured, text: TextSize | None) -> Costs:
    """What a run takes, with every evaluation taken for an improvement, which is saved."""
    training = train.steps * measured.step
    evaluations = {*range(train.eval_every, train.steps + 1, train.eval_every), train.steps}
    by_steps = {*range(train.checkpoint_every, train.steps + 1, train.checkpoint_every)}
    saves = 1 + len(evaluations | by_steps)
    if train.checkpoint_minutes:
        between = training / saves
        saves += int(saves * max(0.0, between // (60 * train.checkpoint_minutes)))
    size = checkpoint_bytes(model, train)
    validation = text.validation_tokens if text else 0
    if train.eval_tokens:
        validation = min(validation, train.eval_tokens)
    held = text.in_memory if text else 0
    estimated = estimate_memory(model, train, train.threads or physical_cores()).total
    kept = min(train.keep_checkpoints + 2, saves)
    return Costs(
        training,
        len(evaluations) * validation / measured.evaluated_tokens,
        saves * size / measured.saved_bytes,
        held + (measured.memory if measured.memory is not None else estimated),
        kept * size + METRICS_BYTES * train.steps // train.log_every,
        len(evaluations),
        saves,
    )


# ---- The loss to expect ------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The loss to expect in nats per token of the run's tokenizer, the interval of it, and what that rests on."""

    loss: float
    low: float
    high: float
    basis: str


def expected_loss(
    N: int, D: int, unique: int, vocab_size: int, characters_per_token: float, fit: Fit | None = None
) -> Expected | None:
    """The loss of N weights in products after D tokens of which `unique` differ; None where the laws cannot say.

    By `fit` where it is given, which has to be of runs with this tokenizer and such text. Otherwise by the two
    published laws: a loss in nats per token depends on the tokenizer, so D and the loss are converted by characters,
    and the interval spans both laws and 10% more above and 30% below, since narrow text is easier than the web's. Below
    the sizes that these were fitted to they may say more than ln V, the loss of guessing: then they say nothing.
    """
    if fit is not None:
        low, high = fit.loss_interval(N, D)
        within = fit.smallest[0] <= N <= fit.largest[0] and fit.smallest[1] <= D <= fit.largest[1]
        basis = "the law of your runs" + ("" if within else ", beyond their sizes")
        loss = scaling.constrained_loss(fit.law, N, D, unique)
        shift = loss - fit.law.loss(N, D)
        return Expected(loss, low + shift, high + shift, basis)
    ratio = characters_per_token / scaling.CHARACTERS_PER_LAW_TOKEN
    losses = [
        ratio * scaling.constrained_loss(law, N, D * ratio, unique * ratio) for law in (BESIROGLU, HOFFMANN)
    ]
    if max(losses) >= math.log(vocab_size):
        return None
    beyond = "" if scaling.FITTED_SIZES[0] <= N else ", fitted to models of 44 million parameters and more"
    return Expected(losses[0], 0.7 * min(losses), 1.1 * max(losses), f"the published laws{beyond}")


def overfitting_passes(N: int, unique: int) -> tuple[float, float]:
    """(from, surely): between which numbers of passes over the text overfitting is to be expected.

    Muennighoff et al.: four passes are about as good as new text; by 1 + R* passes, 16, one more is worth a third of
    that. A model with more weights than the text has tokens learns it by heart sooner: as a rule of thumb of ours, in
    so many times fewer passes after the first.
    """
    sooner = max(1.0, N / unique)
    return 1 + (scaling.HARMLESS_PASSES - 1) / sooner, 1 + scaling.REPEATED_TOKENS / sooner


class TimeNeeded(Callback):
    """Says, once a few steps are made, what the run will take.

    tokens: of all batches of a step. validation: tokens of an evaluation, each of which takes a third of the time that
    it would in training: a forward pass without the backward, which is twice as long.
    """

    after = 2
    """Steps after the first, in which memory is found and which does not count."""

    def __init__(self, config: TrainConfig, tokens: int, validation: int) -> None:
        self.config, self.tokens, self.validation = config, tokens, validation
        self.begun: tuple[int, float] | None = None
        self.said = False

    def on_step(self, metrics: StepMetrics) -> None:
        if self.begun is None:
            self.begun = metrics.step, time.monotonic()
        elif not self.said and metrics.step >= self.begun[0] + self.after:
            self.said = True
            step = (time.monotonic() - self.begun[1]) / (metrics.step - self.begun[0])
            left = self.config.steps - metrics.step
            if not left:
                return
            evaluations = left // self.config.eval_every + 1
            evaluating = evaluations * self.validation * step / (3 * self.tokens)
            print_status(
                f"about {duration(left * step + evaluating)} for {left:,} steps and {evaluations:,} "
                f"evaluation{'s' * (evaluations > 1)}"
            )


# ---- Proposals ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """A model and a number of steps for a budget, its costs by the measured or modelled rate, and its loss by a law."""

    model: ModelConfig
    train: TrainConfig
    seconds: float
    loss: float


def family(like: ModelConfig) -> list[ModelConfig]:
    """The models that a proposal is chosen from, with the vocabulary, context and kind of layers of `like`."""
    return [
        replace(
            like,
            hidden_size=width,
            num_layers=layers,
            num_heads=width // (32 if width < 256 else 64),
            num_kv_heads=0,
            head_dim=0,
            intermediate_size=0,
        )
        for width, layers in FAMILY
    ]


def propose(
    like: ModelConfig,
    train: TrainConfig,
    flops_a_second: float,
    text: TextSize | None,
    hours: float | None = None,
    flops: float | None = None,
    law: ScalingLaw = BESIROGLU,
) -> list[Proposal]:
    """Models of the family that fit in memory, each with the tokens that the budget is enough for, best first.

    like: has vocabulary and context. flops_a_second: measured with another model of the family. hours or flops: the
    budget; FLOPs are counted exactly, with attention. The loss counts text seen again for less.

    Raises InputError where no model fits.
    """
    unique = text.train_tokens if text else 1 << 62
    ratio = (text.characters_per_token / scaling.CHARACTERS_PER_LAW_TOKEN) if text else 1.0
    budget = flops if flops is not None else 3600 * (hours or 0.0) * flops_a_second
    allowed = memory_allowed()
    found = []
    for model in family(like):
        sizes = architecture_of(model)
        windows = train.batch_size * train.gradient_accumulation
        steps = int(budget / (windows * sizes.training_flops(model.context_length)))
        needed = estimate_memory(model, train, train.threads or physical_cores()).total
        if steps < 1 or (allowed is not None and needed > allowed):
            continue
        settings = replace(train, steps=steps, warmup_steps=min(train.warmup_steps, max(1, steps // 20)))
        D = steps * tokens_a_step(model, train) * ratio
        loss = scaling.constrained_loss(law, sizes.weights_in_products, D, unique * ratio)
        found.append(Proposal(model, settings, budget / flops_a_second, loss))
    if not found:
        raise InputError("the budget is not enough for a step of the smallest model; give a larger one")
    return sorted(found, key=lambda proposal: proposal.loss)


def flops_a_second(model: ModelConfig, train: TrainConfig, measured: Measured) -> float:
    """The FLOPs of products that this machine made a second in the measured steps."""
    windows = train.batch_size * train.gradient_accumulation
    return windows * architecture_of(model).training_flops(model.context_length) / measured.step


def as_flags(model: ModelConfig, train: TrainConfig) -> Sequence[str]:
    """The flags of `tinyllm train` that make a proposal of the settings that it was made from."""
    return (
        "--num-layers", str(model.num_layers), "--num-heads", str(model.num_heads),
        "--hidden-size", str(model.hidden_size), "--steps", str(train.steps), "--warmup-steps", str(train.warmup_steps),
    )  # fmt: skip

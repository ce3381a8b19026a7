"""What a run says: what is trained before the first step, how it ended, and how to go on when it was stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from tinyllm.system.wording import command_line
from tinyllm.tokenizer import CharTokenizer, Tokenizer
from tinyllm.training.evaluation import loss_in_words
from tinyllm.training.memory import estimate_memory
from tinyllm.training.trainer import Trainer


def opening(trainer: Trainer, resumed: bool) -> Iterator[str]:
    """What is trained and how large a step is, and for a run that goes on, from where."""
    tokenizer, steps = trainer.tokenizer, trainer.config.steps
    yield (
        f"{trainer.model.num_parameters():,} parameters, {tokenizer.vocab_size:,} {_unit(tokenizer)}s, "
        f"{trainer.sampler.num_tokens:,} tokens to train on, {len(trainer.validation.tokens):,} to validate, "
        f"{trainer.threads} thread{'s' * (trainer.threads > 1)}"
    )
    yield _step_in_words(trainer)
    if resumed and trainer.stops_early:
        yield (
            f"the run has stopped: {trainer.without_gain} evaluations without a lower validation loss; --stop-after N, "
            "with a larger N or 0, goes on"
        )
    elif resumed and trainer.step < steps:
        yield f"going on from step {trainer.step}"
    elif resumed:
        yield f"the run has made its {trainer.step} steps already; --steps N, with a larger N, goes on"


def summary(trainer: Trainer) -> str:
    """How the run ended, and which of its models is the best."""
    _, loss, *others = vars(trainer.predicted.score(trainer.best_loss)).values()
    words = loss_in_words(loss, *others).replace(" nats", f" nats a {_unit(trainer.tokenizer)}", 1)
    best = "the last step" if trainer.best_step == trainer.step else f"step {trainer.best_step}"
    if trainer.best_step < 0:
        best = "a step before it went back"
    lines = [f"best validation loss {words}, in {best}"]
    if trainer.best_step != trainer.step and math.isfinite(trainer.evaluated_loss):
        since = f", no lower in {trainer.without_gain} evaluations since" if trainer.without_gain > 1 else ""
        lines.append(f"the last, in step {trainer.evaluated_step}, is {trainer.evaluated_loss:.4f}{since}")
    if trainer.stops_early:
        lines.append(
            f"stopped early, after --stop-after {trainer.config.stop_after} evaluations without gain"
        )
    sample = f"; a sample of the model of {best}:" if trainer.config.sample_tokens else ""
    return f"{'; '.join(lines)}\nthe run is in {trainer.run}{sample}"


def _step_in_words(trainer: Trainer) -> str:
    """How large a step is, and what memory the run takes, said before the first."""
    windows, tokens = trainer.sampler.batch_size, trainer.sampler.num_tokens
    step = windows * trainer.model.config.context_length
    times = f", {step / tokens:,.0f} times the text," if step >= 2 * tokens else ""
    memory = estimate_memory(trainer.model.config, trainer.config, trainer.threads)
    return f"a step of {step:,} tokens{times} takes {memory.in_words()}"


def out_of_memory(trainer: Trainer, error: MemoryError) -> str:
    """What took the memory, and what takes less."""
    needed = estimate_memory(trainer.model.config, trainer.config, trainer.threads)
    return (
        f"out of memory ({str(error).partition(chr(10))[0] or 'no more said'}); a run of these settings takes "
        f"{needed.in_words()}: make context_length, batch_size or the model smaller"
    )


def stopped(trainer: Trainer) -> str:
    """How to go on with a run that was stopped."""
    step = trainer.checkpoints.saved_step
    if step < 0 or trainer.run is None:
        return "stopped; nothing is saved yet"
    return f"stopped; go on from step {step} with: {resume_command(trainer.run)}"


def resume_command(folder: Path) -> str:
    """The command that goes on with the run in a folder."""
    return command_line("train", "--resume", "--out", folder)


def _unit(tokenizer: Tokenizer) -> str:
    return "character" if isinstance(tokenizer, CharTokenizer) else "token"

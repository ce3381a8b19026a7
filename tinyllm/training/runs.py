"""Whole runs: from text and configs to a trained model in a folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyllm.autograd import use_formulas
from tinyllm.backend import use_backend
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError, WorkerEndedError
from tinyllm.system.progress import print_status
from tinyllm.training import run_report
from tinyllm.training.callbacks import Progress
from tinyllm.training.checkpoints import keeping, resuming
from tinyllm.training.checkpoints.checkpoint import Checkpoint
from tinyllm.training.config import TrainConfig
from tinyllm.training.loss_curve import LossCurve
from tinyllm.training.memory import require_memory
from tinyllm.training.metrics import MetricsFile
from tinyllm.training.planning import TimeNeeded, tokens_a_step
from tinyllm.training.run_folder import RunFolder, check_folder
from tinyllm.training.run_text import read_run_text
from tinyllm.training.safeguards import incidents
from tinyllm.training.samples import Samples, first_sample
from tinyllm.training.starting import read_start, weights_for
from tinyllm.training.trainer import Trainer


def train(
    model_config: ModelConfig, train_config: TrainConfig, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train a model on text, as the configs say, and print a sample of what it learned.

    Writes into `train_config.out`: run.toml, metrics.jsonl, loss.png, samples.txt, checkpoints.

    Args:
        resume: go on from the latest checkpoint in the folder. overwrite: replace a run that is there.

    Returns the folder. Raises InputError for bad text, settings that do not fit it, or a folder that cannot be
    used.
    """
    if train_config.out is None:
        raise InputError("the run needs a folder; give --out DIR")
    folder = Path(train_config.out)
    notes: list[str] = []  # said once all that was given has been found good
    train_config = _with_fitting_warmup(train_config, notes)
    use_backend(train_config.backend, train_config.precision, train_config.device_memory)
    check_folder(folder, resume, overwrite)
    with RunFolder(folder) as run_folder:
        found = keeping.find_valid(folder, training=True) if resume else None
        trainer = _build(model_config, train_config, found, notes)
        progress = Progress()
        samples = Samples(folder, trainer.model, trainer.tokenizer, trainer.config, progress.on_message)
        metrics = MetricsFile(folder, train_config.log_every)
        tokens = tokens_a_step(trainer.model.config, train_config)
        needed = TimeNeeded(train_config, tokens, trainer.validation.num_targets)
        trainer.callbacks += [run_folder, needed, progress, metrics, samples, LossCurve(folder)]
        if found is not None:
            trainer.resume(found)
            del found  # the bytes of its files
        elif overwrite:
            # Only now, when everything that the user gave has been found good.
            incidents.remove_all(folder)
            keeping.remove_run(folder)
        run_folder.write({"model": trainer.model.config, "train": trainer.config})
        with use_formulas(train_config.formulas):
            _fit(trainer, resume, notes)
    if train_config.sample_tokens:
        at_hand = trainer.best_step == trainer.step
        model = trainer.model if at_hand else keeping.load(folder)[0]
        print("".join(first_sample(model, trainer.tokenizer, train_config)).strip("\n"))
    return folder


def _with_fitting_warmup(config: TrainConfig, notes: list[str]) -> TrainConfig:
    """The config, with a warm-up of half the steps where that has as many as there are: the rate would never fall."""
    if config.warmup_steps < config.steps or not config.warmup_steps:
        return config
    fitting = config.steps // 2
    notes.append(
        f"a warm-up of {config.warmup_steps} steps is too long for {config.steps}: it takes {fitting} (--warmup-steps)"
    )
    return replace(config, warmup_steps=fitting)


def _build(
    model_config: ModelConfig, train_config: TrainConfig, found: Checkpoint | None, notes: list[str]
) -> Trainer:
    """The Trainer of a run, with its text and tokenizer, which byte-pair encoding takes from the run to resume.

    found: the checkpoint to go on from. notes: lines about the text are added to it.
    """
    assert train_config.out is not None
    folder, start = Path(train_config.out), found
    if found is None and train_config.init_from is not None:
        start = read_start(train_config.init_from)
        # Of a run, the very checkpoint, since its best may be another one some day.
        train_config = replace(train_config, init_from=str(start.folder))
    choice = "saved" if found is not None and train_config.tokenizer == "bpe" else train_config.tokenizer
    text = read_run_text(
        replace(train_config, tokenizer=choice),
        model_config.vocab_size,
        None if start is None else start.tokenizer(),
        notes,
    )
    tokenizer = text.tokenizer
    if found is not None:  # before its number of tokens is compared with the model's, which says less
        resuming.check_tokenizer(folder, tokenizer, train_config.tokenizer, found)
    begins = start is not None and found is None
    if train_config.tokenizer == "bpe" or (model_config.vocab_size == 0 and not begins):
        model_config = replace(model_config, vocab_size=tokenizer.vocab_size)
    arrays = None
    if start is not None and begins:
        model_config, arrays = weights_for(
            start, model_config, tokenizer, train_config.widen_vocabulary, train_config.seed
        )
        notes.append(f"begins with the weights of {start.folder}")
    if model_config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size={model_config.vocab_size}, and the tokenizer has {tokenizer.vocab_size} tokens; "
            "set it to that, or to 0"
        )
    require_memory(model_config, train_config, train_config.threads or physical_cores())
    model = TransformerLM(model_config, train_config.seed)
    if arrays is not None:
        model.load_state_dict(arrays)
    return Trainer(model, tokenizer, text.train, text.validation, train_config, folder)


def _fit(trainer: Trainer, resumed: bool, notes: Sequence[str]) -> None:
    """Train, and say what was read (`notes`), what is trained, how it ended, and how to go on when it was stopped."""
    assert trainer.run is not None
    for line in [*notes, *run_report.opening(trainer, resumed)]:
        print_status(line)
    try:
        trainer.fit()
    except MemoryError as error:
        raise InputError(run_report.out_of_memory(trainer, error)) from error
    except WorkerEndedError as error:
        there = ""
        if trainer.checkpoints.saved_step >= 0:
            there = f"; go on with: {run_report.resume_command(trainer.run)}"
        raise InputError(f"{error}{there}") from None
    except KeyboardInterrupt:
        print_status(run_report.stopped(trainer))
        raise
    if not math.isfinite(trainer.best_loss):
        raise InputError(
            f"no evaluation gave a finite loss, so the run in {trainer.run} has no best checkpoint"
        )
    print_status(run_report.summary(trainer))

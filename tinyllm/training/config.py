"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tinyllm.optim import OPTIMIZERS
from tinyllm.system.settings import check_bounds, field
from tinyllm.system.wording import require_known


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises InputError when a number is out of range."""

    data: tuple[str, ...] = field(
        (),
        "text to train on: files or folders, or of `tinyllm prepare`; -: standard input; none: Python's help pages",
    )
    newlines: Literal["lf", "keep"] = field(
        "lf", "lf: line ends of the text become \\n, whatever they are; keep: they stay"
    )
    out: str | None = field(None, "folder for the run; none: runs/ and the preset's name")
    tokenizer: str = field(
        "char",
        "char: a token for each character; byte: for each byte; bpe: learned from the text; saved: that of "
        "--init-from, its default there; or a tokenizer.json",
    )
    init_from: str | None = field(
        None,
        "run, checkpoint or folder of transformers whose weights, shape and tokenizer a new run begins with",
    )
    widen_vocabulary: bool = field(
        False,
        "with another tokenizer, keep the rows of tokens that both have, and make new ones for the others",
    )
    special_tokens: bool = field(
        True,
        "special tokens of the tokenizer that stand in the text become their ids; otherwise they are text",
    )
    steps: int = field(2000, "optimizer steps", at_least=1)
    batch_size: int = field(12, "windows in a batch", at_least=1)
    gradient_accumulation: int = field(1, "batches whose gradients are averaged in one step", at_least=1)
    sampling: Literal["windows", "offsets", "sliding", "packed"] = field(
        "windows",
        "windows: end to end from a random offset, shuffled in each epoch; offsets: anywhere, with replacement; "
        "sliding: every stride tokens, shuffled; packed: end to end, shuffled, no token left out of an epoch",
    )
    stride: int = field(0, "tokens from one window of sliding to the next; 0: context_length", at_least=0)
    separate_documents: bool = field(
        False, "tokens see those of their own document alone; the text must say where documents begin"
    )
    weights: tuple[float, ...] = field(
        (),
        "in which proportion windows are drawn from several texts; without them, by length",
        above=0,
        below=math.inf,
    )
    validation_fraction: float = field(0.1, "last part of the text, kept for validation", above=0, below=1)
    validation_data: tuple[str, ...] = field(
        (), "text for validation: files or folders; then all of the other text is trained on"
    )
    optimizer: str = field(
        "adamw", f"{', '.join(OPTIMIZERS)}; muon: for the matrices inside blocks, AdamW elsewhere"
    )
    learning_rate: float = field(3e-3, "peak rate, but of Muon", above=0, below=math.inf)
    muon_learning_rate: float = field(
        0.02, "peak rate of Muon, for the matrices inside blocks", above=0, below=math.inf
    )
    muon_momentum: float = field(0.95, "momentum of Muon", at_least=0, below=1)
    muon_weight_decay: float = field(
        0.0, "decoupled decay of Muon's matrices, times its rate", at_least=0, below=math.inf
    )
    schedule: Literal["cosine", "linear"] = field("linear", "how the rate falls after the warm-up")
    warmup_steps: int = field(100, "steps in which the rate rises", at_least=0)
    final_factor: float = field(0.0, "the rate at the end, as a part of the peak", at_least=0, at_most=1)
    beta1: float = field(0.9, "AdamW: decay of the mean gradient", at_least=0, below=1)
    beta2: float = field(0.95, "AdamW: decay of the mean square gradient", at_least=0, below=1)
    weight_decay: float = field(
        0.1, "decoupled decay of matrices, times the rate", at_least=0, below=math.inf
    )
    clip_norm: float = field(1.0, "largest global gradient norm", above=0)
    clip_running: float = field(
        0.0,
        "largest gradient norm as a multiple of the median of the last steps, beside clip_norm; 0: off",
        at_least=0,
        below=math.inf,
    )
    z_loss: float = field(
        0.0,
        "times (ln sum e^logits)^2, added to the training loss so that logits stay small; PaLM: 1e-4; 0: off",
        at_least=0,
        below=math.inf,
    )
    watch_loss: float = field(
        10.0,
        "a loss so many spreads above the median of the last steps is a spike, its step not made; inf: never",
        above=0,
    )
    watch_norm: float = field(300.0, "the same for the gradient norm; inf: never", above=0)
    watch_window: int = field(128, "steps that loss and gradient norm are compared with", at_least=1)
    patience: int = field(
        5, "rejected steps in a row before training goes back to an earlier checkpoint", at_least=1
    )
    max_rollbacks: int = field(
        3, "times that it goes back for the same trouble before it stops", at_least=0, at_most=20
    )
    backend: Literal["numpy", "cupy"] = field("numpy", "cupy: compute on a GPU")
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = field(
        "float32", "to what a GPU may round the factors of products; their sums and all else stay float32"
    )
    device_memory: float = field(
        0.0, "GiB of the GPU's memory to take at most; 0: all", at_least=0, below=math.inf
    )
    seed: int = field(1, "of initial weights, data order and dropout", at_least=0, at_most=2**32 - 1)
    threads: int = field(0, "workers; 0: one for each physical core; 1: for a debugger", at_least=0)
    formulas: bool = field(False, "compute by the formulas, not by their fast forms: for a debugger")
    recompute: bool = field(
        False,
        "compute each block once more in backward instead of keeping what it needs: less memory, more time",
    )
    eval_every: int = field(500, "steps between evaluations of the whole validation split", at_least=1)
    stop_after: int = field(
        0, "stop after so many evaluations without a lower validation loss; 0: never", at_least=0
    )
    eval_tokens: int = field(
        0,
        "tokens of the validation text that are evaluated, in windows at even distances; 0: all",
        at_least=0,
    )
    eval_batch_size: int = field(64, "windows in a batch of the evaluation", at_least=1)
    checkpoint_every: int = field(500, "steps between checkpoints", at_least=1)
    checkpoint_minutes: float = field(
        10.0, "and minutes between them at most, where steps are slow; 0: by steps alone", at_least=0
    )
    keep_checkpoints: int = field(2, "how many of these are kept, beside the best and the latest", at_least=1)
    log_every: int = field(
        1, "steps between lines of metrics.jsonl; a GPU is waited for at each of them", at_least=1
    )
    sample_tokens: int = field(500, "tokens to sample at the end, and every --sample-every", at_least=0)
    sample_every: int = field(0, "steps between samples on the way; 0: none", at_least=0)
    sample_temperature: float = field(0.8, "temperature of these samples", at_least=0, below=math.inf)

    def __post_init__(self) -> None:
        check_bounds(self)
        require_known("optimizer", self.optimizer, OPTIMIZERS)

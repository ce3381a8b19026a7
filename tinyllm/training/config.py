"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tinyllm.optim import OPTIMIZERS
from tinyllm.system.errors import InputError
from tinyllm.system.settings import field
from tinyllm.system.wording import require_known, shown


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises InputError when a number is out of range."""

    data: tuple[str, ...] = field(
        (), "text to train on: files or folders; without it, Python's own help pages"
    )
    out: str | None = field(None, "folder for the run; none: runs/ and the preset's name")
    tokenizer: str = field(
        "char",
        "char: a token for each character; byte: for each byte; bpe: learned from the text; or a tokenizer.json",
    )
    special_tokens: bool = field(
        True,
        "special tokens of the tokenizer that stand in the text become their ids; otherwise they are text",
    )
    steps: int = field(2000, "optimizer steps")
    batch_size: int = field(12, "windows in a batch")
    gradient_accumulation: int = field(1, "batches whose gradients are averaged in one step")
    sampling: Literal["windows", "offsets"] = field(
        "windows", "windows: shuffled windows, none twice in an epoch; offsets: anywhere, with replacement"
    )
    validation_fraction: float = field(0.1, "last part of the text, kept for validation")
    optimizer: str = field(
        "adamw", f"{', '.join(OPTIMIZERS)}; muon: for the matrices inside blocks, AdamW elsewhere"
    )
    learning_rate: float = field(3e-3, "peak rate of AdamW")
    muon_learning_rate: float = field(0.02, "peak rate of Muon")
    muon_momentum: float = field(0.95, "momentum of Muon")
    muon_weight_decay: float = field(0.0, "decoupled decay of Muon's matrices, times its rate")
    schedule: Literal["cosine", "linear"] = field("linear", "how the rate falls after the warm-up")
    warmup_steps: int = field(100, "steps in which the rate rises")
    final_factor: float = field(0.0, "the rate at the end, as a part of the peak")
    beta1: float = field(0.9, "AdamW: decay of the mean gradient")
    beta2: float = field(0.95, "AdamW: decay of the mean square gradient")
    weight_decay: float = field(0.1, "decoupled decay of matrices, times the rate")
    clip_norm: float = field(1.0, "largest global gradient norm")
    clip_running: float = field(
        0.0, "largest gradient norm as a multiple of the median of the last steps, beside clip_norm; 0: off"
    )
    z_loss: float = field(
        0.0,
        "times (ln sum e^logits)^2, added to the training loss so that logits stay small; PaLM: 1e-4; 0: off",
    )
    watch_loss: float = field(
        10.0,
        "a loss so many spreads above the median of the last steps is a spike, its step not made; inf: never",
    )
    watch_norm: float = field(300.0, "the same for the gradient norm; inf: never")
    watch_window: int = field(128, "steps that loss and gradient norm are compared with")
    patience: int = field(5, "rejected steps in a row before training goes back to an earlier checkpoint")
    max_rollbacks: int = field(3, "times that it goes back for the same trouble before it stops")
    backend: Literal["numpy", "cupy"] = field("numpy", "cupy: compute on a GPU")
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = field(
        "float32", "to what a GPU may round the factors of products; their sums and all else stay float32"
    )
    device_memory: float = field(0.0, "GiB of the GPU's memory to take at most; 0: all")
    seed: int = field(1, "of initial weights, data order and dropout")
    threads: int = field(0, "workers; 0: one for each physical core; 1: for a debugger")
    eval_every: int = field(500, "steps between evaluations of the whole validation split")
    eval_batch_size: int = field(64, "windows in a batch of the evaluation")
    checkpoint_every: int = field(500, "steps between checkpoints")
    keep_checkpoints: int = field(2, "how many of these are kept, beside the best and the latest")
    log_every: int = field(1, "steps between lines of metrics.jsonl; a GPU is waited for at each of them")
    sample_tokens: int = field(500, "tokens to sample at the end")
    sample_temperature: float = field(0.8, "temperature of that sample")

    def __post_init__(self) -> None:
        whole = (
            "steps",
            "batch_size",
            "gradient_accumulation",
            "eval_every",
            "eval_batch_size",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "watch_window",
            "patience",
        )
        for name in whole:
            self._require(name, 1 <= getattr(self, name) < 2**31, "from 1 to 2147483647")
        for name in ("warmup_steps", "threads", "sample_tokens"):
            self._require(name, 0 <= getattr(self, name) < 2**31, "from 0 to 2147483647")
        for name in (
            "weight_decay",
            "sample_temperature",
            "muon_weight_decay",
            "clip_running",
            "z_loss",
            "device_memory",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("learning_rate", "muon_learning_rate"):
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0 and finite")
        for name in ("clip_norm", "watch_loss", "watch_norm"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("max_rollbacks", 0 <= self.max_rollbacks <= 20, "from 0 to 20")
        for name in ("beta1", "beta2", "muon_momentum"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("final_factor", 0 <= self.final_factor <= 1, "from 0 to 1")
        self._require("validation_fraction", 0 < self.validation_fraction < 1, "above 0 and below 1")
        require_known("optimizer", self.optimizer, OPTIMIZERS)
        self._require("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name}={shown(getattr(self, name))}; it must be {expected}")

"""What a run takes of memory, estimated from its settings before anything is made."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllm import backend
from tinyllm.models import ModelConfig
from tinyllm.ops.fast.attention import CAUSAL_ROWS, KEPT_SCORES
from tinyllm.optim import OPTIMIZERS, AdamW
from tinyllm.system.errors import InputError
from tinyllm.system.memory import memory_allowed
from tinyllm.training.config import TrainConfig
from tinyllm.training.micro_batches import count_micro_batches

PROGRAM = 60 << 20
"""Python, NumPy and the text of a small run."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes at most, by what they are for.

    weights: of all workers together, as gradients, optimizer (its state), batches (token ids) and activations. The last
    are what one micro-batch of each worker keeps for backward, with its logits and their gradient. evaluation: in place
    of batches and activations, while the validation split is evaluated. tokens: of these micro-batches.
    """

    weights: int
    gradients: int
    optimizer: int
    batches: int
    activations: int
    evaluation: int
    tokens: int

    @property
    def total(self) -> int:
        """Everything at its largest, the program included."""
        fixed = PROGRAM + self.weights + self.gradients + self.optimizer
        return fixed + max(self.batches + self.activations, self.evaluation)

    def in_words(self) -> str:
        """The total, and the parts that matter, on one line."""
        parts = {
            "program": PROGRAM,
            "weights, gradients and optimizer": self.weights + self.gradients + self.optimizer,
            "batches": self.batches,
            f"activations of {self.tokens:,} tokens": self.activations,
        }
        if self.evaluation > self.batches + self.activations:
            parts["evaluation in place of these"] = self.evaluation
        large = [f"{_shown(size)} {name}" for name, size in parts.items() if size > self.total / 50]
        return f"about {_shown(self.total)} of memory" + (f" ({', '.join(large)})" if large else "")


def estimate_memory(model: ModelConfig, train: TrainConfig, workers: int) -> Memory:
    """What training takes at most with so many workers, on the current backend.

    Within a fifth or so of what is measured for the presets, with long contexts, dropout and large vocabularies.
    """
    P, T, V = model.num_parameters, model.context_length, model.vocab_size
    windows = train.batch_size * train.gradient_accumulation
    count = count_micro_batches(windows, T, workers, V)
    busy = min(workers, count)
    largest = -(-windows // count)
    # Each worker has its sums, and beside them the gradients of the micro-batch at hand.
    sums = workers if workers > 1 or count > 1 else 0
    # Parent and other workers hold a batch, and pass it on as bytes.
    copies = 4 + (2 + 6 * (workers - 1) if workers > 1 else 0)
    at_once = train.eval_batch_size
    evaluated = -(-at_once // count_micro_batches(at_once, T, 1, V))
    return Memory(
        weights=4 * P,
        gradients=4 * P * (sums + busy),
        optimizer=4 * _optimizer_numbers(model, train),
        batches=8 * windows * T * copies,
        activations=4 * busy * _kept(model, largest, train),
        evaluation=4 * workers * _passing(model, evaluated, train.formulas),
        tokens=busy * largest * T,
    )


def require_memory(model: ModelConfig, train: TrainConfig, workers: int) -> None:
    """Refuse a run that this machine's memory cannot hold, before the machine grinds to a halt; raises InputError."""
    allowed = None if backend.is_asynchronous() else memory_allowed()
    needed = estimate_memory(model, train, workers)
    if allowed is None or needed.total <= allowed:
        return
    fixed = PROGRAM + needed.weights + needed.gradients + needed.optimizer
    batch = "eval_batch_size" if needed.evaluation > needed.batches + needed.activations else "batch_size"
    smaller = "hidden_size or num_layers" if fixed > allowed else f"context_length, {batch} or threads"
    raise InputError(
        f"this run would take {needed.in_words()}; there are {_shown(allowed)} here, so make {smaller} smaller"
    )


def _optimizer_numbers(model: ModelConfig, train: TrainConfig) -> int:
    """How many numbers the optimizer keeps; where it is for matrices inside blocks alone, AdamW has the others."""
    chosen = OPTIMIZERS[train.optimizer]
    mine = model.num_parameters
    if chosen.matrices_only:
        V, D = model.vocab_size, model.hidden_size
        mine -= V * D * (1 if model.tie_embeddings else 2)
    return mine * len(chosen.state_names) + (model.num_parameters - mine) * len(AdamW.state_names)


def _kept(model: ModelConfig, windows: int, train: TrainConfig) -> int:
    """How many numbers a micro-batch keeps for backward, its logits and their gradient included."""
    D, H, K, T = model.hidden_size, model.num_heads, model.head_dim, model.context_length
    # Of width D the inputs and outputs of norms and residual branches, of the heads' what is projected, rotated and
    # attended, and in the feed-forward layer gate, up, sigmoid and product.
    block = 8 * D + 4 * K * (H + model.num_kv_heads) + 4 * model.intermediate_size
    scores = windows * H * T * T
    if model.dropout:
        block += 4 * D
        scores *= 3  # the mask, and what it leaves
    elif train.formulas:
        scores *= 2  # before softmax and after it
    else:
        scores = _fast_scores(windows, model)
    tokens, logits = windows * T, 2 * windows * T * model.vocab_size
    if train.recompute:
        # Blocks keep their inputs; one at a time is whole, when logits and their gradient are gone.
        return tokens * model.num_layers * D + max(logits, tokens * block + scores)
    return model.num_layers * (tokens * block + scores) + logits


def _passing(model: ModelConfig, windows: int, formulas: bool) -> int:
    """How many numbers there are at once where nothing is kept for backward."""
    D, T = model.hidden_size, model.context_length
    scores = 2 * windows * model.num_heads * T * T if formulas else _fast_scores(windows, model)
    at_once = max(7 * D + 2 * model.intermediate_size, D + 2 * model.vocab_size)
    return windows * T * at_once + scores


def _fast_scores(windows: int, model: ModelConfig) -> int:
    """How many probabilities the fast form of attention keeps: of each block of queries those that the mask leaves."""
    T = model.context_length
    heads = windows * model.num_heads
    return heads * T * min(T, (T + CAUSAL_ROWS) // 2) if heads * T * T <= KEPT_SCORES else 0


def _shown(number: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{-(-number // 2**20)} MiB"

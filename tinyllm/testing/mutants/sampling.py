"""Mistakes in windows of data, their order, and in drawing tokens."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.data import permutation, sampling, windows
from tinyllm.testing.mutants.planting import mutant

generate = importlib.import_module(
    "tinyllm.models.generation.sampling"
)  # tinyllm.generate as an attribute is the function

# ---- Windows -----------------------------------------------------------------------------------


@mutant(windows, "gather")
def targets_equal_the_inputs(tokens: Any, starts: Any, context_length: int) -> Any:
    """Targets are not moved on by one: the model learns to repeat the token that it sees. The loss falls to zero at
    once."""
    inputs, _ = _gather(tokens, starts, context_length)
    return inputs, inputs.copy()


@mutant(windows, "gather")
def targets_moved_the_wrong_way(tokens: Any, starts: Any, context_length: int) -> Any:
    """Inputs and targets are exchanged: the model learns to predict the token before, which it has seen."""
    inputs, targets = _gather(tokens, starts, context_length)
    return targets, inputs


_gather = windows.gather
_sequential = windows.SequentialWindows.__iter__


@mutant(windows.SequentialWindows, "__iter__")
def validation_leaves_out_the_last_window(self: Any) -> Any:
    """The last window, which is not full, is dropped: the validation loss is that of a shorter text, and of nothing
    where the text is shorter than a window."""
    for inputs, targets in _sequential(self):
        full = (targets != windows.IGNORE_INDEX).all(axis=1)
        if full.any():
            yield inputs[full], targets[full]


@mutant(windows.SequentialWindows, "__iter__")
def validation_skips_a_token_between_batches(self: Any) -> Any:
    """Batches are cut into pieces of T + 1 tokens that do not overlap: the first token of each batch is never a
    target."""
    step = self.batch_size * self.context_length
    for number, (inputs, targets) in enumerate(_sequential(self)):
        if number and step:
            targets = targets.copy()
            targets[0, 0] = windows.IGNORE_INDEX
        yield inputs, targets


@mutant(windows.SequentialWindows, "__iter__")
def validation_counts_the_filling(self: Any) -> Any:
    """The filling of the last window has token 0 as its target instead of being ignored: the loss counts predictions of
    nothing."""
    for inputs, targets in _sequential(self):
        yield inputs, np.where(targets == windows.IGNORE_INDEX, 0, targets)


@mutant(sampling, "permute")
def sampler_repeats_windows(indices: Any, size: int, seed: int, stream: int, numbers: Any) -> Any:
    """Windows of an epoch are drawn with replacement: a third of the text is not seen in an epoch, and other parts
    twice."""
    return permutation.random_integers(indices + size * numbers, size, seed, stream)


@mutant(sampling.EpochSampler, "_starts")
def sampler_same_order_in_every_epoch(self: Any, draws: Any) -> Any:
    """The order is shuffled once, and every epoch shows the same batches again, cut at the same places."""
    return _epoch_starts(self, draws % self.windows_per_epoch)


_epoch_starts = sampling.EpochSampler._starts


@mutant(sampling.RandomOffsets, "_starts")
def sampler_same_batch_at_every_step(self: Any, draws: Any) -> Any:
    """Numbers are drawn for a row of the batch whatever the step: one batch for ever, which is learned by heart."""
    return _offsets(self, draws % self.batch_size)


_offsets = sampling.RandomOffsets._starts


@mutant(sampling.RandomOffsets, "_starts")
def sampler_never_draws_the_last_window(self: Any, draws: Any) -> Any:
    """The last possible start is left out: the last token of the text is never a target."""
    return np.minimum(_offsets(self, draws), len(self.tokens) - self.context_length - 2)


@mutant(sampling.BatchSampler, "load_state_dict")
def resume_begins_the_data_anew(self: Any, state: dict[str, Any]) -> None:
    """The position in the data is saved, checked and not restored: after a resume the first batches come again."""
    _load_sampler(self, {**state, "step": 0})


_load_sampler = sampling.BatchSampler.load_state_dict


@mutant(windows, "split_by_position")
def validation_overlaps_training(tokens: Any, validation_fraction: float) -> Any:
    """The training part is the whole text: the validation loss measures memory."""
    train, validation = _split(tokens, validation_fraction)
    return tokens[: len(train) + len(validation) // 2], validation


_split = windows.split_by_position


@mutant(windows.SlidingWindows, "__len__")
def sliding_windows_one_too_few(self: Any) -> int:
    """The number of windows is off by one: the last is never seen."""
    return max(1, (len(self.tokens) - self.context_length - 1) // self.stride)


# ---- Drawing tokens ----------------------------------------------------------------------------

_next_token = generate.next_token


@mutant(generate, "next_token")
def temperature_multiplies(
    logits: Any, rng: Any, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """Logits are multiplied by the temperature instead of divided: 0.5 makes text wilder where it should make it
    tamer. At 1 nothing shows."""
    return _next_token(logits, rng, 1 / temperature if temperature else 0.0, top_k, top_p)


@mutant(generate, "next_token")
def top_k_keeps_one_more(
    logits: Any, rng: Any, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """top_k is off by one: k + 1 tokens are kept, so that top_k = 1 is not the most likely token."""
    return _next_token(logits, rng, temperature, None if top_k is None else top_k + 1, top_p)


@mutant(generate, "next_token")
def top_p_leaves_out_the_last(
    logits: Any, rng: Any, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """The token with which the probabilities reach p is left out, where the nucleus is the smallest set that reaches
    p."""
    if top_p is not None and temperature:
        scaled = logits.astype(np.float64) / temperature
        p = np.sort(np.exp(scaled - scaled.max()))[::-1]
        kept = int(np.searchsorted(np.cumsum(p / p.sum()), top_p))
        top_k = min(top_k or len(logits), max(1, kept))
    return _next_token(logits, rng, temperature, top_k, None)


@mutant(generate, "next_token")
def sampling_takes_the_most_likely(
    logits: Any, rng: Any, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """The most likely token is taken whatever the settings: generated text goes round in circles."""
    return int(logits.argmax())


@mutant(generate, "_last_logits")
def generation_reads_the_first_position(model: Any, tokens: Any, cache: Any) -> Any:
    """The logits of the first position are used instead of those of the last. With a cache each call has one position,
    so that only the first new token is wrong."""
    with no_grad():
        return backend.to_numpy(model.eval()(backend.asarray([tokens]), cache).data[0, 0])


@mutant(generate, "evaluating")
def generation_forgets_to_switch_dropout_off(model: Any) -> Any:
    """The model is not put into evaluation before it generates: dropout thins it out while it writes."""
    return no_grad()

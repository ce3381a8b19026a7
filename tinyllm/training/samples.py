"""Text that a model writes: of a run or checkpoint, and of a run on its way, into samples.txt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinyllm.models import TransformerLM
from tinyllm.models.generation.sampling import Window, generate_text, until
from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.progress import print_status
from tinyllm.tokenizer import CharTokenizer, Tokenizer
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Rollback

SAMPLES = "samples.txt"
SEPARATOR = "<|endoftext|>"
"""The special token that stands before each document, where a tokenizer has it."""
_SHOWN = 400
"""Characters of a sample that the terminal gets."""
_HEADING = re.compile(r"^---- step (\d+)$", re.MULTILINE)


class Samples(Callback):
    """Lets the model of a run write, every `config.sample_every` steps, into samples.txt and to whoever watches.

    A sample has a line `---- step N` above it. Training that goes on from a checkpoint, or goes back to one, cuts the
    file to the samples up to there. The same seed is used for each, and the run's random numbers are left alone.

    Args:
        folder: of the run. model, tokenizer: what writes. config: how much, how often. say: is told what is written.
    """

    def __init__(
        self,
        folder: Path,
        model: TransformerLM,
        tokenizer: Tokenizer,
        config: TrainConfig,
        say: Callable[[str], None] = print_status,
    ) -> None:
        self.path = folder / SAMPLES
        self.model, self.tokenizer, self.config, self.say = model, tokenizer, config, say
        self.total_steps = 0
        self.newest = -1
        """The step of the last sample in the file."""

    def on_start(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self._cut_to(step)

    def on_rollback(self, rollback: Rollback) -> None:
        self._cut_to(rollback.to_step)

    def on_step_end(self, step: int) -> None:
        config = self.config
        if not config.sample_every or not config.sample_tokens or step % config.sample_every:
            return
        if step <= self.newest:
            return
        try:
            text = "".join(first_sample(self.model, self.tokenizer, config))
        except InputError as error:
            self.say(f"no sample after step {step}: {error}")
            return
        # A line of the text that looks like a heading is set apart from one.
        body = _HEADING.sub(r" \g<0>", text.strip("\n"))
        entry = f"---- step {step}\n{body}\n"
        self._write(lambda: self._append(entry.encode()))
        self.newest = step
        if step < self.total_steps:  # the last has the sample at the end of the run
            more = f" ... (all of it: {self.path})" if len(text) > _SHOWN else ""
            self.say(f"---- sample after step {step}\n{text[:_SHOWN].strip(chr(10))}{more}\n----")

    def _append(self, content: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            storage.write_bytes(file, content)
            storage.flush_file(file)

    def _cut_to(self, step: int) -> None:
        """Leave out the samples after `step`."""
        self.newest = -1

        def cut() -> None:
            if not self.path.exists():
                return
            text = storage.read_file(self.path).decode("utf-8", "replace")
            for heading in _HEADING.finditer(text):
                if int(heading[1]) > step:
                    storage.replace(self.path, text[: heading.start()].encode())
                    return
                self.newest = int(heading[1])

        self._write(cut)

    def _write(self, write: Callable[[], None]) -> None:
        """Change the file; where that fails the run goes on, which has more important things to do."""
        try:
            write()
        except OSError as error:
            self.say(f"{self.path}: cannot be written: {error.strerror or error}")


def first_prompt(tokenizer: Tokenizer) -> str:
    """What a sample begins with when nobody says: the separator of documents, a line end, or the first character."""
    if SEPARATOR in tokenizer.special_tokens:
        return SEPARATOR
    if isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.characters:
        return tokenizer.characters[0]
    return "\n"


def first_sample(model: TransformerLM, tokenizer: Tokenizer, config: TrainConfig) -> Iterator[str]:
    """What the model writes when nobody gives it a prompt, of as many tokens as `config` says."""
    return generate_text(
        model,
        tokenizer,
        first_prompt(tokenizer),
        config.sample_tokens,
        temperature=config.sample_temperature,
    )


def sample(
    path: Path,
    prompt: str | None,
    max_new_tokens: int,
    samples: int = 1,
    stop: str | None = None,
    seed: int = 0,
    window: Window = "restart",
    special_tokens: bool = True,
    **settings: Any,
) -> Iterator[str]:
    """The prompt and its continuation by the model at `path`, piece by piece; see `generate`.

    samples: how many, with seeds that follow each other. stop: a sample ends before this text.
    """
    if samples < 1:
        raise InputError(f"samples={samples}; it must be at least 1")
    if stop == "":
        raise InputError("the text to stop at is empty; give one of a character at least, or none")
    model, tokenizer = keeping.load(path)
    shown = prompt
    if prompt is None:
        prompt = first_prompt(tokenizer)
        shown = "" if prompt == SEPARATOR else prompt
        special_tokens = special_tokens or prompt == SEPARATOR
    settings.update(window=window, special_tokens=special_tokens)
    streams = [
        generate_text(model, tokenizer, prompt, max_new_tokens, seed=seed + number, **settings)
        for number in range(samples)
    ]
    _say_what_is_seen(
        len(tokenizer.encode_document(prompt, special_tokens)),
        max_new_tokens,
        model.config.context_length,
        window,
    )
    for number, pieces in enumerate(streams):
        if samples > 1:
            yield f"{'' if number == 0 else chr(10)}---- sample {number + 1} of {samples}\n"
        yield (shown or "").lstrip("\n")
        yield from pieces if stop is None else until(pieces, stop)


def _say_what_is_seen(prompt: int, new: int, context: int, window: Window) -> None:
    """Say it where the model does not see all tokens of the prompt, or later not all of the text."""
    if prompt > context and window != "all":
        print_status(
            f"the prompt has {prompt:,} tokens, the model sees its newest {context:,}; --window all: all"
        )
    if min(prompt, context) + new > context + 1:
        then = {
            "restart": "the text goes on from its newest half (--window slide or all: see --help)",
            "slide": f"each token sees the newest {context:,}",
            "all": "each token sees all before it, more than the model was trained on",
        }[window]
        print_status(f"past the context of {context:,} tokens {then}")

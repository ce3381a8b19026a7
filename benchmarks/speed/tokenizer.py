"""Byte-pair encoding against rustbpe, tiktoken and tokenizers, on any text.

    python benchmarks/speed/tokenizer.py FILE...

Ours and a peer's runs alternate in one process; the figures are medians.
The peers are extras: pip install -e '.[interop-test,bench]'.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.tokenizer import BPETokenizer

REPEATS = {
    "'a'": "a",
    "' '": " ",
    "emoji": "\U0001f600",
    "combining marks": "\u0301",
    "one Chinese character": "中",
}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` takes, and what it returns."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def alternate(rounds: int, **works: Callable[[], Any]) -> dict[str, tuple[float, Any]]:
    """(the median of the seconds of each work, its last result), the works taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, work in works.items():
            taken, results[name] = seconds(work)
            times[name].append(taken)
    for name, taken_each in times.items():
        print(f"    {name:28s} {', '.join(f'{t:.2f}' for t in taken_each)} s")
    return {name: (statistics.median(times[name]), results[name]) for name in works}


def training(documents: list[str], pattern: str, vocab_size: int, rounds: int, others: bool) -> None:
    """Learn a vocabulary; every library gets the same list of documents."""
    import rustbpe

    expression = BPETokenizer.train(["a"], 256, pattern).pattern

    def theirs() -> Any:
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(documents), vocab_size, pattern=expression)
        return tokenizer

    works: dict[str, Callable[[], Any]] = {
        "ours, 2 processes": lambda: BPETokenizer.train(documents, vocab_size, pattern, workers=2),
        "rustbpe": theirs,
    }
    if others:
        works["tokenizers"] = lambda: train_tokenizers(documents, expression, vocab_size)
    print(f"train {vocab_size:,} tokens")
    results = alternate(rounds, **works)
    ours = results["ours, 2 processes"][0]
    for name, (taken, _) in results.items():
        print(f"  {name}: {taken:.2f} s, {taken / ours:.2f} of ours")


def train_tokenizers(documents: list[str], expression: str, vocab_size: int) -> Any:
    """The same with the tokenizers library."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encoding(text: str, tokenizer: BPETokenizer, rounds: int) -> None:
    """Encode the whole text, each time with a new encoder; ids are compared."""
    import tiktoken

    description = tokenizer.to_json()

    def ours(workers: int) -> Any:
        fresh = BPETokenizer.from_json(description)
        return lambda: fresh.encode_to_array(text, workers=workers)

    peer = tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.vocab, special_tokens={}
    )
    megabytes = len(text.encode()) / 1e6
    times: dict[str, list[float]] = {"ours, 1 process": [], "ours, 2 processes": [], "tiktoken": []}
    ids: Any = None
    for _ in range(rounds):
        for workers, name in ((1, "ours, 1 process"), (2, "ours, 2 processes")):
            taken, ids = seconds(ours(workers))
            times[name].append(taken)
        taken, their_ids = seconds(lambda: peer.encode_ordinary(text))
        times["tiktoken"].append(taken)
    print(f"encode {megabytes:.1f} MB; ids {'equal' if np.array_equal(ids, their_ids) else 'DIFFER'}")
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        each = ", ".join(f"{t:.2f}" for t in times[name])
        ratio = median / medians["ours, 1 process"]
        print(
            f"  {name:18s} {median:6.2f} s  {megabytes / median:5.1f} MB/s  {ratio:.2f} of one process  ({each})"
        )
    taken, decoded = seconds(lambda: tokenizer.decode(ids))
    outcome = "equal" if decoded == text else "DIFFERS"
    print(f"  decode             {taken:6.2f} s  {megabytes / taken:5.1f} MB/s  {outcome}")


def repeats(tokenizer: BPETokenizer, rounds: int) -> None:
    """A million bytes of one character, and two million."""
    description = tokenizer.to_json()
    print("repeats: seconds for n = a million bytes and for 2n")
    for name, character in REPEATS.items():
        number = 10**6 // len(character.encode())
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for multiple, taken in times.items():
                fresh = BPETokenizer.from_json(description)  # which knows no pieces yet
                fresh.encode_to_array("warm up")
                taken.append(seconds(lambda: fresh.encode_to_array(character * number * multiple))[0])  # noqa: B023
        once, twice = (statistics.median(taken) for taken in times.values())
        print(f"  {name:22s} {once:.3f}  {twice:.3f}  ratio {twice / once:.2f}")


def memory(paths: list[str], pattern: str, vocab_size: int, megabytes: int) -> None:
    """The peak memory of a process that learns from so many megabytes of the files, streamed."""
    total = sum(Path(path).stat().st_size for path in paths) / 1e6
    times = max(1, round(megabytes / total))
    program = (
        "import sys\nfrom pathlib import Path\nfrom tinyllm.tokenizer import BPETokenizer\n"
        "paths = [Path(p) for p in sys.argv[4:]] * int(sys.argv[3])\n"
        "BPETokenizer.train(paths, int(sys.argv[2]), sys.argv[1], workers=2)\n"
    )
    command = [sys.executable, "-c", program, pattern, str(vocab_size), str(times), *paths]
    taken, _ = seconds(lambda: subprocess.run(command, check=True))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"memory: {total * times:,.0f} MB streamed in {taken:.0f} s, peak of the largest process {peak:,.0f} MiB"
    )


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--parts", default="train,encode,repeats", help="also: memory, tokenizers")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--pattern", default="gpt2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--document", type=int, default=100_000, help="characters of a document")
    parser.add_argument("--megabytes", type=int, default=1000, help="streamed by the part memory")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if "memory" in parts:  # first, while no other child can have been larger
        memory(args.files, args.pattern, args.vocab_size, args.megabytes)
    text = "\n".join(Path(path).read_text(encoding="utf-8") for path in args.files)
    documents = [text[i : i + args.document] for i in range(0, len(text), args.document)]
    print(f"{len(text.encode()) / 1e6:.1f} MB, {len(text) / 1e6:.1f}M characters, pattern {args.pattern}")
    if "train" in parts:
        training(documents, args.pattern, args.vocab_size, args.rounds, "tokenizers" in parts)
    if {"encode", "repeats"} & set(parts):
        tokenizer = BPETokenizer.train(documents, args.vocab_size, args.pattern, workers=2)
    if "encode" in parts:
        encoding(text, tokenizer, args.rounds)
    if "repeats" in parts:
        repeats(tokenizer, args.rounds)


if __name__ == "__main__":
    main()

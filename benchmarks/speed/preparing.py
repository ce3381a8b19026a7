"""Preparing text: how fast, in how much memory, killed and continued, and what drawing a window costs.

python benchmarks/speed/preparing.py FILES_OR_FOLDERS... --tokenizer FILE | --vocab-size N
python benchmarks/speed/preparing.py --quick        # on generated text, in some seconds
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tinyllm.cli.flags import integer
from tinyllm.data import open_prepared
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.cores import physical_cores
from tinyllm.tokenizer import BPETokenizer

CONTEXT, BATCH = 256, 16


def descendants(pid: int) -> list[int]:
    """A process and those that it has started."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        children = [
            int(child)
            for thread in threads
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        ]
    except OSError:
        return []
    return [pid, *(found for child in children for found in descendants(child))]


def peak(pid: int) -> int:
    """The most bytes of memory that a process has had; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), default=0)


def run(arguments: list[str], kill_after: float | None = None) -> tuple[int, float, dict[int, int]]:
    """Run `tinyllm prepare`, killed after so many seconds; its exit code, seconds, and peaks of its processes."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tinyllm", "prepare", *arguments])
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in descendants(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak(pid))
        if kill_after is not None and time.perf_counter() - begun > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    return process.returncode, time.perf_counter() - begun, peaks


def same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files, without their locks."""

    def names(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.name != ".lock")

    return names(first) == names(second) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names(first)
    )


def measure_reading(folder: Path) -> None:
    """The time to open a folder, to draw a batch of windows, and of a training step of a small model on it."""
    begun = time.perf_counter()
    prepared = open_prepared(folder)
    opening = time.perf_counter() - begun
    train = prepared.train
    train[:]  # every shard is checked once
    rng = np.random.default_rng(0)
    steps = 50
    begun = time.perf_counter()
    for _ in range(steps):
        starts = rng.integers(0, len(train) - CONTEXT, BATCH)
        train[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64)
    drawing = (time.perf_counter() - begun) / steps
    config = ModelConfig(
        vocab_size=prepared.tokenizer.vocab_size,
        context_length=CONTEXT,
        num_layers=2,
        num_heads=4,
        hidden_size=128,
    )
    model = TransformerLM(config, 0)
    tokens = train[: BATCH * CONTEXT].reshape(BATCH, CONTEXT).astype(np.int64)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        model(tokens).sum().backward()
        times.append(time.perf_counter() - begun)
    step = min(times)
    print(f"{len(train):,} tokens opened in {opening:.3f} s")
    print(
        f"a batch of {BATCH} x {CONTEXT} drawn in {1e3 * drawing:.3f} ms, {drawing / step:.2%} of {step:.2f} s, "
        "forward and backward of 2 layers of 128"
    )


def generated(folder: Path, megabytes: int) -> Path:
    """A file of words, drawn as Zipf's law has them."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, rng.integers(1, 10)))) for _ in range(20000)])
    path = folder / "words.txt"
    with open(path, "w") as file:
        while file.tell() < megabytes * 1_000_000:
            chosen = words[np.minimum(rng.zipf(1.2, 20000), 20000) - 1]
            file.write(" ".join(chosen.tolist()).replace(" e", ".\n\n"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--tokenizer")
    parser.add_argument("--vocab-size", type=integer)
    parser.add_argument("--threads", type=integer, default=physical_cores())
    parser.add_argument("--out", help="where to write (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="generated text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.out) as name:
        folder = Path(name)
        data = args.data or [str(generated(folder, 8 if args.quick else 100))]
        tokenizer = args.tokenizer
        if tokenizer is None and args.vocab_size is None:
            tokenizer = str(folder / "tokenizer.json")
            with open(data[0]) as file:
                BPETokenizer.train([file.read(2_000_000)], 4096, special_tokens=["<|endoftext|>"]).save(
                    tokenizer
                )
        chosen = ["--tokenizer", tokenizer] if tokenizer else ["--vocab-size", str(args.vocab_size)]
        arguments = ["--data", *data, *chosen, "--threads", str(args.threads)]
        if args.quick:
            arguments += ["--validation-fraction", "0.1"]
        whole, cut = folder / "whole", folder / "cut"
        code, seconds, peaks = run([*arguments, "--out", str(whole)])
        if code:
            raise SystemExit(code)
        print(f"{seconds:.1f} s in all with {args.threads} processes", end="")
        print("; peak memory of each:", ", ".join(f"{used / 1e6:.0f} MB" for used in sorted(peaks.values())))
        kills = 0
        for part in (0.6, 0.8):
            kills += run([*arguments, "--out", str(cut)], part * seconds)[0] == -signal.SIGKILL
        if run([*arguments, "--out", str(cut)])[0] and not (cut / "index.json").exists():
            raise SystemExit("killed and continued it did not end")
        if not same(whole, cut):
            raise SystemExit("killed and continued it wrote other files")
        print(f"killed {kills} times and continued: the same files, bitwise")
        measure_reading(whole)


if __name__ == "__main__":
    main()

"""Training steps against PyTorch on the same model, weights and batches, in one run.

    python benchmarks/speed/training.py [--size char|medium|large] [--optimizer adamw|muon] [--compile] [--memory]

char is the char preset; medium has 6 layers of width 384 and 16 x 256 tokens; large has 30M parameters, a vocabulary of
32,768 and 8 x 512 tokens. A round is a number of steps here and the same number in PyTorch, one after the other; the
figure is the median over rounds of the ratio of their times. A step is batch, forward, backward, clipping and
optimizer. Losses are compared too, so that both are known to do the same work. With --optimizer muon the peer is
torch.optim.Muon, which rounds to bfloat16; where a CPU has no instructions for that, it is far slower than it would
need to be.

The rate of matrix products is measured in the same run: all workers at once multiply float32 matrices of 2048 x 2048.
A step's floating-point operations are 6 for each weight of a matrix and token, and for attention 12 L D T (T + 1) / 2
for each window: what a causal model needs, whatever is computed.

--memory runs each library in a process of its own and reports the largest sum of its processes' memory (pages that
processes share are counted once), sampled every 10 ms.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.parallel.team import Team
from tinyllm.system.cores import physical_cores
from tinyllm.system.settings import from_mapping
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.config import TrainConfig
from tinyllm.training.optimization import SCHEDULES
from tinyllm.training.trainer import Trainer

# Model settings, windows in a batch, steps in a round, rounds.
SIZES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "char": ({**PRESETS["char"]["model"], "vocab_size": 65}, 12, 20, 15),
    "medium": (
        {"vocab_size": 65, "num_layers": 6, "num_heads": 6, "hidden_size": 384, "context_length": 256},
        16, 1, 12,
    ),
    "large": (
        {"vocab_size": 32768, "num_layers": 8, "num_heads": 5, "hidden_size": 320, "context_length": 512},
        8, 1, 8,
    ),
    "mini": (
        {"vocab_size": 16384, "num_layers": 8, "num_heads": 4, "hidden_size": 256, "context_length": 512,
         "tie_embeddings": True},
        8, 1, 8,
    ),
}  # fmt: skip
Step = Callable[[int], float]


def build_trainer(size: str, optimizer: str, threads: int) -> Trainer:
    """A trainer of this size on random tokens."""
    settings, batch_size, _, _ = SIZES[size]
    return trainer_of(from_mapping(ModelConfig, settings), batch_size, optimizer, threads)


def trainer_of(shape: ModelConfig, batch_size: int, optimizer: str, threads: int) -> Trainer:
    """A trainer of a model of this shape on random tokens."""
    model = TransformerLM(shape, seed=1)
    V = shape.vocab_size
    tokens = np.random.default_rng(0).integers(0, V, size=1_000_000, dtype=np.uint16)
    characters = "".join(chr(i) for i in range(V + 0x1000) if not 0xD800 <= i < 0xE000)[:V]
    config = replace(
        from_mapping(TrainConfig, PRESETS["char"]["train"]),
        threads=threads,
        optimizer=optimizer,
        batch_size=batch_size,
    )
    return Trainer(model, CharTokenizer(characters), tokens, tokens[:10_000], config)


def our_step(trainer: Trainer) -> Step:
    """A function that makes step number `step` here and returns its loss."""

    def step(number: int) -> float:
        trainer.step = number
        return next(trainer.train_steps()).loss

    return step


def torch_step(trainer: Trainer, compiled: bool) -> Step:
    """A function that makes step number `step` in PyTorch, from the same weights, and returns its loss."""
    import torch
    from torch_model import copy_of

    torch.set_num_threads(trainer.threads)
    peer, config = copy_of(trainer.model), trainer.config
    forward = torch.compile(peer) if compiled else peer
    named = dict(peer.named_parameters())
    matrices = [p for n, p in named.items() if ".layers." in n and p.ndim == 2 and config.optimizer == "muon"]
    in_muon = {id(p) for p in matrices}
    decayed = [p for p in named.values() if p.ndim == 2 and id(p) not in in_muon]
    others = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[tuple[Any, float]] = [
        (torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True), config.learning_rate)
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=config.muon_learning_rate, momentum=config.muon_momentum, weight_decay=0.0
        )
        optimizers.append((muon, config.muon_learning_rate))

    def step(number: int) -> float:
        inputs, targets = trainer.sampler.batch(number)
        factor = SCHEDULES[config.schedule](number, config.steps, config.warmup_steps, config.final_factor)
        loss = forward(torch.from_numpy(inputs), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.clip_norm)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def step_flops(config: ModelConfig, windows: int) -> float:
    """Floating-point operations that a training step needs: see the top of this file."""
    D, L, T = config.hidden_size, config.num_layers, config.context_length
    block = (
        2 * D * config.head_dim * (config.num_heads + config.num_kv_heads) + 3 * D * config.intermediate_size
    )
    linear = 6 * (L * block + D * config.vocab_size) * T
    attention = 12 * L * config.num_heads * config.head_dim * T * (T + 1) / 2
    return windows * (linear + attention)


def product_rate(rank: int, products: int = 6) -> float:
    """Floating-point operations a second of this worker in a large product; the median of several."""
    a = np.ones((2048, 2048), dtype=np.float32)
    seconds = []
    for _ in range(products):
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    return 2 * 2048**3 / statistics.median(seconds)


def compare(size: str, optimizer: str, threads: int, compiled: bool, rounds: int, steps: int) -> None:
    """Print the table of times."""
    trainer = build_trainer(size, optimizer, threads)
    peers: dict[str, Step] = {"tinyllm": our_step(trainer), "eager": torch_step(trainer, False)}
    if compiled:
        peers["compile"] = torch_step(trainer, True)
    print(f"{size}: {trainer.model.num_parameters():,} parameters, {platform.machine()}, {threads} threads")
    times: dict[str, list[float]] = {name: [] for name in peers}
    rates = []
    # Workers that are idle while a peer runs. They limit the threads of NumPy's BLAS, which PyTorch does not use.
    with trainer.engine, Team(threads, [product_rate]) as team:
        for number in range(rounds + 1):
            rates.append(sum(team.run(product_rate)))
            for name, step in peers.items():
                begun = time.perf_counter()
                for i in range(number * steps, (number + 1) * steps):
                    loss = step(i)
                if number:  # the first round warms up
                    times[name].append((time.perf_counter() - begun) / steps * 1e3)
                elif name == "tinyllm":
                    expected = loss
                else:
                    print(f"losses after {steps} steps: tinyllm {expected:.6f}, torch {name} {loss:.6f}")
                    assert abs(loss - expected) < 1e-3, "tinyllm and PyTorch do not compute the same"
    rate = statistics.median(rates)
    needed = step_flops(trainer.model.config, trainer.config.batch_size)
    print(
        f"matrix products: {rate / 1e9:.0f} GFLOP/s; "
        f"a step needs {needed / 1e9:.2f} GFLOP, {needed / rate * 1e3:.1f} ms"
    )
    print(
        f"{'':10}{'ms a step (median)':>20}{'least':>10}{'of the rate':>14}{'time / tinyllm':>18}{'quartiles':>18}"
    )
    for name, values in times.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(values, times["tinyllm"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        share = statistics.median(needed / r / ms * 1e3 for r, ms in zip(rates[1:], values, strict=True))
        print(
            f"{name:10}{statistics.median(values):20.1f}{min(values):10.1f}{share:14.0%}"
            f"{statistics.median(ratios):18.2f}{quartiles[0]:10.2f} to {quartiles[2]:.2f}"
        )


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and its descendants hold, shared pages counted once (Linux)."""
    total = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return total
    return total + sum(memory_of_tree(int(child)) for child in children)


def peak_memory(process: subprocess.Popen[str]) -> int:
    """The most bytes that this process and its descendants hold from now to its end (Linux)."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of_tree(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return peak


def memory(size: str, optimizer: str, threads: int) -> None:
    """Print the peak memory of three steps of each library, each in a process of its own."""
    peaks = {}
    for name in ("tinyllm", "eager"):
        command = [
            sys.executable,
            __file__,
            "--size",
            size,
            "--optimizer",
            optimizer,
            "--threads",
            str(threads),
        ]
        process = subprocess.Popen([*command, "--only", name], stdout=subprocess.PIPE, text=True)
        peaks[name] = peak_memory(process)
    for name, peak in peaks.items():
        print(f"{size}, {name:8}: {peak / 2**20:7.0f} MiB at most, {peak / peaks['eager']:.2f} of PyTorch's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="char")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="steps in a round")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile too")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time")
    parser.add_argument(
        "--only", choices=["tinyllm", "eager"], help="three steps of one of them, for --memory"
    )
    args = parser.parse_args()
    _, _, steps, rounds = SIZES[args.size]
    if args.only:
        trainer = build_trainer(args.size, args.optimizer, args.threads)
        if args.only == "tinyllm":
            with trainer.engine:
                for _ in range(3):
                    next(trainer.train_steps())
        else:
            step = torch_step(trainer, False)
            for number in range(3):
                step(number)
    elif args.memory:
        memory(args.size, args.optimizer, args.threads)
    else:
        compare(
            args.size, args.optimizer, args.threads, args.compile, args.rounds or rounds, args.steps or steps
        )


if __name__ == "__main__":
    main()

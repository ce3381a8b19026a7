"""Training steps against PyTorch eager on the same model, weights and batches, in one run.

    python benchmarks/training.py [--preset char] [--optimizer adamw|muon] [--rounds 15] [--steps 20]

A round is a number of steps here and the same number in PyTorch, one after the other; the figure is the median
over rounds of the ratio of their times. A step is batch, forward, backward, clipping and optimizer. Losses are
compared too, so that both are known to do the same work. With --optimizer muon the peer is torch.optim.Muon, which
rounds to bfloat16; where a CPU has no instructions for that, it is far slower than it would need to be.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch_model import TorchLM, copy_of

from tinyllm.config import from_mapping
from tinyllm.cores import physical_cores
from tinyllm.nn import ModelConfig, TransformerLM
from tinyllm.presets import PRESETS
from tinyllm.tokenizer import CharTokenizer
from tinyllm.train import SCHEDULES, TrainConfig, Trainer

VOCAB_SIZE = 65


def torch_step(
    peer: TorchLM, trainer: Trainer, config: TrainConfig, forward: Callable[..., torch.Tensor]
) -> Callable[[int], float]:
    """A function that makes step number `step` in PyTorch and returns its loss."""
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
    optimizers = [
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
        return loss.item()

    return step


def our_steps(trainer: Trainer, first: int, steps: int) -> float:
    """Make steps here and return the last loss."""
    trainer.step = first
    for _ in range(steps):
        loss = trainer.train_step().loss
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="char", choices=sorted(PRESETS))
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    model_config = replace(from_mapping(ModelConfig, preset["model"]), vocab_size=VOCAB_SIZE)
    train_config = replace(
        from_mapping(TrainConfig, preset["train"]), threads=args.threads, optimizer=args.optimizer
    )
    model = TransformerLM(model_config, seed=1)
    peer = copy_of(model)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=1_000_000).astype(np.uint16)
    tokenizer = CharTokenizer("".join(map(chr, range(VOCAB_SIZE))))
    trainer = Trainer(model, tokenizer, tokens, tokens[:10_000], train_config)
    peers = {"eager": torch_step(peer, trainer, train_config, peer)}
    if args.compile:
        compiled_peer = copy_of(model)
        peers["compile"] = torch_step(compiled_peer, trainer, train_config, torch.compile(compiled_peer))
    times: dict[str, list[float]] = {name: [] for name in ("tinyllm", *peers)}
    print(f"{platform.machine()}, {args.threads} threads, numpy {np.__version__}, torch {torch.__version__}")
    # Workers that are idle while a peer runs. They limit the threads of NumPy's BLAS, which PyTorch does not use.
    with trainer.workers:
        for number in range(args.rounds + 1):
            for name in times:
                first = number * args.steps
                begun = time.perf_counter()
                if name == "tinyllm":
                    loss = our_steps(trainer, first, args.steps)
                else:
                    for step in range(first, first + args.steps):
                        loss = peers[name](step)
                if number:  # the first round warms up
                    times[name].append((time.perf_counter() - begun) / args.steps * 1e3)
                elif name == "tinyllm":
                    expected = loss
                else:
                    print(f"losses after {args.steps} steps: tinyllm {expected:.6f}, torch {name} {loss:.6f}")
                    assert abs(loss - expected) < 1e-3, "tinyllm and PyTorch do not compute the same"
    print(f"{'':10}{'ms a step (median)':>20}{'least':>10}{'torch / tinyllm':>18}{'quartiles':>18}")
    for name, values in times.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(values, times["tinyllm"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        print(
            f"{name:10}{statistics.median(values):20.1f}{min(values):10.1f}"
            f"{statistics.median(ratios):18.2f}{quartiles[0]:10.2f} to {quartiles[2]:.2f}"
        )


if __name__ == "__main__":
    main()

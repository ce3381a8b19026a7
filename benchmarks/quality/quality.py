"""The validation loss that `tinyllm train` reaches, over seeds and optimizers.

    python benchmarks/quality/quality.py --data FILE [--seeds 1 2 3] [--optimizers adamw muon] [--set NAME=VALUE ...]
    python benchmarks/quality/quality.py --quick

The loss is the mean over the whole validation split at the last step. --quick makes 200 steps on Python's own help
pages and fails unless the loss is below that of a table of character pairs counted on the training split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tinyllm import data
from tinyllm.cli import main as cli
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.metrics import METRICS, read_metrics


def pair_loss(text: str, validation_fraction: float) -> float:
    """The loss in nats of counted character pairs, with one added to each count, on the validation split."""
    tokenizer = CharTokenizer.train(text)
    train, validation = data.split_by_position(tokenizer.encode_to_array(text), validation_fraction)
    V = tokenizer.vocab_size
    counts = np.ones((V, V))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-log_p[validation[:-1], validation[1:]].mean())


def train(flags: list[str]) -> tuple[float, float, float]:
    """Train by the command line; returns the last validation loss, the best one, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        code = cli.main(["train", "--out", str(Path(folder) / "run"), "--sample-tokens", "0", *flags])
        seconds = time.perf_counter() - begun
        if code:
            sys.exit(code)
        losses = [
            line["val_loss"] for line in read_metrics(Path(folder) / "run" / METRICS) if "val_loss" in line
        ]
    return losses[-1], min(losses), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="passed on as flags of tinyllm train"
    )
    args = parser.parse_args()
    common = ["--data", *args.data] if args.data else []
    for setting in args.set:
        name, _, value = setting.partition("=")
        common += [f"--{name.replace('_', '-')}", value]
    if args.quick:
        loss, _, seconds = train([*common, "--steps", "200", "--eval-every", "200"])
        bound = pair_loss(data.read_text(args.data) if args.data else data.embedded_corpus(), 0.1)
        print(
            f"200 steps: validation loss {loss:.4f} in {seconds:.0f} s; counted character pairs {bound:.4f}"
        )
        sys.exit(0 if loss < bound else "the model is no better than counted character pairs")
    for optimizer in args.optimizers:
        losses = []
        for seed in args.seeds:
            loss, best, seconds = train([*common, "--optimizer", optimizer, "--seed", str(seed)])
            losses.append(loss)
            figures = {"optimizer": optimizer, "seed": seed, "loss": loss, "best": best, "seconds": seconds}
            print(json.dumps(figures), flush=True)
        print(f"{optimizer}: mean {statistics.mean(losses):.4f} over seeds {args.seeds}", flush=True)


if __name__ == "__main__":
    main()

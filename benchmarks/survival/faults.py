"""Damage a small checkpoint in every way: each file cut off before every byte, and with every bit flipped.

    python benchmarks/survival/faults.py [--every 1] [--quick]

Loading must give exactly what was written, or refuse. A fault at every operation of a save is in
tests/training/test_faults.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.faults import flips, truncations

from tinyllm import InputError
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system import storage
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.metrics import MetricsFile
from tinyllm.training.trainer import Trainer


def write_checkpoint(run: Path) -> Path:
    """The last checkpoint of a training run of a few steps."""
    model = TransformerLM(
        ModelConfig(vocab_size=5, context_length=4, num_layers=1, num_heads=1, hidden_size=4)
    )
    tokens = np.random.default_rng(0).integers(0, 5, 100)
    config = TrainConfig(steps=3, batch_size=2, threads=1)
    Trainer(model, CharTokenizer("abcde"), tokens[:80], tokens[80:], config, run, [MetricsFile(run)]).fit()
    return keeping.find(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="only every so manieth damage")
    parser.add_argument("--quick", action="store_true", help="every fiftieth")
    args = parser.parse_args()
    every = 50 if args.quick else args.every
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(Path(temporary))
        names = (*checkpoint.FILES, checkpoint.MANIFEST)
        files = {name: (folder / name).read_bytes() for name in names}
        print(f"{len(files)} files, {sum(map(len, files.values())):,} bytes")
        now = dict(files)
        # From memory, where a hundred thousand files are read in seconds.
        storage.read_file = lambda path, largest=None: now[str(path.relative_to(folder))]
        for what, damage in (("truncations", truncations), ("flipped bits", flips)):
            begun = time.perf_counter()
            refused = exact = 0
            for name in names:
                for number, content in enumerate(itertools.islice(damage(files[name]), 0, None, every)):
                    now[name] = content
                    try:
                        found = checkpoint.read(folder).files
                    except InputError:
                        refused += 1
                    else:
                        if {**found, checkpoint.MANIFEST: files[checkpoint.MANIFEST]} != files:
                            sys.exit(f"{what} number {every * number} of {name} was taken for the checkpoint")
                        exact += 1
                now[name] = files[name]
            print(
                f"{what}: {refused:,} refused, {exact:,} gave the exact state; {time.perf_counter() - begun:.0f} s"
            )


if __name__ == "__main__":
    main()

"""Whole processes: how long the import takes, how long until the first training step, and whether runs repeat.

    python benchmarks/speed/processes.py [--rounds 9] [--runs 10] [--steps 40]

Times are from the start of the process, medians over rounds in which the commands alternate. A round before these lets
Python keep the compiled modules, as pip does when it installs. A run is `tinyllm train` with the char preset on
Python's help pages; the SHA-256 of the weights and optimizer state of its last checkpoint must be the same in all runs
with the same seed and number of threads, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tinyllm.system.cores import physical_cores

FIRST_STEP = """
import os, sys
from tinyllm.training import callbacks
from tinyllm.cli import main as cli
def stop(self, metrics):
    os.write(1, b"step")
    os._exit(0)
callbacks.Progress.on_step = stop
cli.main(["train", "--out", sys.argv[1], "--overwrite"])
"""


def seconds(folder: str, *command: str) -> float:
    """How long a command takes; compiled modules are kept in a folder of their own, whatever the environment says."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder + "/compiled"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    return time.perf_counter() - begun


def checksum(folder: str, steps: int, threads: int) -> str:
    """Train in a folder below `folder` and return the checksum of what the run ends with."""
    run = folder + "/run"
    out = ["--out", run, "--overwrite", "--sample-tokens", "0"]
    seconds(folder, "-m", "tinyllm", "train", "--steps", str(steps), "--threads", str(threads), *out)
    digest = hashlib.sha256()
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        digest.update((Path(run) / "latest" / name).read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="steps of each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "python": ("-c", "pass"),
            "import numpy": ("-c", "import numpy"),
            "import tinyllm": ("-c", "import tinyllm"),
            "first training step": ("-c", FIRST_STEP, folder + "/first"),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for command in commands.values():
            seconds(folder, *command)
        for _ in range(args.rounds):
            for name, command in commands.items():
                times[name].append(seconds(folder, *command))
        for name, values in times.items():
            print(f"{name:20} {statistics.median(values):6.3f} s (least {min(values):.3f})")
        for threads in (1, physical_cores()):
            found = {checksum(folder, args.steps, threads) for _ in range(args.runs)}
            print(f"{args.runs} runs of {args.steps} steps with {threads} threads: {len(found)} checksum(s)")
            assert len(found) == 1, "runs with the same seed and threads differ"


if __name__ == "__main__":
    main()

"""Kill -9 at random moments of a training run, start it again each time, and compare what it ends with.

    python benchmarks/survival/kills.py [--kills 200] [--seed 0] [--quick]

A small model with dropout and gradient accumulation trains in two processes, with a checkpoint every few steps. The
whole process group is killed at a random moment: while it starts, while it trains, or as soon as a checkpoint that is
being written is seen. Then it is started again, with --resume where there is a checkpoint. Each run that comes to its
end must have the files and the metrics of a run that nobody disturbed, bit for bit; another begins then, until there
were enough kills.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = [
    "--data", "text.txt", "--out", "run", "--steps", "300", "--threads", "2", "--dropout", "0.1",
    "--gradient-accumulation", "2", "--batch-size", "2", "--context-length", "16", "--num-layers", "1",
    "--num-heads", "2", "--hidden-size", "16", "--warmup-steps", "10", "--eval-every", "20", "--checkpoint-every", "6",
    "--sample-tokens", "0",
]  # fmt: skip
MOMENTS = ("starting", "training", "saving")


def write_text(folder: Path) -> None:
    """The text that all runs train on."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "and",
        "runs",
        "away",
        "from",
        "it",
    ]
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(words) for _ in range(1500)))


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The training run in `folder`, begun or resumed, as the leader of a process group of its own."""
    resume = ["--resume"] if any((folder / "run/checkpoints").glob("step-*")) else []
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tinyllm", "train", *SETTINGS, *resume],
            cwd=folder,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )


def wait_for(process: subprocess.Popen[bytes], folder: Path, moment: str, generator: random.Random) -> None:
    """Return at such a moment, or when the process has ended."""
    run = folder / "run"
    if moment == "starting":
        time.sleep(generator.uniform(0, 1.0))
        return
    seen = set(run.glob("checkpoints/step-*"))
    while process.poll() is None and set(run.glob("checkpoints/step-*")) <= seen:
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.3))
    while moment == "saving" and process.poll() is None and not any(run.glob("checkpoints/.step-*.tmp")):
        pass
    time.sleep(generator.uniform(0, 0.003))


def result(folder: Path) -> dict[str, object]:
    """All that a run leaves, but for times: every file of its checkpoints, the links to them, its metrics."""
    run = folder / "run"
    found: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }
    for link in ("best", "latest"):
        found[link] = (run / link).resolve().name
    for name in (".lock", "loss.png", "metrics.jsonl"):
        found.pop(name, None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return {**found, "metrics": lines}


def compare(expected: dict[str, object], found: dict[str, object], log: str) -> None:
    """Stop with the names of what differs."""
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if differing:
        sys.exit(f"these differ: {', '.join(differing)}\n{log}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="5 kills")
    args = parser.parse_args()
    wanted = 5 if args.quick else args.kills
    generator = random.Random(args.seed)
    kills: collections.Counter[str] = collections.Counter()
    passed_over = ends = attempts = 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed, folder = Path(temporary, "undisturbed"), Path(temporary, "killed")
        for each in (undisturbed, folder):
            each.mkdir()
            write_text(each)
        if start(undisturbed).wait() != 0:
            sys.exit((undisturbed / "log.txt").read_text())
        expected = result(undisturbed)
        while kills.total() < wanted or attempts:
            attempts += 1
            process = start(folder)
            moment = MOMENTS[(kills.total() + ends) % 3]
            if kills.total() < wanted:
                wait_for(process, folder, moment, generator)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills[moment] += 1
            log = folder / "log.txt"
            if process.wait() == -signal.SIGKILL:
                continue
            if process.returncode != 0:
                sys.exit(f"after {kills.total()} kills:\n{log.read_text()}")
            compare(expected, result(folder), log.read_text())
            passed_over += log.read_text().count("passed over")
            ends, attempts = ends + 1, 0
            shutil.rmtree(folder / "run")
            log.unlink()
    told = ", ".join(f"{kills[moment]} while {moment}" for moment in MOMENTS)
    print(
        f"{kills.total()} kills ({told}); {ends} runs came to their end, each with the bits of the undisturbed one; "
        f"{passed_over} checkpoints were passed over; {time.monotonic() - begun:.0f} s"
    )


if __name__ == "__main__":
    main()

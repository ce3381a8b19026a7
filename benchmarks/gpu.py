"""Everything that has to be known of a GPU, in one command of less than 8 minutes.

    python benchmarks/gpu.py [--quick] [--only PART ...]

Each part runs in a process of its own, under a limit of time, and the table at the end says what came of it:

    tests       tests/backend/test_device.py on CuPy: all ops, training, generation and checkpoints against NumPy
    curve       100 steps of the char model against NumPy: the largest difference of the loss, at most 1e-4
    looks       a stretch of steps in which CuPy may not wait for the device: whatever does raises an error
    10m, 50m    tokens a second against PyTorch eager on the same weights and batches, in float32 and TF32, interleaved;
                and against this library on the CPU
    memory      the peak of each library, in processes of their own

--quick takes the parts that need no device (`launches`) and runs the others on the strict double, to see that they
run; its times say nothing.

    launches    kernels of a training step, before and after fusion, counted by the strict double
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path += [str(Path(__file__).parent / "speed"), str(Path(__file__).parents[1] / "tests")]

from support.strict_device import strict_device

from tinyllm import backend
from tinyllm.backend import current
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.system.settings import from_mapping
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines.device import DeviceSteps, send_batches
from tinyllm.training.events import Limits
from tinyllm.training.trainer import Trainer

PARTS = ("tests", "curve", "looks", "10m", "50m", "memory", "launches")
LIMITS = {"tests": 200, "curve": 40, "looks": 30, "10m": 65, "50m": 70, "memory": 50, "launches": 20}
"""Seconds; together less than 8 minutes."""
SHAPES = {
    "char": (ModelConfig(vocab_size=65), {"batch_size": 12}),
    "10m": (
        ModelConfig(
            8192, context_length=512, num_layers=6, num_heads=5, hidden_size=320, tie_embeddings=True
        ),
        {"batch_size": 32, "learning_rate": 1e-3},
    ),
    "50m": (
        ModelConfig(
            16_384, context_length=1024, num_layers=8, num_heads=10, hidden_size=640, tie_embeddings=True
        ),
        {"batch_size": 32, "learning_rate": 6e-4},
    ),
}
"""The models that are measured, of 0.8M, 10.0M and 49.9M parameters; they stay, so that figures can be compared."""
NO_LIMITS = Limits(float("inf"), float("inf"))


def trainer_of(name: str, **settings: Any) -> Trainer:
    """A trainer of one of SHAPES on random tokens."""
    shape, how = SHAPES[name]
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, size=1_000_000, dtype=np.uint16)
    characters = "".join(chr(i) for i in range(shape.vocab_size + 0x1000) if not 0xD800 <= i < 0xE000)
    config = from_mapping(
        TrainConfig, {**how, "tokenizer": "char", "optimizer": "adamw", "threads": 1, **settings}
    )
    tokenizer = CharTokenizer(characters[: shape.vocab_size])
    return Trainer(TransformerLM(shape, seed=1), tokenizer, tokens, tokens[:20_000], config)


@contextlib.contextmanager
def device(quick: bool, precision: str = "float32") -> Iterator[None]:
    """CuPy as the backend, or the strict double."""
    if quick:
        with strict_device():
            yield
        return
    backend.use_backend("cupy", precision)
    try:
        yield
    finally:
        backend.use_backend("numpy")


def stretch(trainer: Trainer, steps: int) -> Callable[[], None]:
    """A function that makes so many steps on the device without a look at a number, and then waits."""
    workers = trainer.engine
    assert isinstance(workers, DeviceSteps)
    batches = [trainer.sampler.batch(number) for number in range(steps)]
    sent, counts = send_batches(batches), list(map(trainer.objective.count, batches))

    def run() -> None:
        workers.queue(0, sent, counts, [1.0] * steps, trainer.config.clip_norm, NO_LIMITS)
        backend.synchronize()

    return run


def torch_stretch(trainer: Trainer, steps: int, precision: str, where: str) -> Callable[[], None]:
    """The same in PyTorch eager."""
    import torch
    from torch_model import copy_of

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    peer, config = copy_of(trainer.model).to(where), trainer.config
    groups = [
        {"params": [p for p in peer.parameters() if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in peer.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    batches = [
        [torch.from_numpy(x).to(where) for x in trainer.sampler.batch(number)] for number in range(steps)
    ]

    def run() -> None:
        for inputs, targets in batches:
            peer(inputs, targets).backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if where == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


# ---- The parts ---------------------------------------------------------------------------------


def tests(quick: bool) -> str:
    """The tests of the device's path."""
    environment = {**os.environ, "TINYLLM_DEVICE": "" if quick else "cupy"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).parents[1] / "tests/backend/test_device.py"),
    ]
    if quick:
        command += ["-k", "swiglu or run_is_that_of_numpy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:])
        raise SystemExit("tests failed")
    return done.stdout.strip().splitlines()[-1] + " (tests/backend/test_device.py)"


def curve(quick: bool) -> str:
    """100 steps on both backends."""
    steps = 5 if quick else 100

    def losses() -> list[float]:
        trainer = trainer_of("char", steps=steps, log_every=steps, eval_every=steps, checkpoint_every=steps)
        with trainer.engine:
            found: list[float] = []
            while len(found) < steps:
                found += [made.loss for made in trainer.train_steps()]  # type: ignore[union-attr]
        return found

    expected = losses()
    with device(quick):
        found = losses()
    largest = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert largest <= 1e-4, f"the losses differ by {largest:.1e}"
    return f"largest difference of the loss in {steps} steps: {largest:.1e}"


def looks(quick: bool) -> str:
    """Steps in which a wait is an error."""
    with device(quick):
        trainer = trainer_of("char")
        run = stretch(trainer, 4)
        run()  # compiles kernels, makes tables
        workers = trainer.engine
        assert isinstance(workers, DeviceSteps)
        batches = [trainer.sampler.batch(number) for number in range(4)]
        sent, counts = send_batches(batches), list(map(trainer.objective.count, batches))
        if quick:
            before = current.xp.library.count.copy()
            workers.queue(0, sent, counts, [1.0] * 4, 1.0, NO_LIMITS)
            spent = current.xp.library.count - before
            assert (spent.to_device, spent.to_host, spent.synchronizations) == (0, 0, 0), spent
            return "none in 4 steps (strict double)"
        import cupyx

        with cupyx.allow_synchronize(False):
            workers.queue(0, sent, counts, [1.0] * 4, 1.0, NO_LIMITS)
        backend.synchronize()
    return "none in 4 steps"


def speed(name: str, quick: bool) -> str:
    """Tokens a second against PyTorch, and against the CPU."""
    steps, rounds = (1, 1) if quick else (10 if name == "10m" else 4, 5)
    small = {"batch_size": 1} if quick else {}
    lines = []
    for precision in ("float32",) if quick else ("float32", "tf32"):
        with device(quick, precision):
            trainer = trainer_of(name, **small)
            tokens = steps * trainer.config.batch_size * trainer.model.config.context_length
            peers = {"tinyllm": stretch(trainer, steps)}
            peers["torch"] = torch_stretch(trainer, steps, precision, "cpu" if quick else "cuda")
            times: dict[str, list[float]] = {name: [] for name in peers}
            for number in range(rounds + 2):
                for name, run in peers.items():
                    spent = seconds(run)
                    if number > 1 or quick:
                        times[name].append(spent)
        ratio = statistics.median(b / a for a, b in zip(times["tinyllm"], times["torch"], strict=True))
        ours, theirs = (tokens / statistics.median(times[name]) for name in ("tinyllm", "torch"))
        lines.append(
            f"{precision}: {ours:,.0f} tokens/s, PyTorch {theirs:,.0f}, {ratio:.2f} times as fast (asked 0.9)"
        )
    if not quick:
        host = trainer_of(name, batch_size=1 if name == "50m" else 4, threads=0)
        with host.engine:
            next(host.train_steps())
            spent = seconds(lambda: next(host.train_steps()) and None)
        rate = host.config.batch_size * host.model.config.context_length / spent
        lines.append(f"on this machine's CPU {rate:,.0f} tokens/s")
    return "; ".join(lines)


def memory(quick: bool) -> str:
    """The most that each library reserves for a few steps of the model of 10.0M parameters."""
    peaks = {}
    for name in ("tinyllm", "torch"):
        command = [sys.executable, __file__, "--peak", name, *(["--quick"] if quick else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        peaks[name] = int(done.stdout.split()[-1])
    share = peaks["tinyllm"] / max(peaks["torch"], 1)
    return (
        f"10m: {peaks['tinyllm'] / 2**20:,.0f} MiB, PyTorch {peaks['torch'] / 2**20:,.0f}, "
        f"{share:.2f} of it (asked 1.2)"
    )


def peak(name: str, quick: bool) -> int:
    """Bytes that one library reserves."""
    with device(quick):
        trainer = trainer_of("10m", **({"batch_size": 1} if quick else {}))
        if name == "tinyllm":
            stretch(trainer, 1 if quick else 3)()
            return 0 if quick else int(current.xp.library.memory_pool.total_bytes())
    torch_stretch(trainer, 1 if quick else 3, "float32", "cpu" if quick else "cuda")()
    import torch

    return 0 if quick else int(torch.cuda.max_memory_reserved())


def launches(quick: bool) -> str:
    """Kernels of a step, counted by the strict double."""
    counts = {}
    for fuses in (False, True):
        with strict_device(fuses=fuses) as double:
            trainer = trainer_of("10m", batch_size=1)
            run = stretch(trainer, 1)
            run()
            before = double.count.copy()
            run()
            counts[fuses] = (double.count - before).launches
    return f"10m: {counts[False]} a step, {counts[True]} with fused kernels"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without a device")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=["tinyllm", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    functions: dict[str, Callable[[bool], str]] = {
        "tests": tests, "curve": curve, "looks": looks, "memory": memory, "launches": launches,
        "10m": lambda quick: speed("10m", quick), "50m": lambda quick: speed("50m", quick),
    }  # fmt: skip
    if args.peak:
        print(peak(args.peak, args.quick))
        return
    if args.part:
        print(functions[args.part](args.quick))
        return
    if not args.quick:
        describe()
    rows, failed = [], False
    for part in args.only:
        command = [sys.executable, __file__, "--part", part, *(["--quick"] if args.quick else [])]
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMITS[part] * (5 if args.quick else 1)
            )
            lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip().splitlines()
            text = lines[-1] if lines else "nothing was said"
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
                failed, text = True, f"FAILED: {text}"
        except subprocess.TimeoutExpired:
            failed, text = True, f"FAILED: not done in {LIMITS[part]} s"
        rows.append(f"{part:10}{time.perf_counter() - begun:6.0f} s  {text}")
        print(rows[-1], flush=True)
    sys.exit("failed: see above" if failed else 0)


def describe() -> None:
    """Print the device."""
    try:
        backend.use_backend("cupy")
    except InputError as error:
        sys.exit(f"{error}; or give --quick, which needs no device")
    library = current.xp.library.module
    properties = library.cuda.runtime.getDeviceProperties(0)
    print(
        f"{properties['name'].decode()}, {properties['totalGlobalMem'] / 2**30:.0f} GiB, "
        f"CuPy {library.__version__}, CUDA {library.cuda.runtime.runtimeGetVersion()}"
    )
    backend.use_backend("numpy")


if __name__ == "__main__":
    main()

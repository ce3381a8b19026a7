"""Causal attention over long sequences against PyTorch's scaled_dot_product_attention: time and memory.

    python benchmarks/speed/attention.py [--lengths 2048 8192] [--rounds 5]

Batch 1, 8 heads of width 64, float32, forward and backward, alternating in one process. Memory is what a process of its
own needs at most above what it had before the call.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HEADS, WIDTH = 8, 64


def arrays(T: int) -> list[np.ndarray]:
    """q, k, v and the cotangent, each (1, H, T, K)."""
    rng = np.random.default_rng(T)
    return [rng.normal(size=(1, HEADS, T, WIDTH)).astype(np.float32) for _ in range(4)]


def ours(T: int) -> Callable[[], np.ndarray]:
    """Forward and backward here; returns the gradient of q."""
    from tinyllm import Tensor, gradients, ops

    *inputs, cotangent = arrays(T)
    q, k, v = (Tensor(x, requires_grad=True) for x in inputs)

    def run() -> np.ndarray:
        out = ops.scaled_dot_product_attention(q, k, v, causal=True)
        return gradients(out, [q, k, v], cotangent)[0]

    return run


def theirs(T: int) -> Callable[[], np.ndarray]:
    """The same in PyTorch."""
    import torch

    *inputs, cotangent = (torch.from_numpy(x) for x in arrays(T))
    q, k, v = (x.requires_grad_() for x in inputs)

    def run() -> np.ndarray:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, [q, k, v], cotangent)[0].numpy()

    return run


SIDES = {"tinyllm": ours, "torch": theirs}


def peak_memory(name: str, T: int) -> float:
    """MiB that a process of its own needs for the call."""
    command = [sys.executable, __file__, "--memory-of", name, "--lengths", str(T)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory(line: str) -> int:
    """A line of /proc/self/status in kB."""
    status = Path("/proc/self/status").read_text()
    return next(int(text.split()[1]) for text in status.splitlines() if text.startswith(line))


def main() -> None:
    """Print a row for each length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        # A process of its own imports one of the two libraries alone.
        SIDES[args.memory_of](64)()  # loads what is loaded at first use
        run = SIDES[args.memory_of](args.lengths[0])
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far begins anew (Linux)
        before = memory("VmRSS")
        run()
        print((memory("VmHWM") - before) / 1024)
        return
    import torch

    from tinyllm.system.allocator import keep_freed_memory

    keep_freed_memory()  # as training does; it serves both
    print(f"numpy {np.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for T in args.lengths:
        runs = {name: side(T) for name, side in SIDES.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        results = {name: run() for name, run in runs.items()}
        difference = np.abs(results["tinyllm"] - results["torch"]).max() / np.abs(results["torch"]).max()
        for _ in range(args.rounds):
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begun)
        ratios = [a / b for a, b in zip(times["tinyllm"], times["torch"], strict=True)]
        print(f"context {T}: gradients of q differ by {difference:.1e}")
        for name in runs:
            print(
                f"  {name:8} {statistics.median(times[name]) * 1e3:8.0f} ms  {peak_memory(name, T):7.0f} MiB"
            )
        print(f"  tinyllm / torch: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

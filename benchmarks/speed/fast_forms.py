"""What each fast form gains over the formula that it computes, forward and backward, at the sizes of the char preset.

    python benchmarks/speed/fast_forms.py [--rounds 31] [--out docs/fast_forms.json]

float32, one thread; medians of interleaved rounds. `docs/generate_ops.py` puts them into docs/ops.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm import Tensor, gradients, use_formulas
from tinyllm.autograd.registry import REGISTRY
from tinyllm.backend.philox import Key
from tinyllm.system.cores import threads_allowed

B, T, D, H, K, V = 12, 64, 128, 4, 32, 65
F = 344  # width of the feed-forward
HEADS = (B, H, T, K)
SIZES: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "rms_norm": ([(B, T, D), (D,)], {"eps": 1e-6}),
    "layer_norm": ([(B, T, D), (D,), (D,)], {"eps": 1e-5}),
    "matmul": ([(B, T, D), (D, D)], {}),
    "linear": ([(B, T, D), (F, D)], {}),
    "silu": ([(B, T, F)], {}),
    "gelu": ([(B, T, F)], {}),
    "gelu_tanh": ([(B, T, F)], {}),
    "swiglu": ([(B, T, F), (B, T, F)], {}),
    "dropout": ([(B, T, D)], {"p": 0.1, "key": Key(1)}),
    "rope": ([HEADS], {"offset": 0, "theta": 10000.0}),
    "rotary_heads": ([(B, T, H * K), (K,)], {"head_dim": K, "eps": 1e-6, "offset": 0, "theta": 10000.0}),
    "scaled_dot_product_attention": ([HEADS, HEADS, HEADS], {"causal": True}),
    "cross_entropy": (
        [(B, T, V)],
        {"targets": np.random.default_rng(1).integers(0, V, (B, T)), "reduction": "mean"},
    ),
}
"""Input shapes and arguments of every op with a fast form."""


def pass_of(name: str, formulas: bool) -> Callable[[], None]:
    """One forward and backward pass of an op, by formula or fast form."""
    shapes, arguments = SIZES[name]
    rng = np.random.default_rng(0)
    xs = [Tensor(rng.standard_normal(shape, dtype=np.float32), requires_grad=True) for shape in shapes]
    shape = REGISTRY[name](**arguments)(*xs).shape
    cotangent = rng.standard_normal(shape, dtype=np.float32)

    def run() -> None:
        with use_formulas(formulas):
            gradients(REGISTRY[name](**arguments)(*xs), xs, cotangent)

    return run


def seconds(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="write the gains as JSON")
    args = parser.parse_args()
    with_fast = {name for name, op in REGISTRY.items() if op.fast_form or not op.is_formula}
    assert with_fast == set(SIZES), f"sizes for {with_fast ^ set(SIZES)}"
    gains = {}
    with threads_allowed(1):
        for name in SIZES:
            fast, formula = pass_of(name, formulas=False), pass_of(name, formulas=True)
            for run in (fast, formula):
                run()
            pairs = [(seconds(fast), seconds(formula)) for _ in range(args.rounds)]
            gains[name] = round(statistics.median(b / a for a, b in pairs), 2)
            milliseconds = [1e3 * statistics.median(times) for times in zip(*pairs, strict=True)]
            print(
                f"{name:30} fast {milliseconds[0]:7.3f} ms  formula {milliseconds[1]:7.3f} ms  {gains[name]:.2f}"
            )
    if args.out:
        args.out.write_text(json.dumps(gains, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

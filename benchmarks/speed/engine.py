"""A chain of 1,000 small ops, forward and backward, against PyTorch, HIPS autograd and MyGrad in one run.

    pip install autograd mygrad
    python benchmarks/speed/engine.py [--rounds 40] [--length 1000] [--size 10]

The arrays are so small that the arithmetic costs next to nothing: this is what an engine itself costs for each op.
A round runs each engine once, in an order that moves on; the figures are medians over rounds. All are float64 and
on one thread, and all gradients are compared. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm import Tensor
from tinyllm.system.cores import threads_allowed

Array = np.ndarray[Any, Any]
Chain = Callable[[Any, Any], Any]
Engine = Callable[[Chain, Array, Array], tuple[Array, Array]]
"""The gradients of the sum of chain(x, y) for arrays x and y."""


def adds(length: int) -> Chain:
    """x + y + y + ... + y."""

    def chain(x: Any, y: Any) -> Any:
        for _ in range(length):
            x = x + y
        return x

    return chain


def multiplies(length: int) -> Chain:
    """x y y ... y."""

    def chain(x: Any, y: Any) -> Any:
        for _ in range(length):
            x = x * y
        return x

    return chain


def in_tinyllm(chain: Chain, x: Array, y: Array) -> tuple[Array, Array]:
    a, b = Tensor(x, requires_grad=True), Tensor(y, requires_grad=True)
    chain(a, b).sum().backward()
    return a.grad, b.grad


def in_torch(chain: Chain, x: Array, y: Array) -> tuple[Array, Array]:
    import torch

    a, b = (torch.from_numpy(array).requires_grad_() for array in (x, y))
    chain(a, b).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    return a.grad.numpy(), b.grad.numpy()


def in_autograd(chain: Chain, x: Array, y: Array) -> tuple[Array, Array]:
    import autograd
    import autograd.numpy as anp

    a, b = autograd.grad(lambda pair: anp.sum(chain(*pair)))((x, y))
    return a, b


def in_mygrad(chain: Chain, x: Array, y: Array) -> tuple[Array, Array]:
    import mygrad

    a, b = mygrad.tensor(x), mygrad.tensor(y)
    chain(a, b).sum().backward()
    return a.grad, b.grad


ENGINES: dict[str, Engine] = {
    "tinyllm": in_tinyllm,
    "torch": in_torch,
    "autograd": in_autograd,
    "mygrad": in_mygrad,
}


def measure(chain: Chain, x: Array, y: Array, rounds: int) -> dict[str, list[float]]:
    """Seconds of each engine in each round; raises AssertionError when their gradients differ."""
    installed = {name: run for name, run in ENGINES.items() if importlib.util.find_spec(name)}
    expected = in_tinyllm(chain, x, y)
    times: dict[str, list[float]] = {name: [] for name in installed}
    names = list(installed)
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.perf_counter()
            found = installed[name](chain, x, y)
            seconds = time.perf_counter() - begun
            if number >= 2:  # the first two warm up
                times[name].append(seconds)
            for mine, theirs in zip(expected, found, strict=True):
                np.testing.assert_allclose(theirs, mine, rtol=1e-10, err_msg=name)
    return times


def versions() -> str:
    """Of Python, NumPy and the peers."""
    from importlib import metadata

    found = [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    for name in ("torch", "autograd", "mygrad"):
        if importlib.util.find_spec(name):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--length", type=int, default=1000, help="ops in the chain")
    parser.add_argument("--size", type=int, default=10, help="elements of each array")
    args = parser.parse_args()
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=args.size), 1 + rng.normal(scale=1e-4, size=args.size)
    print(versions())
    print(f"{args.length} ops on {args.size} float64 numbers, {args.rounds} rounds; medians")
    print(f"{'':12}{'':12}{'ms':>9}{'us an op':>11}{'of tinyllm':>12}")
    with threads_allowed(1):  # one thread for BLAS
        for kind, chain in (("add", adds(args.length)), ("multiply", multiplies(args.length))):
            times = measure(chain, x, y, args.rounds)
            for name, values in times.items():
                median = statistics.median(values)
                ratios = [theirs / ours for theirs, ours in zip(values, times["tinyllm"], strict=True)]
                print(
                    f"{kind:12}{name:12}{median * 1e3:9.2f}{median / args.length * 1e6:11.2f}"
                    f"{statistics.median(ratios):12.2f}"
                )


if __name__ == "__main__":
    main()

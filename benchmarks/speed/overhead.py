"""What observers, hooks and the module stack cost a training step while nobody uses them.

    python benchmarks/speed/overhead.py [--preset char] [--pairs 60] [--steps 5]

A pair is a number of training steps with the code as it is, and the same number with those parts taken out of
`Module.__call__`, `Op.__call__` and `propagate` (their own source, without the lines), in alternating order. The
figure is the median over pairs of the ratio of their times; the target is below 1.01. Because the difference is
smaller than the noise of one pair, it is estimated in a second way too: what a call of an op and of a module on a
single number costs more, times the number of such calls in a step.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tinyllm.autograd import tensor
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.nn import Module
from tinyllm.system.settings import from_mapping
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.config import TrainConfig
from tinyllm.training.trainer import Trainer

VOCAB_SIZE = 65
TARGET = 0.01


class Stripper(ast.NodeTransformer):
    """Takes out loops over observers, and what is kept about modules."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def _without(self, node: ast.stmt, unwanted: bool) -> ast.stmt | None:
        if not unwanted:
            self.generic_visit(node)
            return node
        self.removed.append(ast.unparse(node).splitlines()[0])
        return None

    def visit_For(self, node: ast.For) -> ast.stmt | None:
        return self._without(node, ast.unparse(node.target) == "observer")

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        return self._without(node, ast.unparse(node.targets[0]) in ("watching", "op.modules"))


def stripped(function: Callable[..., Any], expected: list[str]) -> Callable[..., Any]:
    """The function compiled from its own source without the lines that `Stripper` takes out.

    Raises RuntimeError when these are not the `expected` ones: then the engine has changed, and so must this file.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    stripper = Stripper()
    tree = ast.fix_missing_locations(stripper.visit(tree))
    if stripper.removed != expected:
        raise RuntimeError(f"{function.__qualname__}: took out {stripper.removed}, expected {expected}")
    names: dict[str, Any] = {}
    code = compile(tree, f"<{function.__qualname__} stripped>", "exec", dont_inherit=True)
    exec(code, vars(tensor), names)
    result: Callable[..., Any] = names[function.__name__]
    return result


def call_forward(self: Module, *args: Any, **kwargs: Any) -> Any:
    """`Module.__call__` without module stack, observers and hooks."""
    return self.forward(*args, **kwargs)


STRIPPED: list[tuple[Any, str, Callable[..., Any]]] = [
    (Module, "__call__", call_forward),
    (Op, "__call__", stripped(Op.__call__, [
        "for observer in mode.observers:", "for observer in mode.observers:", "op.modules = module_stack.get()",
    ])),
    (tensor, "propagate", stripped(tensor.propagate, [
        "watching = mode.observers", "for observer in watching:", "for observer in watching:",
    ])),
]  # fmt: skip


@contextlib.contextmanager
def without_observers() -> Iterator[None]:
    """Within this context, modules and ops run without the code that is measured."""
    originals = [getattr(owner, name) for owner, name, _ in STRIPPED]
    for owner, name, function in STRIPPED:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(STRIPPED, originals, strict=True):
            setattr(owner, name, original)


class Count(Observer):
    """How many ops and modules run in a step."""

    def __init__(self) -> None:
        self.ops = self.modules = 0

    def before_forward(self, op: Op, inputs: tuple[Tensor, ...]) -> None:
        self.ops += 1

    def enter_module(self, module: Any) -> None:
        self.modules += 1


class Nothing(Module):
    def forward(self, x: Any) -> Any:
        return x


def calls_of_ops() -> None:
    """1,000 ops on a number, forward and backward."""
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(1000):
        y = y + x
    y.backward()


def calls_of_modules() -> None:
    """1,000 modules that do nothing."""
    module = Nothing()
    for _ in range(1000):
        module(None)


def elapsed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def pairs_of(call: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds with the code as it is and without it, in pairs whose order alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for bare in (False, True) if pair % 2 else (True, False):
            with without_observers() if bare else contextlib.nullcontext():
                times[bare].append(elapsed(call))
    return times


def build_trainer(preset: dict[str, Any]) -> Trainer:
    """A trainer of the preset on random tokens."""
    config = replace(from_mapping(ModelConfig, preset["model"]), vocab_size=VOCAB_SIZE)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=1_000_000).astype(np.uint16)
    tokenizer = CharTokenizer("".join(map(chr, range(VOCAB_SIZE))))
    train = replace(from_mapping(TrainConfig, preset["train"]), threads=1)
    return Trainer(TransformerLM(config, seed=1), tokenizer, tokens, tokens[:10_000], train)


def check_same(preset: dict[str, Any]) -> None:
    """Two steps with and without the code have the same bits, or something else was taken out as well."""
    states = []
    for context in (contextlib.nullcontext(), without_observers()):
        trainer = build_trainer(preset)
        with context, trainer.engine:
            next(trainer.train_steps())
            next(trainer.train_steps())
        states.append(trainer.model.state_dict())
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="char", choices=sorted(PRESETS))
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=5, help="steps in each half of a pair")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    check_same(preset)
    trainer, count = build_trainer(preset), Count()
    with trainer.engine:
        with observe(count):
            next(trainer.train_steps())

        def steps() -> None:
            for _ in range(args.steps):
                next(trainer.train_steps())

        pairs_of(steps, 2)  # warms up
        with_all, without = pairs_of(steps, args.pairs)
    ratios = [a / b for a, b in zip(with_all, without, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    step = statistics.median(without) / args.steps
    print(f"{args.preset}, 1 thread, {args.pairs} pairs of {args.steps} steps of {step * 1e3:.1f} ms")
    print(f"with / without: {median:.4f} (median), {lower:.4f} to {upper:.4f} (quartiles)")

    extra = []
    for call in (calls_of_ops, calls_of_modules):
        pairs_of(call, 3)
        as_it_is, bare = pairs_of(call, 4 * args.pairs)
        extra.append((statistics.median(as_it_is) - statistics.median(bare)) / 1000)
    total = extra[0] * count.ops + extra[1] * count.modules
    print(
        f"call by call: {count.ops} ops at {extra[0] * 1e9:.0f} ns and {count.modules} modules at "
        f"{extra[1] * 1e9:.0f} ns make {total * 1e6:.0f} us, {total / step:.2%} of a step"
    )
    print(f"target: below {TARGET:.0%}; {'met' if max(median - 1, total / step) < TARGET else 'not met'}")


if __name__ == "__main__":
    main()

"""From a token to its gradient in a debugger: a guided session.

python examples/step_through.py

It stops inside the ops of a small model, in the debugger that `breakpoint()` starts (pdb, or what PYTHONBREAKPOINT
names), and says at each stop what the arrays are. Useful there: `where` (the way here), `n` (next line),
`p self.p.shape` (look at something), `import tinyllm.debug as d; d.shapes()` (all arrays here), `c` (on to the next
stop). With --no-stop, or without a terminal, it walks through the same stops alone and prints the arrays.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import numpy as np

from tinyllm import Tensor, ops
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import Op
from tinyllm.debug import break_on
from tinyllm.models import ModelConfig, TransformerLM

TEXT = "to tea"
CHARACTERS = sorted(set(TEXT))

FORWARD_STOPS = {
    "embedding.forward": """
        A token is an integer, and its vector a row of a table. `weight` is the table, (V, D): one row for each of
        the V characters. `self.indices` are the tokens, (B, T). What is returned is (B, T, D).""",
    "blocks.0.attention": """
        The attention of the first block. `x` is the residual stream after the norm, (B, T, D): B texts, T tokens, D
        numbers for each. It makes queries, keys and values of x, H heads of width K.""",
    "rope.forward": """
        Where a token stands: the numbers of a query or key, taken in pairs, are turned by an angle that grows with
        the position t. `x` is (B, H, T, K), `self.cos` and `self.sin` are (T, K/2). Row 0 is not turned at all.""",
    "scores.forward": """
        How well each query fits each key: S = Q K^T / sqrt(K), (B, H, T, T). Without the root, scores would grow
        with the width of a head, and the softmax that comes next would look at one token alone.""",
    "softmax.forward": """
        From scores to weights. `self.mask` hides what comes later, so row t has t + 1 scores that count. After the
        lines ahead, `self.p` holds the weights, (B, H, T, T): each row sums to 1.""",
    "attention.forward": """
        What the tokens take from each other: O = P V. Row t of the result is the mean of the values of the tokens
        up to t, weighted by row t of P.""",
    "swiglu.forward": """
        Each token by itself: `up` proposes numbers, and `gate`, through silu(z) = z sigmoid(z), says how much of
        each to let through. Both are (B, T, D_ff).""",
    "cross_entropy.forward": """
        How surprised the model is by the next characters. `z` are the logits, (B, T, V), `self.targets` (B, T) the
        right characters. The loss is the mean of -ln p[target], and p = softmax(z).""",
}
BACKWARD_STOPS = {
    "cross_entropy.backward": """
        Where backward begins. `gradient` is dL/dL = 1. What is returned, dL/dz, is (p - onehot) / (B T): `self.p`
        of every character, less 1 at the right one. Each row sums to 0: what one logit gains, the others lose.""",
    "swiglu.backward": """
        Two gradients for two inputs. That of `up` is what the gate let through; that of `gate` is `up` times the
        slope of silu, sigmoid(z) (1 + z (1 - sigmoid(z))).""",
    "attention.backward": """
        O = P V is a product, so dP = dO V^T and dV = P^T dO: a value gets a gradient from each token that took from
        it.""",
    "softmax.backward": """
        dS = P (dP - sum P dP). A weight can only grow at the cost of the others, so only what lies above the mean
        of dP, weighted by P, raises a score. Where P is 0, at later tokens, nothing flows.""",
    "scores.backward": """
        S = Q K^T / sqrt(K): dQ = dS K / sqrt(K), dK = dS^T Q / sqrt(K).""",
    "rope.backward": """
        A rotation keeps lengths, and its derivative is the rotation back: the same two lines with -sin.""",
    "embedding.backward": """
        Where backward ends. `gradient` is dL/dx for each token, (B, T, D). A row of what is returned is the sum
        over the places where its character stands; a character that does not occur keeps a gradient of zero.""",
}


class Guide(Observer):
    """Says what is ahead right before an op or module stops."""

    def __init__(self, model: TransformerLM) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}

    def before_forward(self, op: Op, inputs: tuple[Tensor, ...]) -> None:
        self.explain(f"{op.name}.forward", FORWARD_STOPS)

    def enter_module(self, module: Any) -> None:
        self.explain(self.paths[id(module)], FORWARD_STOPS)

    def before_backward(self, op: Op, gradient: Any) -> None:
        self.explain(f"{op.name}.backward", BACKWARD_STOPS)

    def explain(self, place: str, stops: dict[str, str]) -> None:
        if place in stops:
            print(f"\n==== {place}\n{inspect.cleandoc(stops[place])}\n", flush=True)


def show_arrays(*_: Any, **__: Any) -> None:
    """In place of a debugger: print the named arrays of the frame that stopped."""
    frame = inspect.currentframe()
    assert frame is not None
    frame = frame.f_back
    assert frame is not None
    code = frame.f_code
    print(f"stopped in {code.co_qualname}, {code.co_filename}:{frame.f_lineno}")
    names = dict(frame.f_locals)
    owner = names.pop("self")
    names |= {f"self.{name}": value for name, value in vars(owner).items()}
    properties = [name for name, member in vars(type(owner)).items() if isinstance(member, property)]
    names |= {f"self.{name}": getattr(owner, name) for name in properties if hasattr(owner, name)}
    for name, value in names.items():
        values = value.data if isinstance(value, Tensor) else value
        if isinstance(values, np.ndarray):
            text = np.array2string(values, precision=3, suppress_small=True, threshold=40, edgeitems=2)
            print(f"{name}: shape {values.shape}\n  " + text.replace("\n", "\n  "))


def main() -> None:
    """Run one forward and one backward pass with a stop at each place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stop", action=argparse.BooleanOptionalAction, help="stop in a debugger, or never")
    stop = parser.parse_args().stop
    if stop is None:
        stop = sys.stdin.isatty()
    if not stop:
        sys.breakpointhook = show_arrays

    config = ModelConfig(
        vocab_size=len(CHARACTERS),
        context_length=8,
        num_layers=1,
        num_heads=2,
        hidden_size=8,
        intermediate_size=16,
    )
    model = TransformerLM(config, seed=0).astype(np.float64)
    tokens = np.array([[CHARACTERS.index(character) for character in TEXT]])  # (B, T + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    print(
        f"characters {CHARACTERS}; {TEXT[:-1]!r} is {inputs.tolist()}, to be followed by {targets.tolist()}"
    )

    with observe(Guide(model)), break_on(*FORWARD_STOPS):
        loss = ops.cross_entropy(model(inputs), targets)
    print(f"\nforward is done: the loss is {loss.item():.4f}; a guess among {len(CHARACTERS)} characters "
          f"costs ln {len(CHARACTERS)} = {np.log(len(CHARACTERS)):.4f}")  # fmt: skip
    with observe(Guide(model)), break_on(*BACKWARD_STOPS):
        loss.backward()

    gradient = model.embedding.weight.grad
    print(f"\nbackward is done: the gradient of the row of {TEXT[0]!r} is\n{gradient[tokens[0, 0]].round(4)}")
    check(model, inputs, targets, gradient)


def check(model: TransformerLM, inputs: Any, targets: Any, gradient: Any) -> None:
    """The same gradient by the fast forms, and one of its elements by a difference of losses."""
    model.zero_grad()
    ops.cross_entropy(model(inputs), targets).backward()
    assert np.allclose(model.embedding.weight.grad, gradient, rtol=0, atol=1e-12)
    print("the fast forms, which training runs, give the same gradient")

    place, step = (inputs[0, 0], 0), 1e-5
    losses = []
    for shift in (step, -2 * step):
        model.embedding.weight.data[place] += shift
        losses.append(ops.cross_entropy(model(inputs), targets).item())
    slope = (losses[0] - losses[1]) / (2 * step)
    print(f"its first element by a difference of losses: {slope:.8f}, by backward: {gradient[place]:.8f}")
    assert abs(slope - gradient[place]) < 1e-8


if __name__ == "__main__":
    main()

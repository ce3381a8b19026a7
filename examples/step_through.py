"""From a token to its gradient in a debugger: a guided session.

python examples/step_through.py

It stops inside the ops of a small model, in the debugger that `breakpoint()` starts (pdb, or what PYTHONBREAKPOINT
names), and says at each stop what the arrays are. Useful there: `where` (the way here), `n` (next line),
`p self.p.shape` (look at something), `c` (on to the next stop). With --no-stop, or without a terminal, it walks
through the same stops alone and prints the arrays.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import numpy as np

from tinyllm import Tensor, ops, use_formulas
from tinyllm.autograd.mode import Observer, observe
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
        The attention of the first block. `x` is the residual stream after the norm, (B, T, D): B texts, T tokens,
        D numbers for each. It makes queries, keys and values of x, H heads of width K.""",
    "scaled_dot_product_attention.forward": """
        Each token looks at itself and at earlier ones. `q`, `k`, `v` are (B, H, T, K). After the lines ahead,
        `self.p`, (B, H, T, T), holds the weights: row t says how much token t takes from each; a row sums to 1.""",
    "cross_entropy.forward": """
        How surprised the model is by the next characters. `logits` are (B, T, V), `self.targets` (B, T) the right
        characters. The loss is the mean of -ln p[target], and p = softmax(logits).""",
}
BACKWARD_STOPS = {
    "cross_entropy.backward": """
        Where backward begins. `gradient` is dL/dL = 1. What is returned, dL/dlogits, is (p - onehot) / (B T): `p` of
        every character, less 1 at the right one. `self.safe_targets` are the right ones; p is
        `self.exponentials`, e^z of each row less its largest z, divided by their sums `self.total`.""",
    "scaled_dot_product_attention.backward": """
        `gradient` is dL/dO, (B, H, T, K). The softmax's part is dS = P (dP - sum(P dP)). `self.p`
        is P, `self.q` holds the queries times 1/sqrt(K), and what is returned is dL/dq, dL/dk, dL/dv.""",
    "embedding.backward": """
        Where backward ends. `gradient` is dL/dx for each token, (B, T, D). A row of `gradient_weight` is the sum over
        the places where its character stands; a character that does not occur keeps a gradient of zero.""",
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
    """The same gradient by the reference ops, and one of its elements by a difference of losses."""
    model.zero_grad()
    with use_formulas():
        ops.cross_entropy(model(inputs), targets).backward()
    assert np.allclose(model.embedding.weight.grad, gradient, rtol=0, atol=1e-12)
    print("the reference ops, which are made of primitives alone, give the same gradient")

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

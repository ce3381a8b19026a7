"""The hunt: an unnamed bug is planted, and a learner finds it."""

from __future__ import annotations

import code
import random
import runpy
import secrets
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllm import models, nn, ops, optim
from tinyllm.autograd.tensor import Tensor
from tinyllm.testing import check_vjp, gradcheck, invariants
from tinyllm.testing.mutants.planting import MUTANTS, Mutant

GAME = """\
Hunt {seed}: one function of this package has a bug now. Find which, and what is wrong with it.

The bug is one that a learner makes: a sign, a missing term, a wrong axis, an off-by-one. It may be in an op's
gradient, in attention or the model, in an optimizer, in the order of the data, or in the way tokens are drawn. What
you can do:
  - check gradients:      gradcheck(lambda x: ops.softmax(x), np.array([0.5, 1.0, -1.0]))
  - check a model:        invariants.check_model(model)      (a small TransformerLM is ready as `model`)
  - check one thing:      invariants.check_causality(model, vocab_size=11)
  - compare with a formula that you write out by hand, or train a small model and look at its loss
Do not look at the source of what you suspect before you can say what it does wrong: it would give it away.
Tell what you have found with: {program} --reveal {seed}
"""

SESSION = """\
Here: np, tinyllm, Tensor, ops, nn, optim, gradcheck, check_vjp, invariants, model;
hint() tells in which module the bug is, reveal() tells all. exit() or end of input ends the hunt.
"""

PROGRAM = "python -m tinyllm.testing.mutants"


def new_seed() -> int:
    """A seed for a hunt, short enough to remember."""
    return secrets.randbelow(10000)


def hidden(seed: int) -> Mutant:
    """The mutant of a hunt: the same for the same seed, as long as there are the same mutants."""
    return MUTANTS[random.Random(seed).choice(sorted(MUTANTS))]


def reveal(seed: int) -> str:
    """The answer: name, place and explanation."""
    mutant = hidden(seed)
    explanation = textwrap.indent(textwrap.fill(mutant.explanation, 108), "  ")
    return f"hunt {seed}: {mutant.name}\n  in {mutant.place}\n{explanation}"


def interact(seed: int) -> int:
    """An interactive session with the bug planted; returns the exit code."""

    def hint() -> None:
        print(f"the bug is in {hidden(seed).module}")

    names: dict[str, Any] = {
        "np": np, "tinyllm": sys.modules["tinyllm"], "Tensor": Tensor, "ops": ops, "nn": nn, "optim": optim,
        "gradcheck": gradcheck, "check_vjp": check_vjp, "invariants": invariants, "hint": hint,
        "reveal": lambda: print(reveal(seed)),
    }  # fmt: skip
    with hidden(seed).planted():
        names["model"] = models.TransformerLM(
            models.ModelConfig(
                vocab_size=11, context_length=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16
            )
        )
        try:
            code.interact(
                banner=GAME.format(seed=seed, program=PROGRAM) + "\n" + SESSION,
                local=names,
                exitmsg="the hunt is over",
            )
        except SystemExit:
            print("the hunt is over")
    return 0


def run_script(seed: int, command: Sequence[str]) -> int:
    """Run a Python script, `command` with its arguments, with the bug planted; returns its exit code."""
    print(GAME.format(seed=seed, program=PROGRAM), file=sys.stderr)
    before = sys.argv
    sys.argv = list(command)
    try:
        with hidden(seed).planted():
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    finally:
        sys.argv = before
    return 0

"""Checks of every registered op: its gradient and forward mode, and that its fast form is its formula."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.registry import REGISTRY
from tinyllm.autograd.tensor import Case, Op, Tensor, gradients
from tinyllm.backend import Array
from tinyllm.testing.gradient_check import gradcheck
from tinyllm.testing.invariants import check_forward_mode
from tinyllm.testing.mutants.checking import check


def inputs(op: type[Op], case: Case) -> list[Array]:
    """Random arrays that depend on the case alone."""
    rng = np.random.default_rng(zlib.crc32(f"{op.name}{case.shapes}".encode()))
    return [np.asarray(rng.uniform(case.low, case.high, shape)) for shape in case.shapes]


def function(op: type[Op], case: Case) -> Callable[..., Tensor]:
    """The op of a case as a function of Tensors."""
    return lambda *inputs: op(**case.arguments)(*inputs)


def check_gradient(op: type[Op], formulas: bool = False) -> None:
    """Gradients against numerical derivatives, for every case of the op."""
    with use_formulas(formulas):
        for case in op.cases:
            gradcheck(function(op, case), inputs(op, case))


def check_dot_product(op: type[Op]) -> None:
    """<u, J v> = <J^T u, v>, for every case of the op."""
    for case in op.cases:
        check_forward_mode(function(op, case), inputs(op, case))


def check_fast_form(op: type[Op]) -> None:
    """The fast form against the formula, values and gradients, for every case of the op."""
    for case in op.cases:
        arrays = inputs(op, case)
        fast = _values_and_gradients(op, case, arrays)
        with use_formulas():
            expected = _values_and_gradients(op, case, arrays)
        for one, other in zip(fast, expected, strict=True):
            close(one, other, f"{op.name}, fast form and formula")


def _values_and_gradients(op: type[Op], case: Case, arrays: list[Array]) -> list[Array]:
    tensors = [Tensor(x, requires_grad=True) for x in arrays]
    output = function(op, case)(*tensors)
    cotangent = np.random.default_rng(1).standard_normal(output.shape)
    return [output.data, *gradients(output, tensors, cotangent)]


def close(found: Any, expected: Any, what: str, tolerance: float = 1e-10) -> None:
    """Raise AssertionError where two arrays differ by more than `tolerance` of the largest element (at least 1)."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
    error = np.nan_to_num(np.abs(found - expected), nan=np.inf)
    error = np.where(np.isnan(found) & np.isnan(expected), 0, error)
    if not (error <= tolerance * scale).all():
        worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
        raise AssertionError(f"{what}: {found[worst]:.9g} at {worst}, expected {expected[worst]:.9g}")


def register_checks() -> None:
    """The checks of all ops that are registered now."""
    for name, op in REGISTRY.items():
        check(f"gradient of {name}")(functools.partial(check_gradient, op))
    for name, op in REGISTRY.items():
        check(f"forward mode of {name}")(functools.partial(check_dot_product, op))
    for name, op in REGISTRY.items():
        if op.fast_form is not None or not op.is_formula:
            check(f"fast form of {name}")(functools.partial(check_fast_form, op))
    for name, op in REGISTRY.items():
        if op.fast_form is not None:
            check(f"gradient of {name}, by formula")(functools.partial(check_gradient, op, formulas=True))


register_checks()


@check("gradient of a product with a zero factor")
def product_with_zeros() -> None:
    """The gradient at x with a zero is the product of the other factors."""
    x = np.array([[2.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    gradcheck(lambda x: x.prod(axis=1), x)


@check("gradient of composed functions")
def composed() -> None:
    """Tensors that are used several times, at several depths of the graph, and reductions over some axes."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 3, 4))

    def several_uses(x: Tensor, y: Tensor) -> Tensor:
        a = x * y
        b = (a + x).tanh()
        return (a * b + x).mean(axis=1) + (b * x).sum(axis=1)

    gradcheck(several_uses, [x, y])
    gradcheck(lambda x, y: (x.mean(axis=0) * y).var(axis=1), [x, y])


@check("backward adds to .grad until zero_grad")
def accumulation() -> None:
    """Two backward passes give the sum of both gradients; clearing the gradients begins anew."""
    from tinyllm.nn import Linear

    layer = Linear(3, 2, rng=np.random.default_rng(0)).astype(np.float64)
    batches = np.random.default_rng(1).standard_normal((2, 4, 3))

    def gradient_of(*parts: Array) -> Array:
        for part in parts:
            (layer(Tensor(part)).tanh()).sum().backward()
        return np.array(layer.weight.grad)

    layer.zero_grad()
    first = gradient_of(batches[0])
    layer.zero_grad()
    second = gradient_of(batches[1])
    layer.zero_grad()
    close(gradient_of(*batches), first + second, "the gradient after two backward passes")
    layer.zero_grad()
    close(gradient_of(batches[0]), first, "the gradient after zero_grad")

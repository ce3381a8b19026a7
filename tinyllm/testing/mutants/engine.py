"""Mistakes in the backward pass itself: accumulation, order, broadcasting."""

from __future__ import annotations

from typing import Any

from tinyllm import backend
from tinyllm.autograd import backward_pass, tensor
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.backend import current
from tinyllm.nn import Module
from tinyllm.testing.mutants.planting import mutant


@mutant(Tensor, "backward")
def backward_overwrites_grad(self: Tensor, gradient: Any = None, retain_graph: bool = False) -> None:
    """backward() sets .grad where it should add to it. Gradients of micro-batches are lost but for the last, so that
    gradient accumulation trains on a part of the batch."""
    for x, value in backward_pass.propagate(
        self, tensor._cotangent(self, gradient), retain_graph=retain_graph
    ):
        if x.op is None or x.retains_grad:
            x.grad = current.xp.array(value)


@mutant(Module, "zero_grad")
def zero_grad_does_nothing(self: Module, set_to_none: bool = True) -> None:
    """Gradients are never cleared. Each step adds its gradient to those of all steps before: training wanders, the
    more the longer it runs."""


@mutant(backward_pass, "propagate")
def second_use_replaces_the_first(
    output: Tensor,
    cotangent: Any,
    stop: frozenset[int] = frozenset(),
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Any:
    """Where a Tensor is used twice, its gradient is that of one use instead of the sum over both. x * x gets half of
    its gradient, and residual connections lose a branch."""
    found = {id(output): cotangent}
    leaves: dict[int, Tensor] = {} if output.op else {id(output): output}
    for x in reversed(backward_pass.ancestors(output, stop)):
        gradient, op = found.pop(id(x), None), x.op
        if gradient is None or op is None:
            continue
        yield x, gradient
        results = op.backward_as_graph(gradient) if create_graph else op.backward(gradient)
        for i, (y, value) in enumerate(
            zip(op.inputs, results if isinstance(results, tuple) else (results,), strict=True)
        ):
            if value is not None and y.requires_grad:
                found[id(y)] = backward_pass._conform(op, i, y, value) if value.shape != y.shape else value
                if y.op is None or id(y) in stop:
                    leaves[id(y)] = y
    for leaf in leaves.values():
        value = found[id(leaf)]
        yield leaf, value if isinstance(value, Tensor) else current.xp.array(value)


@mutant(backward_pass, "ancestors")
def graph_walked_level_by_level(output: Tensor, stop: frozenset[int] = frozenset()) -> list[Tensor]:
    """The graph is walked level by level instead of in topological order. A node is handled before the longest path
    to it has brought its gradient, and what comes late is dropped."""
    found: list[Tensor] = []
    seen, level = set(stop), [output]
    while level:
        fresh: list[Tensor] = []
        for x in level:
            if x.op is not None and id(x) not in seen:
                seen.add(id(x))
                found.append(x)
                fresh.extend(x.op.inputs)
        level = fresh
    return found[::-1]


def _stretched(x: Tensor, gradient: Any) -> tuple[int, ...]:
    """The axes of a gradient along which x was broadcast."""
    lengths = (1,) * (len(gradient.shape) - x.ndim) + x.shape
    return tuple(
        axis for axis, n in enumerate(gradient.shape) if lengths[axis] != n or axis < len(lengths) - x.ndim
    )


@mutant(backward_pass, "_conform")
def broadcasting_is_averaged_out(op: Op, position: int, x: Tensor, gradient: Any) -> Any:
    """The gradient of an input that was broadcast is the mean over the copies instead of their sum. Biases and norm
    weights learn as many times too slowly as there are rows."""
    axes = _stretched(x, gradient)
    return (gradient.sum(axis=axes) / max(1, gradient.size // max(1, x.size))).reshape(x.shape)


@mutant(backward_pass, "_conform")
def broadcasting_takes_the_first_copy(op: Op, position: int, x: Tensor, gradient: Any) -> Any:
    """The gradient of an input that was broadcast is that of its first copy: the shape fits, the sum is missing. Only
    the first row of a batch teaches a bias."""
    axes = _stretched(x, gradient)
    first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(len(gradient.shape)))
    return gradient[first].reshape(x.shape) if gradient.size else gradient.sum(axis=axes).reshape(x.shape)


@mutant(backward_pass, "_conform")
def broadcasting_sums_new_axes_alone(op: Op, position: int, x: Tensor, gradient: Any) -> Any:
    """Broadcasting is summed over the axes that were added in front, and not over axes of length 1 that were
    stretched. (D,) biases learn rightly; (B, 1) scales get the gradient of one column."""
    extra = len(gradient.shape) - x.ndim
    gradient = gradient.sum(axis=tuple(range(extra)))
    first = tuple(slice(0, n) if n == 1 else slice(None) for n in x.shape)
    return gradient[first].reshape(x.shape) if gradient.size else gradient.sum(keepdims=True).reshape(x.shape)


@mutant(backend, "scatter_add")
def repeated_rows_overwrite(target: Any, index: Any, values: Any) -> None:
    """Rows are assigned instead of added. A token that occurs twice in a batch gets the gradient of one occurrence:
    frequent tokens learn far too slowly."""
    target[index] = values

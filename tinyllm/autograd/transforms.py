"""Derivatives as functions: grad, vjp, jvp, hvp, hessian.

`jvp` runs the function on dual numbers, x + v e with e^2 = 0, for which f(x + v e) = f(x) + J v e: exact to rounding,
in the dtype of x. It uses the formulas of the ops' forwards alone and rules of its own (`forward_mode`), and so is
independent of their backwards: the dot product <u, J v> = <J^T u, v> checks the one against the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tinyllm.autograd.forward_mode import Dual, level_of, tangent_of, value_of
from tinyllm.autograd.mode import current_mode, enable_grad, mode_set
from tinyllm.autograd.operands import as_tensor, floating
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.backend import current

Function = Callable[..., Tensor]
_levels = itertools.count(1)


def grad(fn: Function, argument: int = 0) -> Callable[..., Tensor]:
    """The gradient of a scalar function for one of its arguments, as a function of the same arguments.

    It can be differentiated again: `grad(grad(fn))`.

    Example:
        >>> grad(grad(lambda x: x**3))(Tensor(2.0)).item()
        12.0
    """

    def gradient(*arguments: Any) -> Tensor:
        inputs = _tracked(arguments)
        with enable_grad():
            output = fn(*inputs)
        if output.size != 1:
            raise ValueError(
                f"grad needs a function with one output element; got shape {output.shape}. Use vjp"
            )
        if not output.requires_grad:
            return Tensor(current.xp.zeros_like(inputs[argument].data))
        (result,) = gradients(output, [inputs[argument]], create_graph=True)
        return as_tensor(result)

    return gradient


def vjp(fn: Function, *arguments: Any) -> tuple[Tensor, Callable[[Any], tuple[Tensor, ...]]]:
    """The output of fn, and the function that takes a cotangent u to J^T u, one Tensor for each argument."""
    inputs = _tracked(arguments)
    with enable_grad():
        output = fn(*inputs)

    def pull_back(cotangent: Any) -> tuple[Tensor, ...]:
        results = gradients(output, inputs, as_tensor(cotangent, output.dtype), create_graph=True)
        return tuple(as_tensor(result) for result in results)

    return output, pull_back


def jvp(fn: Function, inputs: Sequence[Any], tangents: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The output of fn at `inputs`, and J v for the `tangents` v, one for each input and of its shape.

    Both are those of the formulas, and can be differentiated again: backward, by another jvp, or by one around this.
    fn may take derivatives itself. Where it is kinked, J is the one that backward takes. What is detached is constant,
    and so is what becomes an integer or a boolean; `.data` carries its tangent along. Inputs of integers are taken as
    float32.

    Raises:
        ValueError: a tangent does not have the shape of its input. TypeError: an op's forward uses a function that has
        no rule, or fn makes plain numbers of what carries a tangent.

    Example:
        >>> jvp(lambda x: x * x, [Tensor(3.0)], [1.0])[1].item()
        6.0
    """
    xs, vs = floating(*inputs), [as_tensor(value) for value in tangents]
    if len(xs) != len(vs) or any(x.shape != v.shape for x, v in zip(xs, vs, strict=False)):
        raise ValueError(
            f"jvp: inputs have shapes {[x.shape for x in xs]}, tangents {[v.shape for v in vs]}; they must be equal"
        )
    level = next(_levels)
    with mode_set(formulas=True, duals=True):
        duals = [Dual(level, _part(x), _part(v.astype(x.dtype))) for x, v in zip(xs, vs, strict=True)]
        output = as_tensor(fn(*[Tensor(dual) for dual in duals]))
        if level_of(output) != level:  # constant
            return output, Tensor(current.xp.zeros(output.shape, dtype=output.dtype))
        return as_tensor(value_of(output, level)), as_tensor(tangent_of(output, level))


def _part(x: Tensor) -> Any:
    """x as the value or tangent of a dual number: a Tensor where there is a graph to be kept, otherwise an array."""
    return x if x.requires_grad and current_mode.get().gradient else x.data


def hvp(fn: Function, inputs: Sequence[Any], vectors: Sequence[Any]) -> tuple[Tensor, ...]:
    """The Hessian of a scalar function times vectors: H v, one Tensor for each input, differentiable again."""
    xs = _tracked(inputs)
    with enable_grad():
        firsts = gradients(fn(*xs), xs, create_graph=True)
        vs = [as_tensor(v, x.dtype) for x, v in zip(xs, vectors, strict=True)]
        parts = [(first * v).sum() for first, v in zip(firsts, vs, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
    if not total.requires_grad:
        return tuple(Tensor(current.xp.zeros_like(x.data)) for x in xs)
    return tuple(as_tensor(result) for result in gradients(total, xs, create_graph=True))


def hessian(fn: Function, x: Any) -> Tensor:
    """All second derivatives of a scalar function of one argument: shape of x twice.

    One product with the Hessian for each element of x: for small x.
    """
    (x,) = floating(x)
    rows = []
    for i in range(x.size):
        unit = current.xp.zeros(x.size, dtype=x.dtype)
        unit[i] = 1
        rows.append(hvp(fn, [x], [unit.reshape(x.shape)])[0].data)
    size = math.prod(x.shape)
    values = current.xp.stack(rows) if rows else current.xp.zeros((0, size), dtype=x.dtype)
    return Tensor(values.reshape(x.shape + x.shape))


def _tracked(arguments: Sequence[Any]) -> list[Tensor]:
    """The arguments as Tensors of their own that require a gradient, of floats; behind those that do is their graph.

    Of their own, for where a function also uses the Tensor that it is called with, that one is a constant to it.
    """
    inputs = []
    for tensor in floating(*arguments):
        if tensor.requires_grad:
            with enable_grad():
                inputs.append(tensor.reshape(tensor.shape))
        else:
            inputs.append(Tensor(tensor, requires_grad=True))
    return inputs

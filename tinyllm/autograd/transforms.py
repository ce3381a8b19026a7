"""Derivatives as functions: grad, vjp, jvp, hvp, hessian.

`jvp` runs the function in complex arithmetic: f(x + i h v) = f(x) + i h J v + O(h^2), and with h = 1e-20 the
square vanishes, so that J v is exact to rounding (Squire and Trapp, "Using complex variables to estimate
derivatives of real functions", 1998). It uses the forwards of ops alone, and so is independent of their backwards:
the dot product <u, J v> = <J^T u, v> checks the one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.tensor import Tensor, floating, gradients
from tinyllm.backend import current

Function = Callable[..., Tensor]
STEP = 1e-20


def grad(fn: Function, argument: int = 0) -> Callable[..., Tensor]:
    """The gradient of a scalar function for one of its arguments, as a function of the same arguments.

    It can be differentiated again: `grad(grad(fn))`.

    Example:
        >>> grad(grad(lambda x: x**3))(Tensor(2.0)).item()
        12.0
    """

    def gradient(*arguments: Any) -> Tensor:
        inputs = _tracked(arguments)
        output = fn(*inputs)
        if output.size != 1:
            raise ValueError(
                f"grad needs a function with one output element; got shape {output.shape}. Use vjp"
            )
        if not output.requires_grad:
            return Tensor(current.xp.zeros_like(inputs[argument].data))
        (result,) = gradients(output, [inputs[argument]], create_graph=True)
        return _as_tensor(result)

    return gradient


def vjp(fn: Function, *arguments: Any) -> tuple[Tensor, Callable[[Any], tuple[Tensor, ...]]]:
    """The output of fn, and the function that takes a cotangent u to J^T u, one Tensor for each argument."""
    inputs = _tracked(arguments)
    output = fn(*inputs)

    def pull_back(cotangent: Any) -> tuple[Tensor, ...]:
        cotangent = cotangent if isinstance(cotangent, Tensor) else Tensor(cotangent, dtype=output.dtype)
        results = gradients(output, inputs, cotangent, create_graph=True)
        return tuple(_as_tensor(result) for result in results)

    return output, pull_back


def jvp(fn: Function, inputs: Sequence[Any], tangents: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The output of fn at `inputs`, and J v for the `tangents` v, one for each input and of its shape.

    Exact to rounding, by complex arithmetic (see the module). Where fn is kinked, it is the derivative of the piece
    that forward took.

    Raises ValueError when a tangent does not have the shape of its input.

    Example:
        >>> jvp(lambda x: x * x, [Tensor(3.0)], [1.0])[1].item()
        6.0
    """
    xs = [value if isinstance(value, Tensor) else Tensor(value) for value in inputs]
    vs = [backend.asarray(v.data if isinstance(v, Tensor) else v) for v in tangents]
    if len(xs) != len(vs) or any(x.shape != v.shape for x, v in zip(xs, vs, strict=False)):
        raise ValueError(
            f"jvp: inputs have shapes {[x.shape for x in xs]}, tangents {[v.shape for v in vs]}; they must be equal"
        )
    with no_grad():
        output = fn(*xs)
        dual = fn(
            *[Tensor(x.data.astype(np.complex128) + 1j * STEP * v) for x, v in zip(xs, vs, strict=True)]
        )
    slope = dual.data.imag / STEP if dual.data.dtype.kind == "c" else current.xp.zeros(dual.shape)
    return output, Tensor(backend.asarray(slope, output.dtype))


def hvp(fn: Function, inputs: Sequence[Any], vectors: Sequence[Any]) -> tuple[Tensor, ...]:
    """The Hessian of a scalar function times vectors: H v, one Tensor for each input, differentiable again."""
    xs = _tracked(inputs)
    output = fn(*xs)
    firsts = gradients(output, xs, create_graph=True)
    vs = [v if isinstance(v, Tensor) else Tensor(v, dtype=x.dtype) for x, v in zip(xs, vectors, strict=True)]
    parts = [(first * v).sum() for first, v in zip(firsts, vs, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if not total.requires_grad:
        return tuple(Tensor(current.xp.zeros_like(x.data)) for x in xs)
    return tuple(_as_tensor(result) for result in gradients(total, xs, create_graph=True))


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
    """The arguments as floating-point Tensors that require a gradient; those that do already keep their graph."""
    inputs = []
    for tensor in floating(*arguments):
        inputs.append(tensor if tensor.requires_grad else Tensor(tensor, requires_grad=True))
    return inputs


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value)

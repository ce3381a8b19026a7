"""Check gradients against numerical derivatives: of functions of Tensors, and of NumPy pairs of any origin."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.mode import enable_grad, no_grad
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.autograd.transforms import jvp
from tinyllm.backend import Array
from tinyllm.ops import concatenate
from tinyllm.testing.compare import Comparison, GradcheckResult, Problem
from tinyllm.testing.numeric import METHODS, Function, Method
from tinyllm.testing.report import GradientError, shape_cause


def gradcheck(
    fn: Callable[..., Tensor],
    inputs: Any,
    *,
    seed: int | np.random.Generator = 0,
    order: int = 1,
    method: Method = "auto",
    max_elements: int = 2000,
    projections: int = 4,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> GradcheckResult:
    """Check the gradient of a function of Tensors, for a random cotangent.

    Args:
        fn: takes Tensors, returns a Tensor.
        inputs: one array or Tensor, or a sequence of them. The floating-point ones are differentiated by, in
            their dtype: a float32 function is compared with float64 derivatives where it runs in float64.
        seed: of the cotangent and of all random directions, or the generator to draw them from.
        order: 2 checks the gradient itself in the same way after the function.
        method: "complex step", "central differences", or "auto" for the first where it can be trusted.
        max_elements: inputs with more elements together are checked along random directions.
        projections: how many random directions, for each large input.
        rtol, atol: allowed errors on top of the derived tolerance, relative to the gradient's size and absolute.

    Raises:
        GradientError: a gradient is wrong; the report names the argument, the element and a likely cause.

    The tolerance of an element is the error bound of the numerical derivative plus a multiple of the rounding
    error that the dtype, the size of the summed terms, the size of the function and its measured loss of
    precision explain.

    Example:
        >>> gradcheck(lambda x, y: (x * y).tanh(), [np.array([1.0, 2.0]), np.array(0.5)]).method
        'complex step'
        >>> gradcheck(lambda x: x.relu(), np.array([-1.0, 0.0, 1.0])).kinks
        (('x', (1,)),)
    """
    arrays = _arrays(inputs)

    def evaluate(*values: Array) -> Any:
        with no_grad():
            if any(x.dtype.kind == "c" for x in values):
                return _complex_step(fn, values)
            return backend.to_numpy(_tensor(fn(*[Tensor(x) for x in values])).data)

    def analytic(cotangent: Array) -> list[Any]:
        tensors = [Tensor(x, requires_grad=x.dtype.kind == "f") for x in arrays]
        output = _tensor(fn(*tensors))
        if not output.requires_grad:
            return [np.zeros_like(x) for x in arrays]
        floating = [x for x in tensors if x.requires_grad]
        found = iter(gradients(output, floating, cotangent))
        return [backend.to_numpy(next(found)) if x.requires_grad else None for x in tensors]

    if order not in (1, 2):
        raise ValueError(f"order={order}; choose 1 or 2")
    generator = np.random.default_rng(seed)
    problem = Problem(
        _names(fn, len(arrays)), arrays, evaluate, analytic, generator, method, max_elements, projections,
        rtol, atol,
    )  # fmt: skip
    result = _check(problem)
    if order == 1:
        return result
    cotangent = _cotangent(evaluate(*arrays), generator)
    return gradcheck(
        gradient_function(fn), [*arrays, cotangent], seed=generator, method=method, max_elements=max_elements,
        projections=projections, rtol=rtol, atol=atol,
    )  # fmt: skip


def gradient_function(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of (*inputs, cotangent) that returns all gradients of `fn`, flat and one after the other.

    It can be differentiated again: `gradcheck(gradient_function(fn), [*inputs, cotangent])` checks second
    derivatives.

    Example:
        >>> gradient_function(lambda x: x * x)(Tensor([3.0]), Tensor([1.0])).numpy()
        array([6.], dtype=float32)
    """

    def gradient(*arguments: Tensor) -> Tensor:
        *inputs, cotangent = arguments
        with enable_grad():
            tensors = [
                Tensor(x.data, requires_grad=True) if x.dtype.kind == "f" and not x.requires_grad else x
                for x in inputs
            ]
            floating = [x for x in tensors if x.requires_grad]
            found = gradients(fn(*tensors), floating, cotangent, create_graph=True)
            joined = concatenate([x.reshape(-1) for x in found])
        # A constant argument gives a constant gradient, whatever was recorded to compute it.
        return joined if any(x.requires_grad for x in arguments) else joined.detach()

    return gradient


def check_vjp(
    fn: Function,
    vjp: Callable[..., Any],
    inputs: Any,
    *,
    seed: int | np.random.Generator = 0,
    method: Method = "auto",
    max_elements: int = 2000,
    projections: int = 4,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> GradcheckResult:
    """Check a hand-written backward in plain NumPy, for a random cotangent.

    Args:
        fn: `fn(*arrays) -> array`. vjp: `vjp(cotangent, *arrays)` -> one gradient per array, None for arrays
            that are not floating point; a single array will do for one input.
        inputs, seed, method, max_elements, projections, rtol, atol: as in `gradcheck`.

    Raises:
        GradientError: a gradient is wrong in value, shape, dtype or number, or an argument was changed.

    Example:
        >>> def softmax(x):
        ...     e = np.exp(x)
        ...     return e / e.sum()
        >>> def vjp(cotangent, x):
        ...     p = softmax(x)
        ...     return p * cotangent  # forgets to subtract p * (p * cotangent).sum()
        >>> check_vjp(softmax, vjp, np.array([1.0, 2.0, 4.0]))
        Traceback (most recent call last):
        ...
        tinyllm.testing.report.GradientError: gradient of argument 0 (x): mean not subtracted: ...
    """
    arrays = _arrays(inputs)

    def analytic(cotangent: Array) -> Sequence[Any]:
        found = vjp(cotangent, *arrays)
        return found if isinstance(found, (tuple, list)) else (found,)

    problem = Problem(
        _names(fn, len(arrays)), arrays, fn, analytic, np.random.default_rng(seed), method, max_elements,
        projections, rtol, atol,
    )  # fmt: skip
    return _check(problem)


def _check(problem: Problem) -> GradcheckResult:
    if problem.method not in METHODS:
        raise ValueError(f"method={problem.method!r}; choose one of {METHODS}")
    inputs = problem.inputs
    output = _unchanged(problem, "the function", lambda: np.array(problem.evaluate(*inputs)))
    if output.dtype.kind != "f":
        raise TypeError(
            f"the function returns dtype {output.dtype}; gradients are of floating-point functions"
        )
    if not np.isfinite(output).all():
        raise GradientError("the function is not finite at these inputs, so it has no derivative there")
    if not np.array_equal(output, problem.evaluate(*inputs)):
        raise GradientError("the function gives different values for the same inputs; fix its random numbers")
    cotangent = _cotangent(output, problem.generator)
    given = cotangent.copy()
    found = _unchanged(problem, "the backward", lambda: list(problem.analytic(given)))
    if not np.array_equal(given, cotangent):
        raise GradientError("input mutated: the backward changed its cotangent")
    _check_form(problem, found)
    return Comparison(problem, output, cotangent.astype(np.float64), found).run()


def _unchanged(problem: Problem, what: str, call: Callable[[], Any]) -> Any:
    """call(), after which no input may have changed."""
    before = [x.copy() for x in problem.inputs]
    result = call()
    for position, (x, copy) in enumerate(zip(problem.inputs, before, strict=True)):
        if x.tobytes() != copy.tobytes():
            cause = f"input mutated: {what} changed its argument in place"
            raise GradientError(cause, problem.names[position], position)
    return result


def _check_form(problem: Problem, found: Sequence[Any]) -> None:
    """Count, shape, dtype and finiteness of the gradients."""
    if len(found) != len(problem.inputs):
        raise GradientError(f"{len(found)} gradients for {len(problem.inputs)} inputs")
    for position, (x, gradient) in enumerate(zip(problem.inputs, found, strict=True)):
        if x.dtype.kind != "f":
            continue
        place = (problem.names[position], position)
        if gradient is None:
            raise GradientError("no gradient (None)", *place)
        gradient = np.asarray(gradient)
        if gradient.shape != x.shape:
            raise GradientError(shape_cause(gradient, x), *place)
        if gradient.dtype != x.dtype:
            cause = f"wrong dtype: the gradient has dtype {gradient.dtype}, the input {x.dtype}"
            raise GradientError(cause, *place)
        if not np.isfinite(gradient).all():
            flat = int(np.flatnonzero(~np.isfinite(gradient))[0])
            index = tuple(int(i) for i in np.unravel_index(flat, x.shape))
            value = float(gradient.reshape(-1)[flat])
            kind = "NaN" if math.isnan(value) else "infinite"
            raise GradientError(f"{kind} at index {index}", *place, index, value)


def _arrays(inputs: Any) -> list[Array]:
    """The inputs as arrays of their own memory, in their own dtype."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, (tuple, list)):
        inputs = [inputs]
    arrays = [np.array(backend.to_numpy(x.data if isinstance(x, Tensor) else x)) for x in inputs]
    if not any(x.dtype.kind == "f" for x in arrays):
        raise TypeError("no input has a floating-point dtype, so there is nothing to differentiate by")
    return arrays


def _names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` positional arguments of `fn`."""
    names: list[str] = []
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return (names + [f"input {i}" for i in range(len(names), count)])[:count]


def _complex_step(fn: Callable[..., Tensor], values: Sequence[Array]) -> Array:
    """fn at the real parts, and its derivative along the imaginary parts as imaginary part.

    Tensors hold no complex numbers: what is infinitely small of them is a tangent of forward mode.
    """
    steps = [x for x in values if x.dtype.kind == "c"]

    def of_steps(*moved: Tensor) -> Tensor:
        rest = iter(moved)
        return _tensor(fn(*[next(rest) if x.dtype.kind == "c" else Tensor(x) for x in values]))

    output, slope = jvp(of_steps, [x.real for x in steps], [x.imag for x in steps])
    return backend.to_numpy(output.data) + 1j * backend.to_numpy(slope.data)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the function returns {type(value).__name__}, not a Tensor; use check_vjp for arrays"
        )
    return value


def _cotangent(output: Array, generator: np.random.Generator) -> Array:
    """Random weights of the output: of both signs and none near zero, so that no output goes unseen."""
    magnitudes = generator.uniform(0.5, 2.0, output.shape)
    signs = generator.choice([-1.0, 1.0], output.shape)
    return np.asarray(magnitudes * signs).astype(output.dtype)

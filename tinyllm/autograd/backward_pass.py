"""The backward pass: from the gradient of an output to those of all Tensors that it came from.

Tensors stand above this module; it knows them as `Operators` that have an `op`, whose `inputs` are Tensors again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np

from tinyllm import backend
from tinyllm.autograd.forward_mode import Dual
from tinyllm.autograd.mode import current_mode, enable_grad
from tinyllm.autograd.operators import Operators
from tinyllm.backend import current

AnyTensor = TypeVar("AnyTensor", bound=Operators)


def propagate(
    output: AnyTensor,
    cotangent: Any,
    stop: frozenset[int] = frozenset(),
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Iterator[tuple[AnyTensor, Any]]:
    """Walk the graph from `output` back to its leaves, and yield each Tensor with its complete gradient.

    Ops are numbered as they are made, so descending numbers are a topological order. Leaves come last. Each
    op is released once its backward has run, unless the graph is retained. Tensors whose `id` is in `stop`
    are treated as leaves.
    """
    tensors = ancestors(output, stop)
    pending = {id(output): cotangent}
    leaves = {} if tensors else {id(output): output}
    mode = current_mode.get()
    watching = mode.observers
    while tensors:
        tensor = tensors.pop()
        gradient = pending.pop(id(tensor), None)
        op = tensor.op
        if gradient is not None:
            yield tensor, gradient
            for observer in watching:
                observer.before_backward(op, gradient)
            if create_graph:
                results = op.backward_as_graph(gradient)
            elif mode.formulas and not op.is_formula:
                results = op.backward_by_formula(gradient)
            else:
                results = op.backward(wide(gradient) if op.widened else gradient)
            if not isinstance(results, tuple):
                results = (results,)
            if len(results) != len(op.inputs):
                raise RuntimeError(
                    f"{op.name}: backward returned {len(results)} gradients for {len(op.inputs)} inputs"
                )
            for observer in watching:
                observer.after_backward(op, gradient, results)
            for position, x in enumerate(op.inputs):
                value = results[position]
                if value is None or not x.requires_grad:
                    continue
                data, key = x.data, id(x)
                if value.shape != data.shape or value.dtype != data.dtype:
                    value = _conform(op, position, x, value)
                known = pending.get(key)
                if known is not None:
                    value = _added(known, value)
                elif x.op is None or key in stop:
                    leaves[key] = x
                    value = _owned(value, gradient, results, position)
                pending[key] = value
        if not (retain_graph or create_graph):
            op.release()
    for leaf in leaves.values():
        value = pending.pop(id(leaf))
        # NumPy makes scalars of sums of arrays with shape ().
        yield leaf, value if isinstance(value, (Operators, Dual)) else backend.asarray(value)


def ancestors(output: AnyTensor, stop: frozenset[int] = frozenset()) -> list[AnyTensor]:
    """All Tensors made by ops that lead to `output`, itself included, oldest first."""
    found: list[AnyTensor] = []
    seen: set[int] = set(stop)
    stack = [output]
    while stack:
        tensor = stack.pop()
        op = tensor.op
        if op is None or id(tensor) in seen:
            continue
        if op.released:
            raise RuntimeError(
                f"the graph behind {op.name} was freed by an earlier backward pass; "
                "of two losses over a shared part, add them and go back once, or call the first backward with "
                "retain_graph=True; otherwise compute the forward pass again"
            )
        seen.add(id(tensor))
        found.append(tensor)
        stack.extend(op.inputs)
    found.sort(key=lambda tensor: tensor.op.sequence)
    return found


def _conform(op: Any, position: int, x: Any, gradient: Any) -> Any:
    """`gradient` with broadcasting summed out, checked to have the shape and dtype of input `x`."""
    shape, dtype = x.shape, x.data.dtype
    if gradient.dtype != dtype and not (op.widened and gradient.dtype == np.float32):
        raise TypeError(
            f"{op.name}: backward made a gradient of dtype {gradient.dtype} for input {position} "
            f"of dtype {dtype}"
        )
    extra = len(gradient.shape) - len(shape)
    if extra < 0 or any(n not in (1, m) for n, m in zip(shape, gradient.shape[extra:], strict=True)):
        raise ValueError(
            f"{op.name}: backward made a gradient of shape {gradient.shape} for input {position} of shape {shape}"
        )
    stretched = tuple(
        axis for axis, n in enumerate((1,) * extra + shape) if n == 1 and gradient.shape[axis] != 1
    )
    axes = tuple(range(extra)) + tuple(axis for axis in stretched if axis >= extra)
    with enable_grad():  # as in _added
        if dtype.char != "e":
            return gradient.sum(axis=axes).reshape(shape)
        return wide(gradient).sum(axis=axes).reshape(shape).astype(dtype)


def wide(x: Any) -> Any:
    """An array or a Tensor of float16 in float32."""
    return x.astype(np.float32) if x.dtype.char == "e" else x


def _added(known: Any, value: Any) -> Any:
    """The sum of two gradients; of Tensors with a graph, even where the backward pass runs in no_grad."""
    if not isinstance(value, Operators):
        return known + value
    with enable_grad():
        return known + value


def _owned(value: Any, gradient: Any, results: tuple[Any, ...], position: int) -> Any:
    """`value` itself where nothing else can hold its memory, otherwise a copy: a leaf keeps what it gets."""
    if isinstance(value, (Operators, Dual)):
        return value
    shared = (
        value is gradient
        or getattr(value, "base", None) is not None
        or any(value is other for other in results[:position])
    )
    return current.xp.array(value) if shared or not backend.is_array(value) else value


def copied(value: Any) -> Any:
    """A copy of an array; nothing changes Tensors and dual numbers in place."""
    return value if isinstance(value, (Operators, Dual)) else current.xp.array(value)

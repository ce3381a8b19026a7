"""Recomputation: a module keeps nothing of its forward pass for backward, which runs it once more."""

from __future__ import annotations

import contextvars
from typing import Any

from tinyllm.autograd.backward_pass import propagate
from tinyllm.autograd.mode import enable_grad, no_grad
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.backend import Array
from tinyllm.nn.module import Module


def recompute(module: Module, x: Tensor, *arguments: Any) -> Tensor:
    """module(x, *arguments), computed once more in backward instead of keeping what is inside for it.

    Memory falls to that of x, and the time of a training step grows by that of a forward pass, about a third. Gradients
    have the same bits, dropout included. `arguments` get no gradient. Backward raises RuntimeError where the module has
    other parameters by then.

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016, section 4.2, with one segment a call.
    """
    return Recomputed(module, arguments)(x, *module.parameters())


class Recomputed(Op):
    """A module as one op, from its input and its parameters."""

    name = "recompute"
    moves = True  # the ops inside see to float16 themselves

    def __init__(self, module: Module, arguments: tuple[Any, ...]) -> None:
        self.module, self.arguments = module, arguments
        # Dropout is keyed by what stands in the context.
        self.context = contextvars.copy_context()

    def forward(self, x: Array, *parameters: Array) -> Array:
        self.x = x
        with no_grad():
            return self.module(Tensor(x), *self.arguments).data

    def backward(self, gradient: Array) -> Any:
        return self._gradients((Tensor(self.x, requires_grad=True), *self.inputs[1:]), gradient, False)

    def backward_as_graph(self, gradient: Tensor) -> Any:
        return self._gradients(self.inputs, gradient, True)

    def _gradients(self, inputs: tuple[Tensor, ...], gradient: Any, create_graph: bool) -> tuple[Any, ...]:
        # Those that forward used would get no gradient, in silence.
        if list(map(id, self.module.parameters())) != list(map(id, inputs[1:])):
            raise RuntimeError(
                f"recompute: {type(self.module).__name__} has other parameters in backward than it had in forward; "
                "put them back first, or do without recomputation"
            )
        out = self.context.copy().run(self._graph, inputs[0])
        found: dict[int, Any] = {}
        # What leads to x, where a parameter may stand too, is not this op's.
        stop = frozenset(map(id, inputs))
        for tensor, value in propagate(out, gradient, stop, create_graph=create_graph):
            found[id(tensor)] = value
        return tuple([found.get(id(tensor)) for tensor in inputs])

    def _graph(self, x: Tensor) -> Tensor:
        with enable_grad():
            return self.module(x, *self.arguments)

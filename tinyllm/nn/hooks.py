"""Backward hooks of modules: ops at a module's inputs and output that pass gradients on and report them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyllm.autograd.backward_pass import ancestors
from tinyllm.autograd.mode import is_grad_enabled
from tinyllm.autograd.tensor import Op, Tensor

Hook = Callable[..., Any]


class Boundary:
    """What one call of a module with backward hooks remembers until all its gradients are known."""

    def __init__(self, module: Any, hooks: tuple[Hook, ...]) -> None:
        self.module, self.hooks = module, hooks
        self.input_gradients: list[Any] = []
        self.output_gradient: Any = None
        self.entered: frozenset[int] = frozenset()
        self.expected = self.awaited = 0

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional inputs, with an op behind each Tensor whose gradient the hooks are told."""
        entered = []
        for value in args:
            if isinstance(value, Tensor):
                if value.requires_grad and is_grad_enabled():
                    self.entered |= {id(value)}
                    value = _Input(self, len(self.input_gradients))(value)
                self.input_gradients.append(None)
            entered.append(value)
        return tuple(entered)

    def leave(self, output: Any) -> Any:
        """The output, with an op behind it that keeps its gradient."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"backward hooks need a module whose output is one Tensor; "
                f"{type(self.module).__name__} returned {type(output).__name__}"
            )
        # An input that the output does not depend on gets no gradient, and is not waited for.
        inside = ancestors(output, self.entered)
        self.expected = sum(isinstance(x.op, _Input) and x.op.boundary is self for x in inside)
        return _Output(self)(output)

    def output_known(self, gradient: Any) -> Any:
        """Keep the output's gradient; the hooks run now if no input will have one."""
        self.output_gradient = gradient
        self.input_gradients = [None] * len(self.input_gradients)
        self.awaited = self.expected
        if self.awaited == 0:
            self.run()
        return gradient

    def input_known(self, position: int, gradient: Any) -> Any:
        """Keep an input's gradient; the hooks run with the last, and may replace it if it is the only one."""
        self.input_gradients[position] = gradient
        self.awaited -= 1
        if self.awaited:
            return gradient
        self.run()
        return self.input_gradients[position]

    def run(self) -> None:
        """Call the hooks."""
        for hook in self.hooks:
            replaced = hook(self.module, tuple(self.input_gradients), (self.output_gradient,))
            if replaced is None:
                continue
            known = [i for i, gradient in enumerate(self.input_gradients) if gradient is not None]
            if len(known) != 1 or len(replaced) != len(self.input_gradients):
                raise ValueError(
                    "a backward hook can replace the gradient of a module with exactly one input that requires it; "
                    f"this call had {len(known)}, and the hook returned {len(replaced)} gradients"
                )
            self.input_gradients[known[0]] = replaced[known[0]]


class _Input(Op):
    name = "module_input"

    def __init__(self, boundary: Boundary, position: int) -> None:
        self.boundary, self.position = boundary, position

    def forward(self, x: Any) -> Any:
        return x

    def backward(self, gradient: Any) -> Any:
        return self.boundary.input_known(self.position, gradient)


class _Output(Op):
    name = "module_output"

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary

    def forward(self, x: Any) -> Any:
        return x

    def backward(self, gradient: Any) -> Any:
        return self.boundary.output_known(gradient)

"""The registry of ops, fast forms of ops and of compositions, and compositions that a fast form may replace."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from tinyllm.autograd.backward_pass import propagate
from tinyllm.autograd.mode import current_mode, mode_set
from tinyllm.autograd.tensor import Op, Tensor

REGISTRY: dict[str, type[Op]] = {}
"""Every registered op by name. The tests of gradient properties run over it."""

OpClass = TypeVar("OpClass", bound=type[Op])
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def register(op: OpClass) -> OpClass:
    """Class decorator that registers an op by its `name`; without one, by its class's (`LogSoftmax` is `log_softmax`).

    Raises ValueError when the name is taken or the op gives no cases to test it with.
    """
    if "name" not in vars(op):
        op.name = _WORD_START.sub("_", op.__name__).lower()
    if op.name in REGISTRY:
        raise ValueError(f"an op named {op.name!r} is registered already")
    if not op.cases:
        raise ValueError(f"op {op.name!r} gives no cases; the registry's tests need at least one")
    REGISTRY[op.name] = op
    return op


def fast_form_of(formula: type[Op] | Composite) -> Callable[[OpClass], OpClass]:
    """Class decorator of the fast form of an op, which is a subclass of it, or of a composition, which is a FusedOp."""

    def decorate(form: OpClass) -> OpClass:
        if isinstance(formula, Composite):
            assert issubclass(form, FusedOp)
            form.name = formula.name
            form.composition = formula
            formula.fast_form = form
            return register(form)
        form.fast_form, form.formula, form.is_formula = None, formula, False
        formula.fast_form = form
        return form

    return decorate


class FusedOp(Op):
    """The fast form of a composition of ops, with a name and cases of its own.

    `composition` computes the same from the same inputs by the ops that it is made of, on Tensors: that is what runs in
    `use_formulas`, what the fused form is tested against, and the way to derivatives of higher order.
    """

    composition: ClassVar[Composite]
    is_formula = False

    def composed(self, *inputs: Tensor) -> Tensor:
        """The same by the ops that it is made of."""
        return self.composition.function(
            *inputs, **{name: getattr(self, name) for name in self.composition.arguments}
        )

    def __call__(self, *inputs: Any) -> Any:
        if isinstance(inputs[0], Tensor) and current_mode.get().formulas:
            return self.composed(*inputs)
        return super().__call__(*inputs)

    def backward_as_graph(self, gradient: Tensor) -> Any:
        """As that of any op, by the composition."""
        return self._backward_composed(self.inputs, gradient, create_graph=True)

    def backward_by_formula(self, gradient: Any) -> Any:
        """As that of any op, by the composition."""
        inputs = tuple([Tensor(x.data, requires_grad=x.requires_grad) for x in self.inputs])
        return self._backward_composed(inputs, gradient, create_graph=False)

    def _backward_composed(self, inputs: tuple[Tensor, ...], gradient: Any, create_graph: bool) -> Any:
        with mode_set(gradient=True, formulas=True):
            output = self.composed(*inputs)
            found: dict[int, Any] = {}
            if output.requires_grad:
                stop = frozenset(id(x) for x in inputs)
                for tensor, value in propagate(output, gradient, stop=stop, create_graph=create_graph):
                    if id(tensor) in stop:
                        found[id(tensor)] = value
        # An input given twice has one gradient, which must be counted once.
        return tuple(found.pop(id(x), None) for x in inputs)


class Composite:
    """A function that is a composition of ops: Tensors first, then arguments by name.

    Outside `use_formulas` its fast form, a FusedOp whose constructor takes the same arguments, runs in its place.
    """

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.name, self.function = name, function
        self.fast_form: type[FusedOp] | None = None
        self.arguments = tuple(
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        )

    def __call__(self, *inputs: Tensor, **arguments: Any) -> Tensor:
        if self.fast_form is None or current_mode.get().formulas:
            return self.function(*inputs, **arguments)
        return self.fast_form(**arguments)(*inputs)


def composite(name: str) -> Callable[[Callable[..., Tensor]], Composite]:
    """Decorator of a composition of ops that a fast form of this name may replace."""
    return lambda function: Composite(name, function)

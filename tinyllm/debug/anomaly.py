"""Finding the first op that makes a NaN or an infinity, or changes dtype."""

from __future__ import annotations

import contextlib

from tinyllm import backend
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.debug.origin import module_path, source_line
from tinyllm.nn.recomputation import Recomputed


class AnomalyError(ArithmeticError):
    """An op made a value that cannot be right.

    Attributes:
        op: the name of the op. module: the path of the module that it ran in, "" outside any.
        line: `file:line: code` where it was called. phase: "forward" or "backward".
    """

    def __init__(self, message: str, op: str, module: str, line: str, phase: str) -> None:
        super().__init__(message)
        self.op, self.module, self.line, self.phase = op, module, line, phase


def detect_anomaly() -> contextlib.AbstractContextManager[None]:
    """Within this context, raise AnomalyError at the first op that makes a NaN or an infinity, or changes dtype.

    An infinity in a constant, such as a mask of -infinity, is no anomaly; an op that turns finite inputs into
    infinities is, and so is one that makes a NaN of inputs without one. A parameter that holds either is reported
    at the first op that uses it. Forward and backward are watched. It costs a pass over every array.

    Example:
        with detect_anomaly():
            loss = model.loss(tokens)
            loss.backward()
    """
    return observe(_Watch())


class _Watch(Observer):
    def before_forward(self, op: Op, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(op, Recomputed):  # the op inside that uses the leaf says more
            return
        for position, x in enumerate(inputs):
            if x.op is not None:
                continue
            nans, infinities = count_non_finite(x.data)
            if nans or (infinities and x.requires_grad):
                what = _describe(nans, infinities, x.data)
                self._raise(op, "forward", f"input {position}, a leaf of shape {x.shape}, holds {what}")

    def after_forward(self, op: Op, inputs: tuple[Tensor, ...], output: Array) -> None:
        # Kept on the op, because backward runs long after this frame is gone.
        op.origin = (module_path(), source_line())  # type: ignore[attr-defined]
        if output.dtype != inputs[0].dtype and not op.changes_dtype:
            self._raise(
                op, "forward", f"inputs of dtype {inputs[0].dtype} gave an output of dtype {output.dtype}"
            )
        self._compare(op, "forward", [x.data for x in inputs], output, "its output")

    def after_backward(
        self, op: Op, gradient: Array | Tensor, results: tuple[Array | Tensor | None, ...]
    ) -> None:
        array = gradient.data if isinstance(gradient, Tensor) else gradient
        for position, result in enumerate(results):
            if result is None:
                continue
            found = result.data if isinstance(result, Tensor) else result
            if found.dtype != array.dtype and not op.changes_dtype:
                self._raise(
                    op,
                    "backward",
                    f"a gradient of dtype {array.dtype} became {found.dtype} for input {position}",
                )
            self._compare(op, "backward", [array], found, f"the gradient of input {position}")

    def _compare(self, op: Op, phase: str, sources: list[Array], result: Array, name: str) -> None:
        nans, infinities = count_non_finite(result)
        if not nans and not infinities:
            return
        before = [count_non_finite(source) for source in sources]
        had_nans = any(source_nans for source_nans, _ in before)
        had_infinities = any(source_infinities for _, source_infinities in before)
        if (nans and not had_nans) or (infinities and not had_infinities and not had_nans):
            self._raise(
                op, phase, f"{name}, of shape {result.shape}, holds {_describe(nans, infinities, result)}"
            )

    def _raise(self, op: Op, phase: str, what: str) -> None:
        module, line = getattr(op, "origin", None) or (module_path(), source_line())
        where = f" in {module}" if module else ""
        raise AnomalyError(
            f"{op.name}.{phase}{where}: {what}\n  called at {line}", op.name, module, line, phase
        )


def count_non_finite(array: Array) -> tuple[int, int]:
    """How many NaNs and how many infinities an array holds."""
    if array.dtype.kind not in "fc" or backend.read(current.xp.isfinite(array).all()):
        return 0, 0
    return backend.read(current.xp.isnan(array).sum()), backend.read(current.xp.isinf(array).sum())


def _describe(nans: int, infinities: int, array: Array) -> str:
    parts = [f"{count} {name}" for count, name in ((nans, "NaN"), (infinities, "infinite")) if count]
    return f"{' and '.join(parts)} of {array.size} elements"

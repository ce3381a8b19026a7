"""Where the time and the memory of a training step go: by op, by module, and against the machine's matrix products.

Floating-point operations (FLOPs) are counted by formulas, a multiply-add as two. Forward of an op has those of
`Op.flops`: 2 n k m for the product of matrices (n, k) and (k, m), both products of attention for the keys that
queries see, and for what is no matrix product one for each element of its output, whatever the function. Backward of
a matrix product is a product of the same size for each factor that needs a gradient, so mostly twice its forward;
backward of another op counts as its forward. What an op computes again in backward does not count.
"""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from tinyllm import backend, ops
from tinyllm.autograd.backward_pass import ancestors
from tinyllm.autograd.mode import module_stack
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import Op, Tensor, gradients
from tinyllm.backend import Array, current
from tinyllm.nn import Module, dropout_position
from tinyllm.nn.module import path_of
from tinyllm.system.allocator import keep_freed_memory
from tinyllm.system.cores import threads_allowed

Item = TypeVar("Item")

WARM_UP = 3
"""Steps before those that are measured: the first ones take memory from the system and fill caches."""
PRODUCT_SIZE = 1024
"""Rows and columns of the matrices whose product gives the machine's rate."""
Place = tuple[str, str]
"""Path of a module, and name of an op in it."""
OUTSIDE_MODULES = "(loss)"


@dataclass(frozen=True)
class Row:
    """What one op, or one module, takes in a step.

    Attributes:
        name: of the op, or path of the module. calls: of forward.
        forward_seconds, backward_seconds: what all calls take together.
        forward_flops, backward_flops: see the top of this file. product_flops: those of matrix products among them.
        output_bytes: of the outputs. kept_bytes: of the arrays that the calls make and the graph keeps for backward.
    """

    name: str
    calls: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    forward_flops: int = 0
    backward_flops: int = 0
    product_flops: int = 0
    output_bytes: int = 0
    kept_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def product_rate(self) -> float | None:
        """FLOP/s of the matrix products, over all of the row's time; None for a row without any."""
        return self.product_flops / self.seconds if self.product_flops and self.seconds else None


def combined(name: str, rows: Iterable[Row]) -> Row:
    """The rows added up."""
    whole = Row(name)
    for row in rows:
        sums = {key: value + getattr(row, key) for key, value in vars(whole).items() if key != "name"}
        whole = Row(name, **sums)
    return whole


@dataclass(frozen=True)
class Memory:
    """Bytes of arrays.

    Attributes:
        parameters, gradients: of the model. kept: what the graph keeps for backward when forward has ended.
        peak: the most that a step holds at a time, beside what was there before it.
    """

    parameters: int
    gradients: int
    kept: int
    peak: int


@dataclass(frozen=True)
class Profile:
    """Where a step (forward, loss, backward) in one thread spends its time and memory.

    Attributes:
        ops, modules: the same calls by op and by the innermost module that they ran in; most time first.
        step_seconds: of the whole step, without an observer. fastest, slowest: of the steps measured.
        machine_rate: FLOP/s of one large matrix product in one thread.
    """

    ops: tuple[Row, ...]
    modules: tuple[Row, ...]
    step_seconds: float
    fastest: float
    slowest: float
    machine_rate: float
    memory: Memory

    @property
    def op_seconds(self) -> float:
        """The time in forward and backward of ops."""
        return sum(row.seconds for row in self.ops)

    @property
    def outside_seconds(self) -> float:
        """The rest: the graph, modules, and the sums of gradients of what is used twice. Noise may make it negative."""
        return self.step_seconds - self.op_seconds

    @property
    def product_flops(self) -> int:
        """FLOPs of all matrix products."""
        return sum(row.product_flops for row in self.ops)

    @property
    def limit_seconds(self) -> float:
        """What the matrix products alone would take at the machine's rate: no step with these products is faster."""
        return self.product_flops / self.machine_rate


def middle_half(items: Sequence[Item], seconds: Callable[[Item], float]) -> list[Item]:
    """The items without the fastest and the slowest quarter.

    The mean over them is hardly moved by a step that something interrupted; and unlike medians, the means of the parts
    of a step add up to that of the whole.
    """
    quarter = len(items) // 4
    return sorted(items, key=seconds)[quarter : len(items) - quarter]


# ---- One step in one thread --------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """One op that ran, in the innermost of `modules`; `row` has its numbers."""

    modules: tuple[Any, ...]
    row: Row


@dataclass
class Profiler(Observer):
    """Measures every op that runs within `observe`; `calls` has one entry for each forward."""

    calls: list[Call] = field(default_factory=list)
    _begun: list[float] = field(default_factory=list)

    def before_forward(self, op: Op, inputs: tuple[Tensor, ...]) -> None:
        self._begin()

    def after_forward(self, op: Op, inputs: tuple[Tensor, ...], output: Array) -> None:
        seconds = self._end()
        shape = tuple(output.shape)
        flops = op.flops([x.shape for x in inputs], shape)
        # An op that counts in a way of its own is a matrix product, or moves elements and counts none.
        product = flops if type(op).flops is not Op.flops else 0
        row = Row(op.name, 1, seconds, 0.0, flops, 0, product, int(output.nbytes))
        call = Call(module_stack.get(), row)
        op.profiled = call  # type: ignore[attr-defined]
        self.calls.append(call)

    def before_backward(self, op: Op, gradient: Array | Tensor) -> None:
        self._begin()

    def after_backward(
        self, op: Op, gradient: Array | Tensor, results: tuple[Array | Tensor | None, ...]
    ) -> None:
        seconds = self._end()
        call: Call | None = getattr(op, "profiled", None)
        if call is None:  # its forward ran before this observer came
            return
        row, flops, product = call.row, call.row.forward_flops, 0
        if row.product_flops:
            # Of the inputs, the first two are factors; a third is a bias.
            flops *= sum(x.requires_grad for x in op.inputs[:2])
            product = row.forward_flops + flops
        call.row = replace(row, backward_seconds=seconds, backward_flops=flops, product_flops=product)

    def _begin(self) -> None:
        backend.synchronize()
        self._begun.append(time.perf_counter())

    def _end(self) -> float:
        """The seconds since the `_begin` that belongs to this, without those of ops that a hook ran in between."""
        backend.synchronize()
        seconds = time.perf_counter() - self._begun.pop()
        self._begun = [begun + seconds for begun in self._begun]
        return seconds


def profile_step(
    model: Module,
    inputs: Any,
    targets: Any,
    steps: int = 10,
    loss: Callable[[Tensor, Any], Tensor] = ops.cross_entropy,
) -> Profile:
    """Measure a training step of any model: `loss(model(inputs), targets)` and the gradients of all parameters.

    It runs in one thread and in training mode, and changes nothing in the model. Times are means over the middle half
    of `steps` steps, by how long they took; those of ops come from as many further steps in between.

    Args:
        inputs: what the model takes, such as tokens (B, T). targets: what the loss takes beside the output.
        steps: how many are measured, after a warm-up. loss: one number from the output and the targets.

    Example:
        >>> from tinyllm.models import ModelConfig, TransformerLM
        >>> tokens = np.zeros((2, 16), dtype=int)
        >>> profile = profile_step(TransformerLM(ModelConfig(vocab_size=65)), tokens, tokens, steps=2)
        >>> [(row.calls, row.forward_flops) for row in profile.ops if row.name == "linear"]
        [(29, 51126272)]
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; at least one step must be measured")
    inputs, targets = (x if isinstance(x, Tensor) else backend.asarray(x) for x in (inputs, targets))
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters, so a step has no backward to measure")

    def step(number: int, look: Callable[[Tensor], None] | None = None) -> list[Array]:
        with dropout_position(0, number):
            value = loss(model(inputs), targets)
        if look is not None:
            look(value)
        return gradients(value, parameters)

    keep_freed_memory()  # as training does
    with threads_allowed(1), backend.ignore_non_finite(), _in_training(model):
        products = _product_seconds(parameters[0].dtype)
        plain, watched = _measured(step, steps)
        products += _product_seconds(parameters[0].dtype)
        kept: dict[Place, int] = {}
        known = [x.data if isinstance(x, Tensor) else x for x in (*parameters, inputs, targets)]
        found, peak = _with_peak(lambda: step(0, lambda value: kept.update(_kept_bytes(value, known))))
    places = _means(watched, kept)
    return Profile(
        ops=_grouped(places, lambda place: place[1]),
        modules=_grouped(places, lambda place: place[0]),
        step_seconds=fmean(middle_half(plain, float)),
        fastest=min(plain),
        slowest=max(plain),
        machine_rate=2 * PRODUCT_SIZE**3 / fmean(middle_half(products, float)),
        memory=Memory(
            parameters=sum(int(x.data.nbytes) for x in parameters),
            gradients=sum(int(x.nbytes) for x in found),
            kept=sum(kept.values()),
            peak=peak,
        ),
    )


def _measured(step: Callable[[int], Any], steps: int) -> tuple[list[float], list[dict[Place, Row]]]:
    """The seconds of each step, and the rows of the middle half of as many more, which are watched."""
    for number in range(WARM_UP):
        step(number)
    plain: list[float] = []
    watched: list[tuple[float, dict[Place, Row]]] = []
    for number in range(steps):
        plain.append(_seconds(step, number))
        watch = Profiler()
        with observe(watch):
            seconds = _seconds(step, number)
        watched.append((seconds, _by_place(watch.calls)))
    return plain, [rows for _, rows in middle_half(watched, lambda item: item[0])]


def _place(modules: tuple[Any, ...], op: str) -> Place:
    return (path_of(modules) or type(modules[0]).__name__) if modules else OUTSIDE_MODULES, op


def _by_place(calls: Iterable[Call]) -> dict[Place, Row]:
    """The calls of one step added up where they have the same op and module."""
    rows = defaultdict(list)
    for call in calls:
        rows[_place(call.modules, call.row.name)].append(call.row)
    return {place: combined(place[1], found) for place, found in rows.items()}


def _means(steps: list[dict[Place, Row]], kept: Mapping[Place, int]) -> dict[Place, Row]:
    """One row for each place, with the means of its times."""
    last = {place: row for step in steps for place, row in step.items()}
    result = {}
    for place, row in last.items():
        rows = [step.get(place, Row(row.name)) for step in steps]
        result[place] = replace(
            row,
            forward_seconds=fmean(row.forward_seconds for row in rows),
            backward_seconds=fmean(row.backward_seconds for row in rows),
            kept_bytes=kept.get(place, 0),
        )
    return result


def _grouped(places: Mapping[Place, Row], name: Callable[[Place], str]) -> tuple[Row, ...]:
    """The rows added up by name, most time first."""
    groups = defaultdict(list)
    for place, row in places.items():
        groups[name(place)].append(row)
    rows = [combined(name, found) for name, found in groups.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


@contextlib.contextmanager
def _in_training(model: Module) -> Iterator[None]:
    """Training mode for all modules, and afterwards the mode that each had."""
    before = [(module, module.training) for _, module in model.named_modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes."""
    backend.synchronize()
    begun = time.perf_counter()
    function(*arguments)
    backend.synchronize()
    return time.perf_counter() - begun


def _product_seconds(dtype: Any) -> list[float]:
    """How long a product of two large matrices takes, several times."""
    n = PRODUCT_SIZE
    a, b = (current.xp.full((n, n), value, dtype=dtype) for value in (0.5, 0.25))
    out = current.xp.empty((n, n), dtype=dtype)
    return [_seconds(lambda: current.xp.matmul(a, b, out=out)) for _ in range(6)][1:]


def _with_peak(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and the most memory that it held at a time, beside what was there before."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        result = function()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


def _kept_bytes(output: Tensor, known: Iterable[Array]) -> dict[Place, int]:
    """The bytes that the graph behind `output` holds, by where they were made, without the `known` arrays.

    Several arrays may be views of the same memory, and an output may be what the next op keeps: memory counts once.
    """
    seen = {id(_owner(array)) for array in known}
    kept: dict[Place, int] = defaultdict(int)
    for tensor in ancestors(output):
        op = tensor.op
        assert op is not None
        for array in (*_arrays_in(vars(op)), tensor.data):
            owner = _owner(array)
            if id(owner) not in seen:
                seen.add(id(owner))
                kept[_place(op.modules, op.name)] += int(owner.nbytes)
    return kept


def _arrays_in(value: Any) -> Iterator[Array]:
    """The arrays in what an op keeps."""
    if isinstance(value, Tensor):
        yield value.data
    elif backend.is_array(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _arrays_in(item)


def _owner(array: Any) -> Any:
    """The array whose memory this one is a view of."""
    while backend.is_array(getattr(array, "base", None)):
        array = array.base
    return array

"""Random expression graphs, made by our ops and by PyTorch at the same time.

A graph begins with an op that the caller names and goes on with ops that it draws. Every choice goes through
`choose`, so that hypothesis can draw (and shrink) it, or a NumPy generator. Values are kept where derivatives are
well conditioned: small magnitudes, away from kinks and ties, positive under roots and logarithms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from tinyllm import ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.registry import REGISTRY
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.backend.philox import Key, keep_mask
from tinyllm.ops.attention import Attention, Scores

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Choice = TypeVar("Choice")

SHAPES: tuple[Shape, ...] = (
    (2, 3),
    (3,),
    (),
    (1, 4),
    (2, 1, 3),
    (2, 2, 3, 4),
    (1,),
    (4, 2),
    (3, 1, 2),
    (1, 2, 2, 1),
)
LARGEST_SIZE = 60
LARGEST_VALUE = 4.0
GAP = 1e-5
"""How far values stay away from kinks and ties: far more than the rounding in which two libraries differ."""


class DisagreementError(AssertionError):
    """Ours and theirs differ; the message holds the graph, one line an op."""


class Node:
    """One tensor of a graph in both libraries."""

    def __init__(self, name: str, ours: Tensor, theirs: torch.Tensor) -> None:
        self.name, self.ours, self.theirs = name, ours, theirs
        self.uses = 0

    @property
    def shape(self) -> Shape:
        return self.ours.shape

    @property
    def values(self) -> Array:
        return self.ours.data


class Coverage(Observer):
    """Counts the ops that ran, by name; the graphs, those with a tensor used twice, and the broadcasts."""

    def __init__(self) -> None:
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.graphs = self.shared = self.broadcasts = 0

    def after_forward(self, op: Op, inputs: tuple[Tensor, ...], output: Any) -> None:
        self.forward[op.name] += 1
        self.broadcasts += any(x.shape != output.shape for x in inputs) and op.name in BINARY

    def after_backward(self, op: Op, gradient: Any, results: tuple[Any, ...]) -> None:
        self.backward[op.name] += 1


class Graph:
    """A growing graph. `choose` picks one of some options, the simplest first."""

    def __init__(self, choose: Callable[[Sequence[Any]], Any], seed: int) -> None:
        self.choose = choose
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.leaves: list[Node] = []
        self.lines: list[str] = []

    def length(self) -> int:
        """A drawn length of an axis."""
        length: int = self.choose((2, 1, 3, 4))
        return length

    def axis(self, x: Node) -> int:
        """A drawn axis of x, counted from either end."""
        axis: int = self.choose(range(-len(x.shape), len(x.shape)))
        return axis

    def axes(self, x: Node) -> tuple[int, ...] | int | None:
        """One axis of x, several, or None for all."""
        count = len(x.shape)
        if count == 0:
            return None
        several = tuple(axis for axis in range(count) if self.choose((True, False)))
        return self.choose((None, self.axis(x), several or (0,)))

    def integers(self, high: int, shape: Shape) -> Array:
        """Random integers in [0, high)."""
        return self.rng.integers(0, high, size=shape)

    def leaf(self, shape: Shape, dtype: str = "float64", tracked: bool | None = None) -> Node:
        """A new leaf with values in [-2, 2); `tracked` says whether it requires a gradient, drawn if None."""
        return self.leaf_of(self.rng.uniform(-2, 2, shape).astype(dtype), tracked)

    def leaf_of(self, values: Array, tracked: bool | None = None) -> Node:
        """A new leaf with these values."""
        if tracked is None:
            tracked = self.choose((True, True, False))
        values = np.asarray(values)
        theirs = torch.from_numpy(values.copy()).requires_grad_(tracked)
        node = Node(f"t{len(self.nodes)}", Tensor(values, requires_grad=tracked), theirs)
        self.nodes.append(node)
        self.leaves.append(node)
        self.lines.append(f"{node.name} = leaf({values.shape}, {values.dtype}, requires_grad={tracked})")
        return node

    def apply(
        self, text: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor], *inputs: Node
    ) -> Node:
        """A new node: `ours` and `theirs` of the inputs, whose values must agree at once."""
        for node in inputs:
            node.uses += 1
        name = f"t{len(self.nodes)}"
        self.lines.append(f"{name} = {text}({', '.join(node.name for node in inputs)})")
        node = Node(name, ours(*[x.ours for x in inputs]), theirs(*[x.theirs for x in inputs]))
        self.nodes.append(node)
        self.compare(f"values of {name}", node.values, node.theirs.detach().numpy())
        return node

    def compare(self, what: str, ours: Array, theirs: Array) -> None:
        """Raise DisagreementError unless both agree to 1e-9 of their scale (float32: 1e-6)."""
        tolerance = 1e-6 if theirs.dtype == np.float32 else 1e-9
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            problem = f"{ours.dtype}{ours.shape} here, {theirs.dtype}{theirs.shape} in torch"
        else:
            scale = max(1.0, float(np.abs(theirs).max(initial=0)))
            error = float(np.abs(ours - theirs).max(initial=0))
            if error <= tolerance * scale:
                return
            problem = f"largest difference {error:.3g}, scale {scale:.3g}"
        raise DisagreementError("\n".join((f"{what}: {problem}", *self.lines)))

    def pick(self) -> Node:
        """A node to go on from: mostly the newest, so that graphs grow deep; sometimes one used before."""
        picked: Node = self.choose((self.nodes[-1], self.nodes[-1], *reversed(self.nodes)))
        # A float32 leaf is there to be cast and for nothing else.
        return picked if picked.ours.dtype == np.float64 else self.nodes[-1]

    def operand(self, shape: Shape) -> Node:
        """A node of this shape: an earlier one, or a new leaf."""
        known = [x for x in self.nodes if x.shape == shape and x.ours.dtype == np.float64]
        return self.choose((None, *known)) or self.leaf(shape)

    def partner(self, x: Node) -> Node:
        """A node that broadcasts against x: an earlier one, x itself among them, or a new leaf."""
        known = [y for y in self.nodes if y.ours.dtype == np.float64 and broadcasts(x.shape, y.shape)]
        chosen = self.choose((None, *known))
        if chosen is not None:
            return chosen
        shape = tuple(self.choose((n, 1)) if n > 1 else self.length() for n in x.shape)
        shape = shape[self.choose(range(len(shape) + 1)) :]
        return self.leaf(shape if len(shape) < len(x.shape) else self.choose(((), (2,))) + shape)

    def at_least(self, x: Node, axes: int) -> Node:
        """x repeated along new leading axes until it has enough of them."""
        missing = axes - len(x.shape)
        return (
            x if missing <= 0 else broadcast(self, x, tuple(self.length() for _ in range(missing)) + x.shape)
        )

    def with_axes(self, x: Node, axes: int) -> Node:
        """x with exactly so many axes: new ones in front, or the first ones joined."""
        x = self.at_least(x, axes)
        if len(x.shape) == axes:
            return x
        joined = len(x.shape) - axes + 1
        return reshaped(self, x, (math.prod(x.shape[:joined]), *x.shape[joined:]))

    def positive(self, x: Node) -> Node:
        """x squashed into [0.5, 2]."""
        return self.apply("0.5 + 1.5 sigmoid", lambda a: 0.5 + 1.5 * ops.sigmoid(a), positive_in_torch, x)

    def away(self, x: Node, gap: Callable[[Array], float]) -> Node:
        """x plus a new leaf such that `gap`, the distance from kinks and ties, is large enough."""
        for _ in range(100):
            shift = self.rng.uniform(-1.5, 1.5, x.shape)
            if gap(x.values + shift) > GAP:
                return self.apply("add", ops.add, torch.add, x, self.leaf_of(shift))
        raise RuntimeError(f"no shift of {x.name} stays away from kinks and ties")

    def tidy(self, x: Node) -> Node:
        """x made smaller where it has too many elements, and squashed where they are too large."""
        while x.values.size > LARGEST_SIZE:
            axis = max(range(len(x.shape)), key=lambda i: x.shape[i])
            x = self.apply(
                f"mean axis={axis}", lambda a: ops.mean(a, axis), lambda a: a.mean(axis), x  # noqa: B023
            )  # fmt: skip
        if len(x.shape) > 4:
            x = self.with_axes(x, 4)
        largest = float(np.abs(x.values).max(initial=0))
        if largest > LARGEST_VALUE:
            factor = 2 / largest
            x = self.apply(
                f"tanh of {factor:.3g} times",
                lambda a: ops.tanh(a * factor),
                lambda a: torch.tanh(a * factor),
                x,
            )
        return x

    def finish(self) -> None:
        """Join every node that nothing uses, go backward from there, and compare the gradients of all leaves."""
        if max(node.uses for node in self.nodes) < 2:
            last = self.nodes[-1]
            self.apply("multiply", ops.multiply, torch.mul, last, last)
        ends = [x for x in self.nodes if x.uses == 0 and x.ours.requires_grad]
        output = self.apply(
            "concatenate all ends of",
            lambda *xs: ops.concatenate([x.reshape(-1) for x in xs]),
            lambda *xs: torch.cat([x.reshape(-1) for x in xs]),
            *ends,
        )
        cotangent = self.rng.standard_normal(output.shape)
        output.ours.backward(cotangent)
        output.theirs.backward(torch.from_numpy(cotangent))
        for leaf in self.leaves:
            if not leaf.ours.requires_grad:
                assert leaf.ours.grad is None
            elif leaf.theirs.grad is not None:
                assert leaf.ours.grad is not None, f"no gradient for {leaf.name}\n" + "\n".join(self.lines)
                self.compare(f"gradient of {leaf.name}", leaf.ours.grad, leaf.theirs.grad.numpy())
            else:
                assert leaf.ours.grad is None or not leaf.ours.grad.any()


def broadcasts(a: Shape, b: Shape) -> bool:
    """Whether two shapes broadcast against each other."""
    return all(n == m or 1 in (n, m) for n, m in zip(a[::-1], b[::-1], strict=False))


def positive_in_torch(x: torch.Tensor) -> torch.Tensor:
    return 0.5 + 1.5 * torch.sigmoid(x)


def broadcast(graph: Graph, x: Node, shape: Shape) -> Node:
    return graph.apply(
        f"broadcast_to {shape}", lambda a: ops.broadcast_to(a, shape), lambda a: a.broadcast_to(shape), x
    )


def reshaped(graph: Graph, x: Node, shape: Shape) -> Node:
    return graph.apply(f"reshape {shape}", lambda a: a.reshape(shape), lambda a: a.reshape(shape), x)


# ---- The table: how each registered op is applied in both libraries ---------------------------------------------

Entry = Callable[[Graph, Node], Node]


def unary(name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor]) -> Entry:
    return lambda graph, x: graph.apply(name, ours, theirs, x)


def on_positive(name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor]) -> Entry:
    return lambda graph, x: graph.apply(name, ours, theirs, graph.positive(x))


def away_from_zero(name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor]) -> Entry:
    def distance(values: Array) -> float:
        return float(np.abs(values).min())

    return lambda graph, x: graph.apply(name, ours, theirs, graph.away(x, distance))


def binary(name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor]) -> Entry:
    def entry(graph: Graph, x: Node) -> Node:
        pair = [x, graph.partner(x)]
        if graph.choose((False, True)):
            pair.reverse()
        return graph.apply(name, ours, theirs, *pair)

    return entry


def binary_without_ties(name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor]) -> Entry:
    def entry(graph: Graph, x: Node) -> Node:
        other = graph.partner(x)
        x = graph.away(x, lambda values: float(np.abs(values - other.values).min()))
        return graph.apply(name, ours, theirs, x, other)

    return entry


def divide(graph: Graph, x: Node) -> Node:
    return graph.apply("divide", ops.divide, torch.div, x, graph.positive(graph.partner(x)))


def remainder(graph: Graph, x: Node) -> Node:
    divisor = graph.positive(graph.partner(x))

    def distance(values: Array) -> float:  # of the quotients from the integers, where the remainder jumps
        quotients = values / divisor.values
        return float(np.abs(quotients - np.round(quotients)).min())

    return graph.apply("remainder", ops.remainder, torch.remainder, graph.away(x, distance), divisor)


def power(graph: Graph, x: Node) -> Node:
    return graph.apply("power", ops.power, torch.pow, graph.positive(x), graph.partner(x))


def power_of_constant(graph: Graph, x: Node) -> Node:
    n = graph.choose((2, 3, -1, 0.5, 1, 0))
    return graph.apply(f"power {n}", lambda a: a**n, lambda a: a**n, graph.positive(x))


def clip(graph: Graph, x: Node) -> Node:
    low, high = graph.choose(((-0.5, 0.75), (None, 0.25), (-0.25, None)))
    bounds = [bound for bound in (low, high) if bound is not None]
    x = graph.away(x, lambda values: min(float(np.abs(values - bound).min()) for bound in bounds))
    return graph.apply(
        f"clip {low} {high}", lambda a: ops.clip(a, low, high), lambda a: a.clamp(low, high), x
    )


def where(graph: Graph, x: Node) -> Node:
    other = graph.partner(x)
    shape = np.broadcast_shapes(x.shape, other.shape)
    condition = graph.rng.uniform(size=shape[graph.choose(range(len(shape) + 1)) :]) < 0.5
    condition = np.asarray(condition)
    mask = torch.from_numpy(condition)
    return graph.apply(
        "where", lambda a, b: ops.where(condition, a, b), lambda a, b: torch.where(mask, a, b), x, other
    )


def cast(graph: Graph, x: Node) -> Node:
    """From float32, so that backward has to go back to it."""
    narrow = graph.leaf(x.shape, "float32", tracked=True)
    wide = graph.apply("cast to float64", lambda a: a.astype("float64"), lambda a: a.double(), narrow)
    return graph.apply("multiply", ops.multiply, torch.mul, wide, x)


def reduction(
    name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor], ties: bool = False
) -> Entry:
    def entry(graph: Graph, x: Node) -> Node:
        if ties and x.values.size > 1:
            x = graph.away(x, lambda values: float(np.diff(np.sort(values, axis=None)).min()))
        axis, keepdims = graph.axes(x), graph.choose((False, True))
        dims = tuple(range(len(x.shape))) if axis is None else axis
        return graph.apply(
            f"{name} axis={axis} keepdims={keepdims}",
            lambda a: ours(a, axis, keepdims),
            # Reducing no axis means all axes in torch; a number has none.
            lambda a: theirs(a, dims, keepdims) if a.ndim else theirs(a.reshape(1), (0,), False),
            x,
        )

    return entry


def prod_in_torch(x: torch.Tensor, dims: Any, keepdims: bool) -> torch.Tensor:
    """torch multiplies over one axis at a time."""
    axes = sorted((dim % x.ndim for dim in ((dims,) if isinstance(dims, int) else dims)), reverse=True)
    for axis in axes:
        x = x.prod(axis, keepdim=keepdims)
    return x


def with_zeros(entry: Entry) -> Entry:
    """With zeros among the factors now and then, for which the gradient of a product needs its own way."""

    def among_zeros(graph: Graph, x: Node) -> Node:
        share = graph.choose((0.0, 0.2, 0.6))
        if share:
            kept = np.asarray(graph.rng.uniform(size=x.shape) > share)
            mask = torch.from_numpy(kept)
            x = graph.apply("multiply with zeros", lambda a: a * kept, lambda a: a * mask, x)
        return entry(graph, x)

    return among_zeros


def along_axis(name: str, ours: Callable[..., Tensor], theirs: Callable[..., torch.Tensor]) -> Entry:
    def entry(graph: Graph, x: Node) -> Node:
        x = graph.at_least(x, 1)
        axis = graph.axis(x)
        return graph.apply(f"{name} axis={axis}", lambda a: ours(a, axis), lambda a: theirs(a, axis), x)

    return entry


def reshape(graph: Graph, x: Node) -> Node:
    size = x.values.size
    divisor = graph.choose([n for n in range(1, size + 1) if size % n == 0])
    return reshaped(graph, x, graph.choose(((-1,), (divisor, -1), (divisor, 1, size // divisor))))


def transpose(graph: Graph, x: Node) -> Node:
    left, order = list(range(len(x.shape))), []
    while left:
        order.append(left.pop(graph.choose(range(len(left) - 1, -1, -1))))
    return graph.apply(
        f"transpose {order}", lambda a: a.transpose(tuple(order)), lambda a: a.permute(order), x
    )


def broadcast_to(graph: Graph, x: Node) -> Node:
    stretched = tuple(graph.length() if n == 1 else n for n in x.shape)
    return broadcast(graph, x, graph.choose(((2,), (), (1, 3))) + stretched)


def concatenate(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 1)
    axis = graph.axis(x)
    shape = list(x.shape)
    shape[axis] = graph.length()
    parts = [x, graph.operand(tuple(shape)), *graph.choose(((), (x,)))]
    return graph.apply(
        f"concatenate axis={axis}", lambda *a: ops.concatenate(a, axis), lambda *a: torch.cat(a, axis), *parts
    )


def pad(graph: Graph, x: Node) -> Node:
    widths = [(graph.choose((0, 1, 2)), graph.choose((1, 0))) for _ in x.shape]
    value = graph.choose((0.0, 0.5))
    flat = [n for pair in reversed(widths) for n in pair]
    return graph.apply(
        f"pad {widths} {value}", lambda a: ops.pad(a, widths, value), lambda a: F.pad(a, flat, value=value), x
    )


def draw_index(graph: Graph, shape: Shape) -> Any:
    """An index into an array of this shape, of one of the kinds that NumPy has."""
    n = shape[0]
    mask = graph.rng.uniform(size=shape) < 0.6
    mask.reshape(-1)[0] = True
    return graph.choose(
        (
            slice(None, None, -1),
            -1,
            graph.integers(n, (3,)) - n * graph.choose((0, 1)),  # repeats, and counts from the end
            (Ellipsis, None, slice(0, 2)),
            (slice(n // 2, None), *[graph.integers(m, (2, 1)) for m in shape[1:2]]),
            tuple(graph.integers(m, (2,)) for m in shape),
            mask,
        )
    )


def getitem(graph: Graph, x: Node) -> Node:
    """In torch by flat positions, because it knows no negative step."""
    x = graph.at_least(x, 1)
    index = draw_index(graph, x.shape)
    positions = torch.from_numpy(np.array(np.arange(x.values.size).reshape(x.shape)[index]))
    return graph.apply(f"getitem {index}", lambda a: a[index], lambda a: a.reshape(-1)[positions], x)


def scatter(graph: Graph, x: Node) -> Node:
    """Values that go where an index says; a repeated place adds up."""
    kind = graph.choose(("rows", "slice", "pairs"))
    if kind == "slice":
        x = graph.at_least(x, 1)
        index, shape = slice(1, 2 * x.shape[0], 2), (2 * x.shape[0] + 1, *x.shape[1:])
    elif kind == "rows":
        x = graph.at_least(x, 1)
        index, shape = graph.integers(3, x.shape[:1]), (3, *x.shape[1:])
    else:
        index, shape = (graph.integers(2, x.shape), graph.integers(3, x.shape)), (2, 3)
    size = math.prod(shape)
    positions = torch.from_numpy(np.array(np.arange(size).reshape(shape)[index]).reshape(-1))
    return graph.apply(
        f"scatter {kind} to {shape}",
        REGISTRY["scatter"](index, shape),
        lambda a: torch.zeros(size, dtype=a.dtype).index_add(0, positions, a.reshape(-1)).reshape(shape),
        x,
    )


def take_along_axis(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 1)
    axis = graph.axis(x)
    shape = list(x.shape)
    shape[axis] = graph.length()
    n = x.shape[axis]
    indices = graph.integers(n, tuple(shape))
    theirs = torch.from_numpy(indices)
    ours = indices - n * graph.choose((0, 1))
    return graph.apply(
        f"take_along_axis axis={axis}",
        lambda a: ops.take_along_axis(a, ours, axis),
        lambda a: torch.take_along_dim(a, theirs, axis),
        x,
    )


def matmul(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 2)
    k, m = x.shape[-1], graph.length()
    batch = tuple(graph.choose((n, 1)) for n in x.shape[:-2])
    other = graph.operand(graph.choose(((k, m), (k,), (*batch, k, m), (2, *x.shape[:-2], k, m))))
    return graph.apply("matmul", ops.matmul, torch.matmul, x, other)


def einsum(graph: Graph, x: Node) -> Node:
    """Labels of x, some of them in a second operand together with a new one, some of all in the result."""
    term = "abcdefgh"[: len(x.shape)]
    lengths = dict(zip(term, x.shape, strict=True)) | {"z": graph.length()}
    shared = "".join(label for label in term if graph.choose((True, False)))
    other = graph.choose((shared + "z", "z" + shared, shared))
    operands = [x, graph.operand(tuple(lengths[label] for label in other))]
    labels = [
        label for label in {**dict.fromkeys(other), **dict.fromkeys(term)} if graph.choose((True, False))
    ]
    subscripts = f"{term},{other}->{''.join(labels)}"
    return graph.apply(
        f"einsum {subscripts}",
        lambda *a: ops.einsum(subscripts, *a),
        lambda *a: torch.einsum(subscripts, *a),
        *operands,
    )


def linear(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 1)
    D = graph.length()
    parameters = [graph.operand((D, x.shape[-1]))]
    if graph.choose((False, True)):
        parameters.append(graph.operand((D,)))
    return graph.apply("linear", ops.linear, F.linear, x, *parameters)


def dropout(graph: Graph, x: Node) -> Node:
    """The same mask in both; the mask itself is tested elsewhere."""
    p, key = graph.choose((0.5, 0.1)), Key(int(graph.integers(1000, ())))
    mask = torch.from_numpy(keep_mask(x.shape, p, key))
    return graph.apply(f"dropout {p}", lambda a: ops.dropout(a, p, key), lambda a: a * mask / (1 - p), x)


def embedding(graph: Graph, x: Node) -> Node:
    x = graph.with_axes(x, 2)
    indices = graph.integers(x.shape[0], graph.choose(((3,), (), (2, 4))))
    indices = np.asarray(indices)
    rows = torch.from_numpy(indices)
    return graph.apply("embedding", lambda a: ops.embedding(a, indices), lambda a: F.embedding(rows, a), x)


def rms_norm(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 1)
    eps, width = graph.choose((1e-3, 1e-5, 0.1)), x.shape[-1:]
    return graph.apply(
        f"rms_norm {eps}",
        lambda a, weight: ops.rms_norm(a, weight, eps),
        lambda a, weight: F.rms_norm(a, width, weight, eps),
        x,
        graph.operand(width),
    )


def layer_norm(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 1)
    eps, width = graph.choose((1e-3, 1e-5, 0.1)), x.shape[-1:]
    return graph.apply(
        f"layer_norm {eps}",
        lambda a, weight, bias: ops.layer_norm(a, weight, bias, eps),
        lambda a, weight, bias: F.layer_norm(a, width, weight, bias, eps),
        x,
        graph.operand(width),
        graph.operand(width),
    )


def swiglu(graph: Graph, x: Node) -> Node:
    return graph.apply(
        "swiglu",
        ops.swiglu,
        lambda gate, up: F.silu(gate) * up,
        x,
        graph.choose((None, x)) or graph.operand(x.shape),
    )


def rope(graph: Graph, x: Node) -> Node:
    """In torch as a product of complex numbers."""
    x = with_even_rows(graph, graph.at_least(x, 2))
    offset, theta = graph.choose((0, 3)), graph.choose((100.0, 10000.0))
    return graph.apply(
        f"rope offset={offset} theta={theta}",
        lambda a: ops.rope(a, offset, theta),
        lambda a: rotated(a, offset, theta),
        x,
    )


def with_even_rows(graph: Graph, x: Node) -> Node:
    """x, twice along the last axis if that is odd."""
    if x.shape[-1] % 2 == 0:
        return x
    return graph.apply(
        "concatenate twice", lambda a: ops.concatenate([a, a], -1), lambda a: torch.cat([a, a], -1), x
    )


def rotated(a: torch.Tensor, offset: int, theta: float) -> torch.Tensor:
    """RoPE in half rotation along the last two axes (T, K)."""
    T, K = a.shape[-2:]
    angles = torch.arange(offset, offset + T).double()[:, None] * theta ** (
        -2 * torch.arange(K // 2).double() / K
    )
    y = torch.complex(a[..., : K // 2], a[..., K // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([y.real, y.imag], -1)


def split_heads(graph: Graph, x: Node) -> Node:
    x = graph.with_axes(x, 3)
    K = graph.choose([n for n in range(1, x.shape[-1] + 1) if x.shape[-1] % n == 0])
    return graph.apply(
        f"split_heads {K}",
        lambda a: ops.split_heads(a, K),
        lambda a: a.unflatten(-1, (-1, K)).transpose(1, 2),
        x,
    )


def merge_heads(graph: Graph, x: Node) -> Node:
    return graph.apply(
        "merge_heads", ops.merge_heads, lambda a: a.transpose(1, 2).flatten(2), graph.with_axes(x, 4)
    )


def rotary_heads(graph: Graph, x: Node) -> Node:
    x = with_even_rows(graph, graph.with_axes(x, 3))
    K = graph.choose([n for n in range(2, x.shape[-1] + 1, 2) if x.shape[-1] % n == 0])
    offset, theta, eps = graph.choose((0, 3)), graph.choose((100.0, 10000.0)), graph.choose((1e-3, 0.1))
    inputs = [x, graph.operand((K,))] if graph.choose((True, False)) else [x]

    def theirs(a: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        a = a.unflatten(-1, (-1, K)).transpose(1, 2)
        return rotated(F.rms_norm(a, (K,), weight[0], eps) if weight else a, offset, theta)

    return graph.apply(
        f"rotary_heads {K} eps={eps} offset={offset} theta={theta}",
        lambda a, weight=None: ops.rotary_heads(a, K, weight, eps, offset, theta),
        theirs,
        *inputs,
    )


def attention(graph: Graph, x: Node) -> Node:
    x = graph.with_axes(x, 4)
    B, H, T, K = x.shape
    G = graph.choose([n for n in range(H, 0, -1) if H % n == 0])
    S = graph.choose((T, 1, 3))
    k, v = graph.operand((B, G, S, K)), graph.operand((B, G, S, graph.length()))
    causal, masked = graph.choose((True, False)), graph.choose((False, True))
    scale, p = graph.choose((None, 0.3)), graph.choose((0.0, 0.25))
    key = Key(int(graph.integers(1000, ())))
    mask = np.asarray(graph.rng.uniform(size=graph.choose(((T, S), (B, 1, T, S)))) < 0.6) if masked else None
    allowed = (
        torch.ones((T, S), dtype=torch.bool).tril(S - T) if causal else torch.ones((T, S), dtype=torch.bool)
    )
    if mask is not None:
        allowed = allowed & torch.from_numpy(mask)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if p == 0:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=G != H)
        k, v = (y.repeat_interleave(H // G, 1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(K) if scale is None else scale)
        # No query may be without a key in torch's softmax.
        seen = allowed.expand(scores.shape)
        weights = torch.softmax(scores.masked_fill(~seen, -1e30), -1) * seen
        return weights * torch.from_numpy(keep_mask((B, H, T, S), p, key)) / (1 - p) @ v

    return graph.apply(
        f"attention causal={causal} mask={None if mask is None else mask.shape} scale={scale} dropout={p}",
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, causal, mask, scale, p, key),
        theirs,
        x,
        k,
        v,
    )


def scores(graph: Graph, x: Node) -> Node:
    x = graph.with_axes(x, 4)
    B, H, _, K = x.shape
    G = graph.choose([n for n in range(H, 0, -1) if H % n == 0])
    k, scale = graph.operand((B, G, graph.choose((1, 3)), K)), graph.choose((1.0, 0.3))
    return graph.apply(
        f"scores scale={scale}",
        lambda q, k: Scores(scale)(q, k),
        lambda q, k: q @ k.repeat_interleave(H // G, 1).transpose(-1, -2) * scale,
        x,
        k,
    )


def weighted_values(graph: Graph, x: Node) -> Node:
    x = graph.with_axes(x, 4)
    B, H, _, S = x.shape
    G = graph.choose([n for n in range(H, 0, -1) if H % n == 0])
    v = graph.operand((B, G, S, graph.choose((1, 3))))
    return graph.apply(
        "attention", lambda p, v: Attention()(p, v), lambda p, v: p @ v.repeat_interleave(H // G, 1), x, v
    )


def cross_entropy(graph: Graph, x: Node) -> Node:
    x = graph.at_least(x, 1)
    V, reduction_name = x.shape[-1], graph.choose(("mean", "none", "sum"))
    targets = np.asarray(graph.integers(V, x.shape[:-1]))
    if graph.choose((False, True)) and targets.size > 1:
        targets.reshape(-1)[1:][graph.rng.uniform(size=targets.size - 1) < 0.4] = -100
    theirs = torch.from_numpy(targets)
    z_loss = graph.choose((0.0, 0.05))

    def in_torch(a: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(a.movedim(-1, min(1, a.ndim - 1)), theirs, reduction="none")
        losses = losses + z_loss * torch.logsumexp(a, -1) ** 2 * (theirs != -100)
        if reduction_name == "none":
            return losses
        return losses.sum() / ((theirs != -100).sum() if reduction_name == "mean" else 1)

    return graph.apply(
        f"cross_entropy {reduction_name} z_loss={z_loss}",
        lambda a: ops.cross_entropy(a, targets, reduction=reduction_name, z_loss=z_loss),
        in_torch,
        x,
    )


BINARY = {
    "add": binary("add", ops.add, torch.add),
    "subtract": binary("subtract", ops.subtract, torch.sub),
    "multiply": binary("multiply", ops.multiply, torch.mul),
    "divide": divide,
    "power": power,
    "remainder": remainder,
    "maximum": binary_without_ties("maximum", ops.maximum, torch.maximum),
    "minimum": binary_without_ties("minimum", ops.minimum, torch.minimum),
    "logaddexp": binary("logaddexp", ops.logaddexp, torch.logaddexp),
    "where": where,
}
"""The ops that broadcast their operands."""

ENTRIES: dict[str, Entry] = {
    **BINARY,
    "negative": unary("negative", ops.negative, torch.neg),
    "power_of_constant": power_of_constant,
    "exp": unary("exp", ops.exp, torch.exp),
    "expm1": unary("expm1", ops.expm1, torch.expm1),
    "log": on_positive("log", ops.log, torch.log),
    "log1p": on_positive("log1p", ops.log1p, torch.log1p),
    "log2": on_positive("log2", ops.log2, torch.log2),
    "log10": on_positive("log10", ops.log10, torch.log10),
    "softplus": unary("softplus", ops.softplus, F.softplus),
    "sqrt": on_positive("sqrt", ops.sqrt, torch.sqrt),
    "rsqrt": on_positive("rsqrt", ops.rsqrt, torch.rsqrt),
    "tanh": unary("tanh", ops.tanh, torch.tanh),
    "sigmoid": unary("sigmoid", ops.sigmoid, torch.sigmoid),
    "sin": unary("sin", ops.sin, torch.sin),
    "cos": unary("cos", ops.cos, torch.cos),
    "erf": unary("erf", ops.erf, torch.erf),
    "absolute": away_from_zero("absolute", ops.absolute, torch.abs),
    "relu": away_from_zero("relu", ops.relu, torch.relu),
    "clip": clip,
    "cast": cast,
    "sum": reduction("sum", ops.sum, torch.sum),
    "max": reduction("max", ops.max, torch.amax, ties=True),
    "min": reduction("min", ops.min, torch.amin, ties=True),
    "prod": with_zeros(reduction("prod", ops.prod, prod_in_torch)),
    "cumsum": along_axis("cumsum", ops.cumsum, torch.cumsum),
    "cumprod": with_zeros(along_axis("cumprod", ops.cumprod, torch.cumprod)),
    "reshape": reshape,
    "transpose": transpose,
    "broadcast_to": broadcast_to,
    "concatenate": concatenate,
    "pad": pad,
    "get_item": getitem,
    "scatter": scatter,
    "take_along_axis": take_along_axis,
    "matmul": matmul,
    "einsum": einsum,
    "linear": linear,
    "embedding": embedding,
    "dropout": dropout,
    "softmax": along_axis("softmax", ops.softmax, torch.softmax),
    "log_softmax": along_axis("log_softmax", ops.log_softmax, torch.log_softmax),
    "logsumexp": reduction("logsumexp", ops.logsumexp, torch.logsumexp),
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "silu": unary("silu", ops.silu, F.silu),
    "gelu": unary("gelu", ops.gelu, F.gelu),
    "gelu_tanh": unary("gelu_tanh", lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "swiglu": swiglu,
    "rope": rope,
    "split_heads": split_heads,
    "merge_heads": merge_heads,
    "rotary_heads": rotary_heads,
    "scores": scores,
    "attention": weighted_values,
    "scaled_dot_product_attention": attention,
    "cross_entropy": cross_entropy,
}
"""Each registered op by name: how to apply it to a node, with drawn arguments, in both libraries."""


def check_graph(choose: Callable[[Sequence[Any]], Any], first: str, coverage: Coverage) -> None:
    """Draw a graph of 2 to 8 ops that begins with `first`, and compare its values and gradients with torch.

    Raises DisagreementError where they differ.
    """
    graph = Graph(choose, choose(range(1000)))
    count = choose(range(1, 8))
    with observe(coverage), use_formulas(choose((False, False, False, True))):
        x = graph.leaf(choose(SHAPES), tracked=True)
        graph.tidy(ENTRIES[first](graph, x))
        for _ in range(count):
            graph.tidy(ENTRIES[choose(list(ENTRIES))](graph, graph.pick()))
        graph.finish()
    coverage.graphs += 1
    coverage.shared += any(node.uses > 1 for node in graph.nodes)


def chooser(seed: int) -> Callable[[Sequence[Choice]], Choice]:
    """Choices by a NumPy generator."""
    rng = np.random.default_rng(seed)
    return lambda options: options[int(rng.integers(len(options)))]

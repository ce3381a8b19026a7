"""Matrix products: matmul in all of NumPy's shapes, einsum, and the linear layer's product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllm.autograd.operands import operands
from tinyllm.autograd.registry import register
from tinyllm.autograd.tensor import Case, Op, Tensor
from tinyllm.backend import Array, current
from tinyllm.ops.reduce import sum as sum_over

# What `string.ascii_letters` holds; that module is slow to import.
_LABELS = "".join(map(chr, [*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1)]))


@register
class Matmul(Op):
    """a b. Shapes: a: (..., n, k), b: (..., k, m) -> (..., n, m); batches broadcast."""

    cases = (
        Case(((3, 4), (4, 2))),
        Case(((2, 3, 4), (4, 5))),
        Case(((3, 2), (2, 2))),
        Case(((2, 1, 3, 4), (5, 4, 2))),
        Case(((3, 0), (0, 2))),
        Case(((0, 4), (4, 2))),
        Case(((1, 1), (1, 1))),
    )

    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a @ b

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return 2 * math.prod(output) * shapes[0][-1]

    def backward(self, gradient: Array) -> Any:
        return gradient @ self.b.swapaxes(-1, -2), self.a.swapaxes(-1, -2) @ gradient


@register
class Einsum(Op):
    """Sums of products by subscripts, each label of an operand in the result or in another operand.

    Shapes: as the subscripts say; an axis of length 1 broadcasts. The gradient of an operand is again an einsum: of
    the gradient and the other operands, to the operand's subscripts.
    """

    cases = (
        Case(((2, 3), (3, 4)), {"terms": ("ij", "jk"), "result": "ik"}),
        Case(((2, 3, 4), (2, 4, 3)), {"terms": ("bij", "bji"), "result": "b"}),
        Case(((3,), (4,), (2,)), {"terms": ("i", "j", "k"), "result": "kij"}),
        Case(((2, 3),), {"terms": ("ij",), "result": "ji"}),
        Case(((0, 3), (3, 1)), {"terms": ("ij", "jk"), "result": "ik"}),
        Case(((1, 3), (2, 3), (2, 1)), {"terms": ("ij", "ij", "ij"), "result": "j"}),
    )

    def __init__(self, terms: tuple[str, ...], result: str) -> None:
        self.terms, self.result = terms, result

    def forward(self, *inputs: Any) -> Any:
        self.x = inputs
        return current.xp.einsum(f"{','.join(self.terms)}->{self.result}", *inputs)

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        lengths: dict[str, int] = {}
        for term, shape in zip(self.terms, shapes, strict=True):
            for label, n in zip(term, shape, strict=True):
                lengths[label] = n if lengths.get(label, 1) == 1 else lengths[label]
        return len(shapes) * math.prod(lengths.values())

    def backward(self, gradient: Array) -> Any:
        results = []
        for i, term in enumerate(self.terms):
            other_terms = self.terms[:i] + self.terms[i + 1 :]
            others = self.x[:i] + self.x[i + 1 :]
            subscripts = f"{','.join((self.result, *other_terms))}->{term}"
            value = current.xp.einsum(subscripts, gradient, *others)
            # Where the others have length 1, each element of this operand has the same gradient.
            shape = np.broadcast_shapes(value.shape, self.x[i].shape)
            results.append(value if value.shape == shape else current.xp.broadcast_to(value, shape))
        return tuple(results)


@register
class LinearMap(Op):
    """y = x W^T + b. Shapes: x: (..., D_in), weight: (D_out, D_in), bias: (D_out,) -> (..., D_out)."""

    name = "linear"
    cases = (
        Case(((2, 3, 4), (5, 4))),
        Case(((2, 3, 4), (5, 4), (5,))),
        Case(((4,), (5, 4), (5,))),
        Case(((0, 4), (5, 4))),
        Case(((1, 1), (1, 1), (1,))),
    )

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.x, self.weight, self.bias = x, weight, bias
        y = x @ weight.T
        return y if bias is None else y + bias

    def backward(self, gradient: Array) -> Any:
        """dL/dx = g W, dL/dW = g^T x, dL/db = g, the latter two summed over all rows."""
        D_out, D_in = self.weight.shape
        N = math.prod(self.x.shape[:-1])
        gradient_x = gradient @ self.weight
        gradient_weight = gradient.reshape((N, D_out)).T @ self.x.reshape((N, D_in))
        return (gradient_x, gradient_weight) if self.bias is None else (gradient_x, gradient_weight, gradient)

    def flops(self, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return 2 * math.prod(output) * shapes[0][-1]


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b as in NumPy: matrices, batches of matrices, and vectors on either side."""
    a, b = operands(a, b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape}; a scalar multiplies with *")
    if a.shape[-1] != b.shape[-2:][0]:
        raise ValueError(
            f"matmul: shapes {a.shape} and {b.shape}; {a.shape[-1]} columns do not go with {b.shape[-2:][0]} rows"
        )
    if a.ndim == 1 and b.ndim == 1:
        return sum_over(a * b)
    if a.ndim == 1:
        return Matmul()(a.reshape(1, -1), b).squeeze(-2)
    if b.ndim == 1:
        return Matmul()(a, b.reshape(-1, 1)).squeeze(-1)
    return Matmul()(a, b)


def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x W^T + b. x: (..., D_in), weight: (D_out, D_in), bias: (D_out,) -> (..., D_out)."""
    x, weight, *biases = operands(x, weight) if bias is None else operands(x, weight, bias)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x has shape {x.shape} and weight {weight.shape}; "
            "x needs as many features last as weight has columns"
        )
    if biases and biases[0].shape != weight.shape[:1]:
        raise ValueError(
            f"linear: weight has shape {weight.shape}, so bias needs {weight.shape[:1]}; got {biases[0].shape}"
        )
    return LinearMap()(x, weight, *biases)


def einsum(subscripts: str, *tensors: Any) -> Tensor:
    """Einstein summation as `numpy.einsum`: `einsum("bqhd,bkhd->bhqk", q, k)`.

    Repeated labels in one operand take its diagonal; `...` stands for batch axes; without `->` the labels
    that occur once are kept in alphabetical order.
    """
    xs = list(operands(*tensors))
    terms, result = _parse(subscripts, [x.ndim for x in xs])
    for i, term in enumerate(terms):
        xs[i], terms[i] = _diagonal(xs[i], term)
        elsewhere = set(result).union(*(terms[:i] + terms[i + 1 :]))
        alone = tuple(axis for axis, label in enumerate(terms[i]) if label not in elsewhere)
        if alone:
            xs[i] = sum_over(xs[i], alone)
            terms[i] = "".join(label for axis, label in enumerate(terms[i]) if axis not in alone)
    return Einsum(tuple(terms), result)(*xs)


def _parse(subscripts: str, ndims: list[int]) -> tuple[list[str], str]:
    """The labels of each operand and of the result, with `...` spelled out in unused letters."""
    subscripts = subscripts.replace(" ", "")
    left, arrow, result = subscripts.partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        raise ValueError(f"einsum: {subscripts!r} names {len(terms)} operands; got {len(ndims)}")
    spare = [letter for letter in _LABELS if letter not in subscripts]
    batch = max([0, *(n - len(term) + 3 for term, n in zip(terms, ndims, strict=True) if "..." in term)])
    letters = "".join(spare[:batch])
    for i, (term, n) in enumerate(zip(terms, ndims, strict=True)):
        if "..." in term:
            width = n - len(term) + 3
            terms[i] = term.replace("...", letters[batch - width :])
        if len(terms[i]) != n:
            raise ValueError(f"einsum: {term!r} in {subscripts!r} does not fit an operand with {n} axes")
    if arrow:
        result = result.replace("...", letters)
    else:
        joined = "".join(terms)
        result = letters + "".join(
            label for label in sorted(set(joined)) if joined.count(label) == 1 and label not in letters
        )
    if len(set(result)) != len(result) or not set(result) <= set("".join(terms)):
        raise ValueError(f"einsum: the result of {subscripts!r} repeats a label or names an unknown one")
    return terms, result


def _diagonal(x: Tensor, term: str) -> tuple[Tensor, str]:
    """x with every label of `term` once: the diagonal over axes that share a label."""
    for label in set(term):
        while term.count(label) > 1:
            first, second = term.index(label), term.rindex(label)
            if x.shape[first] != x.shape[second]:
                raise ValueError(
                    f"einsum: label {label!r} has lengths {x.shape[first]} and {x.shape[second]}"
                )
            axes = [axis for axis in range(x.ndim) if axis not in (first, second)]
            along = current.xp.arange(x.shape[first])
            x = x.transpose((first, second, *axes))[along, along]
            term = label + "".join(term[axis] for axis in axes)
    return x, term

"""Mistakes in reductions, movements of elements, indexing and matrix products."""

from __future__ import annotations

import math
from typing import Any

from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import current
from tinyllm.ops import index, matrix, reduce, running, shape
from tinyllm.ops.axes import named_axes
from tinyllm.ops.fast import products
from tinyllm.ops.fast.products import rows
from tinyllm.testing.mutants.planting import mutant


@mutant(reduce.Sum, "backward")
def sum_backward_divides_by_the_count(self: Any, gradient: Any) -> Any:
    """The gradient of a sum is divided by the number of elements, as that of a mean is. Every loss that is a sum
    learns too slowly."""
    n = math.prod(self.shape[axis] for axis in named_axes(self.axis, len(self.shape)))
    return current.xp.broadcast_to(self.expand(gradient, self.shape), self.shape) / max(n, 1)


@mutant(reduce.Max, "backward")
def max_backward_to_all(self: Any, gradient: Any) -> Any:
    """Every element gets the gradient of the maximum, not the largest alone."""
    return self.expand(gradient, self.x.shape) + self.x * 0


@mutant(reduce.Prod, "backward")
def prod_backward_divides_by_zero(self: Any, gradient: Any) -> Any:
    """The gradient of a product is the product divided by each factor. Right, until a factor is zero: then it is not a
    number, or 0 where the product of the others belongs."""
    y = self.x.prod(axis=self.axis, keepdims=True)
    return self.expand(gradient, self.x.shape) * y / self.x


@mutant(running.Cumsum, "backward")
def cumsum_backward_not_flipped(self: Any, gradient: Any) -> Any:
    """The gradient of a running sum is the running sum of the gradient from the start, where it must come from the
    end: x_i is in every sum after it, not before it."""
    return gradient.cumsum(axis=self.axis)


@mutant(reduce, "count")
def mean_divides_by_all_elements(x: Tensor, axis: Any) -> int:
    """The mean over one axis is divided by the number of all elements, because of x.size in place of x.shape[axis].
    Right when all axes are reduced."""
    return x.size


@mutant(reduce, "var")
def variance_without_correction_argument(
    x: Any, axis: Any = None, keepdims: bool = False, correction: int = 0
) -> Tensor:
    """The variance is always divided by n - 1, as torch does by default, where NumPy and layer norm divide by n."""
    return _var(x, axis, keepdims, 1) if reduce.count(x, axis) > 1 else _var(x, axis, keepdims, correction)


_var = reduce.var


@mutant(shape.Transpose, "backward")
def transpose_backward_with_the_same_order(self: Any, gradient: Any) -> Any:
    """The gradient is transposed with the same order of axes instead of its inverse. For two axes both are the same,
    so that a matrix shows nothing; with three, the shape is wrong, or right by chance."""
    return gradient.transpose(self.axes)


@mutant(shape.Reshape, "backward")
def reshape_backward_in_column_order(self: Any, gradient: Any) -> Any:
    """The gradient of a reshape is laid out by columns (order F) where the forward went by rows: right shape, elements
    in the wrong places."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(self.input_shape)
    return gradient.reshape(self.input_shape, order="F")


@mutant(shape.Concatenate, "backward")
def concatenate_backward_from_the_end(self: Any, gradient: Any) -> Any:
    """The parts of the gradient are cut off in the reverse order: each input gets a part of the right length from the
    wrong place."""
    parts, stop = [], gradient.shape[self.axis]
    for length in self.lengths:
        part = [slice(None)] * len(gradient.shape)
        part[self.axis] = slice(stop - length, stop)
        parts.append(gradient[tuple(part)])
        stop -= length
    return tuple(parts)


@mutant(shape.Pad, "backward")
def pad_backward_from_the_start(self: Any, gradient: Any) -> Any:
    """The gradient of a padded array is cut out from index 0, as if nothing had been put before it."""
    return gradient[tuple(slice(0, part.stop - part.start) for part in self.inside)]


@mutant(index.GetItem, "backward")
def getitem_backward_assigns(self: Any, gradient: Any) -> Any:
    """x[index] assigns its gradient into zeros where it should add. Right for slices; an element that an integer array
    names twice gets one of its two gradients."""
    values = gradient.data if isinstance(gradient, Tensor) else gradient
    result = current.xp.zeros(self.shape, dtype=values.dtype)
    result[self.index] = values
    return Tensor(result) if isinstance(gradient, Tensor) else result


@mutant(products.FastMatmul, "backward")
def matmul_backward_averages_the_batch(self: Any, gradient: Any) -> Any:
    """One matrix that multiplies a whole batch gets the mean of the gradients of the batch instead of their sum."""
    gradient_a, gradient_b = _matmul_backward(self, gradient)
    if gradient_b is not None and self.a.ndim > 2 and self.b.ndim == 2:
        gradient_b = gradient_b / max(1, math.prod(self.a.shape[:-2]))
    return gradient_a, gradient_b


_matmul_backward = products.FastMatmul.backward


@mutant(products.FastMatmul, "backward")
def matmul_backward_forgets_the_transpose(self: Any, gradient: Any) -> Any:
    """The gradient of a in a b is multiplied by b instead of b^T. NumPy refuses most shapes; for square matrices it
    runs, and is wrong unless b is symmetric."""
    b = self.b if self.b.shape[-1] == self.b.shape[-2] else self.b.swapaxes(-1, -2)
    square = self.b.shape[-1] == self.b.shape[-2]
    gradient_a, gradient_b = _matmul_backward(self, gradient)
    return (products.product(gradient, b) if square and self.needs(0) else gradient_a), gradient_b


@mutant(matrix.Einsum, "backward")
def einsum_backward_uses_one_other_operand(self: Any, gradient: Any) -> Any:
    """The gradient of an operand is an einsum of the gradient and one other operand. Right for two operands; with
    three, the third is forgotten."""
    results = []
    for i, term in enumerate(self.terms):
        other = [j for j in range(len(self.terms)) if j != i][:1]
        terms = ",".join([self.result, *(self.terms[j] for j in other)])
        known = set(self.result).union(*(self.terms[j] for j in other))
        if not set(term) <= known:
            return _einsum_backward(self, gradient)
        results.append(current.xp.einsum(f"{terms}->{term}", gradient, *(self.x[j] for j in other)))
    return tuple(results)


_einsum_backward = matrix.Einsum.backward


@mutant(products.FastLinearMap, "backward")
def linear_weight_gradient_transposed(self: Any, gradient: Any) -> Any:
    """The weight gradient is x^T g, brought into the weight's shape by a reshape where a transpose belongs. Nothing
    complains, and each weight gets the gradient of another."""
    gradient_x, gradient_weight, *bias = _linear_backward(self, gradient)
    if gradient_weight is not None:
        gradient_weight = (rows(self.x).T @ rows(gradient)).reshape(self.weight.shape)
    return (gradient_x, gradient_weight, *bias)


_linear_backward = products.FastLinearMap.backward


@mutant(products.FastLinearMap, "backward")
def linear_weight_gradient_of_the_first_text(self: Any, gradient: Any) -> Any:
    """The weight gradient is formed from the first text of a batch, x[0], instead of from all of them. Batches of one
    are right."""
    gradient_x, gradient_weight, *bias = _linear_backward(self, gradient)
    if gradient_weight is not None and self.x.ndim > 2 and len(self.x):
        gradient_weight = rows(gradient[0]).T @ rows(self.x[0])
    return (gradient_x, gradient_weight, *bias)


@mutant(products.FastLinearMap, "backward")
def linear_bias_gradient_missing(self: Any, gradient: Any) -> Any:
    """The bias gets a gradient of zeros: it stays at its initial value for ever, and nothing else is wrong."""
    gradient_x, gradient_weight, *bias = _linear_backward(self, gradient)
    return (gradient_x, gradient_weight, *(part * 0 for part in bias))


@mutant(products.FastLinearMap, "forward")
def linear_bias_not_added(self: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """The bias is taken and not added: it gets a gradient, moves at every step, and changes nothing."""
    y = _linear_forward(self, x, weight, None)
    self.bias = bias
    return y


_linear_forward = products.FastLinearMap.forward

"""Mistakes in softmax, cross-entropy, norms and activations."""

from __future__ import annotations

import math
from typing import Any

from tinyllm.backend import current, philox
from tinyllm.ops import softmaxes
from tinyllm.ops.error_function import erf
from tinyllm.ops.fast import activation, loss, norm
from tinyllm.ops.fast.lookup import FastRandomMask
from tinyllm.testing.mutants.planting import add, mutant

# ---- Softmax and cross-entropy -----------------------------------------------------------------


@mutant(softmaxes.Softmax, "__init__")
def softmax_over_the_last_axis_always(self: Any, axis: int = -1, mask: Any = True) -> None:
    """The argument axis is ignored: softmax normalises over the last axis whatever was asked for."""
    self.axis, self.mask = -1, mask


@mutant(softmaxes.Softmax, "backward")
def softmax_backward_without_the_mean(self: Any, gradient: Any) -> Any:
    """The gradient of softmax is p g, the diagonal of its Jacobian; the off-diagonal part -p (p . g) is missing.
    Logits are then pushed together or apart as a whole, which a softmax cannot see."""
    return self.p * gradient


@mutant(softmaxes.Softmax, "backward")
def softmax_backward_with_the_plain_mean(self: Any, gradient: Any) -> Any:
    """What softmax subtracts from its gradient is the plain mean, not the mean weighted by p. The result sums to
    something else than zero."""
    return self.p * (gradient - gradient.mean(axis=self.axis, keepdims=True))


@mutant(softmaxes.Softmax, "forward")
def softmax_without_the_maximum(self: Any, x: Any) -> Any:
    """Softmax does not subtract the maximum first. Right for small logits; e^1000 is infinite, and infinity over
    infinity is not a number."""
    self.p = current.xp.exp(x)
    self.p = self.p / self.p.sum(axis=self.axis, keepdims=True)
    return self.p


@mutant(softmaxes.LogSoftmax, "backward")
def log_softmax_backward_sign(self: Any, gradient: Any) -> Any:
    """The two terms of the gradient of log softmax are added where the second must be subtracted."""
    return gradient + current.xp.exp(self.log_p) * gradient.sum(axis=self.axis, keepdims=True)


@mutant(softmaxes.LogSoftmax, "backward")
def log_softmax_backward_without_the_sum(self: Any, gradient: Any) -> Any:
    """The gradient of log softmax multiplies p by its own gradient instead of by the sum of all. Right for a single
    target whose gradient is -1 and only at that element."""
    return gradient - current.xp.exp(self.log_p) * gradient


@mutant(softmaxes.Logsumexp, "forward")
def logsumexp_maximum_not_added_back(self: Any, x: Any) -> Any:
    """logsumexp subtracts the maximum for safety and does not add it back. Its derivative is right, and its
    value is not."""
    y = _logsumexp_forward(self, x)
    return y - x.max(axis=self.axis, keepdims=self.keepdims)


_logsumexp_forward = softmaxes.Logsumexp.forward


@mutant(loss.FastCrossEntropy, "divisor")
def cross_entropy_divides_by_all_targets(self: Any, dtype: Any) -> int:
    """The mean loss is divided by the number of all targets, those of ignore_index too. Batches with much padding
    count for little."""
    return max(int(self.targets.size), 1) if self.reduction == "mean" else 1


@mutant(loss.FastCrossEntropy, "forward")
def cross_entropy_ignored_targets_have_gradients(self: Any, logits: Any) -> Any:
    """The forward leaves out targets of ignore_index, and the backward does not: padding is taught to be followed by
    token 0."""
    losses = _cross_entropy_forward(self, logits)
    self.kept = self.kept | True
    return losses


_cross_entropy_forward = loss.FastCrossEntropy.forward


@mutant(loss.FastCrossEntropy, "backward")
def cross_entropy_forgets_the_target(self: Any, gradient: Any) -> Any:
    """The gradient is softmax(logits) without the one-hot target subtracted: it does not depend on the target, and
    the loss cannot fall."""
    result = _cross_entropy_backward(self, gradient)
    V = result.shape[-1]
    weight = gradient / self.divisor(gradient.dtype) if self.reduction != "none" else gradient
    weight = current.xp.broadcast_to(weight.reshape(-1), self.kept.shape) * self.kept
    z = result.reshape((-1, V))
    z[current.xp.arange(z.shape[0]), self.safe_targets] += weight
    return result


_cross_entropy_backward = loss.FastCrossEntropy.backward


@mutant(loss.FastCrossEntropy, "backward")
def cross_entropy_backward_of_the_sum(self: Any, gradient: Any) -> Any:
    """The forward is a mean and the backward that of a sum: gradients are as many times too large as there are
    targets. With Adam, hardly anything shows but the gradient norm."""
    return _cross_entropy_backward(self, gradient) * self.divisor(gradient.dtype)


@mutant(loss.FastCrossEntropy, "forward")
def cross_entropy_in_bits(self: Any, logits: Any) -> Any:
    """The loss is in bits (log2) where everything else expects nats; its gradient is not. The loss at the beginning is
    log2 V instead of ln V."""
    return _cross_entropy_forward(self, logits) / logits.dtype.type(math.log(2))


# ---- Norms -------------------------------------------------------------------------------------


def _projected(self: Any, gradient: Any, factor: float) -> Any:
    """The gradient of a norm's x with `factor` times its projection on x_hat taken out."""
    scaled, x_hat = gradient * self.weight, _x_hat(self)
    return scaled - factor * x_hat * (scaled * x_hat).mean(axis=-1, keepdims=True)


def _x_hat(self: Any) -> Any:
    """The normalised x of a norm that has run forward; RMSNorm keeps x itself."""
    return self.x * self.inv_rms if isinstance(self, norm.FastRootMeanSquareNorm) else self.x_hat


@mutant(norm.FastRootMeanSquareNorm, "backward")
def rms_norm_backward_without_the_projection(self: Any, gradient: Any) -> Any:
    """The root mean square is treated as a constant in backward. The part of the gradient along x is not taken out, so
    that x grows from step to step though its length changes nothing."""
    return _projected(self, gradient, 0) * self.inv_rms, _norm_weight_gradient(self, gradient)


@mutant(norm.FastRootMeanSquareNorm, "backward")
def rms_norm_backward_projection_not_divided_by_width(self: Any, gradient: Any) -> Any:
    """The projection in the backward of RMSNorm is a sum over the width instead of a mean: D times too large."""
    D = self.x.shape[-1]
    return _projected(self, gradient, D) * self.inv_rms, _norm_weight_gradient(self, gradient)


@mutant(norm.FastRootMeanSquareNorm, "forward")
def rms_norm_eps_outside_the_root(self: Any, x: Any, weight: Any) -> Any:
    """eps is added to the root instead of inside of it. With 1e-6 nothing shows but for vectors near zero; a model
    that was trained with the right formula gives slightly other logits."""
    self.x, self.weight = x, weight
    self.inv_rms = 1 / (current.xp.sqrt((x * x).mean(axis=-1, keepdims=True)) + self.eps)
    return x * self.inv_rms * weight


@mutant(norm.FastRootMeanSquareNorm, "forward")
def rms_norm_by_the_sum_of_squares(self: Any, x: Any, weight: Any) -> Any:
    """x is divided by its length, the root of the sum of squares, instead of by the root mean square: everything is
    sqrt(D) times too small."""
    D = x.shape[-1]
    y = _rms_norm_forward(self, x, weight)
    self.inv_rms = self.inv_rms / math.sqrt(D)
    return y / math.sqrt(D)


_rms_norm_forward = norm.FastRootMeanSquareNorm.forward


@mutant(norm.FastRootMeanSquareNorm, "backward")
def rms_norm_weight_gradient_of_x(self: Any, gradient: Any) -> Any:
    """The weight's gradient is formed with x instead of with the normalised x that the weight multiplied."""
    gradient_x, _ = _rms_norm_backward(self, gradient)
    return gradient_x, _norm_weight_gradient(self, gradient / self.inv_rms)


_rms_norm_backward = norm.FastRootMeanSquareNorm.backward


def _norm_weight_gradient(self: Any, gradient: Any) -> Any:
    return (gradient * _x_hat(self)).reshape((-1, gradient.shape[-1])).sum(axis=0)


@mutant(norm.FastStandardisation, "backward")
def layer_norm_backward_without_the_mean(self: Any, gradient: Any) -> Any:
    """The backward of LayerNorm takes out the part along x_hat and forgets the mean: the gradient of the subtracted
    mean(x) is missing."""
    _, *parameters = _layer_norm_backward(self, gradient)
    return (_projected(self, gradient, 1) * self.inv_std, *parameters)


_layer_norm_backward = norm.FastStandardisation.backward


@mutant(norm.FastStandardisation, "backward")
def layer_norm_bias_gradient_is_a_mean(self: Any, gradient: Any) -> Any:
    """The gradient of LayerNorm's bias is the mean over all rows instead of their sum."""
    gradient_x, gradient_weight, gradient_bias = _layer_norm_backward(self, gradient)
    return gradient_x, gradient_weight, gradient_bias / max(1, math.prod(gradient.shape[:-1]))


@mutant(norm.FastStandardisation, "forward")
def layer_norm_with_unbiased_variance(self: Any, x: Any, weight: Any, bias: Any) -> Any:
    """The variance in LayerNorm is divided by D - 1, which is what torch.var and x.std() give when one writes the norm
    by hand."""
    self.weight = weight
    deviation = x - x.mean(axis=-1, keepdims=True)
    variance = (deviation * deviation).sum(axis=-1, keepdims=True) / max(1, x.shape[-1] - 1)
    self.inv_std = 1 / current.xp.sqrt(variance + self.eps)
    self.x_hat = deviation * self.inv_std
    return self.x_hat * weight + bias


# ---- Activations and dropout -------------------------------------------------------------------


@mutant(activation.FastSilu, "backward")
def silu_backward_without_the_second_term(self: Any, gradient: Any) -> Any:
    """The product rule is half applied: the derivative of x sigmoid(x) is taken to be sigmoid(x)."""
    return gradient * self.sigmoid


@mutant(activation.FastSwiglu, "backward")
def swiglu_backward_swapped(self: Any, gradient: Any) -> Any:
    """The gradients of gate and up are returned in the wrong order. Both have the same shape, so nothing complains."""
    gradient_gate, gradient_up = _swiglu_backward(self, gradient)
    return gradient_up, gradient_gate


_swiglu_backward = activation.FastSwiglu.backward


@mutant(activation.FastSwiglu, "forward")
def swiglu_gates_with_a_sigmoid(self: Any, gate: Any, up: Any) -> Any:
    """The gate is sigmoid(gate) instead of silu(gate): that is a GLU and not a SwiGLU."""
    _swiglu_forward(self, gate, up)
    return self.sigmoid * up


_swiglu_forward = activation.FastSwiglu.forward


@mutant(activation.FastGelu, "backward")
def gelu_backward_without_the_density(self: Any, gradient: Any) -> Any:
    """The product rule is half applied: the derivative of x Phi(x) is taken to be Phi(x)."""
    return gradient * self.phi


@mutant(activation.FastGelu, "forward")
def gelu_without_the_root_of_two(self: Any, x: Any) -> Any:
    """Phi is (1 + erf(x)) / 2 with x where x / sqrt(2) belongs: a normal distribution of half the variance."""
    self.x = x
    self.phi = (1 + erf(x)) / 2
    return x * self.phi


add(
    "gelu_tanh_coefficient_mistyped",
    """The coefficient 0.044715 of the tanh form of GELU is mistyped as 0.44715. Forward and backward agree with each
    other, and the function is another one.""",
    activation.FastGeluTanh,
    "cubic",
    0.44715,
)


@mutant(FastRandomMask, "forward")
def dropout_not_scaled(self: Any, x: Any) -> Any:
    """Dropout does not divide by 1 - p in training, and evaluation does nothing about it: activations are larger in
    evaluation than the layers after them have learned."""
    _dropout_forward(self, x)
    self.scale = 1.0
    return x * self.mask


_dropout_forward = FastRandomMask.forward


@mutant(philox, "keep_mask")
def dropout_keeps_what_it_should_drop(shape: tuple[int, ...], drop_probability: float, key: Any) -> Any:
    """p is taken for the probability to keep, as the argument of old TensorFlow was: p = 0.1 drops nine tenths."""
    return _keep_mask(shape, 1 - drop_probability, key)


_keep_mask = philox.keep_mask


@mutant(FastRandomMask, "backward")
def dropout_backward_without_the_mask(self: Any, gradient: Any) -> Any:
    """The gradient of dropout is scaled and not masked: elements that were dropped get a gradient."""
    return gradient * self.scale

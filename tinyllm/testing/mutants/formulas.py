"""Mistakes in formulas that training runs by other texts: ops with a fast form, parts of fused ops.

Each is one change of the formula's text.
"""

from __future__ import annotations

from tinyllm.autograd.tensor import Op
from tinyllm.ops import activation, attention, lookup, loss, matrix, norm, rotary, softmaxes
from tinyllm.testing.mutants.planting import add, edited

_EDITS: tuple[tuple[type[Op], str, str, str, str], ...] = (
    (softmaxes.Softmax, "backward", "(gradient - mean)", "gradient", "The mean of the gradient is not subtracted."),
    (softmaxes.Softmax, "backward", "gradient * self.p).sum", "gradient).sum", "The mean is not weighted by p."),
    (softmaxes.Softmax, "forward", "-math.inf", "0", "What the mask hides counts as a score of 0."),
    (softmaxes.Softmax, "forward", "np.where(total == 0, 1, total)", "total", "A row that sees nothing is 0 / 0."),
    (attention.Scores, "forward", " * self.scale", "", "Scores are not scaled."),
    (attention.Scores, "backward", "@ self.k * self.scale", "@ self.k", "The gradient of q is not scaled."),
    (attention.Scores, "backward", "@ self.q * self.scale", "@ self.q", "The gradient of k is not scaled."),
    (attention.Scores, "backward", "gradient.swapaxes(-1, -2)", "gradient", "The gradient of k is not transposed."),
    (attention.Attention, "backward", "self.p.swapaxes(-1, -2)", "self.p",
     "P is not transposed in the gradient of v."),
    (attention.Attention, "backward", "sum_over_groups(gradient_v, self.G)", "gradient_v[:, : self.G]",
     "The gradient of v is that of the first heads, not the sum over the heads that share it."),
    (norm.RootMeanSquareNorm, "forward", "+ self.eps", "", "eps is left out."),
    (norm.RootMeanSquareNorm, "forward", ".mean(", ".sum(", "The sum of squares stands for their mean."),
    (norm.RootMeanSquareNorm, "backward", " - self.x_hat * projection", "", "The rms is taken for a constant."),
    (norm.RootMeanSquareNorm, "backward", "gradient * self.weight", "gradient", "The weight is missing."),
    (norm.RootMeanSquareNorm, "backward", "gradient_x, gradient * self.x_hat", "gradient_x, gradient",
     "The gradient of the weight is not multiplied by x_hat."),
    (norm.Standardisation, "backward", " - mean", "", "The mean is taken for a constant."),
    (norm.Standardisation, "backward", " - self.x_hat * projection", "", "The variance is taken for a constant."),
    (norm.Standardisation, "forward", "x - x.mean(axis=-1, keepdims=True)", "x", "The mean is not subtracted."),
    (rotary.Rope, "backward", "-self.sin", "self.sin", "The gradient is rotated forward, not back."),
    (rotary.Rope, "forward", "like(np.cos(angles), x)", "like(np.sin(angles), x)", "the sine stands for the cosine."),
    (matrix.LinearMap, "backward", "gradient @ self.weight", "gradient @ self.weight * 2",
     "the gradient is twice too large."),
    (matrix.LinearMap, "forward", "y if bias is None else y + bias", "y", "The bias is forgotten."),
    (matrix.Matmul, "backward", "gradient @ self.b.swapaxes(-1, -2)", "-gradient @ self.b.swapaxes(-1, -2)",
     "the gradient of a has the wrong sign."),
    (activation.Silu, "backward", "(1 - self.sigmoid)", "self.sigmoid", "s for 1 - s."),
    (activation.Gelu, "backward", " + self.x * density", "", "Phi is taken for a constant."),
    (activation.GeluTanh, "backward", "3 * self.cubic", "self.cubic", "The derivative of x^3 is x^2."),
    (activation.Swiglu, "backward", "gradient * self.up * slope", "gradient * slope", "up is missing."),
    (activation.Swiglu, "backward", "gradient * self.gate * self.sigmoid", "gradient * self.gate",
     "the sigmoid is missing in the gradient of up."),
    (loss.CrossEntropy, "backward", " - np.where(self.one_hot, weight, 0)", "", "The target is not subtracted."),
    (loss.CrossEntropy, "backward", "2 * self.z_loss", "self.z_loss", "The derivative of (ln Z)^2 lacks its 2."),
    (loss.CrossEntropy, "backward", "np.where(self.kept, gradient, 0)", "gradient + 0 * self.log_total",
     "Ignored targets have a gradient."),
    (loss.CrossEntropy, "forward", "np.where(self.kept, losses, 0)", "losses", "Ignored targets have a loss."),
    (loss.CrossEntropy, "forward", "(np.log(total) + largest)", "np.log(total)", "The shift is not added back."),
    (lookup.RandomMask, "backward", " / (1 - self.p)", "", "The gradient is not scaled."),
    (lookup.RandomMask, "forward", " / (1 - self.p)", "", "What is kept is not scaled."),
)  # fmt: skip

for _number, (_op, _method, _old, _new, _explanation) in enumerate(_EDITS):
    _text = f"In the formula of {_op.name}, {_method}: {_explanation[0].lower()}{_explanation[1:]}"
    add(f"{_op.name}_formula_{_number}", _text, _op, _method, edited(_op, _method, _old, _new))

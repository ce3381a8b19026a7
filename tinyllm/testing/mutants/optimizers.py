"""Mistakes in optimizers, learning-rate schedules and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm import optim
from tinyllm.optim import SGD, AdamW, Muon, Optimizer, muon
from tinyllm.testing.mutants.planting import add, mutant

# ---- Steps -------------------------------------------------------------------------------------


def _into_gradient(self: Any, theta: Any, gradient: Any, step: Any) -> Any:
    return gradient + step.group["weight_decay"] * theta


def _without_rate(self: Any, theta: Any, gradient: Any, step: Any) -> Any:
    theta *= 1 - step.group["weight_decay"]
    return gradient


def _after(self: Any, theta: Any, gradient: Any, step: Any) -> Any:
    theta *= 1 + step.rate * step.group["weight_decay"]
    return gradient


def _everything(parameters: Any, weight_decay: float) -> Any:
    return [{"params": list(parameters), "weight_decay": weight_decay}]


add(
    "weight_decay_in_the_gradient",
    """Weight decay is added to the gradient (L2) instead of shrinking the weights (decoupled): Adam divides it by the
    root of v, so that weights with large gradients hardly decay.""",
    Optimizer, "decayed", _into_gradient,
)  # fmt: skip
add(
    "weight_decay_of_norms_too",
    """Norm weights and biases decay as well, which pulls norms from 1 towards 0.""",
    optim, "matrices_decayed", _everything,
)  # fmt: skip
add(
    "weight_decay_without_the_rate",
    """Weights shrink by the coefficient itself instead of by rate times coefficient: a decay of 0.1 takes a tenth of
    all weights away in each step.""",
    Optimizer, "decayed", _without_rate,
)  # fmt: skip
add(
    "weight_decay_with_the_wrong_sign",
    """Weights grow by rate times coefficient instead of shrinking.""",
    Optimizer, "decayed", _after,
)  # fmt: skip


@mutant(Optimizer, "step")
def schedule_factor_ignored(self: Any, gradients: Any = None, factor: float = 1.0, *more: Any) -> None:
    """The factor that the schedule gives is not used: no warm-up and no decay, however they are set."""
    _optimizer_step(self, gradients, 1.0, *more)


_optimizer_step = Optimizer.step
_add_group = Optimizer.add_param_group


@mutant(Optimizer, "add_param_group")
def state_shared_by_parameters(self: Any, param_group: Any) -> None:
    """State is made once and used for all parameters of a shape, as `[zeros] * n` does in Python: moments of different
    weights run into one another."""
    _add_group(self, param_group)
    of_shape: dict[Any, Any] = {}
    for name, parameter in self.parameters.items():
        self.state[name] = of_shape.setdefault(parameter.shape, self.state[name])


@mutant(Optimizer, "load_state_arrays")
def resume_forgets_the_steps(self: Any, arrays: Any, steps: int) -> None:
    """Moments are restored and the number of steps is not: bias correction begins anew, and the first steps after a
    resume are several times too large or too small."""
    _load(self, arrays, 0)


_load = Optimizer.load_state_arrays

# ---- SGD and AdamW -----------------------------------------------------------------------------


@mutant(SGD, "update")
def sgd_momentum_not_applied(self: Any, theta: Any, gradient: Any, state: Any, step: Any) -> None:
    """The velocity is kept up to date and the parameters move by the plain gradient."""
    state["velocity"][...] = step.group["momentum"] * state["velocity"] + gradient
    theta -= step.rate * gradient


@mutant(SGD, "update")
def sgd_velocity_dampened(self: Any, theta: Any, gradient: Any, state: Any, step: Any) -> None:
    """The gradient enters the velocity with 1 - momentum, as in Adam's m: with momentum 0.9 the steps are ten times
    smaller than those of the formula."""
    mu = step.group["momentum"]
    state["velocity"][...] = mu * state["velocity"] + (1 - mu) * gradient
    theta -= step.rate * state["velocity"]


def _adam(
    correct: bool = True,
    swap: bool = False,
    eps_inside: bool = False,
    square: bool = True,
    blend: bool = True,
) -> Callable[..., None]:
    """AdamW.update with the mistakes that the arguments name."""

    def update(self: Any, theta: Any, gradient: Any, state: Any, step: Any) -> None:
        beta1, beta2 = step.group["betas"][::-1] if swap else step.group["betas"]
        rate, eps = step.rate, step.group["eps"]
        second = gradient * gradient if square else np.abs(gradient)
        state["m"][...] = beta1 * state["m"] + ((1 - beta1) if blend else 1) * gradient
        state["v"][...] = beta2 * state["v"] + (1 - beta2) * second
        m = state["m"] / (1 - beta1**step.number) if correct else state["m"]
        v = state["v"] / (1 - beta2**step.number) if correct else state["v"]
        theta -= rate * (m / np.sqrt(v + eps) if eps_inside else m / (np.sqrt(v) + eps))

    return update


add(
    "adam_without_bias_correction",
    """m and v are used as they are, although they begin at zero: the first steps are (1 - beta1) / sqrt(1 - beta2)
    times as large as they should be.""",
    AdamW, "update", _adam(correct=False),
)  # fmt: skip
add(
    "adam_betas_exchanged",
    """beta2 is used for the mean and beta1 for the mean square: the direction lags far behind, and the scale jumps.""",
    AdamW, "update", _adam(swap=True),
)  # fmt: skip
add(
    "adam_eps_inside_the_root",
    """eps is added inside the root: 1e-8 acts like 1e-4, and small gradients hardly move anything.""",
    AdamW, "update", _adam(eps_inside=True),
)  # fmt: skip
add(
    "adam_without_the_square",
    """v averages the magnitude of the gradient instead of its square, and the root is still taken: steps depend on
    the scale of the loss.""",
    AdamW, "update", _adam(square=False),
)  # fmt: skip
add(
    "adam_mean_without_its_weight",
    """m = beta1 m + g, as a velocity, without the factor 1 - beta1: steps are ten times too large.""",
    AdamW, "update", _adam(blend=False),
)  # fmt: skip

# ---- Muon --------------------------------------------------------------------------------------


@mutant(Muon, "update")
def muon_without_nesterov(self: Any, theta: Any, gradient: Any, state: Any, step: Any) -> None:
    """The momentum itself is made orthogonal, without the step ahead of Nesterov."""
    momentum, mu = state["momentum"], step.group["momentum"]
    momentum[...] = mu * momentum + (1 - mu) * gradient
    rows, columns = theta.shape
    theta -= optim.orthogonalise(momentum) * (step.rate * math.sqrt(max(1.0, rows / columns)))


@mutant(Muon, "update")
def muon_without_the_shape_factor(self: Any, theta: Any, gradient: Any, state: Any, step: Any) -> None:
    """The step is not multiplied by sqrt(rows / columns): tall matrices move too little."""
    momentum, mu = state["momentum"], step.group["momentum"]
    momentum[...] = mu * momentum + (1 - mu) * gradient
    theta -= step.rate * optim.orthogonalise((1 - mu) * gradient + mu * momentum)


add(
    "newton_schulz_coefficient_mistyped",
    """The last coefficient of the Newton-Schulz iteration is 1.0315 instead of 2.0315: singular values do not settle
    around 1.""",
    muon, "NEWTON_SCHULZ", (3.4445, -4.7750, 1.0315),
)  # fmt: skip


@mutant(optim, "orthogonalise")
def newton_schulz_not_normalised(G: Any, steps: int = 5) -> Any:
    """The matrix is not divided by its norm first. The iteration converges for singular values below about 1.4, and
    explodes for larger ones."""
    a, b, c = muon.NEWTON_SCHULZ
    X = G
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


@mutant(optim, "orthogonalise")
def newton_schulz_not_iterated(G: Any, steps: int = 5) -> Any:
    """The matrix is divided by its norm and the iteration is left out: a step of plain momentum of length 1."""
    return G / (math.sqrt(float((G * G).sum())) + 1e-7)


# ---- Clipping and schedules --------------------------------------------------------------------


@mutant(optim, "clip_grad_norm")
def clip_each_tensor_by_itself(gradients: Any, max_norm: float) -> float:
    """Each tensor is clipped by its own norm instead of all by the global one: the direction of the step changes, and
    the sum may still be far too long."""
    norms = [_clip([gradient], max_norm) for gradient in gradients]
    return math.sqrt(sum(norm * norm for norm in norms))


@mutant(optim, "clip_scale")
def clip_scales_the_wrong_way(norm: float, max_norm: float) -> float:
    """Gradients are multiplied by norm / max_norm: what is too long becomes longer."""
    return norm / max_norm if norm > max_norm else 1.0


@mutant(optim, "clip_scale")
def clip_scales_always(norm: float, max_norm: float) -> float:
    """Every gradient is scaled to max_norm, also one that is shorter: the step no longer gets smaller towards a
    minimum."""
    return max_norm / norm if norm else 1.0


@mutant(optim, "clip_grad_norm")
def clip_by_the_sum_of_norms(gradients: Any, max_norm: float) -> float:
    """The global norm is taken to be the sum of the tensors' norms instead of the root of the sum of squares: gradients
    are clipped far too much, the more the more tensors there are."""
    arrays = list(gradients)
    norm = sum(float(np.linalg.norm(array)) for array in arrays)
    if norm > max_norm:
        for array in arrays:
            array *= max_norm / norm
    return norm


_clip = optim.clip_grad_norm
_cosine = optim.cosine_schedule


@mutant(optim, "cosine_schedule")
def warm_up_begins_at_zero(
    step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """The warm-up is off by one: the rate of the first step is 0, and the first batch is computed for nothing."""
    if step < warmup_steps:
        return step / warmup_steps
    return _cosine(step, total_steps, warmup_steps, final_factor)


@mutant(optim, "cosine_schedule")
def cosine_ends_at_zero_always(
    step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """The final factor is ignored: the rate falls to zero where it should stay above."""
    return _cosine(step, total_steps, warmup_steps, 0.0)


@mutant(optim, "cosine_schedule")
def cosine_counts_the_warm_up(
    step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """The cosine is taken at step / total instead of from the end of the warm-up: the rate jumps down when the warm-up
    ends."""
    if step < warmup_steps:
        return _cosine(step, total_steps, warmup_steps, final_factor)
    return _cosine(step, total_steps, 0, final_factor)


@mutant(optim, "cosine_schedule")
def cosine_runs_a_whole_wave(
    step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """The argument of the cosine is 2 pi instead of pi: the rate is lowest in the middle and back at its peak at the
    end."""
    if step < warmup_steps:
        return _cosine(step, total_steps, warmup_steps, final_factor)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return final_factor + (1 - final_factor) * (1 + math.cos(2 * math.pi * progress)) / 2

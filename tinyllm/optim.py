"""Optimizers, learning-rate schedules and gradient clipping, on Tensors alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from tinyllm import backend
from tinyllm.tensor import Tensor

NamedParameters = Iterable[tuple[str, Tensor]]


class OptimizerSettings(Protocol):
    """The numbers that an optimizer can be built from; TrainConfig has them."""

    @property
    def learning_rate(self) -> float:
        """The peak rate."""

    @property
    def beta1(self) -> float:
        """The decay of the mean gradient."""

    @property
    def beta2(self) -> float:
        """The decay of the mean square gradient."""

    @property
    def weight_decay(self) -> float:
        """The decoupled decay of matrices, times the rate."""

    @property
    def muon_learning_rate(self) -> float:
        """The peak rate of Muon."""

    @property
    def muon_momentum(self) -> float:
        """The momentum of Muon."""

    @property
    def muon_weight_decay(self) -> float:
        """The decoupled decay of Muon's matrices, times its rate."""


class Optimizer:
    """What all optimizers share: named parameters, their state arrays, and the call that makes a step.

    A subclass says in `state_names` which arrays it keeps for each parameter, and in `update` how one
    parameter changes.

    Args:
        parameters: pairs of name and Tensor, as `model.named_parameters()` gives.
        learning_rate: the rate at factor 1. weight_decay: decoupled, times the rate, on matrices alone
            (norms and biases are not decayed).
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    matrices_only: ClassVar[bool] = False
    """Whether it is meant for the matrices inside blocks alone, with AdamW for the rest."""

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        """The optimizer that `settings` ask for; a subclass takes the ones that it knows."""
        return cls(parameters, settings.learning_rate, settings.weight_decay)

    def __init__(self, parameters: NamedParameters, learning_rate: float, weight_decay: float = 0.0) -> None:
        self.parameters = dict(parameters)
        if not self.parameters:
            raise ValueError(f"{type(self).__name__} got no parameters")
        if not learning_rate >= 0 or not weight_decay >= 0:
            raise ValueError(
                f"learning_rate={learning_rate} and weight_decay={weight_decay} must not be negative"
            )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.steps = 0
        self.state = {
            name: {key: backend.xp.zeros_like(parameter.data) for key in self.state_names}
            for name, parameter in self.parameters.items()
        }

    def step(
        self,
        gradients: Mapping[str, Any] | None = None,
        factor: float = 1.0,
        names: Collection[str] | None = None,
        number: int | None = None,
        where: Any = None,
    ) -> None:
        """Change parameters in place.

        Args:
            gradients: an array for each name; without it, the parameters' `.grad`.
            factor: what a schedule multiplies the learning rate with in this step.
            names: change these parameters alone, where several workers share a step; other names are passed over.
            number: the number of this step, from 1, for all who share it; None: one more than `steps`.
            where: a boolean on a device; the step is made if it is true. None: it is made.

        Raises KeyError or ValueError for a parameter without a gradient, before anything is changed.
        """
        found = self.find(gradients)
        self.steps = self.steps + 1 if number is None else number
        rate = self.learning_rate * factor
        with backend.only_where(where):
            for name, parameter in self.parameters.items():
                if names is not None and name not in names:
                    continue
                theta = parameter.data
                if self.weight_decay and theta.ndim >= 2:
                    _scale(theta, 1 - rate * self.weight_decay)
                self.update(theta, found[name], self.state[name], rate)

    def find(self, gradients: Mapping[str, Any] | None) -> dict[str, Any]:
        """The gradient of each parameter by name; raises KeyError or ValueError when one is missing."""
        found = {}
        for name, parameter in self.parameters.items():
            gradient = parameter.grad if gradients is None else gradients[name]
            if gradient is None:
                raise ValueError(f"parameter {name!r} has no gradient; call backward() first")
            found[name] = gradient
        return found

    def update(self, theta: Any, gradient: Any, state: dict[str, Any], rate: float) -> None:
        """Change the parameter array `theta` and its state in place, by functions that are `backend.elementwise`."""
        raise TypeError(f"{type(self).__name__} defines no update(); an Optimizer subclass must")

    def state_dict(self) -> dict[str, Any]:
        """The state arrays as `name.key`; `steps` is a plain number beside them."""
        return {
            f"{name}.{key}": array for name, arrays in self.state.items() for key, array in arrays.items()
        }

    def load_state_dict(self, arrays: Mapping[str, Any], steps: int) -> None:
        """Copy state arrays back; raises ValueError, with nothing changed, when a name or shape does not fit."""
        self.check_state(arrays)
        for key, array in self.state_dict().items():
            array[...] = backend.asarray(arrays[key])
        self.steps = steps

    def check_state(self, arrays: Mapping[str, Any]) -> None:
        """Raise ValueError when a state array is missing, has another shape, or is of other numbers."""
        for key, array in self.state_dict().items():
            if key not in arrays:
                raise ValueError(f"optimizer state {key!r} is missing")
            if tuple(arrays[key].shape) != tuple(array.shape):
                raise ValueError(
                    f"optimizer state {key!r} has shape {tuple(arrays[key].shape)}, expected {array.shape}"
                )
            if arrays[key].dtype.kind != "f":
                raise ValueError(
                    f"optimizer state {key!r} is of {arrays[key].dtype}, expected floating-point numbers"
                )


@backend.elementwise
def _scale(array: Any, factor: float) -> None:
    array *= factor


class SGD(Optimizer):
    """theta -= rate v, v = momentum v + g."""

    state_names = ("velocity",)

    def __init__(
        self,
        parameters: NamedParameters,
        learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        self.momentum = momentum

    def update(self, theta: Any, gradient: Any, state: dict[str, Any], rate: float) -> None:
        _sgd(theta, gradient, state["velocity"], self.momentum, rate)


@backend.elementwise
def _sgd(theta: Any, g: Any, velocity: Any, momentum: float, rate: float) -> None:
    velocity *= momentum
    velocity += g
    theta -= rate * velocity


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    theta -= rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """

    state_names = ("m", "v")

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        betas = (settings.beta1, settings.beta2)
        return cls(parameters, settings.learning_rate, betas, weight_decay=settings.weight_decay)

    def __init__(
        self,
        parameters: NamedParameters,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; both must be at least 0 and below 1")
        self.betas = betas
        self.eps = eps

    def update(self, theta: Any, gradient: Any, state: dict[str, Any], rate: float) -> None:
        beta1, beta2 = self.betas
        # sqrt(v / c2) + eps = (sqrt(v) + eps sqrt(c2)) / sqrt(c2), which saves a pass over v.
        root_c2 = math.sqrt(1 - beta2**self.steps)
        step_size = rate * root_c2 / (1 - beta1**self.steps)
        for part in backend.cache_parts(theta, gradient, state["m"], state["v"]):
            _adamw(*part, beta1, beta2, step_size, self.eps * root_c2)


@backend.elementwise
def _adamw(
    theta: Any, g: Any, m: Any, v: Any, beta1: float, beta2: float, step_size: float, eps: float
) -> None:
    xp = backend.xp
    scratch = g * (1 - beta1)
    m *= beta1
    m += scratch
    xp.multiply(g, g, out=scratch)
    scratch *= 1 - beta2
    v *= beta2
    v += scratch
    xp.sqrt(v, out=scratch)
    scratch += eps
    xp.divide(m, scratch, out=scratch)
    scratch *= step_size
    theta -= scratch


class Muon(Optimizer):
    """Momentum whose matrices are replaced by the nearest orthogonal ones; for the matrices inside blocks.

    M = mu M + (1 - mu) G; N = (1 - mu) G + mu M (Nesterov);
    theta -= rate sqrt(max(1, rows/columns)) orthogonalise(N).
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    state_names = ("momentum",)
    matrices_only = True

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        return cls(
            parameters, settings.muon_learning_rate, settings.muon_momentum, settings.muon_weight_decay
        )

    def __init__(
        self,
        parameters: NamedParameters,
        learning_rate: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, learning_rate, weight_decay)
        for name, parameter in self.parameters.items():
            if parameter.ndim != 2:
                raise ValueError(f"Muon changes matrices; parameter {name!r} has shape {parameter.shape}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}; it must be at least 0 and below 1")
        self.momentum = momentum

    def update(self, theta: Any, gradient: Any, state: dict[str, Any], rate: float) -> None:
        scaled = gradient * (1 - self.momentum)
        _muon_momentum(state["momentum"], scaled, self.momentum)
        rows, columns = theta.shape
        _muon_step(theta, orthogonalise(scaled), rate * math.sqrt(max(1.0, rows / columns)))


@backend.elementwise
def _muon_momentum(momentum: Any, scaled: Any, mu: float) -> None:
    momentum *= mu
    momentum += scaled
    scaled += mu * momentum


@backend.elementwise
def _muon_step(theta: Any, direction: Any, factor: float) -> None:
    theta -= direction * factor


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al., 2024: they raise small singular values fast, to within 0.7 to 1.2 of 1."""


def orthogonalise(G: Any, steps: int = 5) -> Any:
    """About U V^T of the singular value decomposition G = U S V^T, by Newton-Schulz iteration.

    G: (n, m) -> (n, m). X = a X + (b A + c A^2) X with A = X X^T, from X = G / |G|.
    """
    a, b, c = NEWTON_SCHULZ
    rows, columns = G.shape
    X = G.T if rows > columns else G
    X = X / (backend.xp.sqrt((X * X).sum()) + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        B = A @ A
        B *= c
        B += b * A
        X = a * X + B @ X
    return X.T if rows > columns else X


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon, "sgd": SGD}
"""The optimizers that `TrainConfig.optimizer` names."""


class OptimizerGroup:
    """Several optimizers as one, each with parameters of its own.

    Raises ValueError when a parameter belongs to two of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        owners: dict[int, str] = {}
        for optimizer in self.optimizers:
            for name, parameter in optimizer.parameters.items():
                if id(parameter) in owners:
                    raise ValueError(f"parameter {name!r} belongs to two optimizers")
                owners[id(parameter)] = name

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return self.optimizers[0].steps

    def step(
        self,
        gradients: Mapping[str, Any] | None = None,
        factor: float = 1.0,
        names: Collection[str] | None = None,
        number: int | None = None,
        where: Any = None,
    ) -> None:
        """One step of each optimizer; see Optimizer.step. All gradients are there before anything is changed."""
        for optimizer in self.optimizers:
            optimizer.find(gradients)
        for optimizer in self.optimizers:
            optimizer.step(gradients, factor, names, number, where)

    def state_dict(self) -> dict[str, Any]:
        """The state arrays of all optimizers."""
        return {key: array for optimizer in self.optimizers for key, array in optimizer.state_dict().items()}

    def load_state_dict(self, arrays: Mapping[str, Any], steps: int) -> None:
        """Copy state arrays back; raises ValueError, with nothing changed, when a name or shape does not fit."""
        for optimizer in self.optimizers:
            optimizer.check_state(arrays)
        for optimizer in self.optimizers:
            optimizer.load_state_dict(arrays, steps)


def cosine_schedule(step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> float:
    """The factor of the learning rate in step `step` (from 0): a linear warm-up, then half a cosine.

    It rises to 1 over `warmup_steps` and falls to `final_factor` in the last of `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2


def linear_schedule(step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> float:
    """As `cosine_schedule`, with a straight line down."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 + (final_factor - 1) * progress


class NonFiniteNormError(ArithmeticError):
    """A gradient norm that is infinite or not a number, as `norm` says: the step must not be made."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"the global gradient norm is {norm}")
        self.norm = norm


def squared_norm(array: Any) -> float:
    """The sum of squares, infinite where float32 overflows."""
    flat = array.reshape(-1)
    with backend.ignore_overflow():
        return float(backend.read(backend.xp.dot(flat, flat)))


def global_norm(arrays: Sequence[Any], squares: Iterable[float] | None = None) -> float:
    """The Euclidean norm of all arrays together.

    squares: the `squared_norm` of each, where it is known. Raises NonFiniteNormError when the norm is not finite.
    """
    total = sum(map(squared_norm, arrays) if squares is None else squares)
    if math.isinf(total):
        # The squares may overflow where the norm does not.
        total = sum(float(backend.read((array.astype("float64") ** 2).sum())) for array in arrays)
    norm = math.sqrt(total) if total >= 0 else math.nan
    if not math.isfinite(norm):
        raise NonFiniteNormError(norm)
    return norm


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied with, so that their norm is at most `max_norm`."""
    return max_norm / norm if norm > max_norm else 1.0


def clip_grad_norm(gradients: Iterable[Any], max_norm: float) -> float:
    """Scale gradients in place so that their global Euclidean norm is at most `max_norm`; returns the norm before.

    gradients: arrays, or Tensors whose `.grad` is meant.

    Raises NonFiniteNormError, with nothing changed, when the norm is not finite.
    """
    arrays = [item.grad if isinstance(item, Tensor) else item for item in gradients]
    arrays = [array for array in arrays if array is not None]
    norm = global_norm(arrays)
    scale = clip_scale(norm, max_norm)
    if scale != 1:
        for array in arrays:
            array *= scale
    return norm

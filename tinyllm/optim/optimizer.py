"""What optimizers share: named parameters, their state, the call that makes a step; and several as one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current

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
        learning_rate: the rate at factor 1. weight_decay: decoupled, times the rate, of parameters that `decays` names.
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
            name: {key: current.xp.zeros_like(parameter.data) for key in self.state_names}
            for name, parameter in self.parameters.items()
        }

    def step(
        self,
        gradients: Mapping[str, Array] | None = None,
        factor: float = 1.0,
        names: Collection[str] | None = None,
        number: int | None = None,
        where: Array | None = None,
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
        with backend.masked_updates(where):
            for name, parameter in self.parameters.items():
                if names is not None and name not in names:
                    continue
                if self.weight_decay and self.decays(parameter.data):
                    _scale(parameter.data, 1 - rate * self.weight_decay)
                self.update(parameter.data, found[name], self.state[name], rate)

    def find(self, gradients: Mapping[str, Array] | None) -> dict[str, Array]:
        """The gradient of each parameter by name; raises KeyError or ValueError when one is missing."""
        found = {}
        for name, parameter in self.parameters.items():
            gradient = parameter.grad if gradients is None else gradients[name]
            if gradient is None:
                raise ValueError(f"parameter {name!r} has no gradient; call backward() first")
            found[name] = gradient
        return found

    def decays(self, theta: Array) -> bool:
        """Whether weight decay applies to this parameter array."""
        return True

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], rate: float) -> None:
        """Change the parameter array `theta` and its state in place, by functions that are `backend.elementwise`."""
        raise TypeError(f"{type(self).__name__} defines no update(); an Optimizer subclass must")

    def state_dict(self) -> dict[str, Array]:
        """The state arrays as `name.key`; `steps` is a plain number beside them."""
        return {
            f"{name}.{key}": array for name, arrays in self.state.items() for key, array in arrays.items()
        }

    def load_state_dict(self, arrays: Mapping[str, Array], steps: int) -> None:
        """Copy state arrays back; raises ValueError, with nothing changed, when a name or shape does not fit."""
        self.check_state(arrays)
        for key, array in self.state_dict().items():
            array[...] = backend.asarray(arrays[key])
        self.steps = steps

    def check_state(self, arrays: Mapping[str, Array]) -> None:
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
def _scale(array: Array, factor: float) -> None:
    array *= factor


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
        gradients: Mapping[str, Array] | None = None,
        factor: float = 1.0,
        names: Collection[str] | None = None,
        number: int | None = None,
        where: Array | None = None,
    ) -> None:
        """One step of each optimizer; see Optimizer.step. All gradients are there before anything is changed."""
        for optimizer in self.optimizers:
            optimizer.find(gradients)
        for optimizer in self.optimizers:
            optimizer.step(gradients, factor, names, number, where)

    def state_dict(self) -> dict[str, Array]:
        """The state arrays of all optimizers."""
        return {key: array for optimizer in self.optimizers for key, array in optimizer.state_dict().items()}

    def load_state_dict(self, arrays: Mapping[str, Array], steps: int) -> None:
        """Copy state arrays back; raises ValueError, with nothing changed, when a name or shape does not fit."""
        for optimizer in self.optimizers:
            optimizer.check_state(arrays)
        for optimizer in self.optimizers:
            optimizer.load_state_dict(arrays, steps)

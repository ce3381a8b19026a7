"""What optimizers share: named parameters, their state, the call that makes a step; and several as one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current
from tinyllm.system.wording import shown

NamedParameters = Iterable[tuple[str, Tensor]]
Params = Iterable[Tensor] | NamedParameters | Iterable[Mapping[str, Any]]
"""What an optimizer is made of: see `Optimizer`."""


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


class Step(NamedTuple):
    """What one update is told beside the arrays that it changes."""

    rate: float
    """The group's `lr` times the factor of the schedule."""
    number: int
    """Which update of this parameter it is, from 1."""
    group: Mapping[str, Any]
    """The settings of the parameter's group."""


class Optimizer:
    """What all optimizers share: groups of parameters with their settings, state arrays, and the call to make a step.

    A subclass says in `state_names` which arrays it keeps for each parameter, and in `update` how one of them changes.

    Args:
        params: Tensors, as `model.parameters()` gives them; or pairs of name and Tensor, as `model.named_parameters()`
            does; or dictionaries of such `params` and of settings of their own. Without names they are "0", "1", ...
        lr: the rate at factor 1. weight_decay: shrinks every parameter of the group.
        decoupled_weight_decay: theta shrinks by lr weight_decay theta; otherwise weight_decay theta is added to the
            gradient.
        settings: what else `update` reads from a group.

    Attributes:
        param_groups: what `step` reads the settings from: `for group in optimizer.param_groups: group["lr"] = rate`.
        parameters: all of them by name. state: the state arrays by name.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    matrices_only: ClassVar[bool] = False
    """Whether it is meant for the matrices inside blocks alone, with AdamW for the rest."""

    @classmethod
    def from_settings(cls, parameters: NamedParameters, settings: OptimizerSettings) -> Optimizer:
        """The optimizer that `settings` ask for; a subclass takes the ones that it knows."""
        return cls(
            matrices_decayed(parameters, settings.weight_decay),
            settings.learning_rate,
            0.0,
            decoupled_weight_decay=True,
        )

    def __init__(
        self, params: Params, lr: float, weight_decay: float, *, decoupled_weight_decay: bool, **settings: Any
    ) -> None:
        self.defaults = {
            "lr": lr, "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay, **settings
        }  # fmt: skip
        self.param_groups: list[dict[str, Any]] = []
        self.parameters: dict[str, Tensor] = {}
        self.state: dict[str, dict[str, Array]] = {}
        self.steps = 0
        self._missed: dict[str, int] = {}
        """How many of the steps each parameter sat out, for want of a gradient."""
        if isinstance(params, Tensor) or not isinstance(params, Iterable):
            raise TypeError(
                f"{type(self).__name__} takes an iterable of parameters, such as model.parameters(); got a "
                f"{type(params).__name__}"
            )
        given: list[Any] = list(params)
        if not given:
            raise ValueError(f"{type(self).__name__} got no parameters")
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            self.add_param_group(group)

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Add parameters, param_group["params"], with settings of their own; what is left out are the defaults."""
        params = param_group["params"]
        named: dict[str, Tensor] = {}
        for item in [params] if isinstance(params, Tensor) else params:
            name, tensor = item if isinstance(item, tuple) else (str(len(self.parameters) + len(named)), item)
            if not isinstance(tensor, Tensor) or tensor.op is not None:
                raise TypeError(
                    f"parameter {name!r} must be a leaf Tensor, such as a Parameter; got {shown(tensor)}"
                )
            if name in self.parameters or name in named:
                raise ValueError(f"parameter {name!r} is given twice")
            named[name] = tensor
        known = {id(tensor) for tensor in self.parameters.values()}
        if len({id(tensor) for tensor in named.values()} - known) < len(named):
            raise ValueError("a parameter is given twice; each belongs to one group")
        group = {**self.defaults, **param_group, "params": list(named.values()), "param_names": list(named)}
        self._check(group)
        self.param_groups.append(group)
        self.parameters |= named
        for name, tensor in named.items():
            self.state[name] = {key: current.xp.zeros_like(tensor.data) for key in self.state_names}

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for settings of a group that make no step."""
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name}={group[name]}; it must be at least 0")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or with False fill them with zeros."""
        for parameter in self.parameters.values():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad[...] = 0

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
            gradients: an array for each name; without it, the parameters' `.grad`, and those that have none stay.
            factor: what a schedule multiplies the learning rate with in this step.
            names: change these parameters alone, where several workers share a step; other names are passed over.
            number: the number of this step, from 1, for all who share it; None: one more than `steps`.
            where: a boolean on a device; the step is made if it is true. None: it is made.

        Raises KeyError for a name without a gradient, and ValueError where no parameter has one, before anything is
        changed.
        """
        found = self.find(gradients)
        self.steps = self.steps + 1 if number is None else number
        with backend.masked_updates(where):
            for group in self.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    if names is not None and name not in names:
                        continue
                    gradient, missed = found[name], self._missed.get(name, 0)
                    if gradient is None:
                        self._missed[name] = missed + 1
                        continue
                    step = Step(group["lr"] * factor, self.steps - missed, group)
                    gradient = self.decayed(parameter.data, gradient, step)
                    self.update(parameter.data, gradient, self.state[name], step)

    def find(self, gradients: Mapping[str, Array] | None) -> dict[str, Array | None]:
        """The gradient of each parameter by name; raises KeyError where one of `gradients` is missing."""
        if gradients is not None:
            return {name: gradients[name] for name in self.parameters}
        found = {name: parameter.grad for name, parameter in self.parameters.items()}
        if all(gradient is None for gradient in found.values()):
            raise ValueError(
                f"none of the parameters ({next(iter(found))!r}, ...) has a gradient; call backward() first"
            )
        return found

    def decayed(self, theta: Array, gradient: Array, step: Step) -> Array:
        """Weight decay: of the parameter array `theta` in place, or in the gradient that is returned."""
        decay = step.group["weight_decay"]
        if not decay:
            return gradient
        if step.group["decoupled_weight_decay"]:
            _scale(theta, 1 - step.rate * decay)
            return gradient
        return gradient + decay * theta

    def update(self, theta: Array, gradient: Array, state: dict[str, Array], step: Step) -> None:
        """Change the parameter array `theta` and its state in place, by functions that are `backend.elementwise`."""
        raise TypeError(f"{type(self).__name__} defines no update(); an Optimizer subclass must")

    def state_arrays(self) -> dict[str, Array]:
        """The state arrays as `name.key`; `steps` is a plain number beside them."""
        return {
            f"{name}.{key}": array for name, arrays in self.state.items() for key, array in arrays.items()
        }

    def load_state_arrays(self, arrays: Mapping[str, Array], steps: int) -> None:
        """Copy state arrays back; raises ValueError, with nothing changed, when a name or shape does not fit."""
        self.check_state(arrays)
        for key, array in self.state_arrays().items():
            array[...] = backend.asarray(arrays[key])
        self.steps = steps
        self._missed = {}

    def check_state(self, arrays: Mapping[str, Array]) -> None:
        """Raise ValueError when a state array is missing, has another shape, or is of other numbers."""
        for key, array in self.state_arrays().items():
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

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, and `tinyllm.save`: `state`, by name, and `param_groups`, with names."""
        state = {
            name: {"step": self.steps - self._missed.get(name, 0), **arrays}
            for name, arrays in self.state.items()
        }
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            | {"params": list(group["param_names"])}
            for group in self.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state and settings; raises ValueError, with nothing changed, when they are of other parameters."""
        names = [group["param_names"] for group in self.param_groups]
        if [list(group["params"]) for group in state_dict["param_groups"]] != names:
            raise ValueError("the state is of other parameters, or of other groups of them")
        arrays = {
            f"{name}.{key}": value.data if isinstance(value, Tensor) else value
            for name, values in state_dict["state"].items()
            for key, value in values.items()
            if key != "step"
        }
        made = {name: int(values["step"]) for name, values in state_dict["state"].items()}
        self.load_state_arrays(arrays, max(made.values()))
        self._missed = {name: self.steps - count for name, count in made.items() if count != self.steps}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})


def matrices_decayed(parameters: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Groups in which matrices decay alone: vectors are the weights of norms, whose scale is meant to be free."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}
    ]  # fmt: skip
    for name, parameter in parameters:
        groups[parameter.ndim < 2]["params"].append((name, parameter))
    return [group for group in groups if group["params"]]


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
        return {
            key: array for optimizer in self.optimizers for key, array in optimizer.state_arrays().items()
        }

    def load_state_dict(self, arrays: Mapping[str, Array], steps: int) -> None:
        """Copy state arrays back; raises ValueError, with nothing changed, when a name or shape does not fit."""
        for optimizer in self.optimizers:
            optimizer.check_state(arrays)
        for optimizer in self.optimizers:
            optimizer.load_state_arrays(arrays, steps)

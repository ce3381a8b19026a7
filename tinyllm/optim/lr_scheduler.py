"""A schedule that changes the rates of an optimizer's groups, for a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinyllm.optim.optimizer import Optimizer


class LambdaLR:
    """The rate of each group is the one that it began with times `lr_lambda(number of calls of step)`; as torch's.

        schedule = LambdaLR(optimizer, lambda step: cosine_schedule(step, total_steps, warmup_steps=10))

    lr_lambda: a function of the number, or one for each group.
    """

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]]
    ) -> None:
        groups = optimizer.param_groups
        self.optimizer = optimizer
        self.lr_lambdas = [lr_lambda] * len(groups) if callable(lr_lambda) else list(lr_lambda)
        if len(self.lr_lambdas) != len(groups):
            raise ValueError(f"{len(self.lr_lambdas)} functions for {len(groups)} groups; give one for each")
        for group in groups:
            group.setdefault("initial_lr", group["lr"])
        self.last_epoch = -1
        self.step()

    def step(self) -> None:
        """Go on to the next number; called after each step of the optimizer."""
        self.last_epoch += 1
        for group, factor in zip(self.optimizer.param_groups, self.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """The rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """The number of calls; the rates are with the optimizer's state."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.last_epoch = state_dict["last_epoch"]

"""Which optimizer schedule and clipping a TrainConfig asks for."""

from __future__ import annotations

from tinyllm.models import TransformerLM
from tinyllm.optim import OPTIMIZERS, AdamW, OptimizerGroup, cosine_schedule, linear_schedule
from tinyllm.training.config import TrainConfig

SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def build_optimizer(model: TransformerLM, config: TrainConfig) -> OptimizerGroup:
    """The optimizer of the config; where it is for matrices only, AdamW changes the other parameters."""
    chosen = OPTIMIZERS[config.optimizer]
    named = dict(model.named_parameters())
    rest = {
        name: parameter
        for name, parameter in named.items()
        if chosen.matrices_only and not (name.startswith("blocks.") and parameter.ndim == 2)
    }
    mine = {name: parameter for name, parameter in named.items() if name not in rest}
    optimizers = [chosen.from_settings(mine.items(), config)]
    if rest:
        optimizers.append(AdamW.from_settings(rest.items(), config))
    return OptimizerGroup(optimizers)


def rate_factor(config: TrainConfig, step: int) -> float:
    """What the schedule multiplies the learning rate with in the step after `step`."""
    schedule = SCHEDULES[config.schedule]
    return schedule(step, config.steps, config.warmup_steps, config.final_factor)


def lower_rates(config: TrainConfig) -> str:
    """What may help where training diverges, with the flags to change."""
    rates = ["learning_rate", *(["muon_learning_rate"] if config.optimizer == "muon" else [])]
    flags = [f"--{name.replace('_', '-')} (now {getattr(config, name)})" for name in rates]
    return f"lower {' and '.join(flags)} or raise --warmup-steps (now {config.warmup_steps})"


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate in the step after `step`."""
    return config.learning_rate * rate_factor(config, step)


def clip_limit(config: TrainConfig, usual_norm: float) -> float:
    """To which gradient norm the next step is clipped; usual_norm: the median of the last steps."""
    if not config.clip_running:
        return config.clip_norm
    return min(config.clip_norm, config.clip_running * usual_norm)

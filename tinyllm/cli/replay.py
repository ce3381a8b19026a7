"""`tinyllm replay`: a rejected step once more, and where it goes wrong."""

from __future__ import annotations

import argparse
import json
import pdb
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.backend import Array, current
from tinyllm.data import IGNORE_INDEX
from tinyllm.debug import AnomalyError
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.system.errors import InputError
from tinyllm.system.json_files import read_json
from tinyllm.system.settings import from_mapping
from tinyllm.system.wording import shown
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.objectives import NextToken
from tinyllm.training.safeguards.incidents import Step, describe, findings


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `replay` to the commands of a parser."""
    parser = commands.add_parser(
        "replay",
        help="run a step again that training rejected",
        description="Run a step again that training rejected, and print what goes wrong in it and where. "
        "Nothing is written.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="DIR", help="a folder in runs/NAME/incidents")
    parser.add_argument("--debug", action="store_true", help="stop in pdb there, in the frame of the op")
    parser.set_defaults(command=replay_command, parser=parser)


def replay_command(args: argparse.Namespace) -> None:
    """`tinyllm replay`."""
    folder = Path(args.path)
    report, step = load(folder)
    print(f"step {report['step']}, batch {report['position']}: {report['reason']}; {report['done']}")
    loss, norm, gradients = step.run()
    # As text, where NaN equals NaN and no digit is lost.
    then = _number(report["loss"]), _number(report["grad_norm"])
    same = str((loss, norm)) == str(then)
    as_then = "as in the run" if same else f"the run had {report['loss']} and {report['grad_norm']}"
    print(f"again: loss {loss:.6g}, gradient norm {norm:.6g} ({as_then})")
    norms = [
        {
            "name": name,
            "weight_non_finite": int((~current.xp.isfinite(parameter.data)).sum()),
            "gradient_non_finite": int((~current.xp.isfinite(gradients[name])).sum()),
        }
        for name, parameter in step.model.named_parameters()
    ]
    anomaly = step.first_anomaly()
    if anomaly is None and not same:
        print(
            "Computed again, the step is another one: what was wrong did not come from its weights and its batch. "
            "If it happens again, suspect the memory of the machine, or code that changes gradients."
        )
    else:
        print(*findings(None if anomaly is None else describe(anomaly), norms), sep="\n")
    if args.debug and anomaly is not None:
        stop_in_op(anomaly)
    elif args.debug:
        stop_with(step, loss, norm, gradients)


def load(folder: Path) -> tuple[dict[str, Any], Step]:
    """The report of an incident, and its step; raises InputError when something is missing or damaged."""
    if not (folder / "report.json").exists():
        raise InputError(f"{folder}: no incident here; give a folder in runs/NAME/incidents")
    report, batch = read_json(folder / "report.json"), read_json(folder / "batch.json")
    objective = report.get("objective", NextToken.__name__)
    if objective != NextToken.__name__:
        raise InputError(
            f"{folder}: the step was trained for {shown(objective)}, and this command knows "
            f"{NextToken.__name__} alone; "
            "in Python, tinyllm.training.safeguards.incidents.Step runs it again"
        )
    try:
        before = folder / str(report["before"])
        for name in ("step", "reason", "done", "loss", "grad_norm"):
            report[name]
        numbers = {name: int(report[name]) for name in ("position", "seed", "workers")}
        arrays = tuple(np.asarray(batch[name], dtype=np.int64) for name in NextToken.names if name in batch)
        inputs, targets = arrays[:2]
        z_loss = float(report["z_loss"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{folder}: the report is damaged ({error})") from None
    if not before.exists():
        raise InputError(
            f"{before}: the state before this step is gone; the newest incidents alone keep theirs"
        )
    model = _model(before)
    V = model.config.vocab_size
    if inputs.ndim != 2 or not inputs.size or any(array.shape != inputs.shape for array in arrays):
        raise InputError(
            f"{folder / 'batch.json'}: inputs and targets must be (B, T), got {shown(inputs.shape)}"
        )
    if any((array[:, 1:] < array[:, :-1]).any() for array in arrays[2:]):
        raise InputError(f"{folder / 'batch.json'}: documents must not fall along a row")
    ids = np.concatenate([inputs.reshape(-1), targets[targets != IGNORE_INDEX]])
    if ids.min() < 0 or ids.max() >= V:
        raise InputError(f"{folder / 'batch.json'}: ids must be from 0 to {V - 1}")
    if not 1 <= numbers["workers"] <= 4096 or numbers["position"] < 0 or not 0 <= numbers["seed"] < 2**32:
        raise InputError(f"{folder}: the report is damaged ({json.dumps(numbers)})")
    return report, Step(model, NextToken(z_loss), arrays, **numbers)


def _model(before: Path) -> TransformerLM:
    """The model of the checkpoint with the dropout that it was trained with."""
    saved, _ = keeping.load(before)
    settings = checkpoint.load_training(before).values.get("model")
    if not isinstance(settings, Mapping):
        raise InputError(f"{before}: the training state is damaged (it has no model settings)")
    model = TransformerLM(from_mapping(ModelConfig, settings, str(before))).astype(
        saved.embedding.weight.dtype
    )
    try:
        model.load_state_dict(saved.state_dict())
    except ValueError as error:
        raise InputError(f"{before}: {error}") from None
    return model


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"the report is damaged: {shown(value)} is not a number") from None


def stop_in_op(anomaly: AnomalyError) -> None:
    """Run the op that went non-finite once more, in pdb from its first line on."""
    trace = anomaly.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        place = trace.tb_frame.f_code.co_name
        if place in ("before_forward", "after_forward"):
            pdb.Pdb().runcall(names["op"].forward, *(x.data for x in names["inputs"]))
            return
        if place == "after_backward":
            pdb.Pdb().runcall(names["op"].backward, names["gradient"])
            return
        trace = trace.tb_next


def stop_with(step: Step, loss: float, norm: float, gradients: Mapping[str, Array]) -> None:
    """Stop in pdb where nothing is non-finite, with the step and all that it gave at hand."""

    def look(step: Step, loss: float, norm: float, gradients: Mapping[str, Array], losses: Array) -> None:
        """The step, its loss and gradient norm, the gradients by name, and the loss of each token (B, T)."""
        return

    pdb.Pdb().runcall(look, step, loss, norm, gradients, step.each_loss())

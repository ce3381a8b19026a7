"""The autopsy of a rejected step: `incidents/STEP-POSITION/` in the folder of a run.

    batch.json, batch.txt       the batch, as ids and as text
    before/                     a checkpoint of the state before the step, or in report.json where it is
    report.json, report.txt     what went non-finite first, norms, the tokens with the highest loss, what was done

`before` stands in the first folder of several rejections in a row, since no step came between them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tinyllm import backend
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array, current
from tinyllm.debug import AnomalyError, detect_anomaly
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import OptimizerGroup
from tinyllm.system import storage
from tinyllm.system.text_files import write_text
from tinyllm.system.wording import command_line
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints import checkpoint
from tinyllm.training.checkpoints.checkpoint import TrainingState
from tinyllm.training.engines import build_host_engine
from tinyllm.training.events import Rejection
from tinyllm.training.micro_batches import split_batch
from tinyllm.training.objectives import Batch, Objective

FOLDER = "incidents"
KEEP_WHOLE = 3
"""So many folders keep the state before the step, the newest ones."""
KEEP = 50
"""So many folders are kept."""
WORST_TOKENS = 12


@dataclass(frozen=True)
class Step:
    """All that a step is computed from.

    batch: what the objective takes. position: of the batch, which dropout depends on, with the seed. workers: how
    many, which the rounding depends on.
    """

    model: TransformerLM
    objective: Objective
    batch: Batch
    position: int
    seed: int
    workers: int

    def run(self, observer: Observer | None = None) -> tuple[float, float, Mapping[str, Array]]:
        """Loss, gradient norm and gradients, in this process, with the bits that the run had."""
        with (
            backend.ignore_non_finite(),
            observe(observer or Observer()),  # so that the workers are threads
            build_host_engine(
                self.model, OptimizerGroup([]), self.objective, self.workers, self.seed
            ) as engine,
        ):
            loss = engine.gradients(self.position, self.batch)
            return loss, engine.gradient_norm(), engine.total

    def first_anomaly(self) -> AnomalyError | None:
        """Where the step goes non-finite first; None where it is finite throughout."""
        # One worker, so that first means the first; it cuts the batch as all of them do.
        with backend.ignore_non_finite(), detect_anomaly():
            self.model.train()
            tensors = list(self.model.parameters())
            count = self.objective.count(self.batch)
            try:
                for number, micro_batch in enumerate(split_batch(self.batch, self.workers, self.model)):
                    with dropout_position(self.seed, self.position, number):
                        loss, _ = self.objective(self.model, micro_batch)
                    gradients(loss, tensors, gradient=1 / count)
            except AnomalyError as error:
                return error
        return None

    def each_loss(self) -> Array:
        """The losses of the batch, (B, ...); see `Objective.each_loss`."""
        self.model.train()
        losses = []
        with backend.ignore_non_finite():
            for number, micro_batch in enumerate(split_batch(self.batch, self.workers, self.model)):
                with dropout_position(self.seed, self.position, number):
                    losses.append(self.objective.each_loss(self.model, micro_batch))
        return np.concatenate(losses)


def with_report(
    run: Path,
    rejection: Rejection,
    done: str,
    step: Step,
    gradients: Mapping[str, Array],
    tokenizer: Tokenizer,
    state: TrainingState,
) -> Rejection:
    """The rejection with the folder that `record` has written, or in its reason why there is none."""
    try:
        folder = record(run, rejection, done, step, gradients, tokenizer, state)
    except Exception as error:  # whatever it is: a report is never worth a run
        line = str(error).partition("\n")[0]
        return replace(rejection, reason=f"{rejection.reason} (there is no report: {line})")
    return replace(rejection, incident=folder)


def record(
    run: Path,
    rejection: Rejection,
    done: str,
    step: Step,
    gradients: Mapping[str, Array],
    tokenizer: Tokenizer,
    state: TrainingState,
) -> Path:
    """Write the folder of a rejected step, whole or not at all; returns it.

    Args:
        run: the folder of the run. done: what is done about the step, in plain words. step: what it was computed from.
        gradients: what it gave, by name. state: of the run, as a checkpoint would hold it; its sampler is past the
            batch, and its recovery has counted the rejection.

    Raises OSError or InputError when it cannot be written.
    """
    root = run / FOLDER
    name = f"{rejection.step:08}-{rejection.position:08}"
    temporary, folder = root / f".{name}.tmp", root / name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    values = state.values
    try:
        # After the last of a row the count begins anew, when training goes back.
        earlier = _state_before(
            root, rejection, values["recovery"]["rejected"] or values["train"]["patience"]
        )
        if earlier is None:
            sampler = {**values["sampler"], "step": rejection.position}
            before = TrainingState(state.arrays, {**values, "sampler": sampler})
            checkpoint.save(temporary / "before", step.model, tokenizer, before)
        place = "before" if earlier is None else f"../{earlier.name}/before"
        report = {
            "step": rejection.step,
            "position": rejection.position,
            "seed": step.seed,
            "workers": step.workers,
            "objective": type(step.objective).__name__,
            "z_loss": values["train"]["z_loss"],
            "loss": _plain(rejection.loss),
            "grad_norm": _plain(rejection.grad_norm),
            "usual_loss": _median(values["watch"]["losses"]),
            "usual_grad_norm": _median(values["watch"]["norms"]),
            "reason": rejection.reason,
            "done": done,
            "before": place,
            **_examine(step, gradients, tokenizer),
        }
        batch = {name: array.tolist() for name, array in zip(step.objective.names, step.batch, strict=False)}
        write_text(temporary / "batch.json", json.dumps(batch) + "\n")
        write_text(temporary / "batch.txt", step.objective.text(step.batch, tokenizer))
        write_text(temporary / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_text(temporary / "report.txt", report_text(report, folder))
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, before the run was killed
        storage.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(root)
    return folder


def _state_before(root: Path, rejection: Rejection, row: int) -> Path | None:
    """The folder of an earlier rejection among the last `row` ones, this one included, that holds the state before it.

    No other folders: they may be of what was trained here before, as with other settings or from another checkpoint.
    """
    for position in range(max(0, rejection.position + 1 - row), rejection.position):
        folder = root / f"{rejection.step:08}-{position:08}"
        if (folder / "before").exists():
            return folder
    return None


def _examine(step: Step, gradients: Mapping[str, Array], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a report says of the numbers of a step: the first that is not finite, the worst losses, all norms."""
    norms = [
        {"name": name, **_norm("weight", parameter.data), **_norm("gradient", gradients[name])}
        for name, parameter in step.model.named_parameters()
    ]
    anomaly = step.first_anomaly()
    return {
        "first_non_finite": None if anomaly is None else describe(anomaly),
        "tokens": worst_tokens(step, tokenizer),
        "parameters": norms,
    }


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def describe(anomaly: AnomalyError) -> dict[str, str]:
    """What an AnomalyError says, as plain values."""
    what = str(anomaly).splitlines()[0].partition(": ")[2]
    return {
        "op": anomaly.op,
        "phase": anomaly.phase,
        "module": anomaly.module,
        "what": what,
        "line": anomaly.line,
    }


def worst_tokens(step: Step, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The highest losses of the batch, those that are not a number first, with what the objective says of each."""
    losses = step.each_loss()
    order = np.argsort(np.where(np.isnan(losses), -np.inf, -losses), axis=None, kind="stable")
    found = []
    for index in zip(*np.unravel_index(order[:WORST_TOKENS], losses.shape), strict=True):
        place = tuple(map(int, index))
        what = step.objective.describe(step.batch, place, tokenizer)
        found.append({"window": place[0], "loss": _plain(float(losses[place])), **what})
    return found


def report_text(report: Mapping[str, Any], folder: Path) -> str:
    """report.txt: the report in plain words."""
    usual = ""
    if report["usual_loss"] is not None:
        usual = (
            f" (median of the steps before: {report['usual_loss']:.4g} and {report['usual_grad_norm']:.4g})"
        )
    lines = [
        f"Step {report['step']} of the run was not made; its batch is number {report['position']}.",
        f"Why: {report['reason']}.",
        f"Loss {_short(report['loss'])}, gradient norm {_short(report['grad_norm'])}{usual}.",
        f"What was done: {report['done']}.",
        "",
        *findings(report["first_non_finite"], report["parameters"]),
        "",
        "The tokens with the highest loss, and the text before them:",
        *(
            f"  {_short(token['loss']):>10}  window {token['window']}{_where(token)}"
            for token in report["tokens"]
        ),
        "",
        "Norms:",
        f"  {'weight':>10}  {'gradient':>10}",
        *(
            f"  {_short(line['weight_norm']):>10}  {_short(line['gradient_norm']):>10}  {line['name']}"
            for line in report["parameters"]
        ),
        "",
        f"To run this step again: {command_line('replay', folder)}  (--debug stops where it goes wrong)",
    ]
    return "\n".join(lines) + "\n"


def findings(first: Mapping[str, str] | None, norms: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, in plain words: the first op that went non-finite, weights and gradients that are."""
    lines = []
    for kind in ("weight", "gradient"):
        bad = [line for line in norms if line[f"{kind}_non_finite"]]
        if bad:
            names = ", ".join(line["name"] for line in bad[:3]) + (", ..." if len(bad) > 3 else "")
            lines.append(f"{len(bad)} of {len(norms)} {kind}s hold values that are not finite: {names}.")
    if first is not None:
        where = f" in {first['module']}" if first["module"] else ""
        lines.append(f"First not finite: {first['op']}.{first['phase']}{where}: {first['what']}.")
        lines.append(f"  called at {first['line']}")
    elif lines:
        lines.append(
            "Computed again, the step is finite throughout: the values that are not do not come from its weights and "
            "its batch. If it happens again, suspect the memory of this machine, or code that changes gradients."
        )
    else:
        lines.append("All values are finite.")
    return lines


def _where(token: Mapping[str, Any]) -> str:
    """The place of a token in its window and the text before it, where the objective is about tokens."""
    if "context" not in token:
        return ""
    return f", place {token['place']}: {token['text']!r} after {token['context']!r}"


def _norm(kind: str, array: Any) -> dict[str, Any]:
    count = int(backend.read(array.size - current.xp.isfinite(array).sum()))
    norm = math.sqrt(backend.read((array.astype("float64") ** 2).sum()))
    return {f"{kind}_norm": _plain(norm), f"{kind}_non_finite": count}


def _plain(value: float) -> float | str:
    """A number that JSON can hold, or its name."""
    return value if math.isfinite(value) else str(value)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def remove_all(run: Path) -> None:
    """Delete the incidents of a run that is replaced: the next one must not take its states for its own."""
    if (run / FOLDER).exists():
        storage.remove_folder(run / FOLDER)


def _prune(root: Path) -> None:
    """Delete the states of all but the newest folders, and what is oldest."""
    folders = sorted(root.glob("????????-????????"), key=lambda folder: folder.name.partition("-")[2])
    whole = [folder for folder in folders if (folder / "before").exists()]
    states = [folder / "before" for folder in whole[:-KEEP_WHOLE]]
    for path in [*states, *folders[:-KEEP], *root.glob(".*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)

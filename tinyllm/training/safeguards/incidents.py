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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.mode import no_grad
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.tensor import gradients
from tinyllm.backend import Array, current
from tinyllm.debug import AnomalyError, detect_anomaly
from tinyllm.models import TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.optim import NonFiniteNormError, OptimizerGroup
from tinyllm.system import storage
from tinyllm.system.text_files import write_text
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoints import checkpoint, resuming
from tinyllm.training.engines.processes import DataParallel, cut
from tinyllm.training.safeguards.watch import Rejection

if TYPE_CHECKING:
    from tinyllm.training.trainer import Trainer

FOLDER = "incidents"
KEEP_WHOLE = 3
"""So many folders keep the state before the step, the newest ones."""
KEEP = 50
"""So many folders are kept."""
WORST_TOKENS = 12
CONTEXT_TOKENS = 24


@dataclass(frozen=True)
class Step:
    """All that a step is computed from.

    inputs, targets: (B, T) integers. position: of the batch, which dropout depends on, with the seed. workers: how
    many, which the rounding depends on.
    """

    model: TransformerLM
    inputs: Array
    targets: Array
    position: int
    seed: int
    workers: int
    z_loss: float

    def run(self, observer: Observer | None = None) -> tuple[float, float, dict[str, Array]]:
        """Loss, gradient norm and gradients, in this process, with the bits that the run had."""
        with (
            backend.ignore_non_finite(),
            observe(observer or Observer()),  # so that the workers are threads
            DataParallel(
                self.model, OptimizerGroup([]), self.workers, self.seed, z_loss=self.z_loss
            ) as workers,
        ):
            loss = workers.gradients(self.position, self.inputs, self.targets)
            try:
                norm = workers.gradient_norm()
            except NonFiniteNormError as error:
                norm = error.norm
            return loss, norm, workers.total

    def first_anomaly(self) -> AnomalyError | None:
        """Where the step goes non-finite first; None where it is finite throughout."""
        # One worker, so that first means the first; it cuts the batch as all of them do.
        with backend.ignore_non_finite(), detect_anomaly():
            self.model.train()
            tensors = list(self.model.parameters())
            try:
                for number, (x, y) in enumerate(cut(self.inputs, self.targets, self.workers, self.model)):
                    with dropout_position(self.seed, self.position, number):
                        logits = self.model(backend.asarray(x))
                        loss = ops.cross_entropy(
                            logits, backend.asarray(y), reduction="sum", z_loss=self.z_loss
                        )
                    gradients(loss, tensors, gradient=1 / self.targets.size)
            except AnomalyError as error:
                return error
        return None

    def token_losses(self) -> Array:
        """The loss of each target in nats, (B, T)."""
        self.model.train()
        losses = []
        with backend.ignore_non_finite(), no_grad():
            for number, (x, y) in enumerate(cut(self.inputs, self.targets, self.workers, self.model)):
                with dropout_position(self.seed, self.position, number):
                    logits = self.model(backend.asarray(x))
                losses.append(
                    backend.to_numpy(ops.cross_entropy(logits, backend.asarray(y), reduction="none").data)
                )
        return np.concatenate(losses)


def record(trainer: Trainer, rejection: Rejection, done: str) -> Path:
    """Write the folder of a rejected step, whole or not at all; returns it.

    done: what is done about it, in plain words. Raises OSError or InputError when it cannot be written.
    """
    assert trainer.run is not None
    root = trainer.run / FOLDER
    name = f"{rejection.step:08}-{rejection.position:08}"
    temporary, folder = root / f".{name}.tmp", root / name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # After the last of a row the count begins anew, when training goes back.
        earlier = _state_before(root, rejection, trainer.recovery.rejected or trainer.recovery.patience)
        if earlier is None:
            state = resuming.training_state(trainer)
            state.values["sampler"]["step"] = rejection.position
            checkpoint.save(temporary / "before", trainer.model, trainer.tokenizer, state)
        report = _report(
            trainer, rejection, done, "before" if earlier is None else f"../{earlier.name}/before"
        )
        batch = {"inputs": rejection.inputs.tolist(), "targets": rejection.targets.tolist()}
        write_text(temporary / "batch.json", json.dumps(batch) + "\n")
        write_text(temporary / "batch.txt", _batch_text(rejection, trainer.tokenizer))
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


def _report(trainer: Trainer, rejection: Rejection, done: str, before: str) -> dict[str, Any]:
    config, watch = trainer.config, trainer.watch
    step = Step(
        trainer.model, rejection.inputs, rejection.targets, rejection.position, config.seed, trainer.threads,
        config.z_loss,
    )  # fmt: skip
    norms = [
        {
            "name": name,
            **_norm("weight", parameter.data),
            **_norm("gradient", trainer.workers.total[name]),
        }
        for name, parameter in trainer.parameters.items()
    ]
    anomaly = step.first_anomaly()
    seen = len(watch.losses.values)
    return {
        "step": rejection.step,
        "position": rejection.position,
        "seed": config.seed,
        "workers": trainer.threads,
        "z_loss": config.z_loss,
        "loss": _plain(rejection.loss),
        "grad_norm": _plain(rejection.grad_norm),
        "usual_loss": watch.losses.median if seen else None,
        "usual_grad_norm": watch.norms.median if seen else None,
        "reason": rejection.reason,
        "done": done,
        "before": before,
        "first_non_finite": None if anomaly is None else describe(anomaly),
        "tokens": worst_tokens(step, trainer.tokenizer),
        "parameters": norms,
    }


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
    """The targets with the highest loss, those that are not a number first, with the text before them."""
    losses = step.token_losses()
    order = np.argsort(np.where(np.isnan(losses), -np.inf, -losses), axis=None, kind="stable")
    found = []
    for window, place in zip(*np.unravel_index(order[:WORST_TOKENS], losses.shape), strict=True):
        context = step.inputs[window, max(0, place + 1 - CONTEXT_TOKENS) : place + 1]
        target = step.targets[window, place : place + 1]
        found.append(
            {
                "window": int(window),
                "place": int(place),
                "loss": _plain(float(losses[window, place])),
                "target": int(target[0]),
                "text": tokenizer.token_bytes(int(target[0])).decode("utf-8", "replace"),
                "context": tokenizer.decode(context),
            }
        )
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
            f"  {_short(token['loss']):>10}  window {token['window']}, place {token['place']}: "
            f"{token['text']!r} after {token['context']!r}"
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
        f"To run this step again: tinyllm replay {folder}  (--debug stops where it goes wrong)",
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


def _norm(kind: str, array: Any) -> dict[str, Any]:
    count = int(backend.read(array.size - current.xp.isfinite(array).sum()))
    norm = math.sqrt(backend.read((array.astype("float64") ** 2).sum()))
    return {f"{kind}_norm": _plain(norm), f"{kind}_non_finite": count}


def _plain(value: float) -> float | str:
    """A number that JSON can hold, or its name."""
    return value if math.isfinite(value) else str(value)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _batch_text(rejection: Rejection, tokenizer: Tokenizer) -> str:
    """Each window's text; where targets are not the inputs moved on by one, they follow."""
    lines = []
    for number, (inputs, targets) in enumerate(zip(rejection.inputs, rejection.targets, strict=True)):
        moved = bool((inputs[1:] == targets[:-1]).all())
        whole = np.concatenate([inputs, targets[-1:]]) if moved else inputs
        lines += [f"---- window {number}", tokenizer.decode(whole)]
        if not moved:
            lines += [
                f"---- targets of window {number}, which are not its inputs moved on",
                tokenizer.decode(targets),
            ]
    return "\n".join(lines) + "\n"


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

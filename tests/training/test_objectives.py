"""Objectives of other batch shapes than a language model's, trained and evaluated by every engine."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.strict_device import strict_device

from tinyllm import backend, gradients, ops
from tinyllm.cli import main as cli
from tinyllm.data import IGNORE_INDEX
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.optim import SGD, OptimizerGroup
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import DeviceSteps, Engine, Processes, Serial, build_engine
from tinyllm.training.events import Limits
from tinyllm.training.objectives import Batch, NextToken, Objective
from tinyllm.training.trainer import Trainer

EPS32 = float(np.finfo(np.float32).eps)
T = 8
MODEL = ModelConfig(vocab_size=9, context_length=T, num_layers=1, num_heads=2, hidden_size=16)
ANY = Limits(math.inf, math.inf)
RATE = 0.05


class WindowLabel(Objective):
    """One label a window: the token that follows it."""

    names = ("inputs", "labels")

    def __call__(self, model: Any, batch: Batch) -> Any:
        inputs, labels = batch
        logits = model(backend.asarray(inputs))[:, -1]
        return ops.cross_entropy(logits, backend.asarray(labels), reduction="sum"), len(labels)

    def count(self, batch: Batch) -> int:
        return len(batch[1])


class Margins(Objective):
    """Pairs, the first of which is to have a score that is larger by a margin; a score is the last logit of token 0."""

    names = ("chosen", "rejected", "margins")

    def __call__(self, model: Any, batch: Batch) -> Any:
        chosen, rejected, margins = (backend.asarray(array) for array in batch)
        missing = model(rejected)[:, -1, 0] - model(chosen)[:, -1, 0] + margins
        return (missing * missing).sum(), len(margins)

    def count(self, batch: Batch) -> int:
        return len(batch[2])


def tokens(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(0, 9, shape)


def window_labels(rng: np.random.Generator, B: int) -> Batch:
    return tokens(rng, B, T), tokens(rng, B)


def margins(rng: np.random.Generator, B: int) -> Batch:
    return tokens(rng, B, T), tokens(rng, B, T), rng.random(B).astype(np.float32)


def masked_tokens(rng: np.random.Generator, B: int) -> Batch:
    """Next tokens where some have no loss, as the prompt of an instruction."""
    return tokens(rng, B, T), np.where(rng.random((B, T)) < 0.3, IGNORE_INDEX, tokens(rng, B, T))


def loss_of_labels(logits: Any, batch: Batch) -> list[float]:
    return [
        float(np.log(np.exp(row).sum()) - row[label])
        for row, label in zip(logits(batch[0])[:, -1], batch[1], strict=True)
    ]


def loss_of_margins(logits: Any, batch: Batch) -> list[float]:
    return list((logits(batch[1])[:, -1, 0] - logits(batch[0])[:, -1, 0] + batch[2]) ** 2)


def loss_of_tokens(logits: Any, batch: Batch) -> list[float]:
    rows, targets = logits(batch[0]).reshape(-1, 9), batch[1].reshape(-1)
    return [
        float(np.log(np.exp(row).sum()) - row[target])
        for row, target in zip(rows, targets, strict=True)
        if target != IGNORE_INDEX
    ]


Case = tuple[Objective, Callable[[np.random.Generator, int], Batch], Callable[[Any, Batch], list[float]]]
CASES: dict[str, Case] = {
    "a label a window": (WindowLabel(), window_labels, loss_of_labels),
    "pairs with margins": (Margins(), margins, loss_of_margins),
    "masked tokens": (NextToken(), masked_tokens, loss_of_tokens),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
engines = pytest.mark.parametrize("kind", ["serial", "processes", "threads", "device"])


@contextlib.contextmanager
def engine_of(
    kind: str, objective: Objective, monkeypatch: pytest.MonkeyPatch, validation: Any = ()
) -> Iterator[tuple[Engine, TransformerLM]]:
    """The engine that the trainer would take, entered, with a model whose micro-batches have two windows at most."""
    monkeypatch.setattr("tinyllm.training.micro_batches.MICRO_BATCH_TOKENS", 2 * T)
    if kind == "threads":
        monkeypatch.setattr("tinyllm.parallel.team.can_fork", lambda: False)
    with strict_device() if kind == "device" else contextlib.nullcontext():
        model = TransformerLM(MODEL, 4)
        optimizer = OptimizerGroup([SGD(model.named_parameters(), RATE)])
        threads = 2 if kind in ("processes", "threads") else 1
        engine = build_engine(model, optimizer, objective, threads, 0, validation)
        assert type(engine) is {"serial": Serial, "device": DeviceSteps}.get(kind, Processes)
        with engine:
            yield engine, model


def in_float64() -> tuple[TransformerLM, Callable[[Any], Any]]:
    """The same model in float64, and its logits as a function of tokens."""
    model = TransformerLM(MODEL, 4).astype(np.float64)
    return model, lambda inputs: model(inputs).detach().numpy()


@engines
@cases
def test_every_engine_trains_every_objective(monkeypatch: pytest.MonkeyPatch, kind: str, case: Case) -> None:
    objective, make, losses = case
    batch = make(np.random.default_rng(7), 7)
    exact, logits = in_float64()
    expected = losses(logits, batch)
    whole, _ = objective(exact, batch)
    slopes = gradients(whole, list(exact.parameters()), gradient=1 / len(expected))
    norm = math.sqrt(math.fsum(float((slope**2).sum()) for slope in slopes))
    with engine_of(kind, objective, monkeypatch) as (engine, model):
        (outcome,) = engine.run(0, [batch], [0.5], 1e9, ANY)
        assert outcome.made
        # Sums over at most some 100 places, of products some ten ops deep.
        assert outcome.loss == pytest.approx(sum(expected) / len(expected), rel=1000 * EPS32)
        assert outcome.norm == pytest.approx(norm, rel=1000 * EPS32)
        for name, slope in zip(engine.total, slopes, strict=True):
            found = backend.to_numpy(engine.total[name])
            assert np.abs(found - slope).max() < 1000 * EPS32 * np.abs(slope).max(), name
        for before, after, slope in zip(exact.parameters(), model.parameters(), slopes, strict=True):
            moved = backend.to_numpy(after.data) - before.data
            # Of the step, and of the rounding of the parameter that it is added to.
            error = 1000 * EPS32 * RATE * np.abs(slope).max() + EPS32 * np.abs(before.data).max()
            assert np.abs(moved + 0.5 * RATE * slope).max() < error


@engines
@cases
def test_every_engine_evaluates_every_objective(
    monkeypatch: pytest.MonkeyPatch, kind: str, case: Case
) -> None:
    objective, make, losses = case
    rng = np.random.default_rng(8)
    batches = [make(rng, B) for B in (5, 2, 1)]
    _, logits = in_float64()
    expected = [loss for batch in batches for loss in losses(logits, batch)]
    with engine_of(kind, objective, monkeypatch, batches) as (engine, _):
        assert engine.evaluate() == pytest.approx(sum(expected) / len(expected), rel=100 * EPS32)


@engines
@cases
def test_a_step_beyond_its_limits_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, case: Case
) -> None:
    objective, make, _ = case
    batch = make(np.random.default_rng(9), 4)
    with engine_of(kind, objective, monkeypatch) as (engine, model):
        before = [backend.to_numpy(p.data).copy() for p in model.parameters()]
        for limits in (Limits(1e-6, math.inf), Limits(math.inf, 1e-6)):
            (outcome,) = engine.run(0, [batch], [1.0], 1.0, limits)
            assert not outcome.made
            assert not outcome.overflowed
        assert all(
            (backend.to_numpy(p.data) == b).all() for p, b in zip(model.parameters(), before, strict=True)
        )
        (outcome,) = engine.run(0, [batch], [1.0], 1.0, ANY)
        assert outcome.made
        assert any(
            (backend.to_numpy(p.data) != b).any() for p, b in zip(model.parameters(), before, strict=True)
        )


# ---- The trainer, the report and its replay ----------------------------------------------------

CONFIG = TrainConfig(
    steps=12, batch_size=6, warmup_steps=1, threads=1, eval_every=6, checkpoint_every=6, learning_rate=1e-2,
    sample_tokens=0, patience=2,
)  # fmt: skip
TEXT = np.tile(np.arange(9, dtype=np.uint16), 40)


def trainer_of(run: Path | None, broken: int = -1) -> Trainer:
    """A Trainer of window labels, of which those at position `broken` are of a token that makes the loss infinite."""
    model = TransformerLM(MODEL, 4)
    tokenizer = CharTokenizer("abcdefghi")
    trainer = Trainer(model, tokenizer, TEXT[:300], TEXT[300:], CONFIG, run, objective=WindowLabel())
    batch = trainer.sampler.batch

    def labelled(step: int) -> Any:
        inputs, targets = batch(step)
        if step == broken:
            model.parameters().__iter__().__next__().data[-1] = np.nan
        return inputs, targets[:, -1]

    trainer.sampler.batch = labelled  # type: ignore[method-assign, assignment]
    trainer.engine.validation = [labelled(100)]  # type: ignore[attr-defined]
    return trainer


def test_a_trainer_learns_another_objective_and_writes_its_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(None)
    trainer.fit()
    assert trainer.best_loss < 1.5 < math.log(9)
    run = tmp_path / "run"
    run.mkdir()
    trainer_of(run, broken=8).fit()
    folder = run / "incidents/00000009-00000008"
    report = json.loads((folder / "report.json").read_text())
    batch = json.loads((folder / "batch.json").read_text())
    assert report["objective"] == "WindowLabel"
    assert (np.shape(batch["inputs"]), np.shape(batch["labels"])) == ((6, T), (6,))
    assert "labels: " in (folder / "batch.txt").read_text()
    assert {row["window"]: row["labels"] for row in report["tokens"]} == dict(enumerate(batch["labels"]))
    assert "window 0" in (folder / "report.txt").read_text()
    assert cli.main(["replay", str(folder)]) == 2
    assert "WindowLabel" in capsys.readouterr().err


def test_what_training_alone_adds_is_left_out_of_an_evaluation() -> None:
    model = TransformerLM(MODEL, 4)
    batch = masked_tokens(np.random.default_rng(1), 3)
    sums = {}
    for z_loss in (0.0, 0.1):
        for training in (True, False):
            loss, count = NextToken(z_loss)(model.train(training), batch)
            assert int(count) == NextToken().count(batch) == int((batch[1] != IGNORE_INDEX).sum())
            sums[z_loss, training] = loss.item()
    assert sums[0.1, False] == sums[0.0, False] == sums[0.0, True] < sums[0.1, True]
    everything = replace_targets(batch, IGNORE_INDEX)
    assert NextToken().count(everything) == 1, "gradients are divided by it"
    assert int(NextToken()(model, everything)[1]) == 0


def replace_targets(batch: Batch, target: int) -> Batch:
    return batch[0], np.full_like(batch[1], target)


def test_a_report_of_tokens_names_them() -> None:
    """The text before a target, the target, and where labels do not follow their inputs."""
    tokenizer = CharTokenizer("abcdefghi")
    inputs = np.array([[0, 1, 2], [3, 4, 5]])
    targets = np.array([[1, 2, 3], [4, 0, 6]])
    objective = NextToken()
    assert objective.describe((inputs, targets), (1, 1), tokenizer) == {
        "place": 1, "target": 0, "text": "a", "context": "de",
    }  # fmt: skip
    lines = objective.text((inputs, targets), tokenizer).splitlines()
    assert lines[:2] == ["---- window 0", "abcd"]
    assert lines[2:4] == ["---- window 1", "def"]
    assert lines[-1] == "eag"
    assert replace(objective, z_loss=0.5).z_loss == 0.5

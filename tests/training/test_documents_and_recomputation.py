"""Training with documents kept apart and with blocks computed once more: engines, memory, incidents, replay."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.token_parts import TokenParts, in_parts
from support.troubles import before_step

from tinyllm.cli import main as cli
from tinyllm.cli import replay
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import Serial
from tinyllm.training.events import Limits
from tinyllm.training.memory import estimate_memory
from tinyllm.training.micro_batches import split_batch
from tinyllm.training.objectives import NextToken
from tinyllm.training.optimization import build_optimizer
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=9, context_length=8, num_layers=2, num_heads=2, hidden_size=16, dropout=0.2)
TRAIN = TrainConfig(
    steps=5, batch_size=6, warmup_steps=1, threads=1, seed=3, sample_tokens=0, separate_documents=True,
    eval_every=100, checkpoint_every=100, learning_rate=1e-2,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 9, 600).astype(np.uint16)
STARTS = np.array([0, 3, 5, *range(9, 600, 5)])
TOKENIZER = CharTokenizer("abcdefghi")


class Documented(np.ndarray):  # type: ignore[type-arg]
    """A validation split that says where its documents begin."""

    document_starts = np.array([0, 40])


def training_text() -> TokenParts:
    return in_parts(TOKENS, 200, document_starts=STARTS)


def trainer_of(config: TrainConfig, run: Path | None = None) -> Trainer:
    if run is not None:
        run.mkdir()
    model = TransformerLM(MODEL, config.seed)
    return Trainer(model, TOKENIZER, training_text(), TOKENS[:80].view(Documented), config, run)


def weights_of(trainer: Trainer) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in trainer.model.state_dict().items()}


def losses_and_weights(config: TrainConfig) -> tuple[list[float], dict[str, bytes]]:
    trainer, losses = trainer_of(config), []
    with trainer.engine:
        for _ in range(5):
            losses += [event.loss for event in trainer.train_steps()]
    return losses, weights_of(trainer)


# ---- Engines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["serial", "threads", pytest.param("processes", marks=pytest.mark.forks)])
def test_five_steps_have_the_same_bits_with_recomputation(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, and with documents kept apart."""
    if way == "threads":
        monkeypatch.setattr("tinyllm.parallel.team.can_fork", lambda: False)
    config = replace(TRAIN, threads=1 if way == "serial" else 2)
    losses, weights = losses_and_weights(config)
    again, recomputed = losses_and_weights(replace(config, recompute=True))
    assert len(losses) == 5
    assert losses == again
    assert weights == recomputed


def test_blocks_of_a_run_are_computed_once_more() -> None:
    """A forward hook in a block sees both passes; in evaluation there is one."""
    for recompute, passes in ((False, 1), (True, 2)):
        trainer, seen = trainer_of(replace(TRAIN, recompute=recompute)), []
        trainer.model.blocks[1].register_forward_hook(lambda *told, seen=seen: seen.append(told))
        with trainer.engine:
            list(trainer.train_steps())
            assert len(seen) == passes
            trainer.engine.evaluate()
        assert len(seen) == passes + len(list(trainer.validation))


def test_a_hook_of_the_model_sees_each_windows_own_documents() -> None:
    """Micro-batches are cut from all three arrays alike, in order, and hooks see those."""
    rng = np.random.default_rng(2)
    windows, T = 7, 8
    batch = (
        rng.integers(0, 9, (windows, T)),
        rng.integers(0, 9, (windows, T)),
        np.cumsum(rng.integers(0, 2, (windows, T)), axis=1),
    )
    lm, seen = TransformerLM(MODEL, 0).eval(), []
    for workers in (1, 3):
        parts = split_batch(batch, workers, lm)
        assert [len(array) for part in parts for array in part] == [
            len(part[0]) for part in parts for _ in range(3)
        ]
        for whole, *cut in zip(batch, *parts, strict=True):
            assert np.array_equal(np.concatenate(cut), whole)
    lm.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[2].positions))
    each = np.concatenate([NextToken().each_loss(lm, part) for part in split_batch(batch, 3, lm)])
    np.testing.assert_allclose(each, NextToken().each_loss(lm, batch), rtol=1e-4, atol=1e-5)
    expected = [
        [t - int(np.flatnonzero(row == number)[0]) for t, number in enumerate(row)] for row in batch[2]
    ]
    assert np.concatenate(seen[:-1]).tolist() == expected


def test_queries_and_keys_are_rotated_at_the_positions_in_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits cannot tell: a rotation leaves what differs in nothing but where a document begins."""
    lm, given = TransformerLM(MODEL, 0).eval(), []
    heads = type(lm.position).heads

    def seen(self: Any, x: Any, head_dim: int, offset: Any, *others: Any) -> Any:
        given.append(offset)
        return heads(self, x, head_dim, offset, *others)

    monkeypatch.setattr(type(lm.position), "heads", seen)
    lm(np.zeros((1, 6), int), documents=np.array([[0, 0, 1, 1, 1, 4]]))
    assert [offset.tolist() for offset in given] == [[[0, 1, 0, 1, 2, 0]]] * 4


# ---- Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["char", "mini-10m"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_within_a_fifth_of_the_peak(preset: str, documents: bool, recompute: bool) -> None:
    """Of gradients and activations of one micro-batch, documents included."""
    of_preset = PRESETS[preset]
    small = {"num_layers": 4, "vocab_size": 2000} if preset == "mini-10m" else {"vocab_size": 103}
    shape = ModelConfig(**{**of_preset["model"], **small})
    how = TrainConfig(
        **{**of_preset["train"], "threads": 1, "batch_size": max(1, 1024 // shape.context_length)}
    )
    how = replace(how, recompute=recompute)
    rng = np.random.default_rng(0)
    size = (how.batch_size, shape.context_length)
    batch: tuple[Any, ...] = tuple(rng.integers(0, shape.vocab_size, size) for _ in range(2))
    if documents:
        batch += (np.sort(rng.integers(0, 3, size), axis=1),)
    lm = TransformerLM(shape, 0)
    lm.recompute = recompute
    with Serial(lm, build_optimizer(lm, how), NextToken()) as engine:
        tracemalloc.start()
        try:
            engine.gradients(0, batch)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    estimate = estimate_memory(shape, how, 1)
    assert 1 / 1.2 < (estimate.gradients + estimate.activations) / peak < 1.2


# ---- Incidents and replay ----------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_an_incident_keeps_the_documents_and_is_replayed_with_them(
    recompute: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trainer = trainer_of(replace(TRAIN, steps=12, checkpoint_every=5, recompute=recompute, patience=1), run)

    def act(position: int) -> None:
        if position == 7:
            trainer.parameters["blocks.1.feed_forward_norm.weight"].data[3] = np.inf

    before_step(trainer, act)
    trainer.fit()
    folder = run / "incidents" / sorted(path.name for path in (run / "incidents").iterdir())[0]
    kept = json.loads((folder / "batch.json").read_text())
    batch = trainer_of(TRAIN).sampler.batch(7)
    assert kept == dict(zip(("inputs", "targets", "documents"), (a.tolist() for a in batch), strict=True))
    first = json.loads((folder / "report.json").read_text())["first_non_finite"]
    assert (first["op"], first["phase"]) == ("rms_norm", "forward")
    assert first["module"] == "blocks.1.feed_forward_norm"
    _, step = replay.load(folder)
    for mine, expected in zip(step.batch, batch, strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert cli.main(["replay", str(folder)]) == 0
    assert "as in the run" in capsys.readouterr().out


@pytest.mark.parametrize("recompute", [False, True])
def test_a_replayed_step_has_the_loss_of_the_run_with_its_documents(recompute: bool, tmp_path: Path) -> None:
    """Of a step that is refused for its loss alone: without documents it would be another one."""
    run = tmp_path / "run"
    trainer = trainer_of(replace(TRAIN, steps=6, recompute=recompute, patience=1), run)
    engine_run, losses = trainer.engine.run, []

    def infinite(position: int, batches: Any, factors: Any, largest: float, limits: Limits) -> Any:
        if position != 3:
            return engine_run(position, batches, factors, largest, limits)
        outcomes = engine_run(position, batches, factors, largest, Limits(-math.inf, -math.inf))
        losses.append(outcomes[0].loss)
        return outcomes

    trainer.engine.run = infinite  # type: ignore[method-assign]
    trainer.fit()
    folder = next((run / "incidents").iterdir())
    _, step = replay.load(folder)
    assert step.run()[0] == losses[0]
    alone = replace(step, batch=step.batch[:2])
    assert alone.run()[0] != losses[0]

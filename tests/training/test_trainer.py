"""Training: gradients over threads, evaluation of the whole split, resuming bit for bit, callbacks."""

import builtins
import importlib.util
import io
import itertools
import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import InputError, gradients, no_grad, ops
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.system.progress import duration
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.callbacks import Callback, Progress
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Changes, Evaluation, StepMetrics
from tinyllm.training.loss_curve import LossCurve, running_mean
from tinyllm.training.metrics import METRICS, MetricsFile, read_metrics
from tinyllm.training.scoring import evaluate
from tinyllm.training.trainer import Trainer

EPS32 = float(np.finfo(np.float32).eps)
MODEL = ModelConfig(vocab_size=9, context_length=8, num_layers=1, num_heads=2, hidden_size=16)
TRAIN = TrainConfig(
    steps=10, batch_size=6, warmup_steps=2, threads=2, eval_every=4, checkpoint_every=3, eval_batch_size=3,
    learning_rate=5e-3, sample_tokens=0,
)  # fmt: skip
TOKENIZER = CharTokenizer("abcdefghi")
TOKENS = np.random.default_rng(0).integers(0, 9, 500).astype(np.uint16)
SPLIT = (TOKENS[:400], TOKENS[400:])


def make(
    config: TrainConfig = TRAIN,
    model: ModelConfig = MODEL,
    run: Path | None = None,
    callbacks: Any = (),
    tokens: Any = SPLIT,
    tokenizer: Any = TOKENIZER,
) -> Trainer:
    if run is not None:
        run.mkdir(exist_ok=True)
    return Trainer(TransformerLM(model, config.seed), tokenizer, *tokens, config, run, callbacks)


class Recorder(Callback):
    """Keeps what a Trainer tells, and can stop it."""

    def __init__(self, stop_at: int | None = None, stop_in: str = "on_step") -> None:
        self.events: list[Any] = []
        self.stop_at, self.stop_in = stop_at, stop_in

    def on_start(self, step: int, total_steps: int) -> None:
        self.events.append(("start", step, total_steps))

    def on_changes(self, changes: Changes) -> None:
        self.events.append(changes)

    def on_step(self, metrics: StepMetrics) -> None:
        self.events.append(metrics)
        self._stop("on_step", metrics.step)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.events.append(evaluation)
        self._stop("on_evaluation", evaluation.step)

    def on_end(self) -> None:
        self.events.append("end")

    def _stop(self, where: str, step: int) -> None:
        if (where, step) == (self.stop_in, self.stop_at):
            raise KeyboardInterrupt

    def lines(self) -> list[dict[str, Any]]:
        """Steps and evaluations, without what depends on the clock."""
        kept = [vars(event) for event in self.events if isinstance(event, (StepMetrics, Evaluation))]
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in kept]


def bits(trainer: Trainer) -> dict[str, bytes]:
    """All that a run goes on from: parameters and optimizer state."""
    arrays = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: array.tobytes() for name, array in arrays.items()}


def gradient_of_one_step(trainer: Trainer) -> tuple[StepMetrics, list[Any]]:
    """The metrics of a step, and the gradients that its optimizer was given."""
    with trainer.engine:
        metrics = next(trainer.train_steps())
        return metrics, [gradient.copy() for gradient in trainer.engine.total.values()]


# ---- One step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (64, 2)])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, threads: int, accumulation: int
) -> None:
    # 14 windows, so that 4 micro-batches have 4, 4, 3 and 3: each window must weigh the same.
    windows = {1: 14, 2: 7, 3: 5}[accumulation]
    config = replace(
        TRAIN, batch_size=windows, gradient_accumulation=accumulation, threads=threads, clip_norm=math.inf
    )
    trainer = make(config)
    metrics, found = gradient_of_one_step(trainer)
    x, y = trainer.sampler.batch(0)
    assert x.shape == (windows * accumulation, 8)
    whole = TransformerLM(MODEL, config.seed)
    for parameter in whole.parameters():
        parameter.data = parameter.data.astype(np.float64)
    loss = ops.cross_entropy(whole(x), y)
    expected = gradients(loss, list(whole.parameters()))
    assert metrics.loss == pytest.approx(loss.item(), rel=100 * EPS32)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected))
    assert metrics.grad_norm == pytest.approx(norm, rel=1000 * EPS32)
    for (name, _), mine, exact in zip(whole.named_parameters(), found, expected, strict=True):
        # Sums over some 100 positions, of products some ten ops deep.
        assert np.abs(mine - exact).max() < 1000 * EPS32 * np.abs(exact).max(), name
        assert mine.dtype == np.float32


def test_the_clipped_gradient_is_what_the_optimizer_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, found = gradient_of_one_step(make(replace(TRAIN, clip_norm=0.1)))
    assert metrics.grad_norm > 0.1
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in found))
    assert norm == pytest.approx(0.1, rel=1e-5)


def test_z_loss_is_part_of_the_training_loss_alone() -> None:
    plain, trainer = make(), make(replace(TRAIN, z_loss=0.1, clip_norm=math.inf))
    metrics, found = gradient_of_one_step(trainer)
    x, y = trainer.sampler.batch(0)
    model = TransformerLM(MODEL, TRAIN.seed)
    logits = model(x)
    loss = ops.cross_entropy(logits, y) + 0.1 * (ops.logsumexp(logits, axis=-1) ** 2).mean()
    assert metrics.loss == pytest.approx(loss.item(), rel=100 * EPS32)
    for mine, exact in zip(found, gradients(loss, list(model.parameters())), strict=True):
        assert np.abs(mine - exact).max() < 1000 * EPS32 * np.abs(exact).max()
    trainer = make(replace(TRAIN, z_loss=0.1))
    with trainer.engine, plain.engine:
        assert trainer.evaluate() == plain.evaluate()


def test_clipping_by_the_running_median() -> None:
    trainer = make(replace(TRAIN, clip_running=0.5, clip_norm=1e6, watch_window=4, steps=100))
    with trainer.engine:
        for step in range(8):
            usual = float(np.median(trainer.watch.norms.values)) if step >= 4 else math.inf
            metrics = next(trainer.train_steps())
            squares = [float((g.astype(np.float64) ** 2).sum()) for g in trainer.engine.total.values()]
            expected = min(metrics.grad_norm, 0.5 * usual)
            assert math.sqrt(sum(squares)) == pytest.approx(expected, rel=1e-5), step
    assert make(replace(TRAIN, clip_norm=1e-3, clip_running=0.5)).watch.usual_norm == math.inf


def test_dropout_of_a_step_is_that_of_its_seed_step_and_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TRAIN, threads=2, clip_norm=math.inf, seed=5)
    model_config = replace(MODEL, dropout=0.3)
    trainer = make(config, model_config)
    trainer.sampler.step = 7
    _, found = gradient_of_one_step(trainer)
    x, y = trainer.sampler.batch(7)
    model = TransformerLM(model_config, 5)
    total = 0.0
    for number, rows in enumerate((slice(0, 3), slice(3, 6))):
        with dropout_position(5, 7, number):
            total = total + ops.cross_entropy(model(x[rows]), y[rows]) * 0.5
    for mine, exact in zip(found, gradients(total, list(model.parameters())), strict=True):
        assert np.abs(mine - exact).max() < 1000 * EPS32 * np.abs(exact).max()


def test_learning_rate_follows_the_schedule() -> None:
    for schedule, expected in {
        "linear": [1 / 3, 2 / 3, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        "cosine": [1 / 3, 2 / 3, *[(1 + math.cos(math.pi * i / 7)) / 2 for i in range(8)]],
    }.items():
        recorder = Recorder()
        make(replace(TRAIN, schedule=schedule, learning_rate=0.5e-3), callbacks=[recorder]).fit()
        rates = [line["learning_rate"] for line in recorder.lines() if "loss" in line]
        assert rates == pytest.approx([0.5e-3 * factor for factor in expected], abs=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(optimizer: str) -> None:
    text = np.tile(np.arange(9, dtype=np.uint16), 60)  # the next token follows from the last
    config = replace(TRAIN, steps=60, optimizer=optimizer, learning_rate=1e-2)
    recorder = Recorder()
    make(config, callbacks=[recorder], tokens=(text[:400], text[400:])).fit()
    evaluations = [line["val_loss"] for line in recorder.lines() if "val_loss" in line]
    assert evaluations[0] > 1
    assert evaluations[-1] < 0.1


# ---- Evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_evaluation_predicts_each_token_once(count: int, threads: int) -> None:
    tokens = TOKENS[-count:]
    trainer = make(replace(TRAIN, threads=threads), replace(MODEL, dropout=0.5), tokens=(TOKENS, tokens))
    losses = []
    model = TransformerLM(MODEL, TRAIN.seed)
    for position in range(1, count):
        # What a window of 8 shows before this token: from the start of its window on.
        start = (position - 1) // 8 * 8
        with no_grad():
            logits = model(tokens[None, start:position].astype(int)).numpy()[0, -1].astype(np.float64)
        highest = logits.max()
        losses.append(highest + math.log(np.exp(logits - highest).sum()) - logits[tokens[position]])
    with trainer.engine:
        evaluation = trainer.evaluate()
    assert evaluation.val_loss == pytest.approx(math.fsum(losses) / (count - 1), rel=20 * EPS32)
    assert evaluation.val_bits_per_character == pytest.approx(evaluation.val_loss / math.log(2), rel=1e-12)


def test_bits_per_character_count_characters_and_not_tokens() -> None:
    class Pairs(CharTokenizer):
        """Every id stands for two characters."""

        def decode(self, ids: Any) -> str:
            return "".join(2 * character for character in super().decode(ids))

    trainer = make(tokenizer=Pairs("abcdefghi"))
    with trainer.engine:
        evaluation = trainer.evaluate()
    assert evaluation.val_bits_per_character == pytest.approx(evaluation.val_loss / math.log(2) / 2)


def test_evaluate_of_a_whole_text_agrees(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x", TransformerLM(MODEL, TRAIN.seed), TOKENIZER)
    (tmp_path / "text").write_text(TOKENIZER.decode(SPLIT[1]))
    expecting = make()
    with expecting.engine:
        expected = expecting.evaluate()
    for threads in (1, 2):
        score = evaluate(tmp_path / "x", [str(tmp_path / "text")], threads, batch_size=5)
        assert score.tokens == 99
        assert score.loss == pytest.approx(expected.val_loss, rel=20 * EPS32)
        assert score.bits_per_character == pytest.approx(expected.val_bits_per_character, rel=20 * EPS32)


# ---- The same bits -----------------------------------------------------------------------------

KINDS = {
    "adamw": (TRAIN, MODEL),
    "muon, accumulation": (replace(TRAIN, optimizer="muon", gradient_accumulation=2), MODEL),
    "dropout": (replace(TRAIN, seed=3), replace(MODEL, dropout=0.2)),
    "everything": (
        replace(TRAIN, optimizer="muon", gradient_accumulation=3, sampling="offsets", schedule="linear", batch_size=2),
        replace(MODEL, dropout=0.1, tie_embeddings=True),
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_same_seed_gives_the_same_bits(kind: str) -> None:
    found = []
    for _ in range(2):
        recorder = Recorder()
        trainer = make(*KINDS[kind], callbacks=[recorder])
        trainer.fit()
        found.append((bits(trainer), recorder.lines()))
    assert found[0] == found[1]
    config, model = KINDS[kind]
    other = make(replace(config, seed=config.seed + 1), model)
    other.fit()
    assert bits(other)["norm.weight"] != found[0][0]["norm.weight"]


def tie(model: TransformerLM) -> None:
    model.head.weight = model.embedding.weight


def to_float64(model: TransformerLM) -> None:
    model.astype(np.float64)


def leave(model: TransformerLM) -> None:
    pass


@pytest.mark.parametrize("change", [tie, to_float64])
def test_a_model_that_was_changed_by_hand_is_resumed_bit_for_bit(
    tmp_path: Path, change: Callable[[TransformerLM], None]
) -> None:
    def make_changed(name: str, change: Callable[[TransformerLM], None], *callbacks: Callback) -> Trainer:
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        model = TransformerLM(MODEL, TRAIN.seed)
        change(model)
        return Trainer(model, TOKENIZER, *SPLIT, TRAIN, run, callbacks)

    expected = make_changed("a", change)
    expected.fit()
    with pytest.raises(KeyboardInterrupt):
        make_changed("b", change, Recorder(stop_at=5)).fit()
    forgotten = make_changed("b", leave)
    before = bits(forgotten)
    message = {
        tie: "tie_embeddings was True and is False",
        to_float64: "the weights were float64 and are float32",
    }
    with pytest.raises(InputError, match=message[change]):
        forgotten.resume()
    assert bits(forgotten) == before
    resumed = make_changed("b", change)
    resumed.resume()
    resumed.fit()
    assert bits(resumed) == bits(expected)
    loaded, _ = keeping.load(tmp_path / "b" / "latest")
    assert (loaded.head.weight is loaded.embedding.weight) == (change is tie)
    for name, array in expected.model.state_dict().items():
        assert loaded.state_dict()[name].tobytes() == array.tobytes()


def test_a_model_that_is_changed_after_the_trainer_was_made(tmp_path: Path) -> None:
    """Nothing is trained; without a folder for checkpoints there is nothing to refuse."""
    recorder = Recorder()
    trainer = make(run=tmp_path / "run", callbacks=[recorder])
    trainer.model.blocks.append(TransformerLM(MODEL, 5).blocks[0])
    with pytest.raises(InputError) as error:
        trainer.fit()
    assert "the config says 1 layers, the weights are of 2" in str(error.value)
    assert "free space" not in str(error.value)
    assert recorder.events == [("start", 0, 10), "end"]
    assert not keeping.checkpoints(tmp_path / "run")
    model = TransformerLM(MODEL, 1)
    model.blocks.append(TransformerLM(MODEL, 5).blocks[0])
    Trainer(model, TOKENIZER, *SPLIT, replace(TRAIN, steps=1)).fit()


@kinds
@pytest.mark.parametrize("stop", [2, 4, 6], ids="after {}".format)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, kind: str, stop: int) -> None:
    config, model = KINDS[kind]
    whole = Recorder()
    expected = make(config, model, tmp_path / "a", [whole, MetricsFile(tmp_path / "a")])
    expected.fit()
    # Stopped by Ctrl-C after some step, which may be one that is evaluated (4) or saved anyway (6).
    run = tmp_path / "b"
    first = make(config, model, run, [MetricsFile(run), Recorder(stop_at=stop)])
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = make(config, model, run, [MetricsFile(run)])
    second.resume()
    assert second.step == stop
    assert bits(second) == bits(first)
    second.fit()
    assert bits(second) == bits(expected)
    assert second.best_loss == expected.best_loss

    def metrics(folder: Path) -> list[dict[str, Any]]:
        lines = read_metrics(folder / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]

    assert metrics(run) == metrics(tmp_path / "a") == whole.lines()
    for link in ("best", "latest"):
        mine, other = keeping.read_link(run, link), keeping.read_link(tmp_path / "a", link)
        assert mine is not None
        assert other is not None
        assert mine.name == other.name
        for file in ("model.safetensors", "training/optimizer.safetensors"):
            assert (mine / file).read_bytes() == (other / file).read_bytes()


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """A kill is an exception that nothing handles: what is in the folder then must do."""

    class Killed(BaseException):
        pass

    class Kill(Callback):
        def on_step(self, metrics: StepMetrics) -> None:
            if metrics.step == 8:
                raise Killed

    expected = make()
    expected.fit()
    run = tmp_path / "run"
    with pytest.raises(Killed):
        make(run=run, callbacks=[MetricsFile(run), Kill()]).fit()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line that was cut off
    resumed = make(run=run, callbacks=[MetricsFile(run)])
    resumed.resume()
    assert resumed.step == 6
    resumed.fit()
    assert bits(resumed) == bits(expected)
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 11))


def test_a_checkpoint_without_a_link_is_made_again(tmp_path: Path) -> None:
    """A crash between writing a checkpoint and linking to it."""
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        make(run=run, callbacks=[Recorder(stop_at=4)]).fit()
    before = keeping.find(run)
    checkpoint.save(run / "checkpoints/step-00000006", TransformerLM(MODEL, 99), TOKENIZER)
    resumed = make(run=run)
    resumed.resume()
    assert resumed.step == 4
    assert keeping.find(run) == before
    resumed.fit()
    expected = make()
    expected.fit()
    assert bits(resumed) == bits(expected)


def test_an_interrupt_waits_for_the_end_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT comes in the middle of the update: the step is finished, told and saved."""
    run = tmp_path / "run"
    recorder = Recorder()
    trainer = make(run=run, callbacks=[recorder])
    update = trainer.optimizer.optimizers[0].update
    sent = []

    def interrupted(*args: Any) -> None:
        if trainer.step == 2 and not sent:  # amid the third step, in this process
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        update(*args)

    monkeypatch.setattr(trainer.optimizer.optimizers[0], "update", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler
    assert [line["step"] for line in recorder.lines()] == [1, 2, 3]
    resumed = make(run=run)
    resumed.resume()
    assert resumed.step == 3
    resumed.fit()
    expected = make()
    expected.fit()
    assert bits(resumed) == bits(expected)


def test_a_second_interrupt_does_not_wait_and_saves_no_half_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = replace(TRAIN, threads=1)  # updates in the main thread, where signals are handled at once
    trainer = make(config, run=run)
    update = trainer.optimizer.optimizers[0].update
    calls = itertools.count()

    def interrupted(*args: Any) -> None:
        if next(calls) in (4 * len(trainer.parameters) + 3, 4 * len(trainer.parameters) + 4):
            os.kill(os.getpid(), signal.SIGINT)
        update(*args)

    monkeypatch.setattr(trainer.optimizer.optimizers[0], "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = make(config, run=run)
    resumed.resume()
    assert resumed.step == 4
    resumed.fit()
    expected = make(config)
    expected.fit()
    assert bits(resumed) == bits(expected)


def test_an_interrupt_before_the_evaluation_makes_it_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer = make(run=run)

    def stop() -> Evaluation:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    recorder = Recorder()
    resumed = make(run=run, callbacks=[recorder])
    resumed.resume()
    resumed.fit()
    expected = Recorder()
    make(callbacks=[expected]).fit()
    assert recorder.lines() == expected.lines()[4:]
    best, step_4 = keeping.read_link(run, "best"), next(e for e in expected.lines() if "val_loss" in e)
    assert best is not None
    assert step_4["step"] == 4


# ---- Checkpoints of a run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "keep", "left"), [(1, 1, [4, 10]), (1, 3, [4, 8, 9, 10]), (3, 2, [4, 6, 9, 10])]
)
def test_the_last_scheduled_the_best_and_the_latest_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, keep: int, left: list[int]
) -> None:
    run = tmp_path / "run"
    losses = iter([3.0, 2.0, 2.5, 2.5, 4.0])
    config = replace(TRAIN, eval_every=2, checkpoint_every=every, keep_checkpoints=keep)
    trainer = make(config, run=run)
    monkeypatch.setattr(trainer, "evaluate", lambda: Evaluation(trainer.step, next(losses), 0.0, 0.0, 0.0))
    trainer.fit()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{step:08}" for step in left]
    named = {link: keeping.step_of(keeping.find(run, (link,))) for link in keeping.LINKS}
    assert named == {"best": 4, "latest": 10}
    assert trainer.best_loss == 2.0


def test_a_trainer_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make().fit()
    assert list(tmp_path.iterdir()) == []


def refused(action: Any, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    make(replace(TRAIN, steps=3), run=run).fit()
    return run


@pytest.mark.parametrize(
    ("config", "model", "parts"),
    [
        ({"seed": 2}, {}, ["seed was 1 and is 2"]),
        ({"sampling": "offsets", "z_loss": 0.1}, {}, ["sampling was 'windows' and is 'offsets'", "z_loss was 0.0"]),
        ({"optimizer": "muon"}, {}, ["optimizer was 'adamw' and is 'muon'"]),
        ({}, {"num_layers": 2}, ["num_layers was 1 and is 2"]),
        ({"beta2": 0.5, "steps": 9}, {"rope_theta": 9.0}, ["beta2 was 0.95 and is 0.5", "rope_theta was"]),
        ({"steps": 2}, {}, ["has made 3 steps, more than the 2 asked for", "--steps"]),
    ],
)  # fmt: skip
def test_resuming_with_other_settings_is_refused(
    finished: Path, config: dict[str, Any], model: dict[str, Any], parts: list[str]
) -> None:
    trainer = make(replace(TRAIN, **config), replace(MODEL, **model), run=finished)
    before = bits(trainer)
    refused(trainer.resume, *parts)
    assert bits(trainer) == before
    assert trainer.step == 0


def test_resuming_with_another_text_is_refused(finished: Path) -> None:
    for tokens, split in (
        ((TOKENS[:401], TOKENS[401:]), "training and validation"),
        ((TOKENS[:400], TOKENS[400:499]), "validation"),
        ((TOKENS[:400][::-1], TOKENS[400:]), "training"),
    ):
        refused(make(run=finished, tokens=tokens).resume, f"its {split} tokens have another SHA-256")
    make(run=finished, tokens=(TOKENS[:400].astype(np.int64), TOKENS[400:].astype(">i4"))).resume()
    refused(make(run=finished, tokenizer=CharTokenizer("abcdefghj")).resume, "vocabulary")


def test_what_does_not_change_the_steps_may_change(finished: Path) -> None:
    config = replace(
        TRAIN, steps=99, threads=1, eval_every=7, checkpoint_every=9, log_every=2, sample_tokens=9
    )
    trainer = make(config, run=finished)
    trainer.resume()
    assert trainer.step == 3


CHANGES: list[dict[str, Any]] = [
    {"learning_rate": 1e-3},
    {"schedule": "cosine"},
    {"final_factor": 0.3},
    {"warmup_steps": 6},
    {"steps": 40},
    {"weight_decay": 0.7},
    {"clip_norm": 0.01},
    {"clip_running": 0.1, "watch_loss": 20.0},
    {"dropout": 0.5},
    {"batch_size": 4},
    {"batch_size": 7, "gradient_accumulation": 2},
    {"muon_learning_rate": 0.1, "muon_weight_decay": 0.2},
]


def with_change(change: Mapping[str, Any], **others: Any) -> Trainer:
    """A trainer with these settings, whichever config they are of."""
    dropout = {name: value for name, value in change.items() if name == "dropout"}
    rest = {name: value for name, value in change.items() if name != "dropout"}
    base = replace(TRAIN, steps=10, optimizer="muon" if "muon_learning_rate" in change else "adamw")
    return make(replace(base, **rest), replace(MODEL, **dropout), **others)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_run_goes_on_with_other_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    """The next step is that of a trainer of the new settings, given parameters and optimizer state by hand."""
    old = {name: value for name, value in vars(TRAIN).items() if name in change} | {"dropout": 0.0}
    begun = with_change({name: old[name] for name in change}, run=tmp_path / "run", callbacks=[Recorder(3)])
    with pytest.raises(KeyboardInterrupt):
        begun.fit()
    watched = [*begun.watch.losses.values]
    assert (begun.step, len(watched)) == (3, 3)

    recorder = Recorder(4)
    resumed = with_change(change, run=tmp_path / "run", callbacks=[recorder, MetricsFile(tmp_path / "run")])
    resumed.resume()
    kept = [] if change.keys() & {"dropout", "batch_size"} else watched
    assert [*resumed.watch.losses.values] == kept
    by_hand = with_change(change)
    by_hand.model.load_state_dict(begun.model.state_dict())
    by_hand.optimizer.load_state_dict(begun.optimizer.state_dict(), 3)
    by_hand.step = by_hand.sampler.step = 3
    shown = 3 * begun.sampler.batch_size  # the next window is the one after these, whatever the batch size is
    batch = by_hand.sampler.windows(np.arange(shown, shown + by_hand.sampler.batch_size))
    by_hand.sampler.batch = lambda step: batch  # type: ignore[method-assign, misc]
    for loss, norm in zip(watched, begun.watch.norms.values, strict=True):
        if kept:
            by_hand.watch.accept(loss, norm)
    with by_hand.engine:
        next(by_hand.train_steps())
    with pytest.raises(KeyboardInterrupt):
        resumed.fit()
    assert bits(resumed) == bits(by_hand)

    (told,) = (event for event in recorder.events if isinstance(event, Changes))
    assert told.step == 3
    assert told.settings == {name: (old[name], value) for name, value in change.items()}
    recorded = [line for line in read_metrics(tmp_path / "run" / METRICS) if line.get("event") == "changed"]
    assert [(line["step"], line["setting"], line["now"]) for line in recorded] == [
        (3, name, change[name]) for name in told.settings
    ]


def test_the_rate_before_and_after_is_told(tmp_path: Path) -> None:
    make(run=tmp_path / "run").fit()
    recorder, text = Recorder(), io.StringIO()
    longer = make(replace(TRAIN, steps=30), run=tmp_path / "run", callbacks=[recorder, Progress(stream=text)])
    longer.resume()
    longer.fit()
    (told,) = (event for event in recorder.events if isinstance(event, Changes))
    # A line from 1 in the step after the warm-up of 2 to 0 beyond the last, of the rate 5e-3.
    assert told.rates == pytest.approx((5e-3 * (1 - 7 / 8), 5e-3 * (1 - 8 / 28)))
    assert recorder.lines()[0]["learning_rate"] == told.rates[1]
    assert "other settings after step 10: steps was 10 and is 30\n" in text.getvalue()
    assert "the learning rate rises from 0.000625 to 0.00357 in the next step" in text.getvalue()


def test_nothing_is_told_where_nothing_is_changed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(run=tmp_path / "run", callbacks=[Recorder(3)]).fit()
    recorder = Recorder()
    same = make(run=tmp_path / "run", callbacks=[recorder])
    same.resume()
    assert same.changes is None
    same.fit()
    assert not [event for event in recorder.events if isinstance(event, Changes)]


# ---- Early stopping ----------------------------------------------------------------------------


def with_losses(monkeypatch: pytest.MonkeyPatch, losses: Mapping[int, float]) -> None:
    """Let the evaluation after each of these steps find this loss."""
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: Evaluation(self.step, losses[self.step], 0.0, 0.0, 0.0)
    )


LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.9, 10: 1.9, 12: 2.0, 14: 1.0, 16: 1.5}


@pytest.mark.parametrize(("patience", "last"), [(1, 6), (2, 12), (3, 16), (0, 16)])
def test_training_stops_after_evaluations_without_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, last: int
) -> None:
    with_losses(monkeypatch, LOSSES)
    config = replace(TRAIN, steps=16, eval_every=2, stop_after=patience)
    trainer = make(config, run=tmp_path / "run")
    trainer.fit()
    assert trainer.step == last
    assert keeping.step_of(keeping.find(tmp_path / "run")) == last
    assert (trainer.evaluated_step, trainer.evaluated_loss) == (last, LOSSES[last])
    assert trainer.best_loss == min(loss for step, loss in LOSSES.items() if step <= last)


def test_a_run_that_has_stopped_stays_so_or_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, LOSSES)
    config = replace(TRAIN, steps=16, eval_every=2)
    make(config, run=tmp_path / "whole").fit()
    make(replace(config, stop_after=2), run=tmp_path / "run").fit()
    again = make(replace(config, stop_after=2), run=tmp_path / "run")
    again.resume()
    again.fit()
    assert (again.step, again.without_gain, again.evaluated_loss) == (12, 2, 2.0)
    on = make(config, run=tmp_path / "run")
    on.resume()
    on.fit()
    assert (on.step, on.best_step) == (16, 14)
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        mine, other = (keeping.find(tmp_path / name, ("latest",)) / file for name in ("run", "whole"))
        assert mine.read_bytes() == other.read_bytes()


def test_a_loss_that_rises_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, {2: math.nan, 4: math.nan, 6: 2.0, 8: 2.1, 10: 2.2, 12: 2.3, 14: 1.0})
    text = io.StringIO()
    make(replace(TRAIN, steps=14, eval_every=2), callbacks=[Progress(stream=text)]).fit()
    (line,) = [line for line in text.getvalue().splitlines() if "has been above" in line]
    assert line.startswith("validation has been above 2.0000 since step 6")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"sampler": None}, {"sampler": {}}, {"optimizer_steps": None}, {"optimizer_steps": "x"},
        {"best_loss": "low"}, {"best_loss": []}, {"model": 5}, {"train": None}, {"model": {}},
        {"evaluated_step": {}}, {"evaluated_step": 1e999}, {"step": -1}, {"step": True}, {"threads": 0},
        {"threads": 10**9}, {"threads": 1.0}, {"best_step": None}, {"data": None}, {"data": {"training": 5}},
        {"callbacks": 5}, {"optimizer_steps": -5},
        {"watch": None}, {"watch": {}}, {"recovery": []},
        {"recovery": {"rejected": "x", "rollbacks": 0, "trouble": -1}}, {"step": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_training_state_of_hostile_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    saved = make(replace(TRAIN, steps=1), run=tmp_path / "run")
    state = saved._collect()
    state.values.update(change)
    folder = checkpoint.save(tmp_path / "run/checkpoints/step-00000001", saved.model, TOKENIZER, state)
    keeping.link_to(tmp_path / "run", "latest", folder)
    trainer = make(run=tmp_path / "run")
    before = bits(trainer)
    refused(trainer.resume)
    assert bits(trainer) == before


def test_optimizer_arrays_that_are_missing_are_refused(tmp_path: Path) -> None:
    saved = make(replace(TRAIN, steps=1), run=tmp_path / "run")
    state = saved._collect()
    del state.arrays["norm.weight.m"]
    checkpoint.save(tmp_path / "run/checkpoints/step-00000001", saved.model, TOKENIZER, state)
    refused(make(run=tmp_path / "run").resume, "norm.weight.m", "damaged")


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    refused(make(run=tmp_path / "run").resume, "no checkpoint")


@pytest.mark.parametrize("learning_rate", [1e30, 1e8])
def test_divergence_is_said_and_stops_before_the_weights_are_lost(
    tmp_path: Path, learning_rate: float
) -> None:
    recorder = Recorder()
    config = replace(TRAIN, learning_rate=learning_rate, warmup_steps=0, checkpoint_every=1, steps=50)
    trainer = make(config, run=tmp_path / "run", callbacks=[recorder])
    if learning_rate == 1e8:  # an overflow in the first forward pass
        for parameter in trainer.model.parameters():
            parameter.data *= np.float32(1e30)
    # Warnings are errors here: NumPy is silent, and the message is all that is said.
    refused(trainer.fit, "training diverged in step", "lower --learning-rate", "--warmup-steps")
    assert recorder.events[-1] == "end"


def test_text_too_short_for_a_window_is_refused() -> None:
    refused(lambda: make(tokens=(TOKENS[:8], TOKENS)), "training text is too short: 8 tokens", "9")
    refused(lambda: make(tokens=(TOKENS, TOKENS[:1])), "validation text is too short: 1 tokens")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"), ({"batch_size": -1}, "batch_size=-1"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate=inf"), ({"beta1": 1.0}, "beta1=1.0"), ({"beta2": -0.1}, "beta2"),
        ({"validation_fraction": 0.0}, "validation_fraction"), ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"final_factor": 1.5}, "final_factor"), ({"seed": -1}, "seed=-1"), ({"seed": 2**32}, "seed"),
        ({"threads": -1}, "threads=-1"), ({"warmup_steps": -1}, "warmup_steps"), ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_running": -1.0}, "clip_running"), ({"z_loss": -1e-4}, "z_loss=-0.0001"),
        ({"watch_loss": 0.0}, "watch_loss"), ({"watch_norm": -1.0}, "watch_norm"), ({"patience": 0}, "patience=0"),
        ({"watch_window": 0}, "watch_window"), ({"max_rollbacks": -1}, "max_rollbacks=-1"),
        ({"weight_decay": -0.1}, "weight_decay"), ({"steps": 10**12}, "steps=1000000000000"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"), ({"sample_temperature": -1.0}, "sample_temperature"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    refused(lambda: replace(TRAIN, **settings), message)


# ---- Callbacks ---------------------------------------------------------------------------------


def test_callbacks_are_told_in_order() -> None:
    recorder = Recorder()
    make(callbacks=[recorder]).fit()
    kinds = [e.step if isinstance(e, StepMetrics) else e for e in recorder.events]
    kinds = [f"evaluation {e.step}" if isinstance(e, Evaluation) else e for e in kinds]
    assert kinds == [
        ("start", 0, 10), 1, 2, 3, 4, "evaluation 4", 5, 6, 7, 8, "evaluation 8", 9, 10, "evaluation 10", "end",
    ]  # fmt: skip


def test_metrics_file_has_the_promised_fields(tmp_path: Path) -> None:
    make(callbacks=[MetricsFile(tmp_path, log_every=2)]).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in evaluations] == [4, 8, 10]
    for line in steps:
        assert set(line) == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
        assert all(math.isfinite(value) for value in line.values())
    for line in evaluations:
        assert set(line) == {
            "step",
            "val_loss",
            "val_perplexity",
            "val_bits_per_character",
            "val_bits_per_byte",
        }
    # The loss of an untrained model is near that of a guess.
    assert abs(steps[0]["loss"] - math.log(9)) < 0.5


@pytest.mark.parametrize(
    "rubbish", ["5\n", '"x"\n', "{}\n", '{"step": "1"}\n', "\x00\n", "[" * 10**5, '{"a": \n']
)
def test_damaged_metrics_do_not_stop_a_run(tmp_path: Path, rubbish: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + rubbish + '{"step": 2}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    make(callbacks=[MetricsFile(tmp_path)]).fit()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 13


def test_progress_is_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    make(callbacks=[Progress(line_every=4, stream=stream)]).fit()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    lines = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "4", "8/10", "8", "10/10", "10"]
    assert all(word in lines[0] for word in ("loss", "tokens/s", "left"))
    assert all(
        word in lines[2]
        for word in ("validation loss", "nats", "perplexity", "bits per character", "per byte")
    )


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    make(callbacks=[Progress(stream=stream)]).fit()
    text = stream.getvalue()
    assert "\r" in text
    last = text.split("\r")[-1]
    assert "10/10" in last
    assert "loss" in last
    assert "tokens/s" in last
    assert text.count("validation loss") == 3


def test_loss_curve_is_written_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        make(callbacks=[MetricsFile(tmp_path), LossCurve(tmp_path)]).fit()
        assert not (tmp_path / "loss.png").exists()
        return
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", _and_kept(Figure.savefig, drawn))
    make(callbacks=[MetricsFile(tmp_path), LossCurve(tmp_path)]).fit()
    lines = read_metrics(tmp_path / METRICS)
    assert drawn[0].axes[1].lines[0].get_ydata() == pytest.approx(
        [line["learning_rate"] for line in lines if "loss" in line]
    )
    evaluations = {line["val_loss"]: line["step"] for line in lines if "val_loss" in line}
    marks = [
        line.get_xdata()[0] for line in drawn[0].axes[0].lines if line.get_label().startswith("best: step ")
    ]
    assert marks == [evaluations[min(evaluations)]]
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def _and_kept(function: Any, kept: list[Any]) -> Any:
    """The function, with the first argument of each call kept."""

    def called(first: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(first)
        return function(first, *args, **kwargs)

    return called


def test_loss_curve_is_left_out_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    make(callbacks=[MetricsFile(tmp_path), LossCurve(tmp_path)]).fit()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_running_mean_and_duration() -> None:
    assert running_mean([3.0] * 20) == pytest.approx([3.0] * 20)
    line = [float(i) for i in range(100)]
    assert running_mean(line, span=10)[:95] == pytest.approx(line[:95])  # it does not lag
    assert running_mean(line, span=10)[-1] == pytest.approx(np.mean(line[-6:]))
    assert running_mean(line[:40], span=10)[-1] == pytest.approx(np.mean(line[37:40]))
    noise = np.random.default_rng(0).normal(size=1000)
    assert running_mean(noise.tolist())[500] == pytest.approx(noise[475:526].mean())
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 86399)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "23:59:59",
    ]

"""What a run is said to take, against runs and by hand."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyllm.cli.main import main
from tinyllm.data import preparing
from tinyllm.data.preparing import PrepareConfig
from tinyllm.models import ModelConfig
from tinyllm.system.errors import InputError
from tinyllm.system.memory import memory_in_use
from tinyllm.tokenizer import ByteTokenizer
from tinyllm.training import fitted_runs, planning
from tinyllm.training.config import TrainConfig
from tinyllm.training.counts import architecture_of
from tinyllm.training.events import StepMetrics
from tinyllm.training.planning import Measured, TimeNeeded
from tinyllm.training.scaling import ScalingLaw
from tinyllm.training.text_size import TextSize, text_size

MODEL = ModelConfig(vocab_size=64, context_length=16, num_layers=1, num_heads=2, hidden_size=16)
TEXT = TextSize(10_000, 1_000, 64, 1.0, exact=True)


def test_a_measured_step_is_a_real_one_cut_into_micro_batches() -> None:
    # 8 micro-batches for each of two workers; all else being equal the larger batch takes 8 times as long.
    train = TrainConfig(batch_size=1024, threads=2, eval_batch_size=4, out=None)
    large = planning.measure(MODEL, train, 0.3)
    small = planning.measure(MODEL, replace(train, batch_size=128), 0.3)
    assert 4 < large.step / small.step < 16  # the update is in both, and other processes may be in the way
    assert min(small.evaluated_tokens, small.saved_bytes) > 0


def test_costs_are_counted_by_hand() -> None:
    train = TrainConfig(steps=10, eval_every=4, checkpoint_every=5, checkpoint_minutes=0, keep_checkpoints=1)
    costs = planning.costs(MODEL, train, Measured(2.0, 500.0, 1e6, 10**8), TEXT)
    assert costs.training == 20
    assert (costs.num_evaluations, costs.evaluations) == (3, 6.0)  # after 4, 8 and 10
    assert costs.num_checkpoints == 5  # before the first step, after 4, 5, 8 and 10
    size = planning.checkpoint_bytes(MODEL, train)
    assert size == 3 * 4 * MODEL.num_parameters
    assert costs.checkpoints == pytest.approx(5 * size / 1e6)
    assert costs.memory == 10**8 + 8 * 11_000
    by_the_clock = replace(train, steps=1000, eval_every=1000, checkpoint_every=1000, checkpoint_minutes=10)
    # 2,000 seconds with two checkpoints: one each 1,000 seconds, and one more in each of these.
    assert planning.costs(MODEL, by_the_clock, Measured(2.0, 500.0, 1e6, None), None).num_checkpoints == 4


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(map(chr, range(32, 120))) * 40)
    flags = [
        "--steps",
        "1",
        "--num-layers",
        "1",
        "--sample-tokens",
        "0",
        "--threads",
        "1",
        "--batch-size",
        "2",
        "--context-length",
        "16",
    ]
    assert main(["train", "--data", str(text), "--out", str(run), *flags]) == 0
    folder = (run / "latest").resolve()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    model = ModelConfig(vocab_size=88, context_length=16, num_layers=1, num_heads=4, hidden_size=128)
    # Names, tokenizer and training state are some kilobytes.
    assert size == pytest.approx(planning.checkpoint_bytes(model, TrainConfig(optimizer="muon")), rel=0.02)


def test_memory_in_use_counts_children_and_shared_memory_once() -> None:
    before = memory_in_use()
    if not Path("/proc/self/smaps_rollup").exists():
        assert before is None
        return
    assert before is not None
    program = "x = bytearray(b'1') * (64 << 20); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        grown = memory_in_use()
        child.communicate(b"\n")
    assert grown is not None
    assert 60 << 20 < grown - before < 110 << 20


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_the_size_of_a_text_is_exact_for_characters_and_bytes(tmp_path: Path, tokenizer: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("zwölf Boxkämpfer\n" * 500, encoding="utf-8")
    found = text_size(ModelConfig(), TrainConfig(data=(str(text),), tokenizer=tokenizer))
    total = 8500 if tokenizer == "char" else 9500
    assert found.exact
    assert found.train_tokens + found.validation_tokens == pytest.approx(total, abs=1)
    assert found.vocab_size == (len(set("zwölf Boxkämpfer\n")) if tokenizer == "char" else 256)


def test_the_size_of_prepared_texts_is_read_from_their_indexes(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    sizes = {"a": 1000, "b": 300}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text("é" * size, encoding="utf-8")
        config = PrepareConfig(
            (str(tmp_path / f"{name}.txt"),),
            str(tmp_path / name),
            str(tmp_path / "tokenizer.json"),
            validation_fraction=0.0,
            threads=1,
        )
        preparing.prepare(config, say=lambda line: None)
    for names in (["a"], ["a", "b"]):
        found = text_size(ModelConfig(), TrainConfig(data=tuple(str(tmp_path / name) for name in names)))
        assert found.train_tokens == 2 * sum(sizes[name] for name in names)
        assert (found.validation_tokens, found.vocab_size, found.characters_per_token) == (0, 256, 0.5)
        assert found.in_memory == 0
    (tmp_path / "a/index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: lacks 'format'"):
        text_size(ModelConfig(), TrainConfig(data=(str(tmp_path / "a"),)))


def test_the_published_laws_are_converted_by_characters_and_silent_where_they_fail() -> None:
    # A token of 4.2 characters is the laws' own.
    D = 10**10
    expected = planning.expected_loss(10**8, D, D, 32_000, 4.2)
    assert expected is not None
    assert expected.loss == pytest.approx(1.8172 + 482.01 / 1e8**0.3478 + 2085.43 / 1e10**0.3658)
    assert expected.low < expected.loss < expected.high
    halves = planning.expected_loss(10**8, 2 * D, 2 * D, 32_000, 2.1)
    assert halves is not None
    assert halves.loss == pytest.approx(expected.loss / 2)
    assert planning.expected_loss(800_000, 1_500_000, 1_500_000, 65, 1.0) is None


def test_overfitting_comes_sooner_for_models_larger_than_the_text() -> None:
    assert planning.overfitting_passes(10**6, 10**7) == pytest.approx((4, 16.387756))
    first, surely = planning.overfitting_passes(10**8, 10**7)
    assert (first, surely) == pytest.approx((1.3, 2.5387756))


def test_proposals_spend_the_budget_and_keep_twenty_tokens_a_parameter() -> None:
    train = TrainConfig(batch_size=16, warmup_steps=0)
    like = ModelConfig(vocab_size=256, context_length=64)
    best = planning.propose(like, train, 1e10, None, flops=3e16)[0]
    sizes = architecture_of(best.model)
    spent = best.train.steps * 16 * sizes.training_flops(64)
    assert spent == pytest.approx(3e16, rel=0.01)
    tokens = best.train.steps * 16 * 64
    # The family has sizes about three times apart.
    assert 20 / 4 < tokens / sizes.weights_in_products < 20 * 4
    assert best.seconds == pytest.approx(3e6)
    longer = planning.propose(like, train, 1e10, None, hours=3e16 / 1e10 / 3600)[0]
    assert longer.model == best.model
    with pytest.raises(InputError, match="not enough"):
        planning.propose(like, train, 1e10, None, flops=10.0)


def test_the_time_is_said_once_after_some_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 104.0])  # at the first step, and two steps later
    monkeypatch.setattr(planning.time, "monotonic", lambda: next(clock))
    needed = TimeNeeded(TrainConfig(steps=103, eval_every=50), tokens=100, validation=600)
    needed.on_start(0, 103)
    for step in range(1, 10):
        needed.on_step(StepMetrics(step, 1.0, 0.1, 1.0, 1.0))
    # 100 steps of 2 seconds, and 3 evaluations of 600 tokens, each a third of 2 s / 100 tokens.
    assert capsys.readouterr().err == "about 3:32 for 100 steps and 3 evaluations\n"


def test_plan_and_train_say_what_they_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 400)
    flags = [
        "--data",
        str(text),
        "--num-layers",
        "1",
        "--hidden-size",
        "16",
        "--steps",
        "40",
        "--batch-size",
        "4",
    ]
    assert main(["plan", *flags, "--seconds", "0.1", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    for word in (
        "parameters",
        "time: about",
        "memory: about",
        "disk: about",
        "10,240",
        "passes: 1.50",
        "loss: ",
    ):
        assert word in said
    assert (
        main(["plan", "--seconds", "0.1", "--threads", "1", "--num-layers", "1", "--hidden-size", "16"]) == 0
    )
    assert "the text is not known" in capsys.readouterr().out
    assert main(["plan", *flags, "--flops", "1e10", "--seconds", "0.1", "--threads", "1"]) == 0
    *_, command = capsys.readouterr().out.splitlines()
    assert f"--data {text}" in command
    assert command.count("--steps") == command.count("--hidden-size") == 1
    for wrong in (["--hours", "0"], ["--hours", "1", "--flops", "1"], ["--law", str(text)]):
        assert main(["plan", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_law_is_fitted_to_files_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = ScalingLaw(E=0.9, A=30, B=90, alpha=0.3, beta=0.35)
    lines = []
    for budget in (1e12, 4e12, 16e12):
        for N in np.geomspace(3e4, 3e6, 5).astype(int):
            D = int(budget / 6 / N)
            lines.append(json.dumps({"N": int(N), "D": D, "loss": law.loss(N, D), "budget": budget}))
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(lines) + "\n")
    kept = tmp_path / "law.json"
    assert main(["plan", "fit", str(file), "--json", str(kept)]) == 0
    assert "15 runs" in capsys.readouterr().out
    fit = fitted_runs.read_fit(kept)
    assert fit.law.alpha == pytest.approx(0.3, rel=1e-3)
    assert fit.law.loss(1e6, 1e7) == pytest.approx(law.loss(1e6, 1e7), rel=1e-4)
    expected = planning.expected_loss(10**6, 10**7, 10**7, 256, 1.0, fit)
    assert expected is not None
    assert expected.loss == pytest.approx(law.loss(1e6, 1e7), rel=1e-4)
    file.write_text('{"N": 3}\n')
    assert main(["plan", "fit", str(file)]) == 2
    assert "line 1 has no numbers" in capsys.readouterr().err


def test_runs_are_read_from_their_folders_where_they_are_finished(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        "[model]\nvocab_size = 10\nnum_layers = 1\nhidden_size = 16\n[train]\nsteps = 20\nbatch_size = 3\n"
    )
    lines = [{"step": 10, "val_loss": 2.0}, {"step": 20, "val_loss": 1.5}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,), left_out = fitted_runs.read_runs([str(tmp_path)])
    sizes = architecture_of(ModelConfig(vocab_size=10, num_layers=1, hidden_size=16))
    assert (run.N, run.D, run.loss) == (sizes.weights_in_products, 20 * 3 * 64, 1.5)
    assert not left_out
    metrics.write_text(json.dumps(lines[0]) + "\n")
    runs, (reason,) = fitted_runs.read_runs([str(tmp_path)])
    assert not runs
    assert "10 of 20 steps" in reason
    assert not math.isnan(run.budget)

"""What a run takes of memory: the estimate against what is measured, and what this machine allows."""

import math
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import InputError
from tinyllm.autograd import use_formulas
from tinyllm.cli import main as cli
from tinyllm.data import SequentialWindows
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.system import memory
from tinyllm.system.memory import memory_allowed
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import Serial
from tinyllm.training.events import Limits
from tinyllm.training.memory import estimate_memory, require_memory
from tinyllm.training.objectives import NextToken
from tinyllm.training.optimization import build_optimizer

MIB, GIB = 1 << 20, 1 << 30


def settings(preset: str, model: dict[str, Any], train: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    of_preset = PRESETS[preset]
    return (
        ModelConfig(**{"vocab_size": 103, **of_preset["model"], **model}),
        TrainConfig(**{**of_preset["train"], "threads": 1, **train}),
    )


@pytest.mark.parametrize(
    ("preset", "model", "train"),
    [
        ("char", {}, {}),
        ("char", {}, {"batch_size": 40}),
        ("char", {"context_length": 1024}, {"batch_size": 1}),
        ("char", {"context_length": 2048, "num_layers": 2}, {"batch_size": 1}),
        ("char", {"context_length": 512, "dropout": 0.1}, {"batch_size": 1}),
        ("char", {"context_length": 512}, {"batch_size": 1, "formulas": True}),
        ("char", {"num_kv_heads": 1, "hidden_size": 64, "head_dim": 64}, {"optimizer": "sgd"}),
        ("char", {"vocab_size": 20_000}, {"batch_size": 4}),
        ("mini-10m", {"num_layers": 2}, {"batch_size": 1}),
    ],
)
def test_the_estimate_is_near_what_is_measured(
    preset: str, model: dict[str, Any], train: dict[str, Any]
) -> None:
    """Of the arrays of a step, and of an evaluation, by one worker."""
    shape, how = settings(preset, model, train)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (2, how.batch_size, shape.context_length))
    windows = max(1, 1024 // shape.context_length)
    how = replace(how, eval_batch_size=windows)
    lm = TransformerLM(shape, 0)
    validation = SequentialWindows(
        np.resize(tokens, windows * shape.context_length + 1), shape.context_length, windows
    )
    engine = Serial(lm, build_optimizer(lm, how), NextToken(), 0, validation)
    with use_formulas(how.formulas), engine:
        tracemalloc.start()
        try:
            engine.run(0, [(tokens[0], tokens[1])], [1.0], 1.0, Limits(math.inf, math.inf))
            step = tracemalloc.get_traced_memory()[1]
            engine.sums = {}
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            engine.evaluate()
            evaluation = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
    estimate = estimate_memory(shape, how, 1)
    assert 1 / 1.5 < (estimate.gradients + estimate.activations) / step < 1.5
    assert 1 / 1.6 < estimate.evaluation / evaluation < 1.6
    state = sum(array.nbytes for array in engine.optimizer.state_dict().values())
    assert estimate.optimizer == pytest.approx(state, rel=0.01)
    assert estimate.weights == sum(array.nbytes for array in lm.state_dict().values())


def test_workers_share_weights_and_have_their_own_gradients() -> None:
    shape, how = settings("char", {}, {"batch_size": 64})
    one, four = (estimate_memory(shape, how, workers) for workers in (1, 4))
    assert one.weights == four.weights
    assert one.optimizer == four.optimizer
    assert (one.gradients, four.gradients) == (2 * one.weights, 8 * one.weights)
    assert four.activations == 4 * one.activations
    assert (one.tokens, four.tokens) == (1024, 4096)
    # A worker without a micro-batch has its sums alone.
    few = estimate_memory(shape, replace(how, batch_size=2), 4)
    assert few.gradients == 6 * one.weights
    assert few.tokens == 128


def test_the_parts_in_words_make_up_the_total() -> None:
    """For the char preset and a larger model; what is not said is below 2%."""
    for preset in ("char", "mini-10m"):
        shape, how = settings(preset, {}, {})
        words = estimate_memory(shape, how, 2).in_words()
        total, *parts = [
            float(number) * (1024 if unit == "GiB" else 1)
            for number, unit in re.findall(r"([\d.]+) (MiB|GiB)", words)
        ]
        assert abs(sum(parts) - total) <= 0.06 * total, words


def test_a_run_is_refused_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, how = settings("char", {"context_length": 65536}, {})
    monkeypatch.setattr("tinyllm.training.memory.memory_allowed", lambda: 4 * GIB)
    with pytest.raises(
        InputError, match=r"about 6\.9 GiB of memory .*there are 4\.0 GiB here, so make context_length"
    ):
        require_memory(shape, how, 2)
    require_memory(shape, how, 1)  # 3.5 GiB
    require_memory(replace(shape, context_length=4096), how, 2)
    monkeypatch.setattr("tinyllm.training.memory.memory_allowed", lambda: None)
    require_memory(shape, how, 1000)  # nobody knows


def test_an_evaluation_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own micro-batches: 1024 tokens with 2 x 16384 numbers each, where a step has 64 of them."""
    shape, how = settings("char", {"vocab_size": 16384}, {"batch_size": 1})
    monkeypatch.setattr("tinyllm.training.memory.memory_allowed", lambda: 230 * MIB)
    with pytest.raises(
        InputError,
        match=r"about 263 MiB .* 130 MiB evaluation in place of these\); .* context_length, eval_batch_size",
    ):
        require_memory(shape, how, 1)
    require_memory(shape, replace(how, eval_batch_size=1), 1)


def group(root: Path, lines: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/a/b\n", {"a__b__memory_dot_max": "max\n", "a__memory_dot_max": f"{3 * MIB}\n"}, 3 * MIB),
        ("0::/a/b\n", {"a__b__memory_dot_max": f"{2 * MIB}\n", "a__memory_dot_max": f"{3 * MIB}\n"}, 2 * MIB),
        ("0::/host/path\n", {"memory_dot_max": f"{5 * MIB}\n"}, 5 * MIB),
        ("4:memory:/c\n0::/\n", {"memory__c__memory_dot_limit_in_bytes": f"{7 * MIB}\n"}, 7 * MIB),
        ("4:cpu,memory:/x\n", {"memory__memory_dot_limit_in_bytes": f"{7 * MIB}\n"}, 7 * MIB),
        ("4:memory:/\n", {"memory__memory_dot_limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ("4:cpu:/c\n", {"memory__c__memory_dot_limit_in_bytes": f"{7 * MIB}\n"}, None),
        ("0::/\n", {"memory_dot_max": "damaged"}, None),
    ],
)
def test_the_limits_of_containers(
    tmp_path: Path, lines: str, files: dict[str, str], expected: int | None
) -> None:
    physical = memory_allowed(tmp_path)  # without the files of groups
    assert memory_allowed(group(tmp_path / "root", lines, **files)) == (expected or physical)


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory_allowed(tmp_path) is None


def test_every_run_says_what_it_takes_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40)
    command = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--context-length", "8",
               "--num-layers", "1", "--num-heads", "2", "--hidden-size", "8", "--steps", "1", "--threads", "1",
               "--batch-size", "1000", "--sample-tokens", "0", "--warmup-steps", "0"]  # fmt: skip
    assert cli.main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    said = "a step of 8,000 tokens, 5 times the text, takes about "
    (at,) = [number for number, line in enumerate(lines) if line.startswith(said)]
    assert lines[at + 1].startswith("step 1/1")

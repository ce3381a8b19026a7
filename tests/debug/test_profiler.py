"""Profiles of a training step: counts by hand, sums that must agree, and `tinyllm profile`."""

import dataclasses
import importlib.util
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, nn, ops
from tinyllm.autograd.mode import use_formulas
from tinyllm.autograd.observer import observe
from tinyllm.autograd.tensor import gradients
from tinyllm.cli import main as cli
from tinyllm.cli import profile as cli_profile
from tinyllm.debug import trace
from tinyllm.debug.profiler import Memory, Profile, Profiler, Row, combined, middle_half, profile_step
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.presets import PRESETS
from tinyllm.training import profile_report
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import Processes
from tinyllm.training.objectives import NextToken
from tinyllm.training.optimization import build_optimizer
from tinyllm.training.profile_report import WIDTH, alike_together, report
from tinyllm.training.step_profile import TrainingProfile, profile_training

CONFIG = ModelConfig(
    vocab_size=11, context_length=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16, dropout=0.1
)
SMALL = [
    "--hidden-size",
    "16",
    "--num-layers",
    "2",
    "--context-length",
    "16",
    "--steps",
    "2",
    "--threads",
    "2",
]
B, T = 3, 8
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T))


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_step(TransformerLM(CONFIG, seed=0), TOKENS, TOKENS, steps=5)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def by_name(rows: tuple[Row, ...]) -> dict[str, Row]:
    return {row.name: row for row in rows}


# ---- Counts ------------------------------------------------------------------------------------


def test_flops_of_the_char_model_by_hand() -> None:
    config = ModelConfig(vocab_size=65, **PRESETS["char"]["model"])
    D, F, L, V = 128, 344, 4, 65
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (D, F, L)
    windows, length = 2, 64
    tokens = np.zeros((windows, length), dtype=int)
    rows = by_name(profile_step(TransformerLM(config), tokens, tokens, steps=1).ops)
    in_matrices = L * (4 * D * D + 3 * D * F) + D * V
    linear, attention = rows["linear"], rows["scaled_dot_product_attention"]
    assert linear.forward_flops == 2 * in_matrices * windows * length
    assert attention.forward_flops == L * 2 * (2 * windows * (length * (length + 1) // 2) * D)
    for row in (linear, attention):
        assert row.backward_flops == 2 * row.forward_flops
        assert row.product_flops == row.flops == 3 * row.forward_flops
        assert row.product_rate == pytest.approx(row.flops / row.seconds)
    assert {row.name for row in rows.values() if row.product_flops} == {
        "linear",
        "scaled_dot_product_attention",
    }
    assert rows["add"].forward_flops == 2 * L * windows * length * D == rows["add"].backward_flops
    assert rows["add"].product_rate is None
    assert linear.calls == 7 * L + 1


def test_a_product_counts_a_gradient_only_where_one_is_needed() -> None:
    layers = nn.Linear(4, 6, rng=np.random.default_rng(0))
    x = np.ones((5, 4), dtype=np.float32)
    result = profile_step(layers, Tensor(x), np.zeros(5, dtype=int), steps=1)
    row = by_name(result.ops)["linear"]
    assert (row.forward_flops, row.backward_flops) == (2 * 5 * 4 * 6, 2 * 5 * 4 * 6)
    (module, loss) = sorted(result.modules, key=lambda row: row.name, reverse=True)
    assert (module.name, module.calls, loss.name, loss.calls) == ("Linear", 1, "(loss)", 1)


def test_calls_and_bytes_are_those_of_a_trace(profile: Profile) -> None:
    model = TransformerLM(CONFIG, seed=0)
    with nn.dropout_position(0):
        found = trace(model, TOKENS, TOKENS, fast=True).rows
    assert {row.name: row.calls for row in profile.ops} == Counter(row.op for row in found)
    assert {row.name: row.calls for row in profile.modules} == Counter(
        row.module or "(loss)" for row in found
    )
    for row in profile.ops:
        assert row.output_bytes == sum(other.bytes for other in found if other.op == row.name)
        assert row.forward_flops == sum(other.flops for other in found if other.op == row.name)


def test_both_tables_cover_the_same_ops(profile: Profile) -> None:
    ops_in_all, modules_in_all = combined("all", profile.ops), combined("all", profile.modules)
    for name, value in vars(ops_in_all).items():
        assert getattr(modules_in_all, name) == (
            pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        )
    assert combined("all", alike_together(profile.modules)).calls == ops_in_all.calls
    paths = {row.name for row in profile.modules}
    assert {"embedding", "blocks.0.attention", "blocks.1.feed_forward.down", "head", "(loss)"} <= paths


def test_the_modules_of_all_layers_become_one_row() -> None:
    rows = [
        Row("blocks.0.norm", 1, 1.0),
        Row("blocks.11.norm", 2, 2.0),
        Row("norm", 1, 4.0),
        Row("list.3", 1),
    ]
    assert [(row.name, row.calls, row.seconds) for row in alike_together(rows)] == [
        ("norm", 1, 4.0), ("blocks.*.norm", 3, 3.0), ("list.*", 1, 0.0),
    ]  # fmt: skip


# ---- Times -------------------------------------------------------------------------------------


def test_times_add_up_to_the_step(profile: Profile) -> None:
    assert all(row.forward_seconds > 0 and row.backward_seconds > 0 for row in profile.ops)
    assert profile.op_seconds + profile.outside_seconds == pytest.approx(profile.step_seconds)
    assert 0 < profile.op_seconds < 3 * profile.step_seconds
    assert profile.fastest <= profile.step_seconds <= profile.slowest
    assert list(profile.ops) == sorted(profile.ops, key=lambda row: -row.seconds)
    assert profile.limit_seconds == sum(row.product_flops for row in profile.ops) / profile.machine_rate


def test_an_op_that_a_hook_runs_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by 1 at each look, an op takes 1, and one with another inside takes 2 by itself."""
    ticks = iter(range(1000))
    monkeypatch.setattr("tinyllm.debug.profiler.time.perf_counter", lambda: float(next(ticks)))

    def hook(*_: Any) -> None:
        ops.exp(Tensor([1.0]))

    model = nn.Linear(3, 3, bias=False, rng=np.random.default_rng(0))
    model.register_full_backward_hook(hook)
    watch = Profiler()
    with observe(watch):
        loss = ops.tanh(model(Tensor([[1.0, 2.0, 3.0]], requires_grad=True))).sum()
        gradients(loss, list(model.parameters()))
    rows = {call.row.name: call.row for call in watch.calls}
    assert list(rows) == ["module_input", "linear", "module_output", "tanh", "sum", "exp"]
    assert {row.forward_seconds for row in rows.values()} == {1.0}
    assert rows.pop("exp").backward_seconds == 0
    assert rows.pop("module_input").backward_seconds == 2
    assert {row.backward_seconds for row in rows.values()} == {1.0}


def test_the_middle_half() -> None:
    assert middle_half([5.0, 1.0, 9.0, 2.0], float) == [2.0, 5.0]
    assert middle_half([3.0], float) == [3.0]
    assert middle_half([3.0, 1.0, 2.0], float) == [1.0, 2.0, 3.0]
    assert middle_half([float(i) for i in range(10)], float) == [float(i) for i in range(2, 8)]


# ---- Memory ------------------------------------------------------------------------------------


def test_memory_of_a_small_model_by_hand() -> None:
    """tanh(x W^T) keeps the product and its own output; x and W are not made in the step."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            self.linear = nn.Linear(100, 50, bias=False, rng=np.random.default_rng(0))

        def forward(self, x: Any) -> Tensor:
            return ops.tanh(self.linear(x)).reshape(-1)

    x = Tensor(np.ones((200, 100), dtype=np.float32))
    result = profile_step(Layer(), x, None, steps=1, loss=lambda output, _: output.sum())
    assert result.memory.parameters == result.memory.gradients == 4 * 50 * 100
    rows = by_name(result.ops)
    assert rows["linear"].kept_bytes == rows["tanh"].kept_bytes == 4 * 200 * 50
    assert rows["reshape"].kept_bytes == 0, "a view"
    assert result.memory.kept == sum(row.kept_bytes for row in result.ops)
    assert result.memory.kept == sum(row.kept_bytes for row in result.modules)
    at_least = result.memory.kept + result.memory.gradients
    assert at_least <= result.memory.peak < 3 * at_least + 100_000


def test_the_peak_is_that_of_a_step_also_where_memory_is_traced_already(profile: Profile) -> None:
    tracemalloc.start()
    try:
        bytearray(100_000_000)
        again = profile_step(TransformerLM(CONFIG, seed=0), TOKENS, TOKENS, steps=1)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    assert again.memory.peak == pytest.approx(profile.memory.peak, rel=0.5)
    assert profile.memory.peak > profile.memory.kept


# ---- Any model, left as it was -----------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = TransformerLM(CONFIG, seed=0).eval()
    model.head.train()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    profile_step(model, TOKENS, TOKENS, steps=1)
    assert not model.training
    assert not model.blocks[0].training
    assert model.head.training
    assert all((array == before[name]).all() for name, array in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_run_and_are_measured() -> None:
    model = TransformerLM(CONFIG, seed=0)
    seen = Counter[str]()
    model.blocks[1].register_forward_hook(lambda *_: seen.update(["forward"]))
    model.norm.register_full_backward_hook(lambda *_: seen.update(["backward"]))
    result = profile_step(model, TOKENS, TOKENS, steps=2)
    assert seen["forward"] == seen["backward"] > 4
    rows = by_name(result.ops)
    assert rows["module_input"].calls == rows["module_output"].calls == 1
    assert combined("all", result.modules).calls == combined("all", result.ops).calls


def test_formulas_are_profiled_as_the_ops_that_they_are() -> None:
    with use_formulas():
        rows = by_name(profile_step(TransformerLM(CONFIG, seed=0), TOKENS, TOKENS, steps=1).ops)
    assert "scaled_dot_product_attention" not in rows
    for name in ("scores", "attention", "linear"):
        assert rows[name].product_flops == rows[name].forward_flops + rows[name].backward_flops > 0


def test_what_cannot_be_profiled() -> None:
    with pytest.raises(ValueError, match="steps=0; at least one"):
        profile_step(TransformerLM(CONFIG), TOKENS, TOKENS, steps=0)
    with pytest.raises(ValueError, match="Module has no parameters"):
        profile_step(nn.Module(), TOKENS, TOKENS)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_training_step(workers: int) -> None:
    model = TransformerLM(CONFIG, seed=0)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    result = profile_training(model, optimizer, NextToken(), (TOKENS, TOKENS), workers, steps=3)
    parts = (result.gradients_seconds, result.add_up_seconds, result.update_seconds)
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(result.step_seconds)
    assert result.tokens_per_second == B * T / result.step_seconds
    assert result.gradient_bytes == workers * 4 * model.num_parameters()
    assert result.optimizer_bytes == sum(array.nbytes for array in optimizer.state_dict().values()) > 0
    assert all((array == before[name]).all() for name, array in model.state_dict().items()), "the rate is 0"


# ---- The tables --------------------------------------------------------------------------------


def check_width(lines: list[str]) -> None:
    assert max(map(len, lines)) <= WIDTH, max(lines, key=len)


def test_small_rows_are_added_up(profile: Profile) -> None:
    slow = Row("slow", 1, 0.6, 0.3, 10, 20, 30, 4, 5)
    small = [Row(f"small_{i}", 1, 0.001, 0.001, 1, 1, 0, 1, 1) for i in range(3)]
    made = dataclasses.replace(profile, ops=(slow, *small), step_seconds=1.0)
    lines = profile_report._row_table(made, made.ops)
    assert [line.split()[0] for line in lines[1:]] == ["slow", "other", "all"]
    assert lines[2].split()[:6] == ["other", "(3)", "3", "3.00", "3.00", "0.6"]
    # One small row is as short by itself.
    lines = profile_report._row_table(made, made.ops[:2])
    assert [line.split()[0] for line in lines[1:]] == ["slow", "small_0", "all"]
    equal = [dataclasses.replace(slow, name=f"op_{i}", forward_seconds=0.05) for i in range(20)]
    lines = profile_report._row_table(made, equal)
    assert len(lines) == 1 + 12 + 1 + 1
    assert lines[-2].startswith("other (8)")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_tables_fit_the_terminal_whatever_the_numbers(profile: Profile, scale: float) -> None:
    def large(row: Row) -> Row:
        name = "a_very_long_name." * 5 + row.name
        numbers = {key: type(value)(value * scale) for key, value in vars(row).items() if key != "name"}
        return Row(name, **numbers)

    made = Profile(
        tuple(map(large, profile.ops)),
        tuple(map(large, profile.modules)),
        *(seconds * scale for seconds in (profile.step_seconds, profile.fastest, profile.slowest)),
        profile.machine_rate * scale,
        Memory(*(int(size * scale) for size in vars(profile.memory).values())),
    )
    seconds = [scale * value for value in (0.1, 0.01, 0.02, 0.13)]
    whole = TrainingProfile(12, int(1e5 * scale), *seconds, int(1e6 * scale), int(1e6 * scale))
    lines = list(report(made, whole, 1000, 1000, 100_000))
    check_width(lines)
    assert any(re.match(r"\.\.\.\S*name\.linear +\d", line) for line in lines), "cut in front"


def test_a_profile_below_the_noise_says_so(profile: Profile) -> None:
    whole = TrainingProfile(1, 24, 0.1, 0.1, 0.1, 0.3, 1, 1)
    noisy = dataclasses.replace(profile, step_seconds=profile.op_seconds / 2)
    assert any("keeps the machine busy" in line for line in report(noisy, whole, 1, B, T))
    quiet = dataclasses.replace(profile, step_seconds=profile.op_seconds * 2)
    assert not any("keeps the machine busy" in line for line in report(quiet, whole, 1, B, T))


# ---- The command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40)
    arguments = [
        "train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), "--steps", "2", "--batch-size",
        "5", "--gradient-accumulation", "2", "--context-length", "8", "--num-layers", "1", "--num-heads", "2",
        "--hidden-size", "8", "--threads", "1", "--sample-tokens", "0", "--optimizer", "sgd",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    return folder / "run"


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert cli.main(["profile", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return str(out).splitlines()


def test_profile_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of(capsys, "--preset", "char", *SMALL, "--json", "numbers.json")
    check_width(lines)
    assert lines[0] == "preset char"
    assert re.fullmatch(r"[\d,]+ parameters, muon, 12 windows of 16 tokens in a step", lines[1])
    assert lines[3] == "WHOLE TRAINING STEP, 2 workers at the same time"
    assert lines[5].endswith("each worker 1 micro-batch of 6 x 16 tokens")
    text = "\n".join(lines)
    for part in (
        "tokens a second",
        "GFLOP/s",
        "linear",
        "blocks.*.attention",
        "optimizer state",
        "peak",
        " ms ",
    ):
        assert part in text
    numbers = json.loads(Path("numbers.json").read_text())
    step, whole = numbers["micro_batch"], numbers["training_step"]
    assert (numbers["model"]["hidden_size"], numbers["train"]["optimizer"]) == (16, "muon")
    assert (step["windows"], step["length"], step["per_worker"]) == (6, 16, 1)
    assert (whole["workers"], whole["tokens"]) == (2, 12 * 16)
    total = sum(row["forward_seconds"] + row["backward_seconds"] for row in step["ops"])
    assert total == pytest.approx(step["op_seconds"])
    assert total + step["outside_seconds"] == pytest.approx(step["step_seconds"])
    assert step["limit_seconds"] == pytest.approx(step["product_flops"] / step["machine_rate"])
    assert f"{numbers['parameters']:,} parameters" in lines[1]
    assert sum(row["kept_bytes"] for row in step["modules"]) == step["memory"]["kept"]


def test_profile_of_a_run_takes_its_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in trained.rglob("*"))
    for path in (trained, trained / "latest", *(trained / "checkpoints").iterdir()):
        lines = output_of(capsys, str(path), "--steps", "1")
        check_width(lines[1:])
        assert lines[0] == str(path)
        assert lines[1].endswith("parameters, sgd, 10 windows of 8 tokens in a step")
        assert lines[3] == "WHOLE TRAINING STEP, 1 worker"
        assert lines[5].endswith("each worker 1 micro-batch of 10 x 8 tokens")
    lines = output_of(
        capsys, str(trained), "--steps", "1", "--batch-size", "1", "--optimizer", "muon", "--threads", "2"
    )
    assert lines[1].endswith("parameters, muon, 2 windows of 8 tokens in a step")
    lines = output_of(capsys, str(trained), "--steps", "1", "--threads", "3")
    assert lines[3] == "WHOLE TRAINING STEP, 3 workers at the same time"
    assert lines[5].endswith("each worker up to 1 micro-batch of 4 x 8 tokens")
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_a_checkpoint_elsewhere_has_the_default_settings(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = keeping.find(trained)
    folder.resolve().rename("moved")
    try:
        assert ", adamw, 12 windows" in output_of(capsys, "moved", "--steps", "1", "--threads", "1")[1]
    finally:
        Path("moved").rename(folder)


def test_the_micro_batch_is_the_largest_that_a_worker_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    gradients_of = Processes._gradients
    forward = TransformerLM.forward

    def spy(self: TransformerLM, tokens: Any, *arguments: Any) -> Tensor:
        sizes.append(tokens.shape)
        return forward(self, tokens, *arguments)

    monkeypatch.setattr(TransformerLM, "forward", spy)
    assert cli.main(["profile", "--preset", "char", *SMALL, "--batch-size", "200", "--threads", "1"]) == 0
    # 200 windows of 16 tokens are 3.1 micro-batches of 1024 tokens, so 4.
    assert set(sizes) == {(50, 16)}
    assert Processes._gradients is gradients_of


def test_flags_of_training_are_those_of_train() -> None:
    theirs = {item.name: item for item in dataclasses.fields(TrainConfig)}
    for item in dataclasses.fields(cli_profile.BatchFlags):
        assert item.default == theirs[item.name].default
        assert item.type == theirs[item.name].type


BAD: dict[str, tuple[list[str], str]] = {
    "neither": ([], r"nothing to profile; give DIR, a run or a checkpoint, or --preset char"),
    "both": (["here", "--preset", "char"], r"got DIR and --preset; give one of them"),
    "no such folder": (["mising"], r"mising: no such folder; give a run or a checkpoint"),
    "no checkpoint": (["empty"], r"empty: no checkpoint here"),
    "unknown preset": (["--preset", "chat"], r"unknown preset 'chat'; did you mean 'char'\?"),
    "no steps": (["--preset", "char", "--steps", "0"], r"steps=0; it must be from 1 to 2147483647"),
    "steps in words": (["--preset", "char", "--steps", "two"], r"argument --steps: steps must be an integer"),
    "json into no folder": (
        ["--preset", "char", "--json", "no/x.json"],
        r"no/x\.json: cannot be written: No such",
    ),
    "json is a folder": (
        ["--preset", "char", "--json", "empty"],
        r"empty is a folder; give the name of a file",
    ),
    "json below a file": (
        ["--preset", "char", "--json", "file/x"],
        r"file/x: cannot be written: Not a directory",
    ),
    "bad setting": (["--preset", "char", "--batch-size", "0"], r"batch_size=0; it must be from 1"),
    "bad shape": (["--preset", "char", "--num-heads", "3"], r"num_heads=3 does not divide hidden_size=128"),
    "unknown flag": (
        ["--preset", "char", "--step", "3"],
        r"unknown argument '--step'; did you mean --steps\?",
    ),
    "too large": (
        ["--preset", "char", "--hidden-size", "1000000"],
        r"this run would take about .* GiB of memory",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("file").touch()
    arguments, expected = BAD[case]
    assert error_of(capsys, *arguments).startswith("tinyllm: error: ")
    assert re.search(expected, error_of(capsys, *arguments))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return str(err)


def test_the_shape_of_a_trained_model_is_not_a_setting(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "got DIR and --hidden-size" in error_of(capsys, str(trained), "--hidden-size", "16")


def test_a_model_that_is_broken(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tinyllm

    model, tokenizer = tinyllm.load(trained)
    model.head.weight.data[...] = np.nan
    checkpoint.save("broken", model, tokenizer)
    assert "broken: training cannot go on from this model" in error_of(capsys, "broken", "--steps", "1")


def test_a_vocabulary_that_only_training_knows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokenizer in ("bpe", "byte"):
        monkeypatch.setitem(PRESETS, tokenizer, {"train": {"tokenizer": tokenizer}})
    assert "give --vocab-size" in error_of(capsys, "--preset", "bpe")
    output_of(capsys, "--preset", "bpe", "--vocab-size", "7", *SMALL)
    output_of(capsys, "--preset", "byte", *SMALL, "--json", "x.json")
    assert json.loads(Path("x.json").read_text())["model"]["vocab_size"] == 256


def test_plot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        assert "--plot needs matplotlib" in error_of(capsys, "--preset", "char", "--plot", "x.png")
        pytest.skip("matplotlib is not installed")
    output_of(capsys, "--preset", "char", *SMALL, "--plot", "x.png")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--plot needs matplotlib" in error_of(capsys, "--preset", "char", "--plot", "y.png")

"""What is written about a rejected step, and the step run again from it."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.troubles import before_step, nan_in_a_gradient, nan_in_a_weight, one_token, shuffled_labels

from tinyllm import no_grad, ops
from tinyllm.backend import ignore_non_finite
from tinyllm.cli import main as cli
from tinyllm.cli import replay as cli_replay
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import dropout_position
from tinyllm.nn.module import path_of
from tinyllm.ops.fast.activation import FastSwiglu
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.callbacks import Progress
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.events import Rejection
from tinyllm.training.metrics import MetricsFile, read_metrics
from tinyllm.training.safeguards import incidents
from tinyllm.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=12, context_length=8, num_layers=2, num_heads=2, hidden_size=16, dropout=0.1)
CONFIG = TrainConfig(
    steps=60, batch_size=8, warmup_steps=5, threads=2, eval_every=60, checkpoint_every=20, learning_rate=1e-2,
    watch_window=32, patience=3, sample_tokens=0, z_loss=1e-3,
)  # fmt: skip
TOKENIZER = CharTokenizer("abcdefghijkl")
TOKENS = (np.cumsum(np.random.default_rng(0).integers(1, 3, 4000)) % 12).astype(np.uint16)
SPLIT = (TOKENS[:3600], TOKENS[3600:])
AT = 50


def run_with(trouble: Any, run: Path, callbacks: Any = (), config: TrainConfig = CONFIG) -> Trainer:
    run.mkdir()
    trainer = Trainer(TransformerLM(MODEL, config.seed), TOKENIZER, *SPLIT, config, run, callbacks)
    trouble(trainer, AT)
    trainer.fit()
    return trainer


def names(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "incidents").iterdir())


def weight_of_block(trainer: Trainer, at: int) -> None:
    def act(position: int) -> None:
        if position == at:
            trainer.parameters["blocks.1.feed_forward_norm.weight"].data[3] = np.inf

    before_step(trainer, act)


@pytest.fixture(scope="module")
def broken_weight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("weight") / "run"
    run_with(weight_of_block, run, [MetricsFile(run)])
    return run


@pytest.fixture(scope="module")
def broken_gradient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("gradient") / "run"
    run_with(nan_in_a_gradient, run)
    return run


@pytest.fixture(scope="module")
def odd_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("batch") / "run"
    run_with(one_token, run)
    return run


# ---- What is written ---------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_named(broken_weight: Path) -> None:
    assert names(broken_weight) == [f"00000051-000000{position}" for position in (50, 51, 52)]
    folder = broken_weight / "incidents/00000051-00000050"
    report = json.loads((folder / "report.json").read_text())
    first = report["first_non_finite"]
    assert first["module"] == "blocks.1.feed_forward_norm"
    assert (first["op"], first["phase"]) == ("rms_norm", "forward")
    assert [line["name"] for line in report["parameters"] if line["weight_non_finite"]] == [
        "blocks.1.feed_forward_norm.weight"
    ]
    text = (folder / "report.txt").read_text()
    for part in ("Step 51", "batch is number 50", "the loss is nan", "1 of 25 weights hold values that are not finite",
                 "rms_norm.forward in blocks.1.feed_forward_norm", f"tinyllm replay {folder}"):  # fmt: skip
        assert part in text, text
    done = [
        json.loads((broken_weight / "incidents" / name / "report.json").read_text())["done"]
        for name in names(broken_weight)
    ]
    assert ["went back" in what for what in done] == [False, False, True]


def test_the_batch_is_kept_as_ids_and_as_text(broken_weight: Path) -> None:
    expected = Trainer(TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, CONFIG).sampler
    for position in (50, 51, 52):
        folder = broken_weight / f"incidents/00000051-000000{position}"
        batch = json.loads((folder / "batch.json").read_text())
        inputs, targets = expected.batch(position)
        assert batch == {"inputs": inputs.tolist(), "targets": targets.tolist()}
        lines = (folder / "batch.txt").read_text().splitlines()
        assert lines[:2] == ["---- window 0", TOKENIZER.decode([*inputs[0], targets[0, -1]])]
        assert len(lines) == 2 * len(inputs)


def test_labels_that_do_not_follow_are_shown(tmp_path: Path) -> None:
    run_with(shuffled_labels, tmp_path / "run", config=replace(CONFIG, watch_loss=3.0))
    text = (tmp_path / "run/incidents/00000051-00000050/batch.txt").read_text()
    assert text.count("---- targets of window") == 8


def test_the_state_before_is_a_checkpoint_and_is_kept_once(broken_weight: Path) -> None:
    first, *others = (broken_weight / "incidents" / name for name in names(broken_weight))
    state = checkpoint.load_training(first / "before")
    assert (state.values["step"], state.values["sampler"]["step"]) == (50, 50)
    resumed = Trainer(TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, CONFIG)
    resumed._apply(resumed.state.restore(checkpoint.read(first / "before")))
    assert np.isinf(resumed.parameters["blocks.1.feed_forward_norm.weight"].data[3])
    # All but what was broken is what 50 steps give.
    expected = Trainer(TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, CONFIG)
    with expected.engine:
        for _ in range(50):
            next(expected.train_steps())
    for name, array in expected.model.state_dict().items():
        assert int((array != resumed.model.state_dict()[name]).sum()) == (
            name == "blocks.1.feed_forward_norm.weight"
        )
    for name, array in expected.optimizer.state_dict().items():
        assert (array == resumed.optimizer.state_dict()[name]).all()
    for other in others:
        assert not (other / "before").exists()
        report = json.loads((other / "report.json").read_text())
        assert (other / report["before"]).resolve() == (first / "before").resolve()


def test_the_tokens_with_the_highest_loss(odd_batch: Path) -> None:
    folder = odd_batch / "incidents/00000051-00000050"
    report = json.loads((folder / "report.json").read_text())
    batch = json.loads((folder / "batch.json").read_text())
    inputs, targets = np.array(batch["inputs"]), np.array(batch["targets"])
    trainer = Trainer(TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, CONFIG)
    trainer._apply(trainer.state.restore(checkpoint.read(folder / "before")))
    losses = []
    trainer.model.train()
    with no_grad():
        for number, rows in enumerate((slice(0, 4), slice(4, 8))):
            with dropout_position(CONFIG.seed, 50, number):
                losses.append(
                    ops.cross_entropy(trainer.model(inputs[rows]), targets[rows], reduction="none").data
                )
    expected = np.concatenate(losses)
    told = [token["loss"] for token in report["tokens"]]
    assert told == sorted(expected.reshape(-1).tolist(), reverse=True)[:12]
    for token in report["tokens"]:
        assert expected[token["window"], token["place"]] == token["loss"]
        assert (token["text"], set(token["context"])) == ("l", {"l"})
        assert len(token["context"]) == token["place"] + 1
    assert "'l' after" in (folder / "report.txt").read_text()
    assert "All values are finite." in (folder / "report.txt").read_text()
    assert "a spike" in report["reason"]
    assert report["usual_loss"] < report["loss"] / 2


def test_tokens_whose_loss_is_not_a_number_come_first(tmp_path: Path) -> None:
    def trouble(trainer: Trainer, at: int) -> None:
        def act(position: int) -> None:
            if position == at:
                trainer.parameters["embedding.weight"].data[TOKENIZER.encode("l")] = np.nan

        before_step(trainer, act)

    run_with(trouble, tmp_path / "run")
    folder = tmp_path / "run/incidents/00000051-00000050"
    inputs = json.loads((folder / "batch.json").read_text())["inputs"]
    assert [11 in window for window in inputs].count(False) > 0, "some windows are without it"
    for token in json.loads((folder / "report.json").read_text())["tokens"]:
        assert token["loss"] == "nan"
        assert 11 in inputs[token["window"]]


def test_norms_are_those_of_weights_and_gradients(broken_gradient: Path) -> None:
    folder = broken_gradient / "incidents/00000051-00000050"
    report = json.loads((folder / "report.json").read_text())
    model, _ = keeping.load(folder / "before")
    weights = dict(model.named_parameters())
    for line in report["parameters"]:
        norm = float(np.linalg.norm(weights[line["name"]].data.astype(np.float64)))
        assert line["weight_norm"] == pytest.approx(norm, rel=1e-5)
        assert line["gradient_norm"] == "nan"
        assert (line["weight_non_finite"], line["gradient_non_finite"]) == (0, 1)
    assert report["first_non_finite"] is None
    text = (folder / "report.txt").read_text()
    assert "25 of 25 gradients hold values that are not finite" in text
    assert "Computed again, the step is finite throughout" in text


def test_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incidents, "KEEP", 4)
    monkeypatch.setattr(incidents, "KEEP_WHOLE", 2)

    def trouble(trainer: Trainer, at: int) -> None:
        for position in range(40, 50, 2):
            nan_in_a_gradient(trainer, position)

    run = tmp_path / "run"
    run_with(trouble, run)
    assert [name.partition("-")[2] for name in names(run)] == ["00000042", "00000044", "00000046", "00000048"]
    whole = [name for name in names(run) if (run / "incidents" / name / "before").exists()]
    assert whole == names(run)[-2:]
    assert cli.main(["replay", str(run / "incidents" / names(run)[0])]) == 2


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    def trouble(trainer: Trainer, at: int) -> None:
        nan_in_a_weight(trainer, at)
        (tmp_path / "run/incidents").write_text("in the way")

    stream = io.StringIO()
    run = tmp_path / "run"
    trainer = run_with(trouble, run, [MetricsFile(run), Progress(stream=stream)])
    assert trainer.step == 60
    lines = [line for line in stream.getvalue().splitlines() if "not made" in line]
    assert len(lines) == 1
    assert "there is no report: " in lines[0]


def test_what_is_said_and_logged(broken_weight: Path, tmp_path: Path) -> None:
    events = [line for line in read_metrics(broken_weight / "metrics.jsonl") if "event" in line]
    assert [line["event"] for line in events] == ["rejected"] * 3 + ["rollback"]
    assert [line.get("position") for line in events] == [50, 51, 52, None]
    assert (events[0]["loss"], events[0]["reason"]) == (None, "the loss is nan")
    assert (events[-1]["to_step"], events[-1]["skipped"], events[-1]["number"]) == (40, 3, 1)
    text = (broken_weight / "metrics.jsonl").read_text()
    assert "NaN" not in text
    stream = io.StringIO()
    run_with(nan_in_a_weight, tmp_path / "run", [Progress(line_every=1000, stream=stream)])
    first, *lines = stream.getvalue().splitlines()
    assert first.startswith("step 1/60 ")
    folder = tmp_path / "run/incidents/00000051-00000050"
    assert lines[0] == (
        f"step 51 is not made: the loss is nan; its batch is skipped; what led there is in {folder}"
    )
    assert "back to step 40" in lines[1]
    assert "without the next 3 batches" in lines[1]


def test_the_state_before_is_not_that_of_an_earlier_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_with(nan_in_a_gradient, run)
    shutil.rmtree(run / "checkpoints")
    trainer = Trainer(TransformerLM(MODEL, 2), TOKENIZER, *SPLIT, replace(CONFIG, seed=2), run)
    for position in (AT - 20, AT + 1):  # so that step 51 is the same step with the next batch
        nan_in_a_gradient(trainer, position)
    trainer.fit()
    report = json.loads((run / "incidents/00000051-00000051/report.json").read_text())
    assert report["before"] == "before"


def test_a_run_that_replaces_another_has_no_incidents_of_it(tmp_path: Path) -> None:
    """The state before a step of the old run would be taken for that of the new one."""
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 60)
    command = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--threads", "1",
               "--batch-size", "4", "--context-length", "8", "--num-layers", "1", "--num-heads", "2", "--hidden-size",
               "8", "--optimizer", "sgd", "--warmup-steps", "0", "--sample-tokens", "0", "--steps", "2"]  # fmt: skip
    assert cli.main([*command, "--learning-rate", "1e300"]) == 2
    assert names(tmp_path / "run")
    assert cli.main([*command, "--learning-rate", "1e-3", "--overwrite"]) == 0
    assert not (tmp_path / "run/incidents").exists()


# ---- Run again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [50, 51, 52])
def test_a_step_is_replayed_from_any_of_its_folders(
    broken_weight: Path, position: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(broken_weight / f"incidents/00000051-000000{position}")]) == 0
    said = capsys.readouterr().out
    assert f"step 51, batch {position}: the loss is nan" in said
    assert "again: loss nan, gradient norm nan (as in the run)" in said
    assert "First not finite: rms_norm.forward in blocks.1.feed_forward_norm: input 1" in said


def test_a_replayed_step_has_the_bits_of_the_run(odd_batch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = odd_batch / "incidents/00000051-00000050"
    assert cli.main(["replay", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "(as in the run)" in said
    assert "All values are finite." in said
    report = json.loads((folder / "report.json").read_text())
    report["loss"] = math.nextafter(report["loss"], 0)
    changed = odd_batch / "changed"
    shutil.copytree(folder, changed)
    (changed / "report.json").write_text(json.dumps(report))
    assert cli.main(["replay", str(changed)]) == 0
    assert f"the run had {report['loss']}" in capsys.readouterr().out


def test_a_step_that_is_not_wrong_again_is_said(
    broken_gradient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(broken_gradient / "incidents/00000051-00000050")]) == 0
    said = capsys.readouterr().out
    assert "and nan)" in said
    assert "the step is another one" in said


def test_the_first_non_finite_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is finite, and the backward of an op in the second block divides by zero in one batch."""
    plain, bad = FastSwiglu.backward, [False]

    def backward(self: FastSwiglu, gradient: Any) -> Any:
        second = bad[0] and path_of(self.modules).startswith("blocks.1")
        return tuple(result / np.float32(0) if second else result for result in plain(self, gradient))

    def trouble(trainer: Trainer, at: int) -> None:
        before_step(trainer, lambda position: bad.__setitem__(0, position == at))

    monkeypatch.setattr(FastSwiglu, "backward", backward)
    run_with(trouble, tmp_path / "run", config=replace(CONFIG, threads=1))
    report = json.loads((tmp_path / "run/incidents/00000051-00000050/report.json").read_text())
    first = report["first_non_finite"]
    assert (first["op"], first["phase"], first["module"]) == ("swiglu", "backward", "blocks.1.feed_forward")


def test_an_incident_is_written_again_when_a_killed_run_comes_to_it_again(tmp_path: Path) -> None:
    run_with(nan_in_a_gradient, tmp_path / "run")
    report = tmp_path / "run/incidents/00000051-00000050/report.json"
    expected = report.read_bytes()
    report.write_text("of the run that was killed")
    trainer = Trainer(TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, CONFIG, tmp_path / "run")
    nan_in_a_gradient(trainer, AT)
    trainer.resume(checkpoint.read(tmp_path / "run/checkpoints/step-00000040"))
    trainer.fit()
    assert report.read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "commands", "expected"),
    [
        ("broken_weight", "p sorted(locals())\np self.name\nc\n", ["['self', 'weight', 'x']", "'rms_norm'"]),
        ("odd_batch", "p loss > 1\np losses.shape\np step.position\nc\n", ["True", "(8, 8)", "50"]),
    ],
)
def test_debug_stops_where_it_goes_wrong(
    name: str, commands: str, expected: list[str], request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = request.getfixturevalue(name) / "incidents/00000051-00000050"
    monkeypatch.setattr("sys.stdin", io.StringIO(commands))
    assert cli.main(["replay", str(folder), "--debug"]) == 0
    said = capsys.readouterr().out
    for part in expected:
        assert part in said, said


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("report.json", lambda text: "{}"),
        ("report.json", lambda text: text.replace('"before": "before"', '"before": "no"')),
        ("report.json", lambda text: text.replace('"seed": 1', '"seed": -1')),
        ("report.json", lambda text: text.replace('"workers": 2', '"workers": 1e99')),
        ("report.json", lambda text: text.replace('"loss": ', '"loss": [], "l": ', 1)),
        ("batch.json", lambda text: "[]"), ("batch.json", lambda text: '{"inputs": [[99]], "targets": [[0]]}'),
        ("batch.json", lambda text: '{"inputs": [[1], [2, 3]], "targets": [[0]]}'),
        ("batch.json", lambda text: '{"inputs": [[1]], "targets": [["x"]]}'),
        ("batch.json", lambda text: '{"inputs": [], "targets": []}'),
        ("before/model.safetensors", lambda text: ""),
    ],
)  # fmt: skip
def test_a_damaged_incident_is_refused_in_one_line(
    odd_batch: Path, tmp_path: Path, file: str, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(odd_batch / "incidents/00000051-00000050", folder)
    (folder / file).write_text(change((folder / file).read_text(errors="replace")))
    assert cli.main(["replay", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tinyllm: error: ")
    assert said.count("\n") == 1


def test_no_incident_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "no incident here" in capsys.readouterr().err


def test_recording_changes_nothing(tmp_path: Path) -> None:
    """Neither parameters, nor what is trained afterwards."""
    found = []
    for run in (None, tmp_path):
        trainer = Trainer(TransformerLM(MODEL, 1), TOKENIZER, *SPLIT, CONFIG, run)
        nan_in_a_gradient(trainer, 5)
        with ignore_non_finite(), trainer.engine:
            for _ in range(10):
                made = next(trainer.train_steps())
                if run is not None and isinstance(made, Rejection):
                    step = incidents.Step(trainer.model, trainer.objective, made.batch, made.position, 1, 2)
                    incidents.record(
                        run, made, "nothing", step, trainer.engine.total, TOKENIZER, trainer._collect()
                    )
        found.append({name: array.tobytes() for name, array in trainer.model.state_dict().items()})
    assert found[0] == found[1]
    assert names(tmp_path) == ["00000006-00000005"]


def test_a_replayed_model_has_the_dtype_and_the_tie_of_the_run(tmp_path: Path) -> None:
    model = TransformerLM(MODEL, 1).astype(np.float64)
    model.embedding.weight.data += 1e-12  # what float32 does not hold
    model.head.weight = model.embedding.weight
    trainer = Trainer(model, TOKENIZER, *SPLIT, CONFIG, tmp_path)
    nan_in_a_gradient(trainer, 0)
    with ignore_non_finite(), trainer.engine:
        made = next(trainer.train_steps())
        assert isinstance(made, Rejection)
        step = incidents.Step(trainer.model, trainer.objective, made.batch, made.position, 1, 2)
        folder = incidents.record(
            tmp_path, made, "nothing", step, trainer.engine.total, TOKENIZER, trainer._collect()
        )
    _, step = cli_replay.load(folder)
    assert step.model.head.weight is step.model.embedding.weight
    assert {name: array.tobytes() for name, array in step.model.state_dict().items()} == {
        name: array.tobytes() for name, array in model.state_dict().items()
    }

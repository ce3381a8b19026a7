"""The planted bugs: each is killed, each fits the package, and planting leaves nothing behind."""

import inspect
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tinyllm
import tinyllm.training.engines.serial  # holds functions by name, which planting must reach
from tinyllm import optim
from tinyllm.autograd.tensor import Tensor, gradients
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import MultiHeadAttention
from tinyllm.ops.fast.attention import ScaledDotProductAttention
from tinyllm.testing.mutants import (
    CHECKS,
    MUTANTS,
    Kill,
    Mutant,
    Survey,
    attention,
    checking,
    optimizers,
    run_check,
    survey,
)
from tinyllm.testing.mutants.command import main
from tinyllm.testing.mutants.hunt import hidden
from tinyllm.testing.mutants.planting import add, replaced

EACH = pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))


@pytest.fixture(scope="module")
def kills() -> Survey:
    return survey()


# ---- The set -----------------------------------------------------------------------------------


def test_there_are_many_and_each_is_explained() -> None:
    assert len(MUTANTS) >= 60
    explanations = [mutant.explanation for mutant in MUTANTS.values()]
    assert len(set(explanations)) == len(explanations)
    for name, mutant in MUTANTS.items():
        assert mutant.name == name
        assert len(mutant.explanation) > 40
        assert mutant.explanation.endswith((".", ".)"))
        assert "  " not in mutant.explanation


def test_a_mutant_needs_a_new_name_and_an_explanation() -> None:
    for name, explanation in ((next(iter(MUTANTS)), "Something."), ("new", " \n ")):
        with pytest.raises(ValueError, match="is there already, or has no explanation"):
            add(name, explanation, Tensor, "backward", None)
    with pytest.raises(ValueError, match="is there already"):
        checking.check(next(iter(CHECKS)))(lambda: None)


# ---- Kills -------------------------------------------------------------------------------------


def test_every_check_passes_without_a_mutant(kills: Survey) -> None:
    assert kills.failures == {}


@EACH
def test_every_mutant_is_killed(mutant: Mutant, kills: Survey) -> None:
    assert mutant.name not in kills.survivors
    assert [kill.check for kill in kills.kills if kill.mutant == mutant.name]


def test_the_survey_is_fast(kills: Survey) -> None:
    assert kills.passed
    assert kills.seconds < 100


@pytest.mark.parametrize(
    "name", ["softmax_backward_without_the_mean", "cache_prepends", "adam_eps_inside_the_root"]
)
def test_checks_that_do_not_reach_a_mutant_pass(name: str, kills: Survey) -> None:
    """So leaving them out hides no kill."""
    mutant = MUTANTS[name]
    with mutant.planted():
        noticed = {check for check in CHECKS if checking.failure(check) is not None}
    found = survey([mutant], all_kills=True)
    assert noticed == {kill.check for kill in found.kills}
    assert len(noticed) < len(CHECKS) / 2


def test_a_bug_that_nobody_notices_survives() -> None:
    original = tinyllm.ops.elementwise.Exp.backward  # type: ignore[attr-defined]
    harmless = Mutant(
        "harmless", "Nothing.", tinyllm.ops.elementwise.Exp, "backward", lambda s, g: original(s, g)
    )  # type: ignore[attr-defined]
    told: list[tuple[str, list[Kill]]] = []
    result = survey([harmless], report=lambda mutant, kills: told.append((mutant.name, kills)))
    assert result.survivors == ["harmless"]
    assert told == [("harmless", [])]
    assert not result.passed


def test_a_mutant_that_no_longer_fits_is_not_killed_by_its_errors() -> None:
    stale = Mutant("stale", "Takes no gradient.", tinyllm.ops.elementwise.Exp, "backward", lambda self: None)  # type: ignore[attr-defined]
    assert survey([stale]).survivors == ["stale"]


def test_a_check_that_fails_by_itself_kills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise AssertionError("wrong from the start\nand more")

    monkeypatch.setattr(checking, "CHECKS", {"wrong": wrong, "gradient of exp": CHECKS["gradient of exp"]})
    result = survey([MUTANTS["exp_backward_uses_the_input_twice"], MUTANTS["log_backward_multiplies"]])
    assert result.failures == {"wrong": "wrong from the start"}
    assert [kill.check for kill in result.kills] == ["gradient of exp"]
    assert not result.passed


# ---- Planting ----------------------------------------------------------------------------------


def package() -> dict[tuple[str, str], int]:
    """The identity of everything that can be reached by name in the package: modules and classes."""
    found = {}
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "tinyllm":
            for name, value in list(vars(module).items()):
                found[path, name] = id(value)
                if inspect.isclass(value) and value.__module__.startswith("tinyllm"):
                    found |= {(f"{path}.{name}", entry): id(part) for entry, part in vars(value).items()}
    return {key: value for key, value in found.items() if key[1] not in ("__abstractmethods__", "__dict__")}


def test_planting_and_restoring_leaves_everything_as_it_was() -> None:
    before = package()
    for mutant in MUTANTS.values():
        now = inspect.getattr_static(mutant.owner, mutant.attribute)
        with mutant.planted():
            assert inspect.getattr_static(mutant.owner, mutant.attribute) is mutant.replacement
        assert inspect.getattr_static(mutant.owner, mutant.attribute) is now
    assert package() == before


@EACH
def test_planting_is_undone_by_an_error_too(mutant: Mutant) -> None:
    before = vars(mutant.owner).get(mutant.attribute)
    with pytest.raises(KeyError), mutant.planted():
        raise KeyError
    assert vars(mutant.owner).get(mutant.attribute) is before


def test_an_inherited_attribute_is_removed_again() -> None:
    class Child(optim.AdamW):
        pass

    with replaced(Child, "update", None):
        assert Child.update is None
    assert "update" not in vars(Child)
    with pytest.raises(AttributeError), replaced(Child, "no_such_thing", None):
        pass


def test_functions_that_others_import_by_name_are_replaced_there_too() -> None:
    original = optim.clip_scale
    assert tinyllm.training.engines.serial.clip_scale is original
    with MUTANTS["clip_scales_always"].planted():
        assert tinyllm.training.engines.serial.clip_scale is optim.clip_scale
        assert optim.clip_scale is not original
    assert tinyllm.training.engines.serial.clip_scale is optim.clip_scale is original


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name.lstrip("_"), p.kind) for p in inspect.signature(function).parameters.values()]


@EACH
def test_a_replacement_takes_the_arguments_of_what_it_replaces(mutant: Mutant) -> None:
    found = inspect.getattr_static(mutant.owner, mutant.attribute)
    if isinstance(found, property):
        assert isinstance(mutant.replacement, property)
    elif not callable(found):
        assert type(mutant.replacement) is type(found)
    elif not any(kind is inspect.Parameter.VAR_POSITIONAL for _, kind in parameters(mutant.replacement)):
        assert parameters(mutant.replacement) == parameters(found)


# ---- The parts that mutants write out once more are right without a mistake ----------------------


def small() -> TransformerLM:
    config = ModelConfig(
        vocab_size=11, context_length=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16
    )
    return TransformerLM(config, seed=3).astype(np.float64)


def test_attention_written_out_is_the_same() -> None:
    tokens = np.random.default_rng(0).integers(0, 11, (2, 6))

    def run() -> list[Any]:
        model = small()
        output = model(tokens)
        cotangent = np.random.default_rng(1).standard_normal(output.shape)
        return [output.data, *gradients(output, list(model.parameters()), cotangent)]

    expected = run()
    with (
        replaced(MultiHeadAttention, "forward", lambda self, x, cache=None: attention.attend(self, x, cache)),
        replaced(ScaledDotProductAttention, "backward", attention._written_out),
    ):
        found = run()
        run_check("model: cached equals uncached")
        run_check("gradient of scaled_dot_product_attention")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_optimizers_written_out_are_the_same() -> None:
    with replaced(optim.AdamW, "update", optimizers._adam()):
        run_check("AdamW against its paper")


# ---- The command line --------------------------------------------------------------------------


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exp_backward_uses_the_input_twice", "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("killed by") > 1
    assert "killed by [gradient of exp] " in out
    assert MUTANTS["exp_backward_uses_the_input_twice"].explanation[:60] in out
    assert f"1 of 1 mutants killed; {len(CHECKS)} of {len(CHECKS)} checks pass without any" in out


def test_table_with_a_survivor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise AssertionError("wrong from the start")

    kept = {"gradient of exp": CHECKS["gradient of exp"], "wrong": wrong}
    monkeypatch.setattr(checking, "CHECKS", kept)
    assert main(["log_backward_multiplies", "exp_backward_uses_the_input_twice"]) == 1
    out = capsys.readouterr().out
    assert "SURVIVES" in out
    assert "survivors: log_backward_multiplies" in out
    assert "without any mutant, [wrong] fails: wrong from the start" in out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}  ({mutant.place})" in out for name, mutant in MUTANTS.items())
    assert out.endswith(f"{len(MUTANTS)} mutants\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frob"], "unrecognized arguments: --frob"),
        (["softmax_backward_without_mean"], "did you mean 'softmax_backward_without_the_mean'?"),
        (["xyz"], "no mutant is named 'xyz'"),
        (["--hunt", "few"], "argument --hunt: invalid int value: 'few'"),
        (["--hunt", "-3"], "--hunt -3: a seed is 0 or more"),
        (["--reveal", "-1"], "--reveal -1: a seed is 0 or more"),
        (["--reveal"], "argument --reveal: expected one argument"),
        (["--hunt", "3", "--list"], "--list and --hunt do not go together"),
        (["--reveal", "3", "--all"], "--all belongs to the table"),
        (["--run", "x.py"], "--run belongs to a hunt"),
        (["--hunt", "3", "--run"], "--run needs a script"),
        (["--hunt", "3", "--run", "no-such-file.py"], "no-such-file.py: no such file"),
        (["relu_passes_where_the_gradient_is_positive", "--reveal", "3"], "--reveal takes no names"),
    ],
)
def test_bad_flags_get_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def seed_of(name: str) -> int:
    return next(seed for seed in range(100000) if hidden(seed).name == name)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(
        "import sys\n"
        "from tinyllm import Tensor\n"
        "x = Tensor(0.0, requires_grad=True)\n"
        "x.sigmoid().backward()\n"
        "print(sys.argv[1:], float(x.grad), __name__)\n"
        "sys.exit(7)\n"
    )
    return path


def test_hunt_runs_a_script_with_the_bug(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = list(sys.argv)
    seed = seed_of("sigmoid_backward_without_its_value")
    assert main(["--hunt", str(seed), "--run", str(script), "one", "--all"]) == 7
    captured = capsys.readouterr()
    assert captured.out == "['one', '--all'] 0.5 __main__\n"
    assert f"Hunt {seed}: one function of this package has a bug" in captured.err
    assert "sigmoid_backward_without_its_value" not in captured.err
    assert main(["--hunt", str(seed_of("log_backward_multiplies")), "--run", str(script)]) == 7
    assert capsys.readouterr().out == "[] 0.25 __main__\n"
    assert sys.argv == arguments


def test_hunt_in_a_session(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seed = seed_of("sigmoid_backward_without_its_value")
    lines = "gradcheck(lambda x: x.sigmoid(), np.array([0.0]))\nhint()\nreveal()\nmodel.config.vocab_size\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.setitem(sys.modules, "readline", ModuleType("readline"))  # it would read the terminal
    assert main(["--hunt", str(seed)]) == 0
    captured = capsys.readouterr()
    assert "GradientError: gradient of argument 0 (x): constant factor" in captured.err
    assert "the bug is in tinyllm.ops.elementwise\n" in captured.out
    assert f"hunt {seed}: sigmoid_backward_without_its_value" in captured.out
    assert captured.out.endswith("11\n>>> ")
    run_check("gradient of sigmoid")


def test_hunt_without_a_seed(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda limit: limit - 1)
    assert main(["--hunt", "--run", str(script)]) == 7
    assert "Hunt 9999: " in capsys.readouterr().err


def test_reveal(capsys: pytest.CaptureFixture[str]) -> None:
    seed = seed_of("mask_sees_one_token_ahead")
    assert main(["--reveal", str(seed)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"hunt {seed}: mask_sees_one_token_ahead\n  in tinyllm.nn.attention.MultiHeadAttention.forward\n"
    )
    assert " ".join(out.split()).endswith(MUTANTS["mask_sees_one_token_ahead"].explanation)


def test_every_mutant_can_be_hunted() -> None:
    assert {hidden(seed).name for seed in range(10000)} == set(MUTANTS)


def test_as_a_module() -> None:
    root = Path(tinyllm.__file__).parents[1]
    command = [sys.executable, "-m", "tinyllm.testing.mutants", "relu_passes_where_the_gradient_is_positive"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "killed by [gradient of relu]" in result.stdout

"""Everything that runs on a device, on the strict double of CuPy; with TINYLLM_DEVICE=cupy, on CuPy itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.strict_device import StrictDevice, StrictDeviceError, strict_device

import tinyllm
from tinyllm import backend, ops
from tinyllm.autograd.registry import REGISTRY, FusedOp
from tinyllm.autograd.tensor import Case, Op, Tensor, gradients
from tinyllm.backend import current, device
from tinyllm.backend.philox import Key, keep_mask
from tinyllm.cli import evaluate, sample
from tinyllm.cli import main as cli
from tinyllm.data import embedded_corpus, split_by_position
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.generation.sampling import generate
from tinyllm.ops.fast import attention
from tinyllm.system.errors import InputError
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training import runs, scoring
from tinyllm.training.callbacks import Callback
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines.device import DeviceSteps, LossScale
from tinyllm.training.events import Limits, Rejection, StepMetrics
from tinyllm.training.objectives import NextToken
from tinyllm.training.safeguards.watch import Watch
from tinyllm.training.trainer import Trainer


@contextlib.contextmanager
def on_device() -> Iterator[StrictDevice | None]:
    if os.environ.get("TINYLLM_DEVICE") != "cupy":
        with strict_device() as device:
            yield device
        return
    backend.use_backend("cupy")
    try:
        yield None
    finally:
        backend.use_backend("numpy")


def uploaded(value: Any) -> Any:
    """An op's argument with its arrays on the device."""
    if type(value) is tuple:
        return tuple(map(uploaded, value))
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


def assert_close(found: list[Any], expected: list[Any], factor: float = 200.0) -> None:
    """Equal to within `factor` roundings of the largest element, and in shape and dtype."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if b.size:
            np.testing.assert_allclose(
                a, b, rtol=0, atol=factor * np.finfo(b.dtype).eps * max(1, np.abs(b).max())
            )


# ---- Ops ---------------------------------------------------------------------------------------

CASES = [
    pytest.param(op, case, id=f"{name}-{number}")
    for name, op in REGISTRY.items()
    for number, case in enumerate(op.cases)
]


def run_case(
    op: type[Op], case: Case, dtype: Any, mode: str, convert: Callable[[Any], Any]
) -> list[np.ndarray]:
    """Output and gradients; with "twice" the gradients of their squares too, with "forward" jvp and its gradients."""
    rng = np.random.default_rng(1)
    xs = [
        Tensor(convert(rng.uniform(case.low, case.high, shape).astype(dtype)), requires_grad=True)
        for shape in case.shapes
    ]
    arguments = {name: convert(value) for name, value in case.arguments.items()}
    if mode == "forward":
        y, tangent = tinyllm.jvp(lambda *inputs: op(**arguments)(*inputs), xs, xs)
        cotangent = convert(np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype))
        return [backend.to_numpy(x) for x in (y.data, tangent.data, *gradients(tangent, xs, cotangent))]
    made = op(**arguments)
    with tinyllm.use_formulas() if mode == "reference" else contextlib.nullcontext():
        y = made(*xs)
    cotangent = convert(np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype))
    found = gradients(y, xs, cotangent, create_graph=mode == "twice")
    arrays = [y.data, *[x.data if isinstance(x, Tensor) else x for x in found]]
    if mode == "twice":
        with_graph = [x for x in found if isinstance(x, Tensor) and x.requires_grad]
        if with_graph:
            total = with_graph[0] * with_graph[0]
            arrays += gradients(total, xs, convert(np.ones(total.shape, total.dtype)))
    return [backend.to_numpy(x) for x in arrays]


@pytest.mark.parametrize("mode", ["fused", "reference", "twice", "forward"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_op_is_that_of_numpy(op: type[Op], case: Case, mode: str) -> None:
    if mode == "reference" and not issubclass(op, FusedOp):
        mode = "fused"
    for dtype in (np.float32, np.float64):
        expected = run_case(op, case, dtype, mode, lambda value: value)
        with on_device():
            found = run_case(op, case, dtype, mode, uploaded)
        assert_close(found, expected)


CLASSES = np.array([2, -100, 0])

COMPOSED: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "elu": (ops.elu, ((3, 4),)),
    "leaky_relu": (ops.leaky_relu, ((3, 4),)),
    "log_sigmoid": (ops.log_sigmoid, ((3, 4),)),
    "tan": (ops.tan, ((3, 4),)),
    "norms": (lambda x: ops.layer_norm(ops.rms_norm(x)), ((3, 4),)),
    "sort": (lambda x: ops.sort(x, 0, descending=True) * ops.sort(x, 0), ((3, 4),)),
    "topk": (lambda x: ops.topk(x, 2)[0], ((3, 4),)),
    "embedding": (lambda w: ops.embedding(w, backend.asarray(CLASSES[::2]), 2), ((3, 4),)),
    "one_hot": (lambda w: ops.one_hot(backend.asarray(CLASSES[::2]), 3).astype(w.dtype) @ w, ((3, 4),)),
    "scatter_add": (
        lambda x, y: ops.scatter_add(x, 0, backend.asarray(np.array([[0, 2, 1], [0, 0, 1]])), y),
        ((3, 4), (2, 3)),
    ),
    "smooth_l1_loss": (ops.smooth_l1_loss, ((3, 4), (3, 4))),
    "binary_cross_entropy_with_logits": (
        lambda x, y: ops.binary_cross_entropy_with_logits(x, ops.sigmoid(y)),
        ((3, 4), (3, 4)),
    ),
    "kl_div": (lambda x, y: ops.kl_div(x, ops.softmax(y), "batchmean"), ((3, 4), (3, 4))),
    "kl_div of logarithms": (lambda x, y: ops.kl_div(x, y, log_target=True), ((3, 4), (3, 4))),
    "smoothed classes": (
        lambda x, w: ops.cross_entropy(
            x, backend.asarray(CLASSES), weight=w, label_smoothing=0.1, z_loss=0.1
        ),
        ((3, 4), (4,)),
    ),
    "probabilities": (
        lambda x, y: ops.cross_entropy(x, ops.softmax(y), label_smoothing=0.1),
        ((3, 4), (3, 4)),
    ),
    "log-probabilities": (lambda x: ops.nll_loss(x, backend.asarray(CLASSES)), ((3, 4),)),
    "additive mask": (
        lambda q, m: ops.scaled_dot_product_attention(q, q, q, causal=True, mask=m),
        ((2, 1, 2, 3, 4), (2, 1, 1, 3, 3)),
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_function_is_that_of_numpy(name: str) -> None:
    function, shapes = COMPOSED[name]
    arrays = [np.random.default_rng(1).uniform(-1, 1, shape) for shape in shapes]

    def run() -> list[np.ndarray]:
        xs = [Tensor(backend.asarray(x), requires_grad=True) for x in arrays]
        y = function(*xs)
        cotangent = np.random.default_rng(2).standard_normal(y.shape)
        as_graph = [x.data for x in gradients(y, xs, backend.asarray(cotangent), create_graph=True)]
        found = (y.data, *gradients(y, xs, backend.asarray(cotangent)), *as_graph)
        return [backend.to_numpy(x) for x in found]

    expected = run()
    with on_device():
        assert_close(run(), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("H", "G", "T", "S"), [(4, 4, 5, 5), (4, 2, 600, 600), (2, 1, 20, 33), (2, 2, 9, 4)])
def test_long_attention_takes_all_heads_at_once(
    monkeypatch: pytest.MonkeyPatch, H: int, G: int, T: int, S: int, causal: bool, masked: bool
) -> None:
    monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    rng = np.random.default_rng(H + T)
    shapes = ((2, H, T, 8), (2, G, S, 8), (2, G, S, 8))
    arrays = [rng.standard_normal(shape) for shape in shapes]
    mask = rng.random((2, 1, T, S)) > 0.2 if masked else None
    cotangent = rng.standard_normal(shapes[0])

    def run() -> list[np.ndarray]:
        q, k, v = (Tensor(x, requires_grad=True) for x in arrays)
        out = ops.scaled_dot_product_attention(q, k, v, causal=causal, mask=mask)
        return [backend.to_numpy(x) for x in (out.data, *gradients(out, [q, k, v], cotangent))]

    with tinyllm.use_formulas():
        expected = run()
    with on_device() as device:
        assert_close(run(), expected, factor=2000)
    if device is not None:  # not one for each of the 2 H heads
        tiles = -(-S // 512)
        assert device.count.launches < H // G * (80 + 60 * tiles)


def test_rows_of_a_large_table_add_up() -> None:
    rng = np.random.default_rng(0)
    values, index = rng.standard_normal((5000, 3)), rng.integers(-700, 700, 5000)
    expected = np.zeros((700, 3))
    np.add.at(expected, index, values)
    with on_device():
        table = current.xp.zeros((700, 3), dtype="float64")
        backend.scatter_add(table, backend.asarray(index), backend.asarray(values))
        assert_close([backend.to_numpy(table)], [expected])


def test_dropout_has_the_bits_of_the_host() -> None:
    key = Key(2**63 + 5, step=7, stream=3, micro_batch=2)
    expected = keep_mask((33, 5), 0.3, key)
    with on_device():
        np.testing.assert_array_equal(backend.to_numpy(keep_mask((33, 5), 0.3, key)), expected)


def test_arrays_of_the_device_meet_tensors() -> None:
    with on_device():
        x = backend.asarray([1.5, 2.0])
        for result in (
            x * Tensor([2.0, 4.0], requires_grad=True),
            Tensor([2.0, 4.0], requires_grad=True) * x,
        ):
            assert isinstance(result, Tensor)
            assert result.requires_grad
            np.testing.assert_array_equal(backend.to_numpy(result.data), [3, 8])


def test_what_a_tensor_shows_of_itself() -> None:
    with on_device():
        x = Tensor([1.5, 0.0])
        assert repr(x) == "Tensor([1.5, 0. ], shape=(2,), dtype=float32)"
        assert float(x[0]) == 1.5
        assert bool(x[1] == 0)
        assert x.any()
        assert not x.all()
        np.testing.assert_array_equal(np.asarray(x), [1.5, 0])


# ---- Training ----------------------------------------------------------------------------------

TEXT = embedded_corpus()[:40_000]
TOKENIZER = CharTokenizer.train(TEXT)
TRAIN, VALIDATION = split_by_position(TOKENIZER.encode_to_array(TEXT), 0.1)


class Told(Callback):
    """What a run told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.rejections: list[Rejection] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)

    def on_evaluation(self, evaluation: Any) -> None:
        self.validation.append(evaluation.val_loss)

    def on_rejected(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)


def trainer_of(run: Path | None = None, dropout: float = 0.1, **settings: Any) -> tuple[Trainer, Told]:
    values = {
        "steps": 24, "batch_size": 4, "threads": 1, "eval_every": 12, "checkpoint_every": 12, "log_every": 4,
        "eval_batch_size": 32, "warmup_steps": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    config = TrainConfig(**{**values, **settings})
    shape = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, context_length=16, num_layers=2, num_heads=2, hidden_size=16,
        dropout=dropout,
    )  # fmt: skip
    told = Told()
    model = TransformerLM(shape, config.seed)
    return Trainer(model, TOKENIZER, TRAIN, VALIDATION[:1500], config, run, [told]), told


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-3), ("muon", 1e-3), ("sgd", 0.3)])
def test_a_run_is_that_of_numpy(optimizer: str, rate: float) -> None:
    settings = {"optimizer": optimizer, "learning_rate": rate, "z_loss": 1e-4, "clip_norm": 0.3}
    trainer, expected = trainer_of(clip_running=2.0, **settings)
    trainer.fit()
    with on_device():
        trainer, told = trainer_of(clip_running=2.0, **settings)
        trainer.fit()
    # clip_running and the watch know on a device what was known before a stretch of steps.
    np.testing.assert_allclose(told.losses, expected.losses, rtol=1e-4)
    np.testing.assert_allclose(told.validation, expected.validation, rtol=1e-4)


def test_no_look_between_two_lines_of_the_log() -> None:
    with strict_device() as device:
        trainer, _ = trainer_of()
        with trainer.engine:
            assert len(list(trainer.train_steps())) == 4
            before = device.count.copy()
            assert len(list(trainer.train_steps())) == 4
            spent = device.count - before
    assert (spent.to_device, spent.to_host, spent.synchronizations) == (1, 1, 1)


def test_a_stretch_ends_where_something_is_due() -> None:
    with strict_device():
        trainer, _ = trainer_of(steps=22, log_every=7, eval_every=10, checkpoint_every=16)
        ends = []
        with trainer.engine:
            while trainer.step < 22:
                list(trainer.train_steps())
                ends.append(trainer.step)
    assert ends == [7, 10, 14, 16, 20, 21, 22]


@pytest.mark.parametrize(("stretch", "at", "step"), [(1, 1, 8), (4, 1, 8), (4, 3, 12)])
def test_a_signal_drops_a_step_that_has_changed_nothing(
    tmp_path: Path, stretch: int, at: int, step: int
) -> None:
    """So does one in the first step of a stretch; in the others, it waits for the end of the stretch."""
    calls = []

    class Signals(NextToken):
        def __call__(self, model: Any, batch: Any) -> Any:
            if model.training and trainer.step == 8:
                calls.append(batch)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(model, batch)

    with on_device():
        whole, expected = trainer_of(tmp_path / "whole", log_every=stretch)
        whole.fit()
        trainer, _ = trainer_of(tmp_path / "run", log_every=stretch)
        trainer.engine.objective = Signals()  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert trainer.step == step
        resumed, told = trainer_of(tmp_path / "run", log_every=stretch)
        resumed.resume()
        resumed.checkpoints.seconds = 1e-9  # a checkpoint after every stretch, which changes nothing
        resumed.fit()
    assert told.losses == expected.losses[step:]
    assert told.validation == expected.validation


def scale_of(trainer: Trainer) -> LossScale:
    engine = trainer.engine
    assert isinstance(engine, DeviceSteps)
    assert engine.loss_scale is not None
    return engine.loss_scale


def poison(trainer: Trainer, at: int, factor: float) -> None:
    """Multiply one gradient of the batch at position `at`."""
    workers = trainer.engine
    assert isinstance(workers, DeviceSteps)
    original = workers._gradients

    def changed(position: int, *others: Any) -> tuple[Any, dict[str, Any]]:
        loss, found = original(position, *others)
        if position == at:
            next(iter(found.values())).__imul__(factor)
        return loss, found

    workers._gradients = changed  # type: ignore[method-assign]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_bad_step_changes_nothing(optimizer: str, factor: float) -> None:
    with on_device():
        trainer, _ = trainer_of(
            optimizer=optimizer, log_every=40, steps=100, eval_every=100, checkpoint_every=100
        )
        poison(trainer, at=40, factor=factor)
        with trainer.engine, backend.ignore_non_finite():
            list(trainer.train_steps())  # so that the watch is active
            state = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
            before = {name: backend.to_numpy(array).copy() for name, array in state.items()}
            steps = trainer.optimizer.steps
            trainer._steps_to_next_look = lambda: 1  # type: ignore[method-assign]
            (made,) = trainer.train_steps()
            assert isinstance(made, Rejection)
            assert made.replayable
            assert "gradient norm" in made.reason
            for name, array in state.items():
                np.testing.assert_array_equal(backend.to_numpy(array), before[name], err_msg=name)
            assert (trainer.step, trainer.optimizer.steps, trainer.sampler.step) == (40, steps, 41)


def test_the_autopsy_of_a_step_on_a_device(tmp_path: Path) -> None:
    with on_device():
        trainer, told = trainer_of(tmp_path, log_every=1, steps=8)
        poison(trainer, at=5, factor=float("nan"))
        trainer.fit()
    (rejection,) = told.rejections
    assert rejection.incident is not None, rejection.reason
    report = json.loads((rejection.incident / "report.json").read_text())
    assert report["reason"] == "the gradient norm is nan"
    first = report["parameters"][0]
    assert (first["name"], first["gradient_norm"]) == ("embedding.weight", "nan")
    assert checkpoint.read(rejection.incident / "before").training().values["step"] == 5


def test_a_bad_step_amid_a_stretch() -> None:
    with on_device():
        trainer, told = trainer_of(log_every=12)
        poison(trainer, at=15, factor=float("nan"))
        trainer.fit()
    (rejection,) = told.rejections
    assert rejection.position == 15
    assert not rejection.replayable
    assert rejection.incident is None
    assert len(told.losses) == trainer.step == trainer.optimizer.steps == 24
    assert trainer.sampler.step == 25
    assert told.validation[-1] < told.losses[0]


@pytest.mark.parametrize("limits", [Limits(0.1, np.inf), Limits(np.inf, 1e-6)])
def test_a_step_beyond_a_limit_is_not_made(limits: Limits) -> None:
    with on_device():
        trainer, _ = trainer_of()
        workers = trainer.engine
        assert isinstance(workers, DeviceSteps)
        before = backend.to_numpy(trainer.parameters["norm.weight"].data).copy()
        batches = [trainer.sampler.batch(number) for number in range(2)]
        outcomes = workers.run(0, batches, [1.0, 1.0], 1.0, limits)
        assert [outcome.made for outcome in outcomes] == [False, False]
        np.testing.assert_array_equal(backend.to_numpy(trainer.parameters["norm.weight"].data), before)
        assert all(outcome.made for outcome in workers.run(0, batches, [1.0, 1.0], 1.0, Limits(9.0, 9.0)))


def test_float16_products_scale_the_loss(tmp_path: Path) -> None:
    settings = {"optimizer": "sgd", "learning_rate": 0.3}  # AdamW does not mind the scale of gradients
    trainer, expected = trainer_of(**settings)
    trainer.fit()
    with strict_device("float16"):
        trainer, told = trainer_of(tmp_path, **settings)
        scale_of(trainer).value = 2.0**24  # too much, so that gradients overflow at first
        trainer.fit()
        assert scale_of(trainer).value < 2.0**24
        resumed, _ = trainer_of(tmp_path, threads=2, **settings)
        resumed.resume()
        assert scale_of(resumed) == scale_of(trainer)
    assert not told.rejections
    assert trainer.step == 24 == trainer.optimizer.steps
    skipped = trainer.sampler.step - 24
    assert skipped > 0
    # The batches are others by those that were skipped.
    np.testing.assert_allclose(told.validation, expected.validation, rtol=0.05)
    assert told.losses != expected.losses


def test_small_gradients_survive_float16() -> None:
    """Without the scale they are zero in the products of the backward pass."""
    a, b = Tensor(np.full((4, 8), 1e-5, np.float32)), np.ones((8, 3), np.float32)
    with strict_device("float16"):
        weight = Tensor(b, requires_grad=True)
        product = ops.matmul(Tensor(a.data), weight)
        (lost,) = gradients(product, [weight], np.full((4, 3), 1e-8, np.float32))
        product = ops.matmul(Tensor(a.data), weight)
        (scaled,) = gradients(product, [weight], np.full((4, 3), 2.0**16 * 1e-8, np.float32))
        assert not backend.to_numpy(lost).any()
        np.testing.assert_allclose(backend.to_numpy(scaled) / 2.0**16, 4e-13, rtol=1e-2)


def test_limits_are_those_of_the_judge() -> None:
    rng = np.random.default_rng(0)
    watch = Watch(64, 20.0, 300.0)
    assert watch.limits.loss == watch.limits.norm == np.inf
    for _ in range(100):
        watch.accept(3 + rng.normal(), abs(rng.normal()))
    limits = watch.limits
    for name, limit in (("loss", limits.loss), ("norm", limits.norm)):
        for factor, rejected in ((0.999999, False), (1.000001, True)):
            values = {"loss": 1.0, "norm": 0.1, name: limit * factor}
            assert (watch.judge(**values).reason is not None) == rejected


# ---- Files and text ----------------------------------------------------------------------------


def test_checkpoints_move_between_backends(tmp_path: Path) -> None:
    trainer, expected = trainer_of(tmp_path / "host")
    trainer.fit()
    with on_device():
        trainer, told = trainer_of(tmp_path / "device")
        trainer.fit()
    np.testing.assert_allclose(told.losses, expected.losses, rtol=1e-5)
    for name in ("host", "device"):
        keeping.remove_after(tmp_path / name, keeping.folder_of(tmp_path / name, 12))
    trainer, told = trainer_of(tmp_path / "device")
    trainer.resume()
    trainer.fit()
    np.testing.assert_allclose(told.losses, expected.losses[12:], rtol=1e-5)
    with on_device():
        trainer, told = trainer_of(tmp_path / "host")
        trainer.resume()
        trainer.fit()
    np.testing.assert_allclose(told.losses, expected.losses[12:], rtol=1e-5)


def test_text_and_loss_of_a_saved_model(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path / "run")
    trainer.fit()
    folder, text = tmp_path / "run" / "latest", tmp_path / "text.txt"
    text.write_text(TEXT[:3000])

    def told() -> tuple[list[int], float]:
        model, _ = keeping.load(folder)
        return list(generate(model, [1, 2, 3], 40, seed=5)), scoring.evaluate(folder, [str(text)]).loss

    tokens, loss = told()
    with on_device() as device:
        found = told()
        if device is not None:  # in this process: a fork cannot use a device
            before = device.count.copy()
            scoring.evaluate(folder, [str(text)], threads=2)
            assert (device.count - before).launches > 100
    assert found[0] == tokens
    assert abs(found[1] - loss) < 1e-5


# ---- The double itself -------------------------------------------------------------------------

REFUSED: dict[str, Callable[[StrictDevice, Any], Any]] = {
    "conversion": lambda xp, x: np.asarray(x),
    "both libraries in a function": lambda xp, x: np.maximum(x, np.ones(3)),
    "a host array": lambda xp, x: x + np.ones(3),
    "a host array on the left": lambda xp, x: np.ones(3) + x,
    "a host array as an argument": lambda xp, x: xp.maximum(x, np.ones(3)),
    "a host array to write": lambda xp, x: x.__setitem__(0, np.ones(())),
    "a host array as an index": lambda xp, x: x[np.array([0])],
    "a list as an index": lambda xp, x: x[[0, 1]],
    "a number": lambda xp, x: float(x[0]),
    "an integer": lambda xp, x: int(x[0]),
    "a truth": lambda xp, x: bool(x[0] > 0),
    "an index": lambda xp, x: [1, 2][x[0].astype("int64")],
    "elements": lambda xp, x: list(x),
    "where= of a ufunc": lambda xp, x: xp.add(x, x, where=x > 0),
    "initial= of a reduction": lambda xp, x: x.max(initial=0),
    "an output of the host": lambda xp, x: xp.exp(x, out=np.ones(3)),
    "numbers alone": lambda xp, x: xp.exp(1.0),
    "an array of strings": lambda xp, x: xp.asarray(np.array(["a"])),
    "an object": lambda xp, x: x + object(),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_the_double_refuses(what: str) -> None:
    with strict_device() as device, pytest.raises(TypeError):
        REFUSED[what](device, device.array([1.0, 2.0, 3.0]))


def test_the_double_has_what_is_listed_alone() -> None:
    with strict_device() as device:
        with pytest.raises(AttributeError, match="nan_to_num"):
            _ = device.nan_to_num
        with pytest.raises(StrictDeviceError, match="no keyword optimize"):
            device.einsum("i->", device.ones(3), optimize=True)


def test_the_double_counts() -> None:
    with strict_device() as device:
        x = device.asarray(np.ones((2, 3)))
        assert device.count.to_device == 1
        y = device.exp(x.reshape(3, 2).T) + 1
        y[0] = 0
        assert device.count.launches == 3
        assert device.count.synchronizations == 0
        assert y[0, 0].item() == 0
        assert y[1:].get().shape == (1, 3)
        assert (device.count.to_host, device.count.synchronizations) == (2, 2)
        assert x[x > 0].shape == (6,)
        assert device.count.synchronizations == 3


# ---- Choosing the backend ----------------------------------------------------------------------


class FakeCuda:
    """The part of CuPy that is asked whether there is a device."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, devices: int | str, driver: int, built: int = 12090) -> None:
        self.devices, self.driver, self.built = devices, driver, built

    def getDeviceCount(self) -> int:
        if isinstance(self.devices, str):
            raise self.CUDARuntimeError(self.devices)
        return self.devices

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return self.built


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, r"needs CuPy, which is not installed; install tinyllm-numpy\[cupy12x\] for CUDA 12"),
        (FakeCuda("cudaErrorInsufficientDriver", 0), "found no NVIDIA driver; use the 'numpy' backend"),
        (FakeCuda("cudaErrorInsufficientDriver", 12040, 13000), r"for CUDA 13, .* 12; install .*\[cupy12x\]"),
        (FakeCuda("cudaErrorDevicesUnavailable", 13000), "cannot use the device: cudaErrorDevicesUnavailable"),
        (FakeCuda(0, 13000), "found no CUDA device"),
    ],
)  # fmt: skip
def test_no_device(
    cuda: FakeCuda | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = None if cuda is None else SimpleNamespace(cuda=SimpleNamespace(runtime=cuda))
    monkeypatch.setitem(sys.modules, "cupy", module)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        backend.use_backend("cupy")
    assert current.xp is np
    assert cli.main(["sample", "nowhere", "--backend", "cupy"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_choices_that_there_are_not() -> None:
    with pytest.raises(InputError, match="backend='cuda'"):
        backend.use_backend("cuda")
    with pytest.raises(InputError, match="--backend cupy"):
        backend.use_backend("numpy", "tf32")


def test_commands_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train, sample and eval with --backend cupy, where cupy is the double; then out of memory."""
    made = []

    def use(name: str, *options: Any) -> None:
        made.append((name, *options))
        if name == "cupy":
            monkeypatch.setattr(current, "xp", device.Namespace(StrictDevice()))

    monkeypatch.setattr(runs, "use_backend", use)
    monkeypatch.setattr(sample, "use_backend", use)
    monkeypatch.setattr(evaluate, "use_backend", use)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT[:5000])
    small = ["--num-layers", "1", "--hidden-size", "16", "--num-heads", "2", "--context-length", "16"]
    train = [
        "train",
        "--data",
        "text.txt",
        "--out",
        "run",
        "--backend",
        "cupy",
        "--steps",
        "6",
        "--log-every",
        "3",
        *small,
    ]
    assert cli.main([*train, "--precision", "tf32", "--device-memory", "2"]) == 0
    assert cli.main(["sample", "run", "--backend", "cupy", "--tokens", "5"]) == 0
    assert cli.main(["eval", "run", "--backend", "cupy", "--data", "text.txt"]) == 0
    assert made == [("cupy", "tf32", 2.0), ("cupy",), ("cupy",)]
    on_device = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(current, "xp", np)
    assert cli.main(["eval", "run", "--data", "text.txt"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == on_device

    def full(self: Any, *arguments: Any) -> Any:
        raise MemoryError("Out of memory allocating 512 bytes (allocated so far: 0 bytes).\nmore")

    monkeypatch.setattr(DeviceSteps, "queue", full)
    assert cli.main([*train, "--overwrite"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory (Out of memory allocating 512 bytes" in line
    assert "batch_size" in line
    assert "MiB of memory" in line

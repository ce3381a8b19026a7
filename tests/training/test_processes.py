"""Work on several cores: training steps and evaluation by workers, and the threads of an op."""

import contextlib
import math
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from tinyllm import InputError, gradients, no_grad, ops
from tinyllm.autograd.mode import is_grad_enabled
from tinyllm.autograd.observer import Observer, observe
from tinyllm.data import SequentialWindows
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Module
from tinyllm.optim import clip_scale
from tinyllm.system.cores import each_on_a_core, threads_allowed
from tinyllm.training.config import TrainConfig
from tinyllm.training.engines import Processes
from tinyllm.training.evaluation import mean_loss
from tinyllm.training.micro_batches import MICRO_BATCH_LOGITS, MICRO_BATCH_TOKENS, count_micro_batches
from tinyllm.training.objectives import NextToken
from tinyllm.training.optimization import build_optimizer

MODEL = ModelConfig(vocab_size=9, context_length=8, num_layers=1, num_heads=2, hidden_size=16)
ADAMW = TrainConfig(learning_rate=5e-3)
MUON = replace(ADAMW, optimizer="muon")
TOKENS = np.random.default_rng(0).integers(0, 8, 150)
VALIDATION = SequentialWindows(TOKENS, 8, 4)  # 19 windows in 5 batches
Bits = dict[str, bytes]


@pytest.fixture(params=[pytest.param("processes", marks=pytest.mark.forks), "threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the workers of a test run."""
    if request.param == "threads":
        threads_only(monkeypatch)
    return str(request.param)


def threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.parallel.team.can_fork", lambda: False)


def make(
    size: int, model: ModelConfig = MODEL, config: TrainConfig = ADAMW, dtype: Any = np.float32
) -> Processes:
    trained = TransformerLM(model, config.seed).astype(dtype)
    return Processes(trained, build_optimizer(trained, config), NextToken(), size, config.seed, VALIDATION)


def batch(windows: int, step: int = 0) -> tuple[Any, Any]:
    """Inputs and targets, (windows, 8) each."""
    tokens = np.random.default_rng([step, windows]).integers(0, 8, (windows, 9))
    return tokens[:, :-1], tokens[:, 1:]


def train_step(workers: Processes, step: int, windows: int = 5) -> tuple[float, float]:
    """The loss and the gradient's norm of a step whose gradient is clipped."""
    loss = workers.gradients(step, batch(windows, step))
    norm = workers.gradient_norm()
    assert norm > 0.5
    workers.update(0.7, clip_scale(norm, 0.5))
    return loss, norm


def bits(workers: Processes) -> Bits:
    arrays = {**workers.model.state_dict(), **workers.optimizer.state_dict()}
    return {name: array.tobytes() for name, array in arrays.items()}


def check_gradients(workers: Processes, windows: int, step: int = 0) -> None:
    """Compare loss, norm and gradients of a batch with those of one graph in float64.

    They are sums over at most some 100 positions, of products some ten ops deep: 1000 roundings.
    """
    x, y = batch(windows, step)
    whole = TransformerLM(workers.model.config)
    for mine, theirs in zip(whole.parameters(), workers.model.parameters(), strict=True):
        mine.data = theirs.data.astype(np.float64)
    mean = ops.cross_entropy(whole(x), y)
    expected = gradients(mean, list(whole.parameters()))
    tolerance = 1000 * float(np.finfo(next(iter(workers.parameters.values())).dtype).eps)
    assert workers.gradients(step, (x, y)) == pytest.approx(mean.item(), rel=tolerance)
    norm = math.sqrt(math.fsum(float((g**2).sum()) for g in expected))
    assert workers.gradient_norm() == pytest.approx(norm, rel=tolerance)
    for (name, found), exact in zip(workers.total.items(), expected, strict=True):
        assert found.dtype == workers.parameters[name].dtype
        assert np.abs(found - exact).max() < tolerance * np.abs(exact).max(), name


# ---- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, np.float64), (2, np.float32), (3, np.float32), (3, np.float64)]
)
def test_parts_add_up_to_the_gradient_of_the_whole_batch(way: str, size: int, dtype: Any) -> None:
    with make(size, dtype=dtype) as workers:
        assert len(multiprocessing.active_children()) == (size - 1 if way == "processes" else 0)
        # Batches that do not divide evenly, that are smaller than the team, and larger ones after those.
        for step, windows in enumerate((7, 1, 13, 2)):
            check_gradients(workers, windows, step)
    assert multiprocessing.active_children() == []


def test_micro_batches_are_small_and_shared_evenly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        windows, length, workers = (int(n) for n in rng.integers(1, [64, 600, 9]))
        vocab_size = int(2 ** rng.uniform(1, 17))
        pieces = count_micro_batches(windows, length, workers, vocab_size)
        assert pieces == windows or pieces % workers == 0
        assert 1 <= pieces <= windows
        # On average; a piece has whole windows, so one may be larger.
        tokens = windows * length / pieces
        assert pieces == windows or tokens <= MICRO_BATCH_TOKENS
        assert pieces == windows or tokens * vocab_size <= max(MICRO_BATCH_LOGITS, vocab_size)


@pytest.mark.parametrize(
    ("size", "tokens", "pieces"), [(1, 16, 4), (3, 16, 6), (1, 8, 7), (3, 8, 7), (1, 1, 7)]
)
def test_several_micro_batches_for_each_worker_give_the_same_gradient(
    way: str, monkeypatch: pytest.MonkeyPatch, size: int, tokens: int, pieces: int
) -> None:
    monkeypatch.setattr("tinyllm.training.micro_batches.MICRO_BATCH_TOKENS", tokens)
    workers, rows = make(size, dtype=np.float64), []
    with workers:
        check_gradients(workers, 7)
        check_gradients(workers, 5, step=1)
    workers.model.register_forward_hook(lambda model, inputs, output: rows.append(len(inputs[0])))
    with workers:
        check_gradients(workers, 7)
    assert len(rows) == pieces
    assert sum(rows) == 7
    assert max(rows) == math.ceil(7 / pieces)


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_update_is_a_step_of_the_optimizer_with_the_scaled_gradients(way: str, config: TrainConfig) -> None:
    expected = make(1, config=config)
    with make(3, config=config) as workers:
        for step, (factor, scale) in enumerate([(0.5, 0.25), (1.0, 1.0)]):
            workers.gradients(step, batch(5, step))
            workers.gradient_norm()
            scaled = {name: gradient * np.float32(scale) for name, gradient in workers.total.items()}
            workers.update(factor, scale)
            assert all((gradient == scaled[name]).all() for name, gradient in workers.total.items())
            expected.optimizer.step(scaled, factor)
            assert bits(workers) == bits(expected)
            assert workers.optimizer.steps == step + 1


# ---- The same bits -----------------------------------------------------------------------------

KINDS = {
    "adamw": (MODEL, ADAMW),
    "adamw, dropout, tied": (replace(MODEL, dropout=0.2, tie_embeddings=True), ADAMW),
    "muon, dropout": (replace(MODEL, dropout=0.2), MUON),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_and_threads_compute_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    model, config = KINDS[kind]

    def run() -> tuple[Any, Bits]:
        with make(size, model, config) as workers:
            told = [(*train_step(workers, step), workers.evaluate()) for step in range(2)]
        return told, bits(workers)

    by_processes = run()
    threads_only(monkeypatch)
    assert run() == by_processes


def test_ten_runs_give_the_same_bits(way: str) -> None:
    found = set()
    for _ in range(10):
        with make(3, *KINDS["adamw, dropout, tied"]) as workers:
            told = tuple(train_step(workers, step, windows=4) for step in range(2))
        found.add((told, tuple(bits(workers).values())))
    assert len(found) == 1


# ---- Evaluation --------------------------------------------------------------------------------


def test_the_validation_loss_has_the_same_bits_by_any_number_of_workers(way: str) -> None:
    model = replace(MODEL, dropout=0.5)
    found = {}
    for size in (1, 2, 3, 7):
        with make(size, model) as workers:
            before = workers.gradients(0, batch(5))
            found[size] = workers.evaluate()
            assert mean_loss(workers.model, NextToken(), VALIDATION, size) == found[size]
            assert workers.gradients(0, batch(5)) == before, "dropout is on again"
    plain = TransformerLM(MODEL, ADAMW.seed)
    losses = []
    for position in range(1, len(TOKENS)):
        with no_grad():
            logits = plain(TOKENS[None, (position - 1) // 8 * 8 : position]).numpy()[0, -1]
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[TOKENS[position]])
    # As many roundings as there are ops in a row; those of different positions even out in the mean.
    assert found[1] == pytest.approx(
        math.fsum(losses) / len(losses), rel=20 * float(np.finfo(np.float32).eps)
    )
    assert len(set(found.values())) == 1


# ---- Who sees the calls ------------------------------------------------------------------------


class Counter(Observer):
    """Counts the forward passes of the model, and the backward passes of its loss, by process."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def enter_module(self, module: Any) -> None:
        if isinstance(module, TransformerLM):
            self.calls.append(("forward", os.getpid()))

    def before_backward(self, op: Any, gradient: Any) -> None:
        if op.name == "cross_entropy":
            self.calls.append(("backward", os.getpid()))


def test_an_observer_sees_every_call() -> None:
    counter = Counter()
    with observe(counter), make(3) as workers:
        assert multiprocessing.active_children() == []
        workers.gradients(0, batch(6))
        assert sorted(counter.calls) == [("backward", os.getpid())] * 3 + [("forward", os.getpid())] * 3
        counter.calls.clear()
        workers.evaluate()
        assert counter.calls == [("forward", os.getpid())] * 5
        counter.calls.clear()
        mean_loss(workers.model, NextToken(), VALIDATION, 3)
        assert counter.calls == [("forward", os.getpid())] * 5


@pytest.mark.forks
@pytest.mark.parametrize("register", [Module.register_forward_hook, Module.register_full_backward_hook])
@pytest.mark.parametrize("path", ["", "blocks.0.attention"])
def test_a_hook_sees_every_call_and_changes_no_bits(register: Any, path: str) -> None:
    plain, hooked = make(3), make(3)
    seen: list[int] = []
    module = dict(hooked.model.named_modules())[path]
    remove = register(module, lambda *_: seen.append(os.getpid()))
    with plain:
        expected = train_step(plain, 0)
    with hooked:
        assert multiprocessing.active_children() == []
        assert train_step(hooked, 0) == expected
    assert seen == [os.getpid()] * 3
    assert bits(plain) == bits(hooked)
    remove()
    with hooked:
        assert len(multiprocessing.active_children()) == 2
        train_step(hooked, 1)
    assert len(seen) == 3


# ---- Entering and leaving ----------------------------------------------------------------------


def test_outside_of_the_context_nothing_runs(way: str) -> None:
    workers = make(2)

    before = bits(workers)
    calls: list[tuple[Any, ...]] = [
        (workers.gradients, 0, batch(5)), (workers.gradient_norm,), (workers.update, 1.0), (workers.evaluate,)
    ]  # fmt: skip
    for _ in range(2):
        for call, *arguments in calls:
            with pytest.raises(RuntimeError, match="use them within `with`"):
                call(*arguments)
        assert bits(workers) == before
        with workers:
            train_step(workers, 0)
        before = bits(workers)


def test_entering_again_goes_on(way: str) -> None:
    model, config = KINDS["muon, dropout"]
    once, often = make(3, model, config), make(3, model, config)
    with once:
        expected = [train_step(once, step) for step in range(2)]
    found = []
    for step in range(2):
        with often:
            found.append(train_step(often, step))
    assert found == expected
    assert bits(often) == bits(once)


@pytest.mark.parametrize("which", ["one", "all", "in place", "state"])
def test_what_was_changed_in_between_is_used(way: str, which: str) -> None:
    """Parameters and optimizer state: other arrays, or other values in the same arrays."""
    workers, expected = make(3), make(1)
    with workers:
        train_step(workers, 0)
    rng = np.random.default_rng(3)
    for name, parameter in workers.parameters.items():
        if which == "all" or (which == "one" and name == "head.weight"):
            parameter.data = rng.normal(size=parameter.shape).astype(np.float32)
        elif which == "in place":
            parameter.data[...] = rng.normal(size=parameter.shape)
        elif which == "state":
            state = workers.optimizer.optimizers[0].state[name]
            workers.optimizer.optimizers[0].state[name] = {key: array + 0.5 for key, array in state.items()}
    expected.model.load_state_dict(workers.model.state_dict())
    expected.optimizer.load_state_dict(workers.optimizer.state_dict(), 1)
    with workers:
        check_gradients(workers, 5)
        expected.optimizer.step(workers.total, 0.5)
        workers.update(0.5)
    assert bits(workers) == bits(expected)


@pytest.mark.parametrize("bad_window", [0, 5])
def test_an_error_in_the_forward_pass_arrives_and_the_next_step_is_right(
    way: str, monkeypatch: pytest.MonkeyPatch, bad_window: int
) -> None:
    workers = make(3)
    forward = workers.model.forward

    def refuses_8(tokens: Any, *rest: Any) -> Any:
        if (tokens == 8).any():
            raise InputError("token 8 is not for me")
        return forward(tokens, *rest)

    monkeypatch.setattr(workers.model, "forward", refuses_8)
    with workers:
        x, y = batch(6)
        x[bad_window, -1] = 8
        with pytest.raises(InputError, match="token 8 is not for me") as error:
            workers.gradients(0, (x, y))
        notes = "".join(getattr(error.value, "__notes__", []))
        assert ("in refuses_8\n" in notes) == (way == "processes" and bad_window == 5)
        check_gradients(workers, 6)
    with pytest.raises(InputError), workers:
        workers.gradients(0, (x, y))
    assert multiprocessing.active_children() == []


# ---- The threads of an op -------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_each_item_is_called_once_in_the_modes_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, cores: int, count: int
) -> None:
    monkeypatch.setattr("tinyllm.system.cores.physical_cores", lambda: cores)
    seen: list[tuple[int, bool]] = []
    each_on_a_core(lambda item: seen.append((item, is_grad_enabled())), range(count))
    with no_grad():
        each_on_a_core(lambda item: seen.append((item, is_grad_enabled())), range(count))
    assert sorted(seen[:count]) == [(item, True) for item in range(count)]
    assert sorted(seen[count:]) == [(item, False) for item in range(count)]


@pytest.mark.parametrize(("allowed", "expected"), [(0, 3), (1, 1), (2, 2), (3, 3)])
def test_there_are_as_many_threads_as_cores_or_as_allowed(
    monkeypatch: pytest.MonkeyPatch, allowed: int, expected: int
) -> None:
    monkeypatch.setattr("tinyllm.system.cores.physical_cores", lambda: 3)
    lock, running, most = threading.Lock(), 0, 0
    threads: set[int] = set()
    of_blas: list[int] = []
    inside: list[bool] = []

    def item(number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        deadline = time.monotonic() + 20
        while most < expected and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        me = threading.get_ident()
        threads.add(me)
        of_blas.extend(x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas")
        each_on_a_core(lambda _: inside.append(threading.get_ident() == me), range(2))
        with lock:
            running -= 1

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        with threads_allowed(allowed) if allowed else contextlib.nullcontext():
            each_on_a_core(item, range(6))
        assert all(x["num_threads"] == 2 for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas")
    assert most == expected
    assert (threads == {threading.get_ident()}) == (expected == 1)
    assert set(of_blas) <= {1}
    assert inside == [True] * 12, "a call inside stays in its thread"


@pytest.mark.parametrize("allowed", [1, 3])
def test_the_error_of_the_first_failing_item_is_raised(allowed: int) -> None:
    def item(number: int) -> None:
        time.sleep(0.01 * (4 - number))
        if number in (1, 3):
            raise InputError(f"item {number}")

    with threads_allowed(allowed), pytest.raises(InputError, match="item 1"):
        each_on_a_core(item, range(4))

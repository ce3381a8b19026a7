"""Teams of workers: results and errors by rank, shared memory, and the ends of processes."""

import contextvars
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from tinyllm import InputError, no_grad
from tinyllm.autograd.mode import is_grad_enabled
from tinyllm.parallel.team import Team, is_shared, share
from tinyllm.system.cores import each_on_a_core

kinds = pytest.mark.parametrize(
    "processes", [pytest.param(True, marks=pytest.mark.forks), False], ids=["processes", "threads"]
)
sizes = pytest.mark.parametrize("size", [1, 3])


@pytest.fixture(autouse=True)
def nothing_hangs_or_stays() -> Iterator[None]:
    """A test fails after a minute, and when it leaves a process or a thread behind."""
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this hangs"))
    signal.alarm(60)
    try:
        yield
        assert workers_alive() == (0, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def workers_alive() -> tuple[int, int]:
    """How many processes and threads there are beside this one."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("tinyllm")]
    return len(multiprocessing.active_children()), len(threads)


def where(rank: int) -> tuple[int, int, int]:
    return rank, os.getpid(), threading.get_ident()


def blas_threads() -> set[int]:
    """How many threads the matrix products of this process may use."""
    return {x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"}


# ---- Who runs a task ---------------------------------------------------------------------------


@kinds
@sizes
def test_every_rank_runs_the_task_and_results_are_in_the_order_of_ranks(size: int, processes: bool) -> None:
    def scaled(rank: int, factor: int, x: Any) -> Any:
        time.sleep(0.02 * (size - rank))  # the last rank is ready first
        return factor * rank, rank + x

    x = np.arange(100_000)  # more than a pipe holds
    with Team(size, [where, scaled], processes) as team:
        assert team.processes == (processes and size > 1)
        for factor in (10, 7):
            found = team.run(scaled, factor, x)
            assert [number for number, _ in found] == [factor * rank for rank in range(size)]
            assert all((array == rank + x).all() for rank, (_, array) in enumerate(found))
        with pytest.raises(ValueError, match="not in list"):
            team.run(lambda rank: rank)
        assert [rank for rank, *_ in team.run(where)] == list(range(size))
    with pytest.raises(RuntimeError, match="not running"):
        team.run(where)


@kinds
@sizes
def test_rank_0_is_the_caller_and_the_others_are_not(size: int, processes: bool) -> None:
    def run(rank: int) -> tuple[tuple[int, int, int], list[str]]:
        return where(rank), [frame.name for frame in traceback.extract_stack()]

    with Team(size, [run], processes) as team:
        (me, frames), *others = team.run(run)
    assert me == where(0)
    assert test_rank_0_is_the_caller_and_the_others_are_not.__name__ in frames
    pids = [pid for (_, pid, _), _ in others]
    if processes:
        assert len({os.getpid(), *pids}) == size
    else:
        assert pids == [os.getpid()] * (size - 1)
        assert all(thread != threading.get_ident() for (_, _, thread), _ in others)


@kinds
def test_the_ranks_run_at_the_same_time(processes: bool) -> None:
    arrived = share({"arrived": np.zeros(3, bool)})["arrived"]

    def meet(rank: int) -> bool:
        arrived[rank] = True
        deadline = time.monotonic() + 20
        while not arrived.all() and time.monotonic() < deadline:
            time.sleep(0.001)
        return bool(arrived.all())

    with Team(3, [meet], processes) as team:
        assert team.run(meet) == [True] * 3


@kinds
@sizes
def test_a_worker_uses_one_thread(size: int, processes: bool) -> None:
    def threads(rank: int) -> tuple[set[int], bool]:
        used: list[int] = []
        each_on_a_core(lambda item: used.append(threading.get_ident()), range(4))
        return blas_threads(), used == [threading.get_ident()] * 4

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with Team(size, [threads], processes) as team:
            assert team.run(threads) == [({1}, True)] * size
        assert blas_threads() == before


@kinds
def test_the_modes_of_the_caller_hold_in_its_workers(processes: bool) -> None:
    def has_graph(rank: int) -> bool:
        return is_grad_enabled()

    with no_grad(), Team(3, [has_graph], processes) as team:
        assert team.run(has_graph) == [False] * 3
    with Team(3, [has_graph], processes=False) as team:  # processes have the modes of when they were forked
        assert team.run(has_graph) == [True] * 3
        with no_grad():
            assert team.run(has_graph) == [False] * 3
        assert team.run(has_graph) == [True] * 3


def test_threads_are_taken_where_there_are_no_safe_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.parallel.team.can_fork", lambda: False)
    with Team(3, [where]) as team:
        assert [(rank, pid) for rank, pid, _ in team.run(where)] == [(rank, os.getpid()) for rank in range(3)]


# ---- Errors ------------------------------------------------------------------------------------


class OddError(Exception):
    """It can be pickled, and not be read back."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file} in line {line}")


def in_the_depths(error: str) -> None:
    local_error = type("LocalError", (Exception,), {})  # which cannot be pickled
    raise {
        "InputError": InputError("--steps is -1"),
        "ZeroDivisionError": ZeroDivisionError("division by zero"),
        "EOFError": EOFError("as if the connection had ended"),
        "OSError": OSError("as if it were broken"),
        "LocalError": local_error("odd"),
        "OddError": OddError("a.txt", 3),
    }[error]


@kinds
@pytest.mark.parametrize(
    "kind", ["InputError", "ZeroDivisionError", "EOFError", "OSError", "LocalError", "OddError"]
)
def test_the_error_of_a_worker_arrives_with_its_type_and_traceback(processes: bool, kind: str) -> None:
    def task(rank: int, kind: str) -> int:
        if rank == 1 and kind:
            in_the_depths(kind)
        return rank

    with pytest.raises(Exception, match=r"\w") as here:
        in_the_depths(kind)
    expected = (kind, str(here.value))
    if processes and kind in ("LocalError", "OddError"):
        expected = ("RuntimeError", f"{kind}: {here.value}")
    with Team(3, [task], processes) as team:
        with pytest.raises(Exception, match=r"\w") as caught:
            team.run(task, kind)
        assert team.run(task, "") == [0, 1, 2], "the team goes on"
    error = caught.value
    assert (type(error).__name__, str(error)) == expected
    if processes:
        (note,) = error.__notes__
        assert all(part in note for part in ("in a worker process", "in in_the_depths\n", str(here.value)))
    else:
        assert traceback.extract_tb(error.__traceback__)[-1].name == "in_the_depths"


@kinds
@pytest.mark.parametrize("failing", [(1, 2), (0, 2), (2,)], ids=str)
def test_of_several_errors_that_of_the_lowest_rank_is_raised_when_all_have_ended(
    processes: bool, failing: tuple[int, ...]
) -> None:
    ended = share({"ended": np.zeros(3, int)})["ended"]

    def task(rank: int, failing: tuple[int, ...]) -> int:
        time.sleep(0.02 * (rank if 0 in failing else 3 - rank))  # rank 0 fails first, or the last rank
        ended[rank] += 1
        if rank in failing:
            raise LookupError(rank)
        return rank

    with Team(3, [task], processes) as team:
        for count in (1, 2):
            with pytest.raises(LookupError) as caught:
                team.run(task, failing)
            assert caught.value.args == (failing[0],)
            assert ended.tolist() == [count] * 3
        assert team.run(task, ()) == [0, 1, 2]


@pytest.mark.forks
@pytest.mark.parametrize("busy", [True, False], ids=["in a task", "between tasks"])
def test_a_killed_worker_process_is_an_error_that_says_so(busy: bool) -> None:
    def killed(rank: int) -> int:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rank

    with Team(3, [where, killed]) as team:
        _, (_, pid, _), _ = team.run(where)
        if not busy:
            os.kill(pid, signal.SIGKILL)
        for task in (killed if busy else where, where):
            with pytest.raises(InputError, match=r"worker process 1 has ended with exit code -9 .* memory"):
                team.run(task)
        assert workers_alive()[0] == 1


@pytest.mark.forks
def test_a_breakpoint_stops_in_rank_0_and_is_an_error_in_a_worker_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stops: list[int] = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(os.getpid()))

    def stop(rank: int, where: int) -> None:
        if rank == where:
            breakpoint()

    with Team(2, [stop]) as team:
        team.run(stop, 0)
        assert stops == [os.getpid()]
        with pytest.raises(RuntimeError, match=r"breakpoint\(\) in a worker process.*--threads 1"):
            team.run(stop, 1)
        assert len(stops) == 1


@pytest.mark.forks
def test_worker_processes_leave_interrupts_to_the_caller() -> None:
    def interrupted(rank: int) -> bool:
        if rank:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    with Team(3, [interrupted]) as team:
        assert team.run(interrupted) == [False, True, True]


# ---- The end of the workers --------------------------------------------------------------------

PARENT = """
import multiprocessing, time
from tinyllm.parallel.team import Team

def rest(rank):
    if rank == 0:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep((60, 0, 0.5)[rank])

with Team(3, [rest]) as team:
    team.run(rest)
"""


@pytest.mark.forks
def test_workers_end_when_the_parent_is_killed() -> None:
    """One waits for its next task then, and one is in the middle of a task."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    try:
        # The workers have its standard output too: this ends when the last of them does.
        assert process.communicate(timeout=20)[0] == ""
    except subprocess.TimeoutExpired:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    assert process.returncode == -signal.SIGKILL


@kinds
@pytest.mark.parametrize("fails", [False, True], ids=["in peace", "with an exception"])
def test_leaving_the_context_ends_the_workers(processes: bool, fails: bool) -> None:
    team = Team(3, [where], processes)
    for _ in range(2):  # it can be entered again
        try:
            with team:
                assert [rank for rank, *_ in team.run(where)] == [0, 1, 2]
                alive = workers_alive()
                assert alive == (2, 0) if processes else alive[0] == 0 < alive[1]
                if fails:
                    raise LookupError
        except LookupError:
            assert fails
        assert workers_alive() == (0, 0)


@pytest.mark.forks
def test_leaving_with_an_exception_does_not_wait_for_a_worker_amid_a_task() -> None:
    at_work = share({"": np.zeros(2, bool)})[""]

    def interrupted(rank: int) -> None:
        at_work[rank] = True
        while not at_work.all():
            time.sleep(0.001)
        if rank == 0:
            raise KeyboardInterrupt
        time.sleep(50)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Team(2, [interrupted]) as team:
        team.run(interrupted)
    assert time.monotonic() - begun < 20


# ---- Shared memory -----------------------------------------------------------------------------


@pytest.mark.forks
def test_shared_arrays_are_seen_by_all_and_others_are_not() -> None:
    shared = share({"x": np.zeros((2, 3)), "y": np.zeros(2, np.float32)})
    plain = np.zeros(3)

    def write(rank: int) -> None:
        shared["x"][1, rank] = plain[rank] = rank + 1
        shared["y"][...] += rank == 2

    def read(rank: int) -> tuple[Any, Any]:
        return shared["x"].tolist(), plain.tolist()

    with Team(3, [write, read]) as team:
        team.run(write)
        assert shared["x"].tolist() == [[0, 0, 0], [1, 2, 3]]
        assert shared["y"].tolist() == [1, 1]
        assert plain.tolist() == [1, 0, 0]
        shared["x"][0] = plain[...] = 5
        both = [[5, 5, 5], [1, 2, 3]]
        assert team.run(read) == [(both, [5, 5, 5]), (both, [0, 2, 0]), (both, [0, 0, 3])]
    assert shared["x"].tolist() == both


SOURCES: dict[str, Any] = {
    "matrix": np.arange(15.0).reshape(3, 5),
    "by columns": np.asfortranarray(np.arange(15, dtype=np.float32).reshape(3, 5)),
    "empty": np.zeros((0, 4), np.float32),
    "strided": np.arange(20, dtype=np.uint16)[::-3],
    "0-d": np.array(2.5, np.float32),
    "a line and a byte": np.arange(65, dtype=np.int8),
    "complex": np.array([[3 + 4j]]),
    "last and empty": np.zeros(0, np.int64),
}


def test_shared_arrays_are_aligned_copies_of_the_same_shape_and_type() -> None:
    shared = share(SOURCES)
    assert list(shared) == list(SOURCES)
    for name, array in SOURCES.items():
        copy = shared[name]
        assert (copy.shape, copy.dtype) == (array.shape, array.dtype)
        assert (copy == array).all()
        assert copy.ctypes.data % 64 == 0, name
        assert copy.flags.c_contiguous
    for count, copy in enumerate(shared.values()):
        copy[...] = count % 2
    for count, copy in enumerate(shared.values()):
        assert (copy == count % 2).all(), "none lies over another"
    assert share({}) == {}
    assert share({"x": np.zeros((3, 0))})["x"].shape == (3, 0)


def test_is_shared_knows_copies_by_share_and_their_views() -> None:
    shared = share(SOURCES)
    matrix = shared["matrix"]
    assert all(map(is_shared, shared.values()))
    assert all(
        map(is_shared, (matrix[1:], matrix.T[::2], matrix.reshape(5, 3).view(np.uint8), matrix[0, :0]))
    )
    others = (matrix.copy(), matrix + 0, matrix[[0, 2]], np.zeros(9)[3:], np.frombuffer(bytearray(8))[:0])
    assert not any(map(is_shared, (*SOURCES.values(), *others)))


def test_mapped_files_are_not_shared(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3))
    assert not is_shared(np.load(tmp_path / "x.npy", mmap_mode="c"))


# ---- What went wrong once ----------------------------------------------------------------------


@pytest.mark.forks
def test_answers_that_an_interrupt_left_are_not_taken_for_later_ones() -> None:
    def interrupted(rank: int) -> str:
        if rank == 0:
            raise KeyboardInterrupt
        return "stale"

    with Team(2, [where, interrupted]) as team:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                team.run(interrupted)
        assert [rank for rank, _, _ in team.run(where)] == [0, 1]


def test_teams_end_in_any_order() -> None:
    def overlapping() -> None:
        first, second = Team(2, [where]), Team(2, [where])
        with first:
            second.__enter__()
        assert [rank for rank, _, _ in second.run(where)] == [0, 1]
        second.__exit__(None, None, None)

    contextvars.copy_context().run(overlapping)  # contexts that do not nest leave their variables behind


@pytest.mark.forks
@pytest.mark.parametrize("kind", ["function", "exit"])
def test_what_cannot_be_sent_is_an_error_that_says_so(kind: str) -> None:
    def odd(rank: int) -> Any:
        if kind == "exit" and rank:
            raise SystemExit("enough")
        return (lambda: rank) if rank else 0

    with Team(2, [where, odd]) as team:
        with pytest.raises(
            (TypeError, SystemExit), match="cannot be sent" if kind == "function" else "enough"
        ):
            team.run(odd)
        assert [rank for rank, _, _ in team.run(where)] == [0, 1]


@pytest.mark.forks
def test_a_fork_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = Team._fork

    def failing(self: Team, rank: int) -> None:
        if rank == 2:
            raise OSError("no more processes")
        fork(self, rank)

    monkeypatch.setattr(Team, "_fork", failing)
    before = blas_threads()
    with pytest.raises(OSError, match="no more processes"):
        Team(3, [where]).__enter__()
    assert blas_threads() == before


@pytest.mark.forks
def test_a_worker_process_that_needs_workers_takes_threads() -> None:
    def nested(rank: int) -> list[int]:
        with Team(2, [where]) as inner:
            return [found for found, _, _ in inner.run(where)]

    with Team(2, [nested]) as team:
        assert team.run(nested) == [[0, 1], [0, 1]]

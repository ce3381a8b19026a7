"""What a person sees of long work: how much, how fast, how long still."""

import io
import time

import pytest

from tinyllm.system.progress import Bar


class Clock:
    """A time that passes only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def lines(
    clock: Clock, total: int | None, unit: str, done: int = 0, amounts: tuple[int, ...] = (1,)
) -> list[str]:
    """What stands in a file when 11 seconds go by before each amount."""
    stream = io.StringIO()
    with Bar("work", total, unit, stream, done=done) as bar:
        for amount in amounts:
            clock.now += 11
            bar(amount)
    return stream.getvalue().splitlines()


def test_bytes_are_megabytes(clock: Clock) -> None:
    assert lines(clock, 1_129_234_212, "B", amounts=(77_000_000, 1)) == [
        "work: 77 of 1,129 MB, 7.0 MB/s, 2:30 left",
        "work: 77 of 1,129 MB, 3.5 MB/s, 5:01 left",
    ]
    assert lines(clock, 7_115_388, "B", amounts=(1_100_000,)) == ["work: 1.1 of 7.1 MB, 0.1 MB/s, 1:00 left"]
    assert lines(clock, None, "B", amounts=(1_100_000,)) == ["work: 1.1 MB"]


def test_other_units(clock: Clock) -> None:
    assert lines(clock, 16_127, "merges", amounts=(9_900,)) == [
        "work: 9,900 of 16,127 merges, 900 merges/s, 0:07 left"
    ]
    assert lines(clock, None, "characters", amounts=(12_000,)) == ["work: 12,000 characters"]


def test_what_was_done_before_is_no_part_of_the_rate(clock: Clock) -> None:
    assert lines(clock, 1_000_000_000, "B", done=900_000_000, amounts=(0, 22_000_000)) == [
        "work: 900 of 1,000 MB",
        "work: 922 of 1,000 MB, 1.0 MB/s, 1:18 left",
    ]


def test_more_than_the_total_takes_no_negative_time(clock: Clock) -> None:
    assert lines(clock, 10, "merges", amounts=(110,)) == ["work: 110 of 10 merges, 10 merges/s, 0:00 left"]


def test_short_work_has_no_line(clock: Clock) -> None:
    stream = io.StringIO()
    with Bar("work", 10, "merges", stream) as bar:
        clock.now += 10
        bar(10)
    assert stream.getvalue() == ""


def test_a_terminal_says_the_same() -> None:
    stream = Terminal()
    with Bar("work", 100_000_000, "B", stream) as bar:
        time.sleep(0.15)  # a bar is drawn ten times a second
        bar(100_000_000)
    assert "100 of 100 MB, " in stream.getvalue()
    assert " MB/s, 0:00 left" in stream.getvalue()

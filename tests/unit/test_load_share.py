"""What is told of a load as it goes on."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ram_core.engine import load_share
from ram_core.engine.load_share import Share
from ram_core.engine.pace import Pace


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.fractions: list[float] = []

    def progress(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def expect(self, newcomer: object) -> None:
        raise AssertionError("only whoever loads it knows the newcomer")


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(load_share, "time", clock)
    return clock


def told_soon(clock: Clock, total: int, pieces: list[tuple[float, int]]) -> list[int]:
    """Bytes that had been read when the rest was said to be near; a piece comes after so many seconds."""
    share = Share(Heard(), Pace(lambda: False), 0, 1)
    share.total = total
    told: list[int] = []
    num_read = 0
    share.on_soon = lambda: told.append(num_read)
    for after_s, num_bytes in pieces:
        clock.now_s += after_s
        num_read += num_bytes
        share.read(num_bytes)
    return told


def test_the_rest_is_near_when_it_takes_so_long_at_the_pace_so_far(clock: Clock) -> None:
    # A tenth each 0.1 s: with eight tenths there, the rest takes 0.2 s.
    assert told_soon(clock, 100, [(0.1, 10)] * 10) == [90]
    assert told_soon(clock, 100, [(0.02, 10)] * 10) == [30]


def test_nobody_knows_before_a_fifth_has_come(clock: Clock) -> None:
    assert told_soon(clock, 100, [(0.001, 1)] * 100) == [20]


def test_of_a_load_that_stops_it_is_not_said(clock: Clock) -> None:
    assert told_soon(clock, 100, [(0.1, 10)] * 5 + [(60.0, 10)] * 2) == []


def test_progress_is_told_in_steps_over_all_parts() -> None:
    heard = Heard()
    share = Share(heard, Pace(lambda: False), 1, 2)
    share.total = 1000
    for _ in range(100):
        share.read(10)
    steps = [after - before for before, after in pairwise([0.5, *heard.fractions])]
    assert 15 <= len(steps) <= 20
    assert all(0.02 < step < 0.04 for step in steps)
    assert 0.95 < heard.fractions[-1] <= 1

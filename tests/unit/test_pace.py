"""A load takes its share of the cores beside steps, and all it can get otherwise."""

from __future__ import annotations

import pytest

from ram_core.engine import pace
from ram_core.engine.pace import Pace


class Clock:
    """The time of a thread, and of the world, which sleeping alone lets pass."""

    def __init__(self) -> None:
        self.worked_s = self.now_s = 100.0
        self.ends_s: float | None = None

    def thread_time(self) -> float:
        return self.worked_s

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        assert pause_s > 0
        self.now_s += pause_s

    def work(self, work_s: float) -> None:
        self.worked_s += work_s
        self.now_s += work_s

    def is_busy(self) -> bool:
        return self.ends_s is None or self.now_s < self.ends_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_beside_steps_it_works_for_its_share_of_the_time(clock):
    paced = Pace(clock.is_busy, share=0.2)
    for _ in range(10):
        clock.work(0.01)
        paced.rest()
    assert clock.now_s - 100 == pytest.approx(0.1 / 0.2)
    paced.rest()
    assert clock.now_s - 100 == pytest.approx(0.1 / 0.2), "nothing was done since"


def test_it_goes_on_when_the_steps_end(clock):
    paced = Pace(clock.is_busy, share=0.01)
    clock.work(1.0)
    clock.ends_s = clock.now_s + 2.0
    paced.rest()
    assert clock.now_s == pytest.approx(103.0, abs=0.01)
    clock.work(1.0)
    paced.rest()
    assert clock.now_s == pytest.approx(104.0, abs=0.01)

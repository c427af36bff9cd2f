"""What those outside of the engine know of its aligners, and what its next life begins with."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from ram_core.engine import supervisor
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.limits import EngineLimits
from ram_core.engine.messages import (
    AlignerFreed,
    AlignerLoaded,
    AlignerNews,
    AlignerProgress,
    Command,
    EngineBegan,
    EngineLost,
    FreeAligner,
    LoadAligner,
)
from ram_core.engine.residents import Residents
from ram_core.engine.supervisor import SupervisedEngine
from ram_core.engine.wire import News, Ready

BEGAN = EngineBegan((("a@1", 5),), (), 100, 4, "cpu")
B = LoadAligner("b@1", (("b@1", "/b"), ("b@1/part", "/b/part")), 9)


class Desk:
    """Residents, what they send, and what a listener hears."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.heard: list[AlignerNews] = []
        self.residents = Residents([AlignerSource("a@1", "/a")], self.sent.append)
        self.residents.watch(self.heard.append)


def test_orders_go_to_an_engine_that_is_up_and_to_no_other() -> None:
    desk = Desk()
    desk.residents.load(B)
    desk.residents.begin(BEGAN)
    desk.residents.load(B)
    desk.residents.free(FreeAligner("a@1"))
    desk.residents.lose()
    desk.residents.load(B)
    desk.residents.free(FreeAligner("b@1"))
    assert desk.sent == [B, FreeAligner("a@1")]
    assert desk.heard == [BEGAN, EngineLost()]


def test_who_comes_late_hears_what_is_there() -> None:
    desk = Desk()
    desk.residents.begin(BEGAN)
    desk.residents.load(B)
    desk.residents.take([AlignerProgress("b@1", 0.5), AlignerLoaded("b@1", 7, "cpu"), AlignerFreed("a@1")])
    late: list[AlignerNews] = []
    desk.residents.watch(late.append)
    assert late == [EngineBegan((("b@1", 7),), (), 100, 4, "cpu")]
    assert len(desk.heard) == 4


def test_a_next_life_has_what_was_there_and_was_not_told_to_go() -> None:
    desk = Desk()
    desk.residents.begin(BEGAN)
    desk.residents.load(B)
    assert desk.residents.sources[0] == AlignerSource("a@1", "/a", required=False)
    desk.residents.take([AlignerLoaded("b@1", 7, "cpu")])
    desk.residents.load(LoadAligner("c@1", (("c@1", "/c"),), 9))
    desk.residents.free(FreeAligner("a@1"))
    desk.residents.lose()
    assert desk.residents.sources == (
        AlignerSource("b@1", "/b", required=False),
        AlignerSource("b@1/part", "/b/part", required=False),
    )


class ScriptedProcess:
    """A life that gives the news of one list after the other, and then ends; the last one goes on."""

    lives: Iterator[list[News]]
    configs: queue.SimpleQueue[EngineConfig]

    def __init__(self, config: EngineConfig) -> None:
        self.configs.put(config)
        self._news = next(self.lives)
        self.how_it_ended = "ended"
        self._goes_on = bool(self._news) and self._news[-1] == Ready(LIMITS, LAST)

    @property
    def has_ended(self) -> bool:
        return not self._news and not self._goes_on

    def receive(self) -> News | None:
        return self._news.pop(0) if self._news else None

    def end(self, grace_s: float) -> None:
        pass


LIMITS = EngineLimits(10, 10, 4, 10, {})
LAST = EngineBegan((), (), 100, 4, "cpu")


def test_aligners_that_kill_one_life_after_the_other_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: queue.SimpleQueue[EngineConfig] = queue.SimpleQueue()
    monkeypatch.setattr(ScriptedProcess, "configs", configs, raising=False)
    lives = iter([[Ready(LIMITS, BEGAN)], [], [], [Ready(LIMITS, LAST)]])
    monkeypatch.setattr(ScriptedProcess, "lives", lives, raising=False)
    monkeypatch.setattr(supervisor, "EngineProcess", ScriptedProcess)
    monkeypatch.setattr(supervisor, "pause_before_restart", lambda num_deaths: 0.0)
    heard: queue.SimpleQueue[AlignerNews] = queue.SimpleQueue()
    engine = SupervisedEngine(EngineConfig("p", (AlignerSource("a@1", "/a"),)))
    engine.watch_aligners(heard.put)
    engine.begin()
    assert [heard.get(timeout=10) for _ in range(2)] == [BEGAN, EngineLost()]
    began = heard.get(timeout=10)
    engine.end()
    assert isinstance(began, EngineBegan)
    assert began.aligners == ()
    assert [name for name, _ in began.failed] == ["a@1"]
    asked = [[source.required for source in configs.get().aligners] for _ in range(4)]
    assert asked == [[True], [False], [False], []]

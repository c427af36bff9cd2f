"""A stream's line by itself: one send at a time, comments in silence, an end for sends that take too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from server.settings import Settings
from server.streaming import _Line, _StoppedReadingError


class Client:
    """Takes what is sent to it, except that it stops at what begins with `stops_at` until it may go on."""

    def __init__(self, stops_at: bytes = b"nothing") -> None:
        self.heard: list[bytes] = []
        self.num_sending = 0
        self.may_go_on = asyncio.Event()
        self.has_stopped = asyncio.Event()
        self._stops_at = stops_at

    async def send(self, message: Any) -> None:
        self.num_sending += 1
        assert self.num_sending == 1, "two sends at once"
        if message["body"].startswith(self._stops_at):
            self.has_stopped.set()
            await self.may_go_on.wait()
        self.heard.append(message["body"])
        self.num_sending -= 1


def line_to(client: Client, clock: Clock | None = None, **settings: float) -> _Line:
    now_s = time.monotonic if clock is None else clock.time
    return _Line(client.send, Settings(**settings), now_s)


@pytest.mark.parametrize("stuck", [b"word", b": ping"], ids=["event", "comment"])
def test_a_send_that_takes_too_long_ends_the_watch(stuck):
    async def scenario() -> None:
        client = Client(stops_at=stuck)
        line = line_to(client, ping_s=0.01, send_timeout_s=0.02)
        saying = asyncio.create_task(line.say(b"word"))
        with pytest.raises(_StoppedReadingError):
            await line.watch()
        saying.cancel()

    asyncio.run(scenario())


def test_an_event_waits_for_a_comment_that_is_being_sent():
    async def scenario() -> None:
        client = Client(stops_at=b": ping")
        line = line_to(client, ping_s=0.001)
        watching = asyncio.create_task(line.watch())
        await client.has_stopped.wait()
        saying = asyncio.create_task(line.say(b"word"))
        await asyncio.sleep(0.01)
        assert client.heard == []
        client.may_go_on.set()
        await saying
        assert client.heard[:2] == [b": ping\n\n", b"word"]
        watching.cancel()

    asyncio.run(scenario())


def test_no_comment_comes_between_while_an_event_is_being_sent():
    async def scenario() -> None:
        client = Client(stops_at=b"word")
        line = line_to(client, ping_s=0.001)
        saying = asyncio.create_task(line.say(b"word"))
        watching = asyncio.create_task(line.watch())
        await client.has_stopped.wait()
        await asyncio.sleep(0.01)
        client.may_go_on.set()
        await saying
        assert client.heard[0] == b"word"
        watching.cancel()

    asyncio.run(scenario())


class Clock:
    """Goes on while the watch sleeps; something happens after each of its sleeps but the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *happenings: Callable[[], Awaitable[None]]) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []
        self._happenings = list(happenings)
        # Only there: servers of other tests may sleep at the same time.
        own = SimpleNamespace(**{**vars(asyncio), "sleep": self._sleep})
        monkeypatch.setattr("server.streaming.asyncio", own)

    def time(self) -> float:
        return self.now_s

    async def _sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        began_s = self.now_s
        if not self._happenings:
            raise asyncio.CancelledError
        await self._happenings.pop(0)()
        self.now_s = began_s + delay_s


async def nothing() -> None:
    """Nobody says anything."""


def test_only_silence_is_filled(monkeypatch):
    """Each event begins the time anew."""

    async def speak_at_6_s() -> None:
        clock.now_s += 6.0
        await line.say(b"word")

    async def scenario() -> None:
        with pytest.raises(asyncio.CancelledError):
            await line.watch()

    clock, client = Clock(monkeypatch, speak_at_6_s, nothing), Client()
    line = line_to(client, clock, ping_s=10.0)
    asyncio.run(scenario())
    assert clock.slept_s == [10.0, 6.0, 10.0]
    assert client.heard == [b"word", b": ping\n\n"]


def test_many_sends_together_may_take_longer_than_one(monkeypatch):
    """A send begins while the clock sleeps, and ends; the one after it has its own time."""

    async def send_from(begin_s: float) -> None:
        clock.now_s += begin_s
        client.may_go_on.set()
        await asyncio.gather(*speaking)
        client.may_go_on.clear()
        speaking.append(asyncio.create_task(line.say(b"word")))
        for _ in range(3):
            await asyncio.wait((speaking[-1],), timeout=0)

    async def scenario() -> None:
        with pytest.raises(_StoppedReadingError):
            await line.watch()
        for task in speaking:
            task.cancel()

    speaking: list[asyncio.Task[None]] = []
    clock = Clock(
        monkeypatch, lambda: send_from(9.0), lambda: send_from(8.0), lambda: send_from(7.0), nothing
    )
    client = Client(stops_at=b"word")
    line = line_to(client, clock, ping_s=60.0, send_timeout_s=10.0)
    asyncio.run(scenario())
    # They begin at 9, 18 and 26 s; the last one is over time at 36 s.
    assert clock.slept_s == [10.0, 9.0, 9.0, 8.0]

"""The engine's thread: what is admitted, told, cancelled, and what happens when it dies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from ram_core.engine.client import StreamingClient
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.messages import Event, FailedEvent, Request, StartedEvent, TokenEvent
from ram_core.engine.thread import EngineThread
from ram_core.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, QueueFull, UnknownModel
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from tests.models import save_pair

PROMPT = tuple(range(20, 30))
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = replace(LONG, max_tokens=4)
Test = Callable[[EngineThread], Coroutine[None, None, None]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"), "llama", vocab_size=320)
    sources = tuple(AlignerSource(name, str(path)) for name, path in aligners.items())
    return EngineConfig(str(proposal), sources, device="cpu", max_batch=2, max_queue=2)


@pytest.fixture
def run(config: EngineConfig) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def body() -> None:
            async with running(config) as engine:
                await asyncio.wait_for(test(engine), 30)

        asyncio.run(body())

    return run


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[EngineThread]:
    engine = EngineThread.start(config)
    try:
        yield engine
    finally:
        await engine.close()


async def collect(engine: StreamingClient, request: Request) -> list[Event]:
    async with engine.submit(request) as events:
        return [event async for event in events]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_request_is_told_that_it_started_then_each_token(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        started, *tokens = await collect(engine, Request("a", PROMPT, SHORT))
        assert isinstance(started, StartedEvent)
        assert [token.finish_reason for token in tokens] == [None, None, None, "length"]

    run(test)


def test_many_requests_with_many_choices_each_end_once(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        aligned = AlignmentParams((AlignerTerm("polite"),))
        told = await asyncio.gather(
            *(collect(engine, Request(name, PROMPT, SHORT, aligned, 2)) for name in "ab")
        )
        for events in told:
            assert sum(isinstance(event, StartedEvent) for event in events) == 1
            ends = [e.index for e in events if isinstance(e, TokenEvent) and e.finish_reason]
            assert sorted(ends) == [0, 1]

    run(test)


def test_what_can_never_be_served_is_refused_before_it_is_queued(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        refused: list[tuple[Request, type[Exception]]] = [
            (Request("a", ()), InvalidRequest),
            (Request("a", (engine.vocab_size,)), InvalidRequest),
            (Request("a", (-1,)), InvalidRequest),
            (Request("a", PROMPT, replace(SHORT, max_tokens=engine.max_model_len)), ContextLengthExceeded),
            (Request("a", (5,) * engine.max_model_len), ContextLengthExceeded),
            (Request("a", PROMPT, SHORT, AlignmentParams((AlignerTerm("nobody"),))), UnknownModel),
        ]
        for request, error in refused:
            with pytest.raises(error):
                engine.submit(request)

    run(test)


def test_a_full_queue_refuses_and_has_room_again_after_a_hang_up(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        held = [engine.submit(Request(str(number), PROMPT, LONG)) for number in range(4)]
        with pytest.raises(QueueFull) as caught:
            engine.submit(Request("one too many", PROMPT, LONG))
        assert caught.value.retry_after_s > 0
        held[0].cancel()
        assert len(await collect(engine, Request("fits now", PROMPT, SHORT))) == 5
        for stream in held[1:]:
            stream.cancel()

    run(test)


def test_each_choice_takes_a_place_of_the_queue(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        held = engine.submit(Request("three", PROMPT, LONG, num_choices=3))
        with pytest.raises(QueueFull, match="3 of 4 places"):
            engine.submit(Request("two too many", PROMPT, LONG, num_choices=2))
        fourth = engine.submit(Request("fits", PROMPT, LONG))
        with pytest.raises(QueueFull, match="4 of 4 places"):
            engine.submit(Request("one too many", PROMPT, LONG))
        held.cancel()
        fourth.cancel()

    run(test)


def test_hanging_up_frees_the_slot_and_pages_before_the_next_step(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        steps = in_single_steps(engine)
        async with engine.submit(Request("a", PROMPT, LONG)):
            steps.release()
            await until(lambda: engine.stats.num_running == 1)
        # The step that was under way; after it the engine idles, although nothing more comes in.
        steps.release()
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.num_pages_used == 0
        assert engine.stats.num_steps == 2

    run(test)


def in_single_steps(engine: EngineThread) -> threading.Semaphore:
    """Let the engine make a step for each release only, to the end."""
    allowed = threading.Semaphore(0)
    step = engine._engine.step

    def wait_and_step() -> list[Event]:
        assert allowed.acquire(timeout=10)
        return step()

    engine._engine.step = wait_and_step  # type: ignore[method-assign]
    return allowed


def test_a_cancelled_choice_is_not_told_even_if_it_had_ended_unread(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        async with engine.submit(Request("a", PROMPT, SHORT, num_choices=2)) as events:
            await until(lambda: not events.num_open)
            events.cancel(0)
            told = [event async for event in events]
        assert [e.index for e in told if isinstance(e, TokenEvent)] == [1] * 4

    run(test)


def test_what_was_under_way_when_a_choice_was_cancelled_is_dropped(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        async with engine.submit(Request("a", PROMPT, SHORT, num_choices=2)) as events:
            events.cancel(0)
            events.deliver(TokenEvent("a", 0, 7, -1.0, finish_reason="length"))
            assert events.num_open == 1
            told = [event async for event in events]
        assert engine._streams.num_open == 0
        assert {e.index for e in told if isinstance(e, TokenEvent)} == {1}

    run(test)


def test_an_event_loop_that_ends_with_requests_running_takes_nothing_with_it(config: EngineConfig) -> None:
    engine = EngineThread.start(config)

    async def leave() -> None:
        for number in range(4):
            engine.submit(Request(f"left {number}", PROMPT, LONG))

    async def come() -> None:
        async def ask() -> list[Event]:
            while True:
                try:
                    return await collect(engine, Request("new", PROMPT, SHORT, num_choices=4))
                except QueueFull:
                    await asyncio.sleep(0.001)

        assert len(await asyncio.wait_for(ask(), 30)) == 1 + 4 * 4
        assert engine.stats.num_steps < 200
        await engine.close()

    asyncio.run(leave())
    asyncio.run(come())


def test_cancelling_one_choice_leaves_the_other(run: Callable[[Test], None]) -> None:
    async def test(engine: EngineThread) -> None:
        told: list[int] = []
        async with engine.submit(Request("a", PROMPT, SHORT, num_choices=2)) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    events.cancel(0)
                    told.append(event.index)
        assert told.count(1) == 4
        assert told.count(0) <= 1

    run(test)


def test_a_dying_step_loop_fails_what_runs_and_refuses_what_comes(
    config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        engine = EngineThread.start(config)
        stream = engine.submit(Request("a", PROMPT, LONG, num_choices=2))
        events = aiter(stream)
        assert isinstance(await anext(events), StartedEvent)

        def explode() -> list[Event]:
            raise MemoryError("no more")

        engine._engine.step = explode  # type: ignore[method-assign]
        failed = [event async for event in events if isinstance(event, FailedEvent)]
        assert sorted(event.index for event in failed) == [0, 1]
        assert all(isinstance(event.error, EngineUnavailable) for event in failed)
        assert engine.trouble == "the engine has died"
        with pytest.raises(EngineUnavailable, match="has died"):
            engine.submit(Request("b", PROMPT, SHORT))
        await engine.close()

    asyncio.run(asyncio.wait_for(body(), 30))
    assert "no more" in caplog.text


def test_closing_fails_what_runs(config: EngineConfig) -> None:
    async def body() -> None:
        async with running(config) as engine:
            task = asyncio.create_task(collect(engine, Request("a", PROMPT, LONG)))
            await until(lambda: engine.stats.num_running == 1)
        assert isinstance((await task)[-1], FailedEvent)

    asyncio.run(asyncio.wait_for(body(), 30))

"""The engine's process: what crosses to it and back, and that it answers as the thread does."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from ram_core import errors
from ram_core.engine.client import HEARTBEAT_S, StreamingClient
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.messages import (
    AlignerOutcome,
    Cancel,
    EngineStats,
    Event,
    FailedEvent,
    Request,
    StartedEvent,
    StepTelemetry,
    TokenEvent,
)
from ram_core.engine.supervisor import SupervisedEngine, pause_before_restart
from ram_core.engine.wire import Load, Report, Stop, decode_news, decode_order, encode
from ram_core.engine.worker import run
from ram_core.errors import CheckpointError, EngineUnavailable, InvalidRequest, QueueFull, RamError
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from tests.models import save_pair
from tests.unit.test_thread import collect, running

PROMPT = tuple(range(20, 30))
ALIGNED = AlignmentParams((AlignerTerm("polite", -0.5),), Resampling.CANDIDATES, kl_threshold=2.5)
LONG = SamplingParams(seed=7, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"), vocab_size=320)
    sources = tuple(AlignerSource(name, str(path)) for name, path in aligners.items())
    return EngineConfig(str(proposal), sources, device="cpu", max_batch=2, max_queue=2)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What was told while loading."""
    return []


@pytest.fixture(scope="module")
def engine(config: EngineConfig, lines: list[str]) -> Iterator[SupervisedEngine]:
    engine = SupervisedEngine.start(config, lines.append)
    yield engine
    engine.end()


def tell(engine: StreamingClient, request: Request) -> list[Event]:
    return asyncio.run(asyncio.wait_for(collect(engine, request), 30))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "order",
    [
        Request("a", (1, 2), LONG, ALIGNED, 3, "tenant", -1, "salt"),
        Request("a", (1,)),
        Cancel("a"),
        Cancel("a", 2),
        Stop(),
        Load(EngineConfig("here", (AlignerSource("polite", "there"),), kv_memory_bytes=2**40), 10),
    ],
    ids=lambda order: type(order).__name__,
)
def test_orders_arrive_as_they_were_sent(order: Request | Cancel | Stop | Load) -> None:
    assert decode_order(encode(order)) == order


def test_a_report_arrives_as_it_was_sent_even_what_is_no_number() -> None:
    telemetry = StepTelemetry(math.inf, -math.inf, 0.1, 1e-310, True)
    events = (
        StartedEvent("a", 0.25, 5),
        TokenEvent("a", 1, 7, -math.inf, ((3, -0.1), (4, -math.inf)), telemetry, "stop"),
        TokenEvent("b", 0, 7, math.nan),
    )
    report = decode_news(encode(Report(events, EngineStats(1, 2, 3, 4, 5, 6.5, 7, 8, 9, 10, 11))))
    assert isinstance(report, Report)
    assert report.events[:2] == events[:2]
    assert report.stats == EngineStats(1, 2, 3, 4, 5, 6.5, 7, 8, 9, 10, 11)
    nameless = report.events[2]
    assert isinstance(nameless, TokenEvent)
    assert math.isnan(nameless.log_prob)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RamError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_what_it_is(kind: type[RamError]) -> None:
    fields = {QueueFull: {"retry_after_s": 1.5}, InvalidRequest: {"param": "here"}}.get(kind, {})
    report = decode_news(encode(Report((FailedEvent("a", 1, kind("It failed.", **fields)),), EngineStats())))
    assert isinstance(report, Report)
    [failed] = report.events
    assert isinstance(failed, FailedEvent)
    assert type(failed.error) is kind
    assert str(failed.error) == "It failed."
    assert vars(failed.error) == vars(kind("It failed.", **fields))


def test_the_process_tells_what_the_thread_tells(engine: SupervisedEngine, config: EngineConfig) -> None:
    sampling = SamplingParams(seed=3, max_tokens=12, ignore_eos=True, num_top_log_probs=3)
    request = Request("a", PROMPT, sampling, ALIGNED, num_choices=2)

    async def from_thread() -> list[Event]:
        async with running(config) as engine:
            return await collect(engine, request)

    def tokens(events: list[Event]) -> list[str]:
        # As text, for NaN is not equal to itself.
        return [repr(event) for event in events if isinstance(event, TokenEvent)]

    assert tokens(tell(engine, request)) == tokens(asyncio.run(from_thread()))


def test_loading_is_told_and_limits_are_known_here(engine: SupervisedEngine, lines: list[str]) -> None:
    assert lines[0] == "reading configs and tokenizers"
    assert engine.aligners == ("polite", "terse")
    assert (engine.vocab_size, engine.max_model_len) == (300, 256)
    assert engine.trouble is None


def test_what_cannot_be_loaded_is_the_same_error_here(config: EngineConfig) -> None:
    broken = EngineConfig(config.proposal, (AlignerSource("gone", "/nowhere"),), device="cpu")
    with pytest.raises(CheckpointError, match="/nowhere"):
        SupervisedEngine.start(broken)


def test_a_number_beyond_64_bits_is_refused(engine: SupervisedEngine) -> None:
    with pytest.raises(InvalidRequest, match="64 bits"):
        tell(engine, Request("a", PROMPT, SamplingParams(stop_token_ids=(10**30,))))
    assert engine._streams.num_open == 0


def test_hanging_up_frees_what_the_request_held(engine: SupervisedEngine) -> None:
    async def body() -> None:
        async with engine.submit(Request("a", PROMPT, LONG)):
            await until(lambda: engine.stats.num_running == 1)
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.num_steps < 1000

    asyncio.run(body())


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_an_idle_engine_gives_signs_of_life(
    engine: SupervisedEngine, config: EngineConfig, kind: str
) -> None:
    async def newest(engine: StreamingClient) -> None:
        before = engine.stats.last_progress_s
        await until(lambda: engine.stats.last_progress_s > before)
        before = engine.stats.last_progress_s
        await until(lambda: engine.stats.last_progress_s > before)
        assert time.monotonic() - engine.stats.last_progress_s < 20 * HEARTBEAT_S

    async def body() -> None:
        if kind == "process":
            await newest(engine)
        else:
            async with running(config) as other:
                await newest(other)

    asyncio.run(body())


def test_a_death_frees_all_places_even_those_of_loops_that_are_gone(config: EngineConfig) -> None:
    engine = SupervisedEngine.start(config)
    others = asyncio.new_event_loop()

    async def submit(name: str) -> None:
        engine.submit(Request(name, PROMPT, LONG, num_choices=2))

    async def body() -> None:
        await submit("here")
        os.kill(engine.pid or 0, signal.SIGKILL)
        await until(lambda: engine.trouble is not None)
        with pytest.raises(EngineUnavailable, match=r"The engine has died and is being restarted\."):
            await submit("too soon")
        await until(lambda: engine.trouble is None)
        assert engine._streams.num_open == 0
        assert len(await collect(engine, Request("again", PROMPT, LONG, num_choices=4))) == 1 + 4 * 200

    others.run_until_complete(submit("there"))
    others.close()
    try:
        asyncio.run(body())
    finally:
        engine.end()


def test_closing_fails_what_runs_and_leaves_no_process(config: EngineConfig) -> None:
    async def body() -> None:
        engine = SupervisedEngine.start(config)
        pid = engine.pid
        task = asyncio.create_task(collect(engine, Request("a", PROMPT, LONG)))
        await until(lambda: engine.stats.num_running == 1)
        await engine.close()
        failed = (await task)[-1]
        assert isinstance(failed, FailedEvent)
        assert str(failed.error) == "The engine was closed."
        with pytest.raises(ProcessLookupError):
            os.kill(pid or 0, 0)
        with pytest.raises(EngineUnavailable, match="closed"):
            engine.submit(Request("b", PROMPT))

    asyncio.run(body())


def test_closing_ends_a_process_that_is_still_loading(config: EngineConfig) -> None:
    engine = SupervisedEngine(config)
    engine.begin()
    engine.end()
    assert engine.pid is None
    with pytest.raises(EngineUnavailable, match="closed before it had loaded"):
        engine.wait_loaded()


def test_pauses_before_restarts_grow_to_a_limit() -> None:
    assert [pause_before_restart(deaths) for deaths in (1, 2, 3, 4, 6, 7, 5000)] == [0, 1, 2, 4, 16, 30, 30]


class FakeEngine:
    """Has work for `num_steps` steps after each request."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._left = 0
        self.stats = EngineStats()

    @property
    def has_work(self) -> bool:
        return self._left > 0

    def handle(self, command: object) -> None:
        self._left = self._num_steps

    def tend(self) -> list[AlignerOutcome]:
        return []

    def step(self) -> list[Event]:
        self._left -= 1
        return [StartedEvent("a", 0), StartedEvent("b", 0)]


class FakeLine:
    """Gives the orders of one list after the other, and keeps what is told."""

    def __init__(self, *orders: list[object]) -> None:
        self._orders = iter(orders)
        self.waits: list[float] = []
        self.told: list[Report] = []

    def take(self, wait_s: float) -> list[object]:
        self.waits.append(wait_s)
        return next(self._orders)

    def tell(self, report: Report) -> None:
        self.told.append(report)


def test_a_step_is_one_message_and_idling_is_told_too() -> None:
    line = FakeLine([], [Request("a", PROMPT)], [], [Cancel("b"), Stop()])
    run(FakeEngine(num_steps=2), line)  # type: ignore[arg-type]
    assert [len(report.events) for report in line.told] == [0, 2, 2]
    assert line.waits == [HEARTBEAT_S, HEARTBEAT_S, 0, HEARTBEAT_S]

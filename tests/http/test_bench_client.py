"""The load client against a server of raw bytes in the same event loop, which notes when it wrote what."""

from __future__ import annotations

import asyncio
import json
import statistics
from typing import Any

import pytest

from ram_core.errors import RamError
from server.bench.client import Client, Target, list_models
from server.bench.load import Load, PlannedRequest, arrival_times
from server.bench.record import Record
from server.bench.run import Run, run_load
from tests.http.bench_server import Exchange, RawServer, Script, chunk, raw_server

SLACK_S = 0.05
"""What the median of many times may be off on a busy machine; sleeps are longer by an order of magnitude."""


async def greet(exchange: Exchange) -> None:
    """Three tokens at once."""
    await exchange.begin()
    for text in ("Hello", ",", " dog"):
        await exchange.say(text)
    await exchange.end(usage={"prompt_tokens": 5, "completion_tokens": 3})


def load_of(**fields: Any) -> Load:
    return Load(
        **{"models": (("big", 1.0),), "concurrency": 4, "num_requests": 12, "num_warmup": 0, **fields}
    )


def run_against(script: Script, load: Load, **target: Any) -> tuple[Run, RawServer]:
    async def play() -> tuple[Run, RawServer]:
        async with raw_server(script) as server:
            return await run_load(Target(server.url, **target), load), server

    return asyncio.run(play())


def one_record(script: Script, **target: Any) -> Record:
    """A request to the script; times are on `time.perf_counter`, as the server's are."""

    async def play() -> Record:
        async with raw_server(script) as server:
            aim = Target(server.url, **target)
            async with aim.open_session(1) as session:
                return await Client(aim, session, 0.0).send(PlannedRequest(0, "big", 8, b"{}"))

    return asyncio.run(play())


def test_times_are_those_of_the_wire():
    """No chunk is seen before it was written, and half of them within the slack; so ITL is the server's."""
    seen: list[Exchange] = []

    async def tick(exchange: Exchange) -> None:
        seen.append(exchange)
        await asyncio.sleep(0.15)
        await exchange.begin()
        for _ in range(20):
            await exchange.say("tick")
            await asyncio.sleep(0.02)
        await exchange.end(usage={"completion_tokens": 20})

    record = one_record(tick)
    (exchange,) = seen
    delays_s = [there - left for there, left in zip(record.chunk_times_s, exchange.wrote_s, strict=True)]
    assert min(delays_s) >= 0
    assert statistics.median(delays_s) < SLACK_S / 5
    assert record.sent_s <= exchange.came_s
    assert 0.15 <= record.ttft_s <= exchange.wrote_s[0] - record.sent_s + SLACK_S
    assert record.ended_s >= exchange.wrote_s[-1] + 0.02
    assert statistics.median(record.gaps_s) == pytest.approx(0.02, rel=0.5)
    assert record.tpot_s == pytest.approx((record.e2e_s - record.ttft_s) / 19)


def test_only_chunks_with_content_count():
    """Not the role's, not the end's, not the usage; reasoning and tool calls are content."""

    async def script(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.event(b": ping\n\n")
        await exchange.event(chunk({"role": "assistant", "content": ""}))
        await exchange.event(chunk({"reasoning_content": "Hm"}))
        await exchange.event(chunk({"content": "Hello"}))
        await exchange.event(chunk({"tool_calls": [{"index": 0}]}))
        await exchange.event({"choices": [], "prompt_filter_results": []})
        details = {"cached_tokens": 4}
        usage = {"prompt_tokens": 9, "completion_tokens": 7, "prompt_tokens_details": details, "x": 1}
        await exchange.end(usage=usage)

    record = one_record(script)
    assert record.failure is None
    assert len(record.chunk_times_s) == 3
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (9, 4, 7)
    assert record.finish_reason == "length"


def test_events_of_one_read_share_its_time_and_a_cut_event_has_the_time_of_its_last_byte():
    async def script(exchange: Exchange) -> None:
        await exchange.begin()
        one = b"data: " + json.dumps(chunk({"content": "a"})).encode() + b"\n\n"
        await exchange.event(one + one + one[:20])
        await asyncio.sleep(0.1)
        await exchange.event(one[20:])
        await exchange.end()

    first, second, third = one_record(script).chunk_times_s
    assert second == first
    assert third - second >= 0.1


def _error(**fields: Any) -> bytes:
    return json.dumps({"error": {"message": "No.", "type": "requests", "param": None, **fields}}).encode()


async def refuse(exchange: Exchange) -> None:
    await exchange.answer("429 Too Many Requests", "application/json", _error(code="rate_limit_exceeded"))


async def refuse_without_code(exchange: Exchange) -> None:
    await exchange.answer("500 Internal Server Error", "application/json", _error(code=None))


async def refuse_in_html(exchange: Exchange) -> None:
    await exchange.answer("502 Bad Gateway", "text/html", b"<h1>Bad gateway</h1>")


async def answer_plainly(exchange: Exchange) -> None:
    await exchange.answer("200 OK", "application/json", b'{"choices": []}')


async def fail_amid(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.say("Hello")
    await exchange.event({"error": {"message": "It broke.", "type": "server_error", "code": None}})
    await exchange.end()


async def babble(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(b"data: {not json\n\n")
    await exchange.end()


async def stall(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.say("Hello")
    await asyncio.sleep(2)


async def break_off(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.say("Hello")
    await asyncio.sleep(0.02)
    exchange.cut()


async def hang_up(exchange: Exchange) -> None:
    exchange.cut()


async def forget_done(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.say("Hello")
    await exchange.end(has_done=False)


async def say_nothing(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.end()


async def end_early(exchange: Exchange) -> None:
    """The connection breaks after [DONE], and before the body's last chunk: nobody is hurt."""
    await exchange.begin()
    await exchange.say("Hello")
    await exchange.event(b"data: [DONE]\n\n")
    await asyncio.sleep(0.02)
    exchange.cut()


@pytest.mark.parametrize(
    ("script", "label", "message"),
    [
        (refuse, "HTTP 429 rate_limit_exceeded", "No."),
        (refuse_without_code, "HTTP 500 requests", "No."),
        (refuse_in_html, "HTTP 502", "<h1>Bad gateway</h1>"),
        (answer_plainly, "no stream", "application/json"),
        (fail_amid, "error event server_error", "It broke."),
        (babble, "bad event", "malformed"),
        (stall, "timeout", "too long"),
        (break_off, "broken stream ClientPayloadError", ""),
        (hang_up, "connection", ""),
        (forget_done, "missing [DONE]", ""),
        (say_nothing, "empty answer", ""),
    ],
)
def test_failures_are_told_by_their_kind(script, label, message):
    failure = one_record(script, timeout_s=0.5).failure
    assert failure is not None
    assert failure.label.startswith(label)
    assert message in failure.message


def test_a_stream_without_done_may_be_allowed():
    assert one_record(forget_done, needs_done=False).failure is None


def test_a_connection_that_breaks_after_the_end_is_no_failure():
    assert one_record(end_early).failure is None


def test_nobody_listens():
    async def play() -> None:
        async with raw_server(greet) as server:
            url = server.url
        with pytest.raises(RamError, match="Cannot reach"):
            await list_models(Target(url))
        with pytest.raises(RamError, match="No request of the warm-up succeeded: connection"):
            await run_load(Target(url), load_of(num_warmup=2))

    asyncio.run(play())


@pytest.mark.parametrize("listing", [b"[]", b"{}", b'{"data": []}', b'{"data": [{"name": "x"}]}', b"no"])
def test_a_server_that_lists_no_models(listing):
    async def script(exchange: Exchange) -> None:
        await exchange.answer("200 OK", "application/json", listing)

    async def play() -> None:
        async with raw_server(script) as server:
            with pytest.raises(RamError, match="model"):
                await list_models(Target(server.url))

    asyncio.run(play())


def test_a_refused_list_of_models_says_why():
    async def play() -> None:
        async with raw_server(refuse) as server:
            with pytest.raises(RamError, match=r"models: HTTP 429 rate_limit_exceeded: No\."):
                await list_models(Target(server.url))

    asyncio.run(play())


def test_a_closed_loop_keeps_its_streams_busy_over_as_many_connections():
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.02)
        await greet(exchange)

    run, server = run_against(script, load_of(concurrency=4, num_requests=16))
    assert [record.index for record in run.records] == list(range(16))
    assert all(record.is_ok for record in run.records)
    assert server.max_running == 4
    assert server.num_connections == 4
    assert run.wall_s == max(record.ended_s for record in run.records)
    assert 0 < run.cpu_s < 60


def test_a_closed_loop_stops_sending_after_its_duration():
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        await greet(exchange)

    run, server = run_against(script, load_of(concurrency=2, num_requests=None, duration_s=0.3))
    assert 2 < len(run.records) <= 12
    assert all(record.sent_s < 0.3 for record in run.records)
    assert [json.dumps(exchange.body["messages"]) for exchange in server.exchanges] == list(
        dict.fromkeys(json.dumps(exchange.body["messages"]) for exchange in server.exchanges)
    )


def test_an_open_loop_sends_when_it_is_time_however_slow_the_server():
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.5)
        await greet(exchange)

    load = load_of(concurrency=None, rate_per_s=50.0, num_requests=20)
    run, server = run_against(script, load)
    assert [record.planned_s for record in run.records] == arrival_times(load)
    lags_s = [record.lag_s for record in run.records]
    assert min(lags_s) >= -1e-6
    assert statistics.median(lags_s) < SLACK_S
    assert server.max_running > 10


def test_a_cap_on_an_open_loop_is_kept_and_shows_as_lag():
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.03)
        await greet(exchange)

    load = load_of(concurrency=2, rate_per_s=1000.0, num_requests=10, arrivals="constant")
    run, server = run_against(script, load)
    assert server.max_running == 2
    assert run.records[-1].lag_s > 4 * 0.03 - 0.01
    assert run.records[-1].ttft_s < run.records[-1].lag_s


def test_the_warm_up_is_sent_and_not_counted():
    run, server = run_against(greet, load_of(num_requests=6, num_warmup=3))
    assert len(run.records) == 6
    said = [exchange.body["messages"][0]["content"] for exchange in server.exchanges]
    assert len(said) == len(set(said)) == 9


def test_the_same_seed_sends_the_same_bodies():
    def sent(seed: int) -> list[str]:
        _, server = run_against(greet, load_of(seed=seed, prompt_tokens="uniform:4:30", num_warmup=2))
        return sorted(json.dumps(exchange.body) for exchange in server.exchanges)

    assert sent(1) == sent(1)
    assert sent(1) != sent(2)


def test_a_warm_up_in_which_everything_fails_ends_the_run_with_the_reason():
    with pytest.raises(RamError, match=r"HTTP 429 rate_limit_exceeded: No\."):
        run_against(refuse, load_of(num_warmup=2))


def test_some_failures_do_not_disturb_the_rest():
    async def script(exchange: Exchange) -> None:
        await (refuse if exchange.body["model"] == "small" else greet)(exchange)

    run, _ = run_against(script, load_of(num_requests=40, models=(("big", 1.0), ("small", 1.0))))
    assert {record.model for record in run.records if record.is_ok} == {"big"}
    assert {record.model for record in run.records if not record.is_ok} == {"small"}


def test_key_headers_and_extra_fields_arrive():
    target = {"api_key": "s3cret", "headers": {"X-Team": "a"}}
    _, server = run_against(greet, load_of(num_requests=1, extra_body={"temperature": 0}), **target)
    (exchange,) = server.exchanges
    assert exchange.head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer s3cret\r\n" in exchange.head
    assert "X-Team: a\r\n" in exchange.head
    assert exchange.body["temperature"] == 0


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/api/openai", "https://host/api/openai"),
    ],
)
def test_the_base_url(url, base_url):
    assert Target(url).base_url == base_url


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "http://"])
def test_a_bad_url_is_refused(url):
    with pytest.raises(RamError, match="A URL begins with"):
        Target(url)

"""Faults under a server that runs as an operator runs it: what clients saw, how it mended, what was lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from ram_core.engine.wire import decode_news, decode_order
from server.tenants.editing import add_tenant
from tests.faults.crowd import CHAT, Seen, client_of, crowd, read_stream
from tests.faults.operated import PATIENCE_S, Operated, operate, until
from tests.http.standin import chat
from tests.lengths import IS_FULL, full_or_short
from tests.models import save_pair
from tests.told import TABLE

NUM_STREAMS = full_or_short(64, 16)
NUM_HANG_UPS = full_or_short(500, 60)
SEND_TIMEOUT_S = 1.0
GREEDY = {"ignore_eos": True, "temperature": 0}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return save_pair(tmp_path_factory.mktemp("pair"), aligners=("polite",), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, dict[str, Path]]
) -> Iterator[Operated]:
    proposal, aligners = pair
    words = f"--aligner polite={aligners['polite']} --max-batch {NUM_STREAMS} --kv-memory 64MiB".split()
    with operate(
        tmp_path_factory.mktemp("server"), proposal, *words, RAM_SEND_TIMEOUT_S=str(SEND_TIMEOUT_S)
    ) as opened:
        with opened.client() as client:
            answer(client, "polite")
        yield opened


@pytest.fixture
def client(running: Operated) -> Iterator[httpx.Client]:
    with running.client() as http:
        yield http
    until(lambda: running.is_idle, "nothing runs, waits, or holds memory")
    assert not running.num_server_errors()


def answer(client: httpx.Client, model: str = "big", **fields: object) -> str:
    body = chat(model=model, **({"max_tokens": 20, "seed": 1, "ignore_eos": True} | fields))
    got = client.post(CHAT, json=body)
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["message"]["content"])


@contextlib.contextmanager
def beside(running: Operated) -> Iterator[list[Seen]]:
    """A neighbour that streams all the while; its answer must be the one that it has alone."""
    body = chat(model="polite", stream=True, max_tokens=400, seed=7, ignore_eos=True)

    async def one() -> Seen:
        async with client_of(running) as http:
            return await read_stream(http, body)

    alone = asyncio.run(one()).text
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: asyncio.run(one()))
        seen: list[Seen] = []
        yield seen
        seen.append(reading.result(PATIENCE_S))
    assert seen[0].ending == "length"
    assert seen[0].text == alone


def raw_stream(running: Operated, **fields: object) -> socket.socket:
    """The connection of a request that was just sent, with a small window to receive in."""
    body = json.dumps(chat(**({"model": "big", "stream": True, "ignore_eos": True} | fields))).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE_S)
    connection.connect(running.address)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\n"
    connection.sendall(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    return connection


def test_nothing_listens_but_the_servers_own_port(running: Operated) -> None:
    """The engine is spoken with over sockets of no port, in a directory of the user's own."""
    pids = (running.process.pid, running.engine_pid)
    sockets = [each for pid in pids for each in psutil.Process(pid).net_connections(kind="inet")]
    assert {each.laddr for each in sockets if each.status == psutil.CONN_LISTEN} == {running.address}


@pytest.mark.parametrize("decode", [decode_order, decode_news])
def test_what_is_no_message_is_not_read(decode: Callable[[bytes], object]) -> None:
    """A pickle, above all: reading one runs what it says."""
    for frame in (
        pickle.dumps(print),
        pickle.dumps({"a": 1}, protocol=0),
        b"",
        b"\xff" * 100,
        b"\xdd\xff\xff\xff\xff",
    ):
        with pytest.raises(msgspec.MsgspecError):
            decode(frame)


def test_a_client_that_stops_reading_loses_its_place_and_nobody_else_notices(
    running: Operated, client: httpx.Client
) -> None:
    before = running.num_ended("abort")
    with beside(running), raw_stream(running, n=8, logprobs=True, top_logprobs=20) as connection:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        stopped_s = time.monotonic()
        until(lambda: running.num_ended("abort") == before + 1, "the request of whoever stopped is cancelled")
        recovery_s = time.monotonic() - stopped_s
    TABLE.add("a client stops reading", "it: a cut stream; others: nothing", recovery_s, "its own answer")


def test_a_slow_client_gets_everything_and_holds_up_nobody(running: Operated, client: httpx.Client) -> None:
    with (
        beside(running),
        raw_stream(running, max_tokens=100, stream_options={"include_usage": True}) as connection,
    ):
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = connection.recv(512)
            assert piece, received[-200:]
            received += piece
            time.sleep(0.005)
    assert b'"completion_tokens":100' in received
    TABLE.add("a slow client", "everything, slowly; others: nothing", None, "nothing")


def test_hang_ups_at_random_points_leave_nothing_behind(running: Operated, client: httpx.Client) -> None:
    noise = random.Random(0)
    until(lambda: running.is_idle, "nothing runs")
    files = running.num_files

    async def hang_up(number: int) -> None:
        body = json.dumps(
            chat(model="polite", stream=bool(number % 3), n=1 + number % 2, max_tokens=60)
        ).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\n"
        raw = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        reader, writer = await asyncio.open_connection(*running.address)
        cut = noise.random()
        writer.write(raw if cut < 0.8 else raw[: noise.randrange(len(raw))])
        if cut < 0.6:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.readexactly(noise.randrange(1, 4000)), noise.random() / 4)
        if noise.random() < 0.5:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def many() -> None:
        places = asyncio.Semaphore(8)

        async def in_turn(number: int) -> None:
            async with places:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    await hang_up(number)

        await asyncio.gather(*[in_turn(number) for number in range(NUM_HANG_UPS)])

    with beside(running):
        asyncio.run(many())
        over_s = time.monotonic()
    until(lambda: running.is_idle and running.num_files <= files, "all they held is free")
    TABLE.add(
        f"{NUM_HANG_UPS} hang-ups at random points",
        "others: nothing",
        time.monotonic() - over_s,
        "their own answers",
    )


def test_a_full_disk_fails_no_request_and_loses_only_lines_of_the_log(
    running: Operated, client: httpx.Client
) -> None:
    """SIGHUP turns the log to another place, as after it was rotated; this one has no room."""
    usage, kept = running.home / "usage.jsonl", running.home / "usage.1"
    lost = "ram_usage_log_errors_total"
    answer(client)
    usage.rename(kept)
    usage.symlink_to("/dev/full")
    running.leave(signal.SIGHUP)
    before = running.metric(lost)
    until(lambda: bool(answer(client)) and running.metric(lost) > before, "the full disk is felt")
    num_lost = running.metric(lost)
    assert [answer(client) for _ in range(3)]
    assert running.metric(lost) == num_lost + 3
    usage.unlink()
    running.leave(signal.SIGHUP)
    mended_s = until(usage.exists, "the log goes on")
    answer(client)
    assert len(usage.read_text().splitlines()) == 1
    TABLE.add("a full disk", "nothing", mended_s, "usage lines of that time, counted")


def test_a_reload_disturbs_no_stream_and_takes_new_keys_up(running: Operated, client: httpx.Client) -> None:
    tenants = running.home / "tenants.toml"
    before = tenants.read_text()

    def reload() -> None:
        newcomer["key"] = add_tenant(tenants, "newcomer")
        running.leave(signal.SIGHUP)

    newcomer: dict[str, str] = {}
    seen = asyncio.run(crowd(running, NUM_STREAMS, reload, max_tokens=200, **GREEDY))
    assert {stream.ending for stream in seen} == {"length"}
    headers = {"Authorization": f"Bearer {newcomer['key']}"}

    def is_known() -> bool:
        return client.get("/v1/models", headers=headers).status_code == 200

    taken_s = until(is_known, "the new tenant is let in")
    tenants.write_text("[tenants")
    running.leave(signal.SIGHUP)
    assert answer(client)
    assert is_known(), "a broken file changes nothing"
    tenants.write_text(before)
    TABLE.add("SIGHUP under load", "nothing", taken_s, "nothing")


@pytest.mark.skipif(not IS_FULL, reason="another start of the engine, which `make faults` waits for")
def test_an_engine_that_gets_no_memory_from_the_system_goes_on_or_comes_back(
    running: Operated, client: httpx.Client
) -> None:
    """Its address space is cut to what it has. If what was freed before is not enough, some library finds
    none, and cannot tell what it was."""
    alone, pid = answer(client), running.engine_pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    before = running.metric("ram_engine_restarts_total")
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    bodies = [chat("The quick brown fox jumps. " * (80 * number), max_tokens=4) for number in range(1, 4)]
    answers = [client.post(CHAT, json=body) for body in bodies]
    failed_s = time.monotonic()
    statuses = sorted({got.status_code for got in answers})
    assert set(statuses) <= {200, 500, 503}
    assert all("retry-after" in got.headers for got in answers if got.status_code == 503)
    if 503 in statuses:
        until(lambda: running.metric("ram_engine_restarts_total") > before, "it comes back")
    until(lambda: running.is_ready, "it is ready")
    recovery_s = time.monotonic() - failed_s
    assert answer(client) == alone
    resource.prlimit(running.engine_pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert all(client.post(CHAT, json=body).status_code == 200 for body in bodies)
    TABLE.add("the system gives no memory", f"{statuses}, Retry-After", recovery_s, "running answers")


def test_at_sigterm_streams_end_and_new_requests_are_refused(running: Operated) -> None:
    """The last one: it ends the server."""
    refused: list[httpx.Response] = []

    def leave() -> None:
        running.leave()
        with running.client() as client:
            until(lambda: not running.is_ready, "it is not ready any more")
            until(
                lambda: client.post(CHAT, json=chat(max_tokens=1)).status_code == 503,
                "new requests are refused",
            )
            refused.append(client.post(CHAT, json=chat(model="polite")))

    asked_s = time.monotonic()
    seen = asyncio.run(crowd(running, NUM_STREAMS, leave, max_tokens=300, **GREEDY))
    assert {stream.ending for stream in seen} == {"length"}
    [refusal] = refused
    assert int(refusal.headers["retry-after"]) > 0
    assert refusal.json()["error"]["code"] == "engine_unavailable"
    assert running.process.wait(PATIENCE_S) == 0
    usage = [json.loads(line) for line in (running.home / "usage.jsonl").read_text().splitlines()]
    told = [line for line in usage[-NUM_STREAMS:] if line["finish_reason"] == "length"]
    assert sum(line["completion_tokens"] for line in told) == 300 * NUM_STREAMS
    TABLE.add(
        f"SIGTERM with {NUM_STREAMS} streams",
        "their whole answers; new requests 503 with Retry-After; exit code 0",
        time.monotonic() - asked_s,
        "nothing",
    )

"""The engine's process is killed, stopped, or orphaned under a live server, and what clients see of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.supervisor import SupervisedEngine
from ram_core.models.vocabulary import load_tokenizer
from tests.http.standin import LiveServer, chat, count_metrics, live
from tests.http.test_cli import assert_one_line, ram, serve
from tests.models import save_pair
from tests.told import TABLE

CHAT = "/v1/chat/completions"
NUM_STREAMS = 32
PATIENCE_S = 60.0
"""Loading takes seconds, on a busy machine many of them."""

Pair = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A context that no stream comes to the end of before its test does."""
    return save_pair(tmp_path_factory.mktemp("pair"), max_position_embeddings=16384)


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[LiveServer]:
    proposal, aligners = pair
    sources = tuple(AlignerSource(f"{name}@1", str(path)) for name, path in aligners.items())
    config = EngineConfig(str(proposal), sources, device="cpu", max_batch=NUM_STREAMS)
    with live(SupervisedEngine.start(config), load_tokenizer(str(proposal)), stall_s=2) as running:
        yield running
    assert running.engine.pid is None


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        yield http


def until(condition: Callable[[], bool], what: str) -> float:
    """Seconds until the condition held."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < PATIENCE_S, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - began_s


def is_ready(client: httpx.Client) -> bool:
    return client.get("/health/ready").status_code == 200


def num_restarts(client: httpx.Client) -> int:
    return count_metrics(client.get("/metrics").text)["ram_engine_restarts_total"]


def pid_of(server: LiveServer) -> int:
    assert server.engine.pid is not None
    return server.engine.pid


def endings_of_streams(server: LiveServer, strike: Callable[[], None]) -> list[list[str]]:
    """Strike when all of many streams have brought text; the last two events of each."""

    async def read(http: httpx.AsyncClient, number: int, begun: asyncio.Semaphore) -> list[str]:
        body = chat(model=("polite", "big")[number % 2], stream=True, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            begun.release()
            return [line async for line in lines if line][-2:]

    async def run() -> list[list[str]]:
        begun = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as http:
            reading = [asyncio.create_task(read(http, number, begun)) for number in range(NUM_STREAMS)]
            for _ in reading:
                await begun.acquire()
            strike()
            return await asyncio.gather(*reading)

    return asyncio.run(run())


def test_a_killed_engine_fails_its_streams_clearly_and_comes_back(
    server: LiveServer, client: httpx.Client
) -> None:
    before, was = num_restarts(client), pid_of(server)
    endings = endings_of_streams(server, lambda: os.kill(was, signal.SIGKILL))
    failed_s = time.monotonic()
    for error, done in endings:
        assert json.loads(error.removeprefix("data: "))["error"] == {
            "message": "The engine has died and is being restarted.",
            "type": "service_unavailable_error",
            "param": None,
            "code": "engine_unavailable",
        }
        assert done == "data: [DONE]"
    refused = client.get("/health/ready")
    assert refused.status_code == 503
    assert refused.json()["reason"] == "the engine has died and is being restarted"
    assert client.get("/health/live").status_code == 200
    answer = client.post(CHAT, json=chat())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    until(lambda: is_ready(client), "the engine comes back")
    assert pid_of(server) != was
    assert num_restarts(client) == before + 1
    for model in ("big", "polite", "terse"):
        assert client.post(CHAT, json=chat(model=model, max_tokens=3)).status_code == 200
    recovery_s = time.monotonic() - failed_s
    TABLE.add(
        "the engine is killed", "an error event, then 503 with Retry-After", recovery_s, "running answers"
    )


def test_a_death_while_loading_again_is_tried_again(server: LiveServer, client: httpx.Client) -> None:
    before, first = num_restarts(client), pid_of(server)
    os.kill(first, signal.SIGKILL)
    until(lambda: server.engine.pid not in (None, first), "a second process begins")
    os.kill(pid_of(server), signal.SIGKILL)
    until(lambda: is_ready(client), "the engine comes back")
    assert num_restarts(client) == before + 2
    assert client.post(CHAT, json=chat(model="polite", max_tokens=3)).status_code == 200


def test_signals_for_the_whole_group_do_not_end_the_engine(server: LiveServer, client: httpx.Client) -> None:
    before = pid_of(server)
    os.kill(before, signal.SIGINT)
    os.kill(before, signal.SIGTERM)
    assert client.post(CHAT, json=chat(max_tokens=50, ignore_eos=True)).status_code == 200
    assert pid_of(server) == before


def test_an_engine_that_hangs_is_neither_alive_nor_ready_until_it_goes_on(
    server: LiveServer, client: httpx.Client
) -> None:
    body = chat(stream=True, ignore_eos=True, max_tokens=2000)
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(pid_of(server), signal.SIGSTOP)
        try:
            until(lambda: client.get("/health/live").status_code == 503, "a stall is noticed")
            assert "the engine made no progress for" in client.get("/health/live").json()["reason"]
            assert "the engine made no progress for" in client.get("/health/ready").json()["reason"]
        finally:
            os.kill(pid_of(server), signal.SIGCONT)
        mended_s = until(lambda: client.get("/health/live").status_code == 200, "the engine goes on")
        assert is_ready(client)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    TABLE.add("the engine hangs, and goes on", "a pause; both probes 503", mended_s, "nothing")


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def has_ended(pid: int) -> bool:
    """Gone, or a zombie whose parent, the machine's init, takes its time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_no_engine_outlives_its_server(pair: Pair, is_stopped: bool) -> None:
    process, url = serve(str(pair[0]))
    try:
        [engine] = children_of(process.pid)
        body = chat(stream=True, ignore_eos=True)
        with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=PATIENCE_S) as answer:
            next(answer.iter_lines())
            if is_stopped:
                os.kill(engine, signal.SIGSTOP)
            process.kill()
        until(lambda: has_ended(engine), "the engine ends with its server")
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_ends_leaves_no_engine_behind(pair: Pair) -> None:
    process, _ = serve(str(pair[0]))
    try:
        [engine] = children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
        assert has_ended(engine)
    finally:
        process.kill()
        process.communicate()


def test_an_engine_that_dies_at_its_first_start_is_one_line(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = SupervisedEngine.begin

    def begin_and_die(engine: SupervisedEngine) -> None:
        begin(engine)
        until(lambda: engine.pid is not None, "the process begins")
        os.kill(engine.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(SupervisedEngine, "begin", begin_and_die)
    result = ram("serve", str(pair[0]), "--port", "0")
    assert_one_line(result, "The engine's process was killed by SIGKILL.")

"""A client that is gone costs nothing more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from server.app import create_app
from server.commands import serve
from server.settings import Settings
from tests.http.standin import (
    PATIENCE_S,
    Gate,
    ScriptedEngine,
    chat,
    live,
    loaded_of,
    say,
    wait_until,
)

BODIES = [
    ("/v1/chat/completions", chat()),
    ("/v1/chat/completions", chat(n=3)),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
]


@contextlib.contextmanager
def raw_request(url: str, path: str, body: dict):
    """A request whose connection the test holds in its hands."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    head = "\r\n".join([*lines, "", ""])
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def everything_cancelled(engine: ScriptedEngine, num_choices: int) -> bool:
    seen = {engine.cancelled.get(timeout=PATIENCE_S) for _ in range(num_choices)}
    return len(seen) == num_choices


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("is_stream", [False, True])
def test_hanging_up_before_the_first_token_stops_the_generation(server, engine, path, body, is_stream):
    gate = Gate()
    engine.script = lambda request: [gate]
    with raw_request(server.url, path, {**body, "stream": is_stream}):
        gate.wait_reached()
    prompts = body.get("prompt", "")
    assert everything_cancelled(engine, body.get("n", 1) * (len(prompts) if isinstance(prompts, list) else 1))


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("is_stream", [False, True])
def test_hanging_up_midway_stops_the_generation(server, engine, path, body, is_stream):
    gate = Gate()
    engine.script = lambda request: [*say(request, "dog", finish=None), gate]
    with raw_request(server.url, path, {**body, "stream": is_stream}) as connection:
        gate.wait_reached()
        if is_stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    prompts = body.get("prompt", "")
    assert everything_cancelled(engine, body.get("n", 1) * (len(prompts) if isinstance(prompts, list) else 1))


def test_closing_a_stream_counts_as_an_abort(server, client, engine):
    gate = Gate()
    engine.script = lambda request: [*say(request, "dog", finish=None), gate]
    name = 'ram_requests_finished_total{aligner="identity",reason="abort",version=""}'
    before = metric(client, name)
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        next(answer.iter_lines())
    engine.left.get(timeout=PATIENCE_S)
    assert metric(client, name) == before + 1


def test_a_whole_answer_leaves_nothing_to_cancel(client, engine):
    for is_stream in (False, True):
        client.post("/v1/chat/completions", json=chat(n=2, stream=is_stream))
        engine.left.get(timeout=PATIENCE_S)
    assert engine.cancelled.empty()


def test_a_client_that_stops_reading_loses_its_place():
    """Its receive window is full, so that sending waits; the wait has an end."""

    def script(request):
        for _ in range(20_000):
            yield from say(request, "dog " * 50, finish=None)

    engine = ScriptedEngine(script)
    with (
        live(engine, send_timeout_s=0.1) as server,
        raw_request(server.url, "/v1/chat/completions", chat(stream=True)) as connection,
    ):
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert everything_cancelled(engine, 1)


def test_clients_that_read_nothing_are_dropped_when_the_server_leaves(monkeypatch, caplog):
    monkeypatch.setattr(serve, "_LAST_WORDS_S", 1.0)

    def script(request):
        for _ in range(20_000):
            yield from say(request, "dog " * 50, finish=None)

    engine = ScriptedEngine(script)
    servers = []

    async def run() -> None:
        app = create_app(Settings(served_model_name="big", shutdown_grace_s=0.0), loaded_of(engine))
        config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5, ws="none")
        servers.append(serve.GracefulServer(config, app.state.serving))
        await servers[0].serve()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    wait_until(lambda: servers and servers[0].started)
    port = servers[0].servers[0].sockets[0].getsockname()[1]
    with raw_request(f"http://127.0.0.1:{port}", "/v1/chat/completions", chat(stream=True)) as connection:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        wait_until(lambda: any(at.flow.write_paused for at in servers[0].server_state.connections))
        servers[0].should_exit = True
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not engine.left.empty()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_hanging_up_while_sending_is_no_error(server, client, engine, caplog):
    with contextlib.suppress(OSError), raw_request(server.url, "/v1/chat/completions", {}) as connection:
        connection.shutdown(socket.SHUT_WR)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
    deadline = time.monotonic() + PATIENCE_S
    name = 'ram_http_requests_total{route="/v1/chat/completions",status="499"}'
    while not metric(client, name) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert metric(client, name) >= 1
    assert "Traceback" not in caplog.text
    assert not engine.requests


def metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0

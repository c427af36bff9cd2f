"""A client that is gone costs nothing more."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import httpx
import pytest

from tests.http.standin import PATIENCE_S, Gate, ScriptedEngine, chat, live, say

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

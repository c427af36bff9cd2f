"""Bytes that are no good request are answered in OpenAI's shape, or hung up on; nothing hangs."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from server.settings import Settings
from tests.faults.bad_wire import WIRES, Wire, chunked, get, one_chunk, sized
from tests.faults.judge import fault_of
from tests.http.standin import PATIENCE_S, Gate, LiveServer, ScriptedEngine, chat, live, say

RECEIVE_TIMEOUT_S = 0.4
NUM_DAMAGED = 300


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live(ScriptedEngine(), max_body_bytes=2**20) as running:
        yield running


@contextlib.contextmanager
def connection(server: LiveServer) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as open_socket:
        yield open_socket


def send(to: socket.socket, raw: bytes) -> None:
    """Send, as far as the server lets us."""
    with contextlib.suppress(ConnectionError):
        to.sendall(raw)


def answer_of(source: socket.socket) -> tuple[int, dict[str, str], bytes]:
    answer = http.client.HTTPResponse(source)
    answer.begin()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
def test_what_comes_down_the_wire_is_answered_in_openais_shape(server: LiveServer, wire: Wire) -> None:
    with connection(server) as open_socket:
        send(open_socket, wire.raw)
        status, headers, body = answer_of(open_socket)
    assert status in wire.statuses, body
    assert not (fault := fault_of(status, headers, body)), fault


def test_damaged_requests_hang_nothing(server: LiveServer) -> None:
    """Some bytes of a good request are lost, doubled, or another's; its sender then says no more."""
    noise = random.Random(0)
    originals = [sized(), chunked(one_chunk()), get(b"/v1/models"), sized() + sized()]
    num_answers = 0
    for _ in range(NUM_DAMAGED):
        raw = bytearray(noise.choice(originals))
        for _ in range(noise.randint(1, 4)):
            place = noise.randrange(len(raw))
            raw[place : place + noise.randint(0, 2)] = noise.choice(
                [b"", b"\r\n", b"\x00", noise.randbytes(2)]
            )
        with connection(server) as open_socket:
            send(open_socket, bytes(raw))
            open_socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                assert not (fault := fault_of(*answer_of(open_socket))), (fault, bytes(raw))
                num_answers += 1
    assert num_answers > NUM_DAMAGED / 4
    assert server.engine.last is not None


def test_a_trailer_is_no_header(server: LiveServer) -> None:
    """A proxy has checked the headers before the body; what comes after it, nobody has."""
    raw = chunked(one_chunk(trailers=b"X-Request-Id: smuggled\r\nAuthorization: Bearer x\r\n"))
    with connection(server) as open_socket:
        open_socket.sendall(raw)
        status, headers, _ = answer_of(open_socket)
    assert status == 200
    assert headers["x-request-id"] != "smuggled"


def test_requests_in_one_piece_are_answered_in_turn(server: LiveServer) -> None:
    """A smuggler wants a body taken for a request: each body must end where its length says."""
    inner = get(b"/v1/nothing")
    with connection(server) as open_socket:
        open_socket.sendall(sized(inner) + get(b"/v1/models") + get(b"/version"))
        statuses = []
        reader = open_socket.makefile("rb")
        for _ in range(3):
            statuses.append(int(reader.readline().split()[1]))
            length = 0
            while (line := reader.readline()) != b"\r\n":
                name, _, value = line.lower().partition(b":")
                length = int(value) if name == b"content-length" else length
            reader.read(length)
    assert statuses == [400, 200, 200]


LEFTOVERS = {
    "garbage": (b"\0\0\r\n\r\n", []),
    "a broken body": (chunked(b"zz\r\n"), []),
    # Whoever may still say the rest is told that it did not come.
    "half a head": (b"GET / HTT", [b"408"]),
    "half a body": (sized()[:-5], [b"408"]),
}


@pytest.mark.parametrize(("leftover", "refusals"), LEFTOVERS.values(), ids=LEFTOVERS)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_comes_after_a_request_spoils_no_answer(
    leftover: bytes, refusals: list[bytes], is_streamed: bool
) -> None:
    """Not even in its midst; and the client is told nothing that it could take for another answer."""
    gate = Gate()
    engine = ScriptedEngine(lambda request: [*say(request, "dog", finish=None), gate, *say(request, "dog")])
    body = json.dumps(chat(stream=is_streamed)).encode()
    first = sized(body).replace(b"/completions", b"/chat/completions")
    with live(engine, receive_timeout_s=RECEIVE_TIMEOUT_S) as server, connection(server) as open_socket:
        send(open_socket, first + get(b"/v1/models") + leftover)
        gate.wait_reached()
        time.sleep(2 * RECEIVE_TIMEOUT_S)
        gate.open()
        told = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := open_socket.recv(1 << 16):
                told += piece
    answer, models, *refusal = told.split(b"HTTP/1.1 ")[1:]
    assert answer.startswith(b"200 OK")
    assert (b"data: [DONE]" if is_streamed else b'"object":"chat.completion"') in answer
    assert models.startswith(b"200 OK")
    assert [line[:3] for line in refusal] == refusals
    assert len(engine.requests) == 1


def test_many_requests_on_one_connection_are_not_too_large_together(server: LiveServer) -> None:
    with connection(server) as open_socket:
        for _ in range(4):
            open_socket.sendall(sized(b'{"prompt": "Hi", "user": "%b"}' % (b"a" * 40_000)))
            assert answer_of(open_socket)[0] == 200


HALVES = {
    "nothing": b"",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: ",
    "a head alone": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    "half a chunk": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{",
}


def test_who_does_not_finish_a_request_is_told_and_hung_up_on() -> None:
    """Nor does a byte now and then help."""
    with (
        live(ScriptedEngine(), receive_timeout_s=RECEIVE_TIMEOUT_S) as server,
        contextlib.ExitStack() as exits,
    ):
        sockets = {name: exits.enter_context(connection(server)) for name in HALVES}
        for name, raw in HALVES.items():
            sockets[name].sendall(raw)
        drip_until_s = time.monotonic() + RECEIVE_TIMEOUT_S / 2
        while time.monotonic() < drip_until_s:
            sockets["half a head"].sendall(b"a")
            time.sleep(0.02)
        assert sockets.pop("nothing").recv(1) == b""
        for open_socket in sockets.values():
            status, headers, body = answer_of(open_socket)
            assert status == 408
            assert not fault_of(status, headers, body)
            assert open_socket.recv(1) == b""
        assert not server.engine.requests


def test_clients_give_idle_connections_up_before_the_server_does() -> None:
    """If both do so at the same time, a request is sent into a connection that is being closed, and lost."""
    assert Settings().keep_alive_s > 10 * httpx.Limits().keepalive_expiry
    with live(ScriptedEngine(), keep_alive_s=1) as server, connection(server) as open_socket:
        open_socket.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(open_socket)[0] == 200
        assert open_socket.recv(1) == b""


def test_a_stream_outlives_the_time_for_its_request() -> None:
    gate = Gate()
    engine = ScriptedEngine(lambda request: [*say(request, "dog", finish=None), gate, *say(request, "dog")])
    with live(engine, receive_timeout_s=RECEIVE_TIMEOUT_S) as server, connection(server) as open_socket:
        body = json.dumps(chat(stream=True)).encode()
        open_socket.sendall(sized(body).replace(b"/completions", b"/chat/completions"))
        gate.wait_reached()
        time.sleep(2 * RECEIVE_TIMEOUT_S)
        gate.open()
        assert answer_of(open_socket)[2].endswith(b"data: [DONE]\n\n")

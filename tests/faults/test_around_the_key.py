"""Ways around the key that were open in other servers: by the path, by headers, by another protocol."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from tests.faults.bad_wire import BODY, get, one_chunk
from tests.faults.judge import fault_of
from tests.faults.test_bad_wire import answer_of, connection, send
from tests.http.standin import LiveServer, ScriptedEngine, live

KEY = b"ram-s3cret"
OPEN = b"/health"
CLOSED = b"/v1/models"

PATHS = rb"""
/v1/models //v1/models /v1//models /./v1/models /V1/models /v1/models/ /v1/models/big /health/../v1/models
/health/%2e%2e/v1/models /health%2f..%2fv1/models /health/..;/v1/models /health;/v1/models
/health;/../v1/models /health%00/../v1/models /health%0a/v1/models /health%3f/../v1/models
/health%23/../v1/models /health/live/../../v1/models /health\..\v1\models /%76%31/models /v1%2fmodels
/v1/%6dodels /v1/models%2f..%2f..%2fhealth /v1/models/../../health /v1/models?/health /v1/models#/health
/v1/models;/health /v1/models%20 /v1/models%0a /v1/models%00 /v1/models/%2e%2e/%2e%2e/health
/%2576%2531/models /version/../v1/models http://x/v1/models http://x/health/../v1/models
http://health/v1/models /docs /openapi.json /redoc /docs/oauth2-redirect /metrics/ /metrics%0a /metrics%00
/v1 / /admin /admin/aligners /inference/v1/generate /tokenize /invocations /pause /get_world_size
""".split()

# Of the Host header Starlette once made the URL, and servers their decision: CVE-2026-48710, CVE-2026-48746.
_PLAIN_HEADERS = rb"""
Host: x/health?
Host: x/health#
Host: x/health
Host: x:80/health?a=
Host: x?/health
Host: @x/health
X-Forwarded-Prefix: /health
X-Forwarded-Path: /health
X-Original-URL: /health
X-Rewrite-URL: /health
X-Forwarded-Uri: /health
X-Original-URI: /health
X-HTTP-Method-Override: GET
X-Forwarded-For: 127.0.0.1
X-Real-IP: 127.0.0.1
Forwarded: for=127.0.0.1
X-Forwarded-Host: localhost
Authorization: Bearer
Authorization: Bearer null
Authorization: Bearer ram-s3cre
Authorization: Bearer ram-s3cret1
Authorization: Bearer RAM-S3CRET
Authorization: Basic ram-s3cret
Authorization: ram-s3cret
Authorization: Bearer ram-s3cret, Bearer x
Authorization: Bearer "ram-s3cret"
X-API-Key: ram-s3cret
Cookie: Authorization=Bearer ram-s3cret
Proxy-Authorization: Bearer ram-s3cret
""".strip().splitlines()
HEADERS = [
    *_PLAIN_HEADERS,
    b"Authorization: Bearer ",
    b"Authorization: Bearer \xff",
    b"Authorization: Bearer\tram-s3cret",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    b"Authorization: Bearer x\r\nAuthorization: Bearer ram-s3cret",
    b"Authorization: Bearer ram-s3cret\r\nAuthorization: Bearer x",
]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live(
        ScriptedEngine(), api_key=KEY.decode(), admin_key="ram-4dmin", metrics_access="admin"
    ) as running:
        yield running


def ask(server: LiveServer, raw: bytes) -> tuple[int, bytes]:
    with connection(server) as open_socket:
        send(open_socket, raw)
        status, headers, body = answer_of(open_socket)
    assert not (fault := fault_of(status, headers, body)), fault
    return status, body


def test_the_door_opens_with_the_key_and_health_without(server: LiveServer) -> None:
    assert ask(server, get(CLOSED, b"Authorization: Bearer " + KEY))[0] == 200
    assert ask(server, get(OPEN))[0] == 200
    assert ask(server, get(OPEN + b"?/v1/models"))[0] == 200


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_no_path_leads_around_the_key(server: LiveServer, path: bytes) -> None:
    status, body = ask(server, get(path))
    assert status in (400, 401), body
    assert b"polite" not in body


@pytest.mark.parametrize("header", HEADERS, ids=repr)
def test_no_header_leads_around_the_key(server: LiveServer, header: bytes) -> None:
    lines = [header] if header.startswith(b"Host:") else [b"Host: x", header]
    status, body = ask(server, b"\r\n".join([b"GET /v1/models HTTP/1.1", *lines, b"", b""]))
    assert status in (400, 401), body
    assert b"polite" not in body


@pytest.mark.parametrize("method", [b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PROPFIND", b"QUERY"])
def test_no_method_leads_around_the_key(server: LiveServer, method: bytes) -> None:
    with connection(server) as open_socket:
        open_socket.sendall(method + b" /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert open_socket.recv(12)[-3:] in (b"401", b"400")


def test_nobody_generates_without_the_key(server: LiveServer) -> None:
    """Not in the body of a request that may come, nor after one, nor by a trailer."""
    inner = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
    key = b"Authorization: Bearer " + KEY
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    attempts = [
        inner,
        get(OPEN, b"Content-Length: %d" % len(inner)) + inner,
        get(OPEN, b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + inner,
        get(OPEN) + inner,
        head
        + b"Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n"
        + one_chunk(BODY, key + b"\r\n"),
        head + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY) + key + b"\r\n\r\n",
    ]
    for raw in attempts:
        with connection(server) as open_socket:
            send(open_socket, raw)
            open_socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while open_socket.recv(65536):
                    pass
    assert not server.engine.requests
    ask(server, head + key + b"\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY))
    assert len(server.engine.requests) == 1


def test_a_wrong_key_and_none_are_told_alike(server: LiveServer) -> None:
    """Neither tells how near it was, nor whether the model or the path exists."""
    told = set()
    for path in (b"/v1/models", b"/v1/nothing", b"/v1/models/polite"):
        for key in (b"x", KEY[:-1], KEY + b"1", b"ram-000000000000-x"):
            status, body = ask(server, get(path, b"Authorization: Bearer " + key))
            told.add((status, json.loads(body)["error"]["message"]))
    assert told == {(401, "Incorrect API key provided.")}

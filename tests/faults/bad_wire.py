"""What may come down a wire that is no good request, byte by byte."""

from __future__ import annotations

import json
from dataclasses import dataclass

BODY = json.dumps({"model": "big", "prompt": "Hi", "max_tokens": 1}).encode()
_HEADERS = b"Host: x\r\nContent-Type: application/json\r\n"


def post(*headers: bytes, body: bytes = BODY, path: bytes = b"/v1/completions") -> bytes:
    """A POST of these header lines, as they are."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST %b HTTP/1.1\r\n%b%b\r\n%b" % (path, _HEADERS, lines, body)


def get(path: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path, lines)


def sized(body: bytes = BODY, *headers: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body), *headers, body=body)


def chunked(raw: bytes, *headers: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", *headers, body=raw)


def one_chunk(body: bytes = BODY, trailers: bytes = b"") -> bytes:
    return b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


@dataclass(frozen=True)
class Wire:
    """Bytes, and the statuses that may answer them."""

    name: str
    raw: bytes
    statuses: tuple[int, ...]


_NO_HTTP = {
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": b"\x00" * 1024,
    "an unknown method": b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method in lower case": b"get /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long method": b"A" * 100_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/3.0": b"GET /v1/models HTTP/3.0\r\nHost: x\r\n\r\n",
    "a version of letters": b"GET /v1/models HTTP/a.b\r\nHost: x\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tunnel": b"CONNECT example.org:80 HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "an upgraded tunnel": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n",
    "a URL without a path": b"GET http://example.org HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path in UTF-8": get("/v1/módels".encode()),
    "a path in Latin-1": get(b"/v1/m\xf3dels"),
    "a zero in the path": get(b"/v1/mo\x00dels"),
    "a space in the path": get(b"/v1/mo dels"),
    "a tab in the path": get(b"/v1/mo\tdels"),
    "line feeds alone": b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    "carriage returns alone": b"GET /v1/models HTTP/1.1\rHost: x\r\r",
    "a folded header": get(b"/v1/models", b"X: a\r\n b"),
    "a space before the colon": get(b"/v1/models", b"X : a"),
    "a space before the name": get(b"/v1/models", b" X: a"),
    "a header without a colon": get(b"/v1/models", b"X"),
    "a header without a name": get(b"/v1/models", b": a"),
    "a zero in a name": get(b"/v1/models", b"X\x00: a"),
    "a zero in a value": get(b"/v1/models", b"X: a\x00b"),
    "a carriage return in a value": get(b"/v1/models", b"X: a\rb"),
    "a name in UTF-8": get(b"/v1/models", "Ä: a".encode()),
    "two lengths": post(b"Content-Length: 5", b"Content-Length: 6"),
    "two lengths in one": post(b"Content-Length: 5, 6"),
    "the same length twice": post(*[b"Content-Length: %d" % len(BODY)] * 2),
    "a length below zero": post(b"Content-Length: -1"),
    "a length with a sign": post(b"Content-Length: +%d" % len(BODY)),
    "a length in hexadecimal": post(b"Content-Length: 0x10"),
    "a length of letters": post(b"Content-Length: ten"),
    "an empty length": post(b"Content-Length:"),
    "a length beyond 64 bits": post(b"Content-Length: 99999999999999999999999"),
    "a length and chunks": chunked(one_chunk(), b"Content-Length: 5"),
    "chunks and a length": post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=one_chunk()),
    "an unknown coding": post(b"Transfer-Encoding: xchunked"),
    "a coding after chunked": post(b"Transfer-Encoding: chunked, identity", body=one_chunk()),
    "chunked twice": post(*[b"Transfer-Encoding: chunked"] * 2, body=one_chunk()),
    "a tab before chunked": post(b"Transfer-Encoding:\x0bchunked", body=one_chunk()),
    "a chunk below zero": chunked(b"-1\r\n"),
    "a chunk with a sign": chunked(b"+5\r\nabcde\r\n0\r\n\r\n"),
    "a chunk in 0x": chunked(b"0x5\r\nabcde\r\n0\r\n\r\n"),
    "a chunk beyond 64 bits": chunked(b"fffffffffffffffff\r\n"),
    "a chunk longer than it says": chunked(b"1\r\n{}\r\n0\r\n\r\n"),
    "a chunk without a size": chunked(b"\r\n\r\n"),
    "chunks ended by line feeds": chunked(b"2\n{}\n0\n\n"),
}

_TOO_LARGE = {
    "a path of 200 KB": get(b"/" + b"a" * 200_000),
    "a query of 100 KB": get(b"/v1/models?" + b"a" * 100_000),
    "a header of 20 MB": get(b"/v1/models", b"X: " + b"a" * 20 * 2**20),
    "a name of 20 MB": get(b"/v1/models", b"X" * 20 * 2**20 + b": a"),
    "a key of 1 MB": get(b"/v1/models", b"Authorization: Bearer " + b"a" * 2**20),
    "30000 headers": get(b"/v1/models", *[b"a: b"] * 30_000),
    "a million empty lines": b"\r\n" * 10**6,
    "a trailer of 1 MB": chunked(one_chunk(b"{", b"X: " + b"a" * 2**20 + b"\r\n")),
    "an extension of 1 MB": chunked(b"1;" + b"a" * 2**20 + b"\r\n{"),
}

_ODD_BUT_GOOD = {
    "an offer of WebSocket": sized(BODY, b"Connection: Upgrade", b"Upgrade: websocket"),
    "an offer of HTTP/2": sized(BODY, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"),
    "an offer with chunks": chunked(one_chunk(), b"Connection: Upgrade", b"Upgrade: h2c"),
    "an odd expectation": sized(BODY, b"Expect: 200-ok"),
    "a trailer": chunked(one_chunk(BODY, b"X: a\r\n")),
    "an extension": chunked(b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "a chunk a byte": chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"),
    "a whole URL": get(b"http://example.org/v1/models"),
    "HTTP/1.0": b"GET /v1/models HTTP/1.0\r\n\r\n",
    "two hosts": get(b"/v1/models", b"Host: y"),
    "a body to a GET": get(b"/v1/models", b"Content-Length: 3") + b"abc",
    "empty lines first": b"\r\n\r\n" + get(b"/v1/models"),
}

_WRONG = {
    "everything's options": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
    "TRACE": (b"TRACE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
    "DELETE": (b"DELETE /v1/models/polite HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
    "PATCH without a body": (b"PATCH /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
    "a path of bad escapes": (get(b"/v1/models/%zz%ff%"), (404,)),
    "a path with a zero": (get(b"/v1/models/%00"), (404,)),
    "a path with a line end": (get(b"/v1/models/%0d%0aX:%20a"), (404,)),
    "a path of 60 KB": (get(b"/v1/models/" + b"a" * 60_000), (404,)),
    "no body": (post(b"Content-Length: 0", body=b""), (400,)),
    "neither length nor chunks": (post(body=b""), (400,)),
    "no chunks": (chunked(b"0\r\n\r\n"), (400,)),
    "a packed body": (sized(b"\x1f\x8b\x08\x00" + b"\x00" * 20, b"Content-Encoding: gzip"), (400,)),
    "a packed transfer": (post(b"Transfer-Encoding: gzip, chunked", body=one_chunk(b"\x1f\x8b")), (400,)),
    "a form": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n",
        (415,),
    ),
    "a MB and more in chunks": (chunked(one_chunk(b" " * (2**20 + 1))), (413,)),
    "a MB and more of a byte a chunk": (chunked(b"1\r\n \r\n" * (2**20 + 1)), (413,)),
    "a terabyte announced": (post(b"Content-Length: 1000000000000", body=b"{"), (413,)),
}

WIRES = [
    *(Wire(name, raw, (400, 431)) for name, raw in _NO_HTTP.items()),
    *(Wire(name, raw, (431,)) for name, raw in _TOO_LARGE.items()),
    *(Wire(name, raw, (200,)) for name, raw in _ODD_BUT_GOOD.items()),
    *(Wire(name, raw, statuses) for name, (raw, statuses) in _WRONG.items()),
]

"""What a connection must keep to before any request is looked at: uvicorn's protocol, with limits.

By itself it takes heads of any size and waits for ever, answers what is no HTTP in plain text, counts
trailers as headers, and loses the body of a request that offers an upgrade.
"""

from __future__ import annotations

import json
import uuid
from asyncio import TimerHandle, Transport

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.openai.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's first line and headers, and of anything else that is neither head nor body."""
_UPGRADE_HEADERS = frozenset({b"upgrade", b"connection", b"http2-settings"})

_LINGER_S = 1.0
"""A refused client may still be sending: read on for so long, or the kernel's reset would eat the answer."""


class GuardedProtocol(HttpToolsProtocol):
    """One client's connection. What it refuses is answered in OpenAI's shape, and then closed."""

    receive_timeout_s = 60.0
    """A request must have arrived as a whole so long after it began, or after the connection was made."""

    _has_begun = False
    _is_in_head = True
    _is_progress = False
    _num_idle_bytes = 0
    _timer: TimerHandle | None = None
    _refusal: ApiError | None = None
    _is_refused = False
    _heard: tuple[RequestResponseCycle, ...] = ()
    """Requests whose heads have come, in their order, but for some that were answered."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; too much without a piece of a body, or the end of a head, is refused."""
        if self._is_refused or self.transport.is_closing():
            return
        if self._timer is None:
            self._wait()
        self._unset_keepalive_if_required()
        self._is_progress = False
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal or ApiError(400, "This is not a valid HTTP request."))
            return
        self._num_idle_bytes = 0 if self._is_progress else self._num_idle_bytes + len(data)
        if self._num_idle_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._has_begun and self._timer is None:
            # Behind the end of another one.
            self._wait()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._has_begun = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; not a trailer, which nobody before us may have looked at."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the head is too large or offers an upgrade."""
        self._is_progress = True
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > MAX_HEAD_BYTES:
            self._refusal = _too_large()
            raise self._refusal
        if not self.parser.should_upgrade():
            self._is_in_head = False
            super().on_headers_complete()
            self._heard = (*(each for each in self._heard if not each.response_complete), self.cycle)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of a body."""
        self._is_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there; what comes next is another one."""
        self._is_progress = True
        if self._is_in_head:
            return  # An upgrade was offered: it comes again, without.
        self._has_begun, self._is_in_head = False, True
        self._stop_waiting()
        super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed(self._head_without_upgrade() + data[upgrade.args[0] :])

    def _head_without_upgrade(self) -> bytes:
        """The same request, for a new parser, as we upgrade to nothing: the old one would read no body."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("this is no proxy")
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in _UPGRADE_HEADERS]
        return b"\r\n".join([*lines, b"", b""])

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.receive_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._before():
            # Nothing is read meanwhile.
            self._wait()
            return
        if not self._has_begun:
            self.transport.close()
            return
        message = f"The request did not arrive within {self.receive_timeout_s:g} s."
        self._refuse(ApiError(408, message, code="request_timeout"))

    @property
    def _refused(self) -> RequestResponseCycle | None:
        """The request of which more is to come, if its head was complete."""
        return None if self._is_in_head else self.cycle

    def _before(self) -> list[RequestResponseCycle]:
        """Requests that came whole, and were not answered yet."""
        return [each for each in self._heard if not each.response_complete and each is not self._refused]

    def _refuse(self, error: ApiError) -> None:
        """Answer for the application, if it has not begun to answer itself, and hang up.

        Requests that came whole before are answered in their order, and then it is hung up: a refusal among
        their answers would be taken for one of these.
        """
        self._stop_waiting()
        self._is_refused = True
        refused = self._refused
        if refused is not None:
            refused.disconnected = True
            refused.message_event.set()
        if before := self._before():
            before[-1].keep_alive = False
            return
        if refused is not None and refused.response_started:
            self.transport.close()
            return
        self.transport.write(_raw_answer(error))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


def guarded(receive_timeout_s: float) -> type[GuardedProtocol]:
    """The protocol with another timeout, as uvicorn takes it."""
    return type("GuardedProtocol", (GuardedProtocol,), {"receive_timeout_s": receive_timeout_s})


def _too_large() -> ApiError:
    message = f"The request's headers are larger than {MAX_HEAD_BYTES} bytes."
    return ApiError(431, message, code="headers_too_large")


def _raw_answer(error: ApiError) -> bytes:
    body = json.dumps(error.body).encode()
    head = [
        STATUS_LINE[error.status].rstrip(),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"x-request-id: req_%b" % uuid.uuid4().hex.encode(),
        b"connection: close",
    ]
    return b"\r\n".join([*head, b"", body])

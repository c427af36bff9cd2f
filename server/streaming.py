"""Answers that leave while they grow, and what happens when nobody listens any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ram_core.errors import RamError
from server.generation import Delta, Generation
from server.openai.errors import error_event
from server.openai.render import Renderer, count_usage
from server.settings import Settings

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_HEADERS = {"Cache-Control": "no-store", "Connection": "keep-alive", "X-Accel-Buffering": "no"}
"""Nobody between us and the client may keep events, or gather them."""

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class HungUpError(Exception):
    """The client is gone; there is nobody to answer."""


class _StoppedReadingError(Exception):
    """The client is there, but takes nothing any more."""


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; if the client hangs up before, the work is cancelled, and `HungUpError` raised."""
    return await _unless(work, _until_hang_up(request))


async def _unless(work: Coroutine[Any, Any, Result], *ends: Coroutine[Any, Any, NoReturn]) -> Result:
    """The work's result; if one of `ends` fails before, the work is cancelled, and that error raised."""
    working = asyncio.create_task(work)
    watching = [asyncio.create_task(each) for each in ends]
    try:
        await asyncio.wait((working, *watching), return_when=asyncio.FIRST_COMPLETED)
        for end in watching:
            if end.done() and not working.done():
                end.result()
        return working.result()
    finally:
        working.cancel()
        for end in watching:
            end.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)


async def _until_hang_up(request: Request) -> NoReturn:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise HungUpError


class ChunkStream(Response):
    """Server-sent events of one generation, which it owns: however the stream ends, the generation does.

    It ends early when the client hangs up, or takes nothing for `send_timeout_s`. After `ping_s` without an
    event a comment keeps the line open.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        first: asyncio.Future[list[Delta]],
        renderer: Renderer,
        settings: Settings,
        *,
        wants_usage: bool,
    ) -> None:
        self.status_code = 200
        self.background = None
        # With a body, even an empty one, they would tell its length.
        self.init_headers(_HEADERS)
        self._generation = generation
        self._first = first
        self._renderer = renderer
        self._settings = settings
        self._wants_usage = wants_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = _Line(send, self._settings)
        try:
            await _unless(self._tell(line), _until_hang_up(Request(scope, receive)), line.watch())
        except HungUpError:
            pass
        except _StoppedReadingError:
            logger.info("A client stopped reading its stream; its request was cancelled.")
        finally:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
            await self._generation.__aexit__()

    async def _tell(self, line: _Line) -> None:
        await line.begin(self.status_code, self.raw_headers)
        try:
            deltas = await self._first
            while deltas:
                # What has come together leaves together.
                if events := [event for delta in deltas for event in self._renderer.events(delta)]:
                    await line.say(b"".join(events))
                deltas = await self._generation.take()
            last = self._renderer.usage_event(count_usage(self._generation)) if self._wants_usage else b""
        except Exception as error:
            if not isinstance(error, RamError):
                logger.exception("A stream failed.")
            last = error_event(error)
        await line.say(last + DONE, is_last=True)


class _Line:
    """What a stream says, one send at a time, and a clock beside it.

    The clock looks how long a send takes, now and then. A timeout around each send would cost a quarter of
    all that is done for a token.
    """

    def __init__(self, send: Send, settings: Settings, now_s: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._send_timeout_s = settings.send_timeout_s
        self._ping_s = settings.ping_s
        self._now_s = now_s
        self._since_s = self._now_s()
        self._is_sending = False
        self._pinging: asyncio.Task[None] | None = None

    def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> Awaitable[None]:
        return self._put({"type": "http.response.start", "status": status, "headers": headers})

    def say(self, data: bytes, *, is_last: bool = False) -> Awaitable[None]:
        return self._put({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def watch(self) -> NoReturn:
        """Fill silence with comments; raises `_StoppedReadingError` when a send takes too long."""
        while True:
            limit_s = self._send_timeout_s if self._is_sending else self._ping_s
            left_s = limit_s - (self._now_s() - self._since_s)
            if left_s > 0:
                # A send that begins after this look has at least so long.
                await asyncio.sleep(min(left_s, self._send_timeout_s))
            elif self._is_sending:
                raise _StoppedReadingError
            else:
                await self._ping()

    async def _ping(self) -> None:
        self._since_s = self._now_s()
        self._pinging = asyncio.create_task(self._comment())
        try:
            await asyncio.wait_for(self._pinging, self._send_timeout_s)
        except TimeoutError:
            raise _StoppedReadingError from None
        finally:
            self._pinging = None

    async def _comment(self) -> None:
        await self._send({"type": "http.response.body", "body": _PING, "more_body": True})

    async def _put(self, message: Message) -> None:
        if self._pinging is not None:
            await asyncio.wait((self._pinging,))
        self._since_s = self._now_s()
        self._is_sending = True
        await self._send(message)
        self._is_sending = False


async def open_stream(
    generation: Generation, renderer: Renderer, settings: Settings, *, wants_usage: bool
) -> ChunkStream:
    """Wait for the first token, so that what fails before it is no 200; then hand the answer over.

    After `ping_s` the answer begins without a token: comments keep the line open while the request waits.
    """
    await generation.__aenter__()
    first = asyncio.ensure_future(generation.take())
    try:
        await asyncio.wait((first,), timeout=settings.ping_s)
        if first.done():
            first.result()
        return ChunkStream(generation, first, renderer, settings, wants_usage=wants_usage)
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await generation.__aexit__()
        raise

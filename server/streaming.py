"""Answers that leave while they grow, and what happens when nobody listens any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ram_core.errors import RamError
from server.generation import Delta, Generation
from server.openai.errors import error_event
from server.openai.render import Renderer, count_usage
from server.settings import Settings

DONE = b"data: [DONE]\n\n"
_SHUTDOWN_MARGIN_S = 2.0
"""The engine is closed when the grace ends; streams then have this long to tell their clients so."""

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class HungUpError(Exception):
    """The client is gone; there is nobody to answer."""


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; if the client hangs up before, the work is cancelled, and `HungUpError` raised."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_hang_up(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HungUpError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ChunkStream(EventSourceResponse):
    """Server-sent events of one generation, which it owns: however the stream ends, the generation does."""

    def __init__(
        self,
        generation: Generation,
        first: asyncio.Future[Delta],
        renderer: Renderer,
        settings: Settings,
        *,
        wants_usage: bool,
    ) -> None:
        self._generation = generation
        self._first = first
        self._renderer = renderer
        self._wants_usage = wants_usage
        super().__init__(
            self._events(),
            sep="\n",
            ping=settings.ping_s,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=settings.send_timeout_s,
            shutdown_grace_period=settings.shutdown_grace_s + _SHUTDOWN_MARGIN_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.info("A client stopped reading its stream; its request was cancelled.")
        finally:
            with anyio.CancelScope(shield=True):
                self._first.cancel()
                await asyncio.gather(self._first, return_exceptions=True)
                await self._generation.__aexit__()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            delta: Delta | None = await self._first
            while delta is not None:
                if chunks := [_event(chunk) for chunk in self._renderer.chunks(delta)]:
                    yield b"".join(chunks)
                delta = await anext(self._generation, None)
            if self._wants_usage:
                yield _event(self._renderer.usage_chunk(count_usage(self._generation)))
        except Exception as error:
            if not isinstance(error, RamError):
                logger.exception("A stream failed.")
            yield error_event(error)
        yield DONE


async def open_stream(
    generation: Generation, renderer: Renderer, settings: Settings, *, wants_usage: bool
) -> ChunkStream:
    """Wait for the first token, so that what fails before it is no 200; then hand the answer over.

    After `ping_s` the answer begins without a token: comments keep the line open while the request waits.
    """
    await generation.__aenter__()
    first = asyncio.ensure_future(generation.__anext__())
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


def _event(chunk: str) -> bytes:
    return b"data: " + chunk.encode() + b"\n\n"

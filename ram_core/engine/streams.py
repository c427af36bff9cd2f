"""What was admitted and has not ended: its places in the queue, and whom its events are for.

Every client of an engine needs this, wherever the engine runs. Event loops and the engine's side call it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from msgspec.structs import replace

from ram_core.engine.limits import EngineLimits
from ram_core.engine.messages import (
    Cancel,
    Command,
    Event,
    FailedEvent,
    Prefill,
    Request,
    StartedEvent,
)
from ram_core.errors import EngineUnavailable, QueueFull, RamError
from ram_core.params import AlignmentParams

_RETRY_AFTER_S = 1.0


class RequestStream:
    """The events of one request; see `EventStream`. Lives in the event loop that submitted the request."""

    def __init__(self, streams: OpenStreams, request: Request) -> None:
        self.loop = asyncio.get_running_loop()
        self.request_id = request.request_id
        self._streams = streams
        self._choices = range(request.num_choices)
        self._open = set(self._choices)
        self._cancelled: set[int] = set()
        self._arrived: list[Event] = []
        self._waiting: asyncio.Future[None] | None = None

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while events := await self.take():
            for event in events:
                # The last one's reader may have cancelled a choice.
                if not self._is_unwanted(event):
                    yield event

    async def take(self) -> list[Event]:
        """All events that have come since the last call; waits for one, and is empty after the last."""
        while True:
            arrived, self._arrived = self._arrived, []
            if self._cancelled:
                arrived = [event for event in arrived if not self._is_unwanted(event)]
            if arrived or not self._open:
                return arrived
            self._waiting = self.loop.create_future()
            await self._waiting

    def cancel(self, index: int | None = None) -> None:
        """Stop choice `index` (all of them without one); no further event of it arrives."""
        for choice in self._choices if index is None else [index]:
            # One that has ended may still have events that nobody has read.
            self._cancelled.add(choice)
            if choice in self._open:
                self._streams.cancel(self, choice)
                self._close(choice)

    def deliver(self, event: Event) -> None:
        """Take an event from the engine."""
        if isinstance(event, StartedEvent):
            self._arrived.append(event)
        elif event.index in self._open:
            self._arrived.append(event)
            if isinstance(event, FailedEvent) or event.finish_reason is not None:
                self._close(event.index)
        self._wake()

    def fail(self, error: EngineUnavailable) -> None:
        """End every open choice with `error`."""
        for index in sorted(self._open):
            self.deliver(FailedEvent(self.request_id, index, error))

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._open)

    def _close(self, index: int) -> None:
        self._open.discard(index)
        self._streams.release(self)
        if not self._open:
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _is_unwanted(self, event: Event) -> bool:
        return not isinstance(event, StartedEvent) and event.index in self._cancelled


class OpenStreams:
    """Admits requests to an engine, which `send` hands commands to, and brings them their events."""

    def __init__(self, capacity: int, send: Callable[[Command], None]) -> None:
        self._capacity = capacity
        self._send = send
        # Guards what both the event loops and the engine's side touch.
        self._lock = threading.Lock()
        self._streams: dict[str, RequestStream] = {}
        self._num_open = 0
        self._limits: EngineLimits | None = None
        self._trouble: str | None = "the engine is being loaded"

    @property
    def num_open(self) -> int:
        """Places that are taken, by choices that wait or run."""
        return self._num_open

    @property
    def trouble(self) -> str | None:
        """Why nothing is admitted; None if it is."""
        return self._trouble

    @property
    def limits(self) -> EngineLimits:
        """The newest engine's limits; raises `EngineUnavailable` before there is one."""
        if self._limits is None:
            raise self._unavailable()
        return self._limits

    def open(self, limits: EngineLimits) -> None:
        """Admit requests from now on."""
        with self._lock:
            self._limits = limits
            self._trouble = None

    def renew(self, limits: EngineLimits) -> None:
        """The same engine takes other requests from now on."""
        with self._lock:
            self._limits = limits

    def admit(self, request: Request) -> RequestStream:
        """Send a request to the engine, or refuse it, as `EngineClient.submit` does."""
        self.limits.check(request)
        stream = RequestStream(self, request)
        with self._lock:
            if self._trouble is not None:
                raise self._unavailable()
            if self._num_open + request.num_choices > self._capacity:
                raise QueueFull(
                    f"The queue is full: {self._num_open} of {self._capacity} places are taken.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            # Under the lock, so that no request goes to an engine after the end of those that ran on it.
            self._send(request)
            self._num_open += request.num_choices
            self._streams[request.request_id] = stream
        return stream

    def prefill(self, request: Request) -> None:
        """Have a prompt read before its request comes, unless it would be refused; see `EngineClient`."""
        with suppress(RamError):
            # Its aligners are still to come.
            self.limits.check(replace(request, alignment=AlignmentParams()))
            with self._lock:
                if self._trouble is None:
                    self._send(Prefill(request))

    def forget(self, request_id: str) -> None:
        """What was asked for by `prefill` is not needed any more."""
        self._send(Cancel(request_id))

    def cancel(self, stream: RequestStream, index: int) -> None:
        """Ask the engine to forget a choice; its slot and pages are free before the next step."""
        self._send(Cancel(stream.request_id, index))

    def release(self, stream: RequestStream) -> None:
        """One choice of a request has ended; the last one ends the request."""
        with self._lock:
            if self._streams.get(stream.request_id) is stream:
                self._num_open -= 1
                if not stream.num_open:
                    del self._streams[stream.request_id]

    def deliver(self, events: Iterable[Event]) -> None:
        """Wake every event loop once with all that is for it."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Event]]] = {}
        with self._lock:
            for event in events:
                stream = self._streams.get(event.request_id)
                if stream is not None:
                    by_loop.setdefault(stream.loop, []).append((stream, event))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:
                self._abandon(loop)

    def shut(self, trouble: str) -> None:
        """Admit nothing from now on, and fail what runs, with `EngineUnavailable` that tells of `trouble`."""
        with self._lock:
            self._trouble = trouble
            streams, self._streams = list(self._streams.values()), {}
            self._num_open = 0
        for stream in streams:
            try:
                stream.loop.call_soon_threadsafe(stream.fail, self._unavailable())
            except RuntimeError:
                continue  # Its event loop was closed before: nobody is left to be told.

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """A loop was closed with requests still running; nobody is left to read them."""
        with self._lock:
            orphans = [stream for stream in self._streams.values() if stream.loop is loop]
            for stream in orphans:
                self._num_open -= stream.num_open
                del self._streams[stream.request_id]
        for stream in orphans:
            self._send(Cancel(stream.request_id))

    def _unavailable(self) -> EngineUnavailable:
        trouble = self._trouble or ""
        return EngineUnavailable(f"{trouble[:1].upper()}{trouble[1:]}.")


def _deliver(deliveries: list[tuple[RequestStream, Event]]) -> None:
    for stream, event in deliveries:
        stream.deliver(event)

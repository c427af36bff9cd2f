"""The engine in a thread of its own, behind the asynchronous client interface.

Only frozen commands and events cross: a queue in, one callback a step out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterable
from queue import SimpleQueue

from ram_core.engine.bank import Progress
from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Cancel, Command, EngineStats, Event, FailedEvent, Request, StartedEvent
from ram_core.errors import EngineUnavailable, QueueFull

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0


class ThreadedEventStream:
    """The events of one request; see `EventStream`. Lives in the event loop that submitted the request."""

    def __init__(self, engine: EngineThread, request: Request) -> None:
        self.loop = asyncio.get_running_loop()
        self._engine = engine
        self._request_id = request.request_id
        self._choices = range(request.num_choices)
        self._open = set(self._choices)
        self._cancelled: set[int] = set()
        # None says that nothing more will come.
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def __aenter__(self) -> ThreadedEventStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, StartedEvent) or event.index not in self._cancelled:
                yield event

    def cancel(self, index: int | None = None) -> None:
        """Stop choice `index` (all of them without one); no further event of it arrives."""
        for choice in self._choices if index is None else [index]:
            # One that has ended may still have events that nobody has read.
            self._cancelled.add(choice)
            if choice in self._open:
                self._engine.cancel(self._request_id, choice)
                self._close(choice)

    def deliver(self, event: Event) -> None:
        """Take an event from the engine."""
        if isinstance(event, StartedEvent):
            self._events.put_nowait(event)
        elif event.index in self._open:
            self._events.put_nowait(event)
            if isinstance(event, FailedEvent) or event.finish_reason is not None:
                self._close(event.index)

    def fail(self, error: EngineUnavailable) -> None:
        """End every open choice with `error`."""
        for index in sorted(self._open):
            self.deliver(FailedEvent(self._request_id, index, error))

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._open)

    def _close(self, index: int) -> None:
        self._open.discard(index)
        self._engine.release(self._request_id, is_over=not self._open)
        if not self._open:
            self._events.put_nowait(None)


class EngineThread:
    """An `EngineClient` whose step loop runs in a background thread of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._capacity = engine.config.max_batch + engine.config.max_queue
        # None asks the thread to end.
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._stats = engine.stats
        # Guards what both the event loops and the engine's thread touch.
        self._lock = threading.Lock()
        self._streams: dict[str, ThreadedEventStream] = {}
        self._num_open = 0
        self._end: EngineUnavailable | None = None
        self._thread = threading.Thread(target=self._run, name="ram-engine", daemon=True)

    @classmethod
    def start(cls, config: EngineConfig, progress: Progress = lambda _: None) -> EngineThread:
        """Load the models in the calling thread, then run the step loop in its own.

        Raises:
            CheckpointError: a model cannot be served.
        """
        client = cls(Engine.load(config, progress))
        client._thread.start()
        return client

    @property
    def aligners(self) -> tuple[str, ...]:
        """Names of the aligners that can be asked for, in the order of registration."""
        return tuple(self._engine.limits.pools)

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together hold at most this many tokens."""
        return self._engine.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        return self._engine.limits.vocab_size

    @property
    def stats(self) -> EngineStats:
        """The newest numbers; cheap, never blocks."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        """Whether the step loop runs (it may be idle)."""
        return self._end is None and self._thread.is_alive()

    def submit(self, request: Request) -> ThreadedEventStream:
        """Admit a request or refuse it at once; see `EngineClient`. Call it from a running event loop."""
        self._engine.limits.check(request)
        stream = ThreadedEventStream(self, request)
        with self._lock:
            if self._end is not None:
                raise EngineUnavailable(str(self._end))
            if self._num_open + request.num_choices > self._capacity:
                raise QueueFull(
                    f"The queue is full: {self._num_open} of {self._capacity} places are taken.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._num_open += request.num_choices
            self._streams[request.request_id] = stream
        self._inbox.put(request)
        return stream

    def cancel(self, request_id: str, index: int) -> None:
        """Ask the engine to forget a choice; its slot and pages are free before the next step."""
        self._inbox.put(Cancel(request_id, index))

    def release(self, request_id: str, *, is_over: bool) -> None:
        """One choice of a request has ended; the last one (`is_over`) ends the request."""
        with self._lock:
            self._num_open -= 1
            if is_over:
                self._streams.pop(request_id, None)

    async def close(self) -> None:
        """End the step loop; running requests fail with `EngineUnavailable`."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        reason = "The engine was closed."
        try:
            while self._take_commands():
                self._post(self._engine.step())
                self._stats = self._engine.stats
        except Exception:
            logger.exception("the engine's step loop died")
            reason = "The engine has died."
        self._end_with(EngineUnavailable(reason))

    def _take_commands(self) -> bool:
        """Hand on what has come in; wait for something if there is nothing to do. False: end the loop."""
        while not self._engine.has_work or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            self._engine.handle(command)
            self._stats = self._engine.stats
        return True

    def _post(self, events: Iterable[Event]) -> None:
        """Wake every event loop once with all that is for it."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[ThreadedEventStream, Event]]] = {}
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

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """A loop was closed with requests still running; nobody is left to read them."""
        with self._lock:
            orphans = [name for name, stream in self._streams.items() if stream.loop is loop]
            for name in orphans:
                self._num_open -= self._streams.pop(name).num_open
        for name in orphans:
            self._engine.handle(Cancel(name))

    def _end_with(self, error: EngineUnavailable) -> None:
        with self._lock:
            self._end = error
            streams = list(self._streams.values())
        for stream in streams:
            try:
                stream.loop.call_soon_threadsafe(stream.fail, error)
            except RuntimeError:
                logger.debug("a request's event loop was closed before the engine ended")


def _deliver(deliveries: list[tuple[ThreadedEventStream, Event]]) -> None:
    for stream, event in deliveries:
        stream.deliver(event)

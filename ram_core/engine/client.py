"""The engine as its users see it, whether it runs in this thread, another, or another process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from ram_core.engine.config import EngineConfig
from ram_core.engine.messages import (
    AlignerNews,
    Command,
    EngineStats,
    Event,
    FreeAligner,
    LoadAligner,
    Request,
)
from ram_core.engine.residents import Residents
from ram_core.engine.streams import OpenStreams, RequestStream

HEARTBEAT_S = 0.25
"""An idle engine tells its numbers anew so often: a `last_progress_s` that is older tells of a stall."""


class EventStream(Protocol):
    """The events of one request, in order; ends after each choice's last event.

    Use as `async with engine.submit(request) as events: async for event in events: …`. Leaving the block
    early, for any reason, cancels what still runs.
    """

    async def __aenter__(self) -> EventStream: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def take(self) -> list[Event]:
        """All events that have come since the last call; waits for one, and is empty after the last."""

    def cancel(self, index: int | None = None) -> None:
        """Stop choice `index` (all of them without one); no further event of it arrives."""


class EngineClient(Protocol):
    """What the server needs of an engine."""

    @property
    def aligners(self) -> tuple[str, ...]:
        """Names of the aligners' models that can be asked for, in the order in which they came."""

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together hold at most this many tokens."""

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""

    @property
    def stats(self) -> EngineStats:
        """The newest numbers; cheap, never blocks. An engine that is idle renews them all the same."""

    @property
    def num_restarts(self) -> int:
        """How often the engine has died and was begun anew."""

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken now, such as "the engine has died"; None if the step loop runs."""

    def load_aligner(self, order: LoadAligner) -> None:
        """Have an aligner loaded; what becomes of it is news. Never blocks; void while no engine runs."""

    def free_aligner(self, aligner: str) -> None:
        """Have an aligner's memory given back; news says when. Never blocks; void while no engine runs."""

    def watch_aligners(self, listener: Callable[[AlignerNews], None]) -> None:
        """Have a thread of the engine's call `listener` with all news of aligners from now on, in order.

        If the engine is up already, `EngineBegan` is told at once. The listener must return quickly.
        """

    def submit(self, request: Request) -> EventStream:
        """Admit a request or refuse it at once.

        Raises:
            InvalidRequest: an unknown token id, or no room in the context (`ContextLengthExceeded`).
            UnknownModel: an aligner that is not registered.
            QueueFull: too many requests are waiting.
            EngineUnavailable: the engine is dead, closed, or being restarted.
        """

    def prefill(self, request: Request) -> None:
        """Have the prompt of a request read that waits for its aligners, if there is room.

        The proposal reads it now, an aligner as its weights come. Once all are there, submit the request.
        Never blocks nor raises: what cannot be served is refused when it is submitted.
        """

    def forget(self, request_id: str) -> None:
        """A request for which `prefill` was called is not going to be submitted."""

    async def close(self) -> None:
        """End the step loop; running requests fail with `EngineUnavailable`."""


class StreamingClient:
    """What is the same of every client: requests are admitted here, without asking the engine."""

    def __init__(self, config: EngineConfig, send: Callable[[Command], None]) -> None:
        self._streams = OpenStreams(config.max_batch + config.max_queue, send)
        self._stats = EngineStats()
        self._residents = Residents(config.aligners, send)

    def load_aligner(self, order: LoadAligner) -> None:
        """Have an aligner loaded; see `EngineClient`."""
        self._residents.load(order)

    def free_aligner(self, aligner: str) -> None:
        """Have an aligner's memory given back; see `EngineClient`."""
        self._residents.free(FreeAligner(aligner))

    def watch_aligners(self, listener: Callable[[AlignerNews], None]) -> None:
        """Have all news of aligners told; see `EngineClient`."""
        self._residents.watch(listener)

    @property
    def aligners(self) -> tuple[str, ...]:
        """Names of the aligners' models that can be asked for, in the order in which they came."""
        return tuple(self._streams.limits.pools)

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together hold at most this many tokens."""
        return self._streams.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        return self._streams.limits.vocab_size

    @property
    def stats(self) -> EngineStats:
        """The newest numbers; cheap, never blocks."""
        return self._stats

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken now; None if the step loop runs."""
        return self._streams.trouble

    def submit(self, request: Request) -> RequestStream:
        """Admit a request or refuse it at once; see `EngineClient`. Call it from a running event loop."""
        return self._streams.admit(request)

    def prefill(self, request: Request) -> None:
        """Have the prompt of a request read that will be submitted; see `EngineClient`."""
        self._streams.prefill(request)

    def forget(self, request_id: str) -> None:
        """A request for which `prefill` was called is not going to be submitted."""
        self._streams.forget(request_id)

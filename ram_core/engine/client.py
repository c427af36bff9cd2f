"""The engine as its users see it, whether it runs in this thread, another, or another process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from ram_core.engine.messages import EngineStats, Event, Request


class EventStream(Protocol):
    """The events of one request, in order; ends after each choice's last event.

    Use as `async with engine.submit(request) as events: async for event in events: …`. Leaving the block
    early, for any reason, cancels what still runs.
    """

    async def __aenter__(self) -> EventStream: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self, index: int | None = None) -> None:
        """Stop choice `index` (all of them without one); no further event of it arrives."""


class EngineClient(Protocol):
    """What the server needs of an engine."""

    @property
    def aligners(self) -> tuple[str, ...]:
        """Names of the aligners that can be asked for, in the order of registration."""

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together hold at most this many tokens."""

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""

    @property
    def stats(self) -> EngineStats:
        """The newest numbers; cheap, never blocks."""

    @property
    def is_alive(self) -> bool:
        """Whether the step loop runs (it may be idle)."""

    def submit(self, request: Request) -> EventStream:
        """Admit a request or refuse it at once.

        Raises:
            InvalidRequest: an unknown token id, or no room in the context (`ContextLengthExceeded`).
            UnknownModel: an aligner that is not registered.
            QueueFull: too many requests are waiting.
            EngineUnavailable: the engine is dead or closed.
        """

    async def close(self) -> None:
        """End the step loop; running requests fail with `EngineUnavailable`."""

"""From prompts to text: drives the engine for one HTTP request, whatever shape its answer takes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from ram_core.engine.client import EngineClient, EventStream
from ram_core.engine.detokenizer import Detokenizer
from ram_core.engine.messages import (
    Event,
    FailedEvent,
    FinishReason,
    Request,
    StartedEvent,
    StepTelemetry,
    TokenEvent,
)
from ram_core.errors import EngineUnavailable, RamError
from server.metrics import Meter, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MAX_FIGURES = 64
"""So many tokens' telemetry is added up at once, which takes less than one by one."""


@dataclass(slots=True)
class Tally:
    """Sums over the aligned tokens of one choice; figures that are not finite are left out of the means."""

    num_tokens: int = 0
    num_fallbacks: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, telemetry: StepTelemetry) -> None:
        self.num_tokens += 1
        self.num_fallbacks += telemetry.is_fallback
        for name in ("kl_p_q", "kl_pi_p", "ess", "aligner_mass"):
            value: float = getattr(telemetry, name)
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def merge(self, other: Tally) -> None:
        self.num_tokens += other.num_tokens
        self.num_fallbacks += other.num_fallbacks
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if name in self.sums else None


class Delta(Struct, frozen=True, gc=False):
    """What one token added to choice `index`: text that is safe to send, and the tokens it is made of.

    `tokens` travel with their text: they wait where it waits, and those inside a stop string are never told.
    `finish_reason` and `tally` are set on the choice's last delta.
    """

    index: int
    text: str
    tokens: tuple[TokenEvent, ...] = ()
    is_first: bool = False
    finish_reason: FinishReason | None = None
    tally: Tally | None = None


class _Choice:
    """One growing answer."""

    def __init__(self, index: int, request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
        self._index = index
        self._detokenizer = Detokenizer(tokenizer, request.sampling.stop, request.prompt_ids)
        self._waiting: list[TokenEvent] = []
        self._tally = Tally()
        self._figures: list[StepTelemetry] = []
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, event: TokenEvent) -> Delta:
        is_first = self.num_tokens == 0
        self.num_tokens += 1
        if event.telemetry is not None:
            self._figures.append(event.telemetry)
            if len(self._figures) == _MAX_FIGURES:
                self._add_up()
        detokenizer = self._detokenizer
        text = ""
        if event.finish_reason != "stop":
            self._waiting.append(event)
            text = detokenizer.push(event.token_id)
        if event.finish_reason is not None or detokenizer.is_stopped:
            return self._end(event, text, is_first)
        if not text:
            return Delta(self._index, "", (), is_first)
        tokens = tuple(self._waiting)
        self._waiting.clear()
        return Delta(self._index, text, tokens, is_first)

    def _end(self, event: TokenEvent, text: str, is_first: bool) -> Delta:
        if event.finish_reason is not None:
            text += self._detokenizer.flush()
        is_stopped = self._detokenizer.is_stopped
        self.finish_reason = "stop" if is_stopped else event.finish_reason
        self._add_up()
        tokens = () if is_stopped and not text else tuple(self._waiting)
        return Delta(self._index, text, tokens, is_first, self.finish_reason, self._tally)

    def _add_up(self) -> None:
        for telemetry in self._figures:
            self._tally.add(telemetry)
        self._figures.clear()


class Generation:
    """The choices of all prompts of one request, as they grow.

    Prompts have `num_choices` choices each, numbered through. Leaving the block stops whatever still runs.
    `on_end` is called once, as soon as the outcome is known, and before anybody hears of it; not if a prompt
    was not admitted; `on_left` is called when the block is left. With `keeps_text`, `texts` are the answers.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        meter: Meter,
        on_end: Callable[[Generation], None] | None = None,
        *,
        on_left: Callable[[], None] = lambda: None,
        keeps_text: bool = False,
    ) -> None:
        self._on_end = on_end
        self._on_left = on_left
        self._texts = [""] * sum(request.num_choices for request in requests) if keeps_text else []
        self._started: set[int] = set()
        self.failure: RamError | None = None
        self._engine = engine
        self._tokenizer = tokenizer
        self._requests = requests
        self._meter = meter
        self._choices: list[list[_Choice]] = []
        self._num_open = self.num_choices
        self.num_cached_tokens = 0
        self._streams: list[EventStream] = []
        self._merged: _Merged | None = None
        # What has arrived and was not looked at yet, newest first, with the number of its prompt.
        self._source = 0
        self._arrived: list[Event] = []
        self._exits = AsyncExitStack()
        self._outcome: Outcome = "abort"

    @property
    def num_choices(self) -> int:
        return sum(request.num_choices for request in self._requests)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self._requests)

    @property
    def num_started_prompt_tokens(self) -> int:
        """Tokens of the prompts that have left the queue."""
        return sum(len(self._requests[number].prompt_ids) for number in self._started)

    @property
    def is_admitted(self) -> bool:
        """Whether the engine took every prompt; the end will then be told."""
        return bool(self._choices)

    @property
    def outcome(self) -> Outcome:
        """How it ended; "abort" while it has not."""
        return self._outcome

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts)

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choices in self._choices for choice in choices)

    async def __aenter__(self) -> Self:
        """Admit every prompt, or none; raises what `EngineClient.submit` raises."""
        async with AsyncExitStack() as exits:
            for request in self._requests:
                self._streams.append(await exits.enter_async_context(self._engine.submit(request)))
            self._choices = self._make_choices()
            if len(self._streams) > 1:
                self._merged = await exits.enter_async_context(_Merged(self._streams))
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._tell_end()
        self._meter.ended(self._outcome)
        try:
            await self._exits.aclose()
        finally:
            # Only now nothing asks for the aligners any more.
            self._on_left()

    async def take(self) -> list[Delta]:
        """A delta for each token that has come since the last call; waits for one, and is empty at the end.

        Raises the error of a choice that failed, once what came before it was taken.
        """
        deltas: list[Delta] = []
        while self._num_open and not deltas:
            if not self._arrived:
                await self._wait()
            deltas = self._read()
        return deltas

    def _read(self) -> list[Delta]:
        """Look at what has arrived, up to a failure; only one that comes first is raised."""
        deltas: list[Delta] = []
        while self._arrived and self._num_open:
            event = self._arrived[-1]
            if isinstance(event, FailedEvent):
                if deltas:
                    break
                self._outcome = "error"
                raise self._failed(event.error)
            self._arrived.pop()
            self._started.add(self._source)
            if isinstance(event, StartedEvent):
                self.num_cached_tokens += event.num_cached_tokens
                self._meter.started(event.queue_s, len(self._requests[self._source].prompt_ids))
                continue
            choice = self._choices[self._source][event.index]
            if choice.finish_reason is None:
                deltas.append(self._push(event, choice))
        return deltas

    def _make_choices(self) -> list[list[_Choice]]:
        """For each prompt its choices; only once the engine has found the prompts' token ids to be some."""
        return [
            [
                _Choice(first * request.num_choices + index, request, self._tokenizer)
                for index in range(request.num_choices)
            ]
            for first, request in enumerate(self._requests)
        ]

    async def _wait(self) -> None:
        """Have something arrive, or fail."""
        if self._merged is None:
            arrived = await self._streams[0].take()
        else:
            self._source, arrived = await self._merged.take()
        if not arrived:
            self._outcome = "error"
            raise self._failed(EngineUnavailable("The engine ended before the answer did."))
        self._arrived = arrived[::-1]

    def _failed(self, error: RamError) -> RamError:
        self.failure = error
        self._tell_end()
        return error

    def _tell_end(self) -> None:
        tell, self._on_end = self._on_end, None
        if tell is not None:
            tell(self)

    def _push(self, event: TokenEvent, choice: _Choice) -> Delta:
        delta = choice.push(event)
        self._meter.token(delta.index, event.telemetry)
        if self._texts:
            self._texts[delta.index] += delta.text
        if delta.finish_reason is not None:
            if event.finish_reason is None:
                # A stop string was met, of which the engine knows nothing.
                self._streams[self._source].cancel(event.index)
            self._num_open -= 1
            if not self._num_open:
                reasons = {choice.finish_reason for choices in self._choices for choice in choices}
                self._outcome = "length" if "length" in reasons else "stop"
                self._tell_end()
        return delta


class _Merged:
    """Events of several streams in the order of their arrival, each with its stream's number."""

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self._streams = streams
        self._arrived: asyncio.Queue[tuple[int, list[Event]] | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_open = len(streams)

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._pump(number, stream)) for number, stream in enumerate(self._streams)
        ]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def take(self) -> tuple[int, list[Event]]:
        """A stream's number, and what has come of it; nothing once all have ended."""
        while self._num_open:
            arrived = await self._arrived.get()
            if isinstance(arrived, Exception):
                raise arrived
            if arrived[1]:
                return arrived
            self._num_open -= 1
        return 0, []

    async def _pump(self, number: int, stream: EventStream) -> None:
        try:
            is_open = True
            while is_open:
                events = await stream.take()
                self._arrived.put_nowait((number, events))
                is_open = bool(events)
        except Exception as error:
            self._arrived.put_nowait(error)

"""The aligners in an engine's memory, as those outside of the engine know them. Never imports torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import msgspec

from ram_core.engine.config import AlignerSource
from ram_core.engine.messages import (
    AlignerFreed,
    AlignerLoaded,
    AlignerNews,
    AlignerOutcome,
    Command,
    EngineBegan,
    EngineLost,
    FreeAligner,
    LoadAligner,
)

_DEADLY = "the engine died more than once while it was to be loaded again"

Parts = tuple[tuple[str, str], ...]


class Residents:
    """Hands orders to the engine while it lives, its news to listeners, and remembers what both come to.

    Any thread may call it. Listeners are called one after the other, so that all hear the same order.
    """

    def __init__(self, sources: Iterable[AlignerSource], send: Callable[[Command], None]) -> None:
        self._send = send
        self._lock = threading.RLock()
        self._began: EngineBegan | None = None
        self._listeners: list[Callable[[AlignerNews], None]] = []
        # Of what is in memory, or on its way there.
        self._parts: dict[str, Parts] = {}
        for source in sources:
            before = self._parts.get(source.aligner, ())
            self._parts[source.aligner] = (*before, (source.name, source.source))

    def watch(self, listener: Callable[[AlignerNews], None]) -> None:
        """Tell a listener everything from now on, and first what is there if the engine is up."""
        with self._lock:
            self._listeners.append(listener)
            if self._began is not None:
                listener(self._began)

    def load(self, order: LoadAligner) -> None:
        """Order an aligner; void while no engine runs."""
        with self._lock:
            if self._began is not None:
                self._parts[order.aligner] = order.parts
                self._send(order)

    def free(self, order: FreeAligner) -> None:
        """Order an aligner away; void while no engine runs. A next life begins without it."""
        with self._lock:
            if self._began is not None:
                self._parts.pop(order.aligner, None)
                self._send(order)

    def begin(self, began: EngineBegan) -> None:
        """An engine is up."""
        with self._lock:
            known = {aligner for aligner, _ in (*began.aligners, *began.failed)}
            # Not even tried, as one of them may be what killed the engine.
            missing = tuple((aligner, _DEADLY) for aligner in self._parts if aligner not in known)
            self._began = began = msgspec.structs.replace(began, failed=began.failed + missing)
            self._keep(aligner for aligner, _ in began.aligners)
            self._tell(began)

    def take(self, outcomes: Iterable[AlignerOutcome]) -> None:
        """Pass on what became of orders."""
        with self._lock:
            for outcome in outcomes:
                assert self._began is not None, "only an engine that is up tells outcomes"
                there = dict(self._began.aligners)
                if isinstance(outcome, AlignerLoaded):
                    there[outcome.aligner] = outcome.num_bytes
                elif isinstance(outcome, AlignerFreed):
                    there.pop(outcome.aligner, None)
                self._began = msgspec.structs.replace(self._began, aligners=tuple(there.items()))
                self._tell(outcome)

    def lose(self) -> None:
        """The engine died; what it had in memory stays known, for the next one."""
        with self._lock:
            if self._began is not None:
                self._keep(aligner for aligner, _ in self._began.aligners)
                self._began = None
                self._tell(EngineLost())

    @property
    def sources(self) -> tuple[AlignerSource, ...]:
        """What an engine's next life should have in memory, as far as it can still be loaded."""
        with self._lock:
            return tuple(
                AlignerSource(name, source, required=False)
                for parts in self._parts.values()
                for name, source in parts
            )

    def _keep(self, aligners: Iterable[str]) -> None:
        self._parts = {name: self._parts[name] for name in aligners if name in self._parts}

    def _tell(self, news: AlignerNews) -> None:
        for listener in self._listeners:
            listener(news)

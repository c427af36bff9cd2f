"""Aligners that come and go while the engine runs: loads under way, and memory that steps still read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.aligner_loads import AlignerLoads, Arrived
from ram_core.engine.bank import ModelBank
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerFreed,
    AlignerLoaded,
    AlignerOutcome,
    FailedEvent,
    FreeAligner,
    LoadAligner,
)
from ram_core.engine.newcomers import turn_away
from ram_core.engine.pages import PageBook
from ram_core.engine.scheduler import Scheduler
from ram_core.errors import AlignerUnavailable


@dataclass(frozen=True, slots=True)
class _Leaving:
    """An aligner that nobody can ask for any more; its places are free after `last_step`, and its pages."""

    aligner: str
    pages: frozenset[str]
    places: tuple[tuple[AlignerGroup, int], ...]
    last_step: int


class Turnover:
    """Takes orders about aligners, between steps alone."""

    def __init__(
        self,
        bank: ModelBank,
        scheduler: Scheduler,
        loads: AlignerLoads,
        new_book: Callable[[int], PageBook],
        forget: Callable[[AlignerGroup], None],
    ) -> None:
        self._bank = bank
        self._scheduler = scheduler
        self._loads = loads
        self._new_book = new_book
        self._forget = forget
        self._abandoned: set[str] = set()
        self._leaving: deque[_Leaving] = deque()
        self._outcomes: list[AlignerOutcome] = []

    def load(self, order: LoadAligner) -> None:
        """Begin to load an aligner; one that is there, or on its way, is not loaded twice."""
        if order.aligner in self._bank.residents:
            self._tell_loaded(order.aligner)
        elif all(order.aligner != known.aligner for known in self._loads.orders):
            self._loads.begin(order)

    def free(self, order: FreeAligner) -> list[FailedEvent]:
        """Let an aligner go once the steps under way have ended; fails the sequences that use it."""
        aligner = order.aligner
        if aligner not in self._bank.residents:
            if any(aligner == known.aligner for known in self._loads.orders):
                self._abandoned.add(aligner)
            else:
                self._outcomes.append(AlignerFreed(aligner))
            return []
        names = self._bank.residents[aligner]
        pages = frozenset(self._bank.group_of[name].lane(name)[0] for name in names)
        failed = []
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if any(lane.model in pages for lane in sequence.lanes):
                self._scheduler.remove(sequence)
                error = AlignerUnavailable(f"The aligner `{aligner}` was taken out of memory.")
                failed.append(FailedEvent(sequence.request.request_id, sequence.index, error))
        places = self._bank.remove(aligner)
        self._leaving.append(_Leaving(aligner, pages, places, self._scheduler.num_launched))
        return failed

    def tend(self) -> list[AlignerOutcome]:
        """Take in whom the loader brought, free what no step reads any more, and say what has come of it."""
        for outcome in self._loads.take():
            if isinstance(outcome, Arrived):
                self._settle(outcome)
            else:
                self._outcomes.append(outcome)
        while self._leaving and self._leaving[0].last_step <= self._scheduler.num_done:
            leaving = self._leaving.popleft()
            for group in self._bank.free(leaving.places):
                self._forget(group)
            for book in self._scheduler.books.values():
                book.drop(leaving.pages)
            self._outcomes.append(AlignerFreed(leaving.aligner))
        told, self._outcomes = self._outcomes, []
        return told

    def _settle(self, arrived: Arrived) -> None:
        aligner = arrived.order.aligner
        if aligner in self._abandoned:
            self._abandoned.discard(aligner)
            turn_away(arrived.newcomers)
            self._outcomes.append(AlignerFreed(aligner))
            return
        try:
            new_pools = self._bank.add(aligner, arrived.newcomers)
        except ValueError as error:
            turn_away(arrived.newcomers)
            self._outcomes.append(AlignerFailed(aligner, str(error)))
            return
        self._scheduler.books |= {name: self._new_book(pool.num_pages) for name, pool in new_pools.items()}
        self._tell_loaded(aligner)

    def _tell_loaded(self, aligner: str) -> None:
        num_bytes = self._bank.bytes_of[aligner]
        self._outcomes.append(AlignerLoaded(aligner, num_bytes, str(self._bank.proposal.device)))

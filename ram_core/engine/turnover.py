"""Aligners that come and go while the engine runs: loads under way, and memory that steps still read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.aligner_loads import AlignerLoads, Arrived, Expected
from ram_core.engine.bank import ModelBank
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerFreed,
    AlignerLoaded,
    AlignerOutcome,
    AlignerProgress,
    FailedEvent,
    FreeAligner,
    LoadAligner,
)
from ram_core.engine.newcomers import Newcomer, turn_away
from ram_core.engine.pages import PageBook
from ram_core.engine.scheduler import Scheduler
from ram_core.engine.sequence import Lane, Sequence
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
        # Loads come one after the other.
        self._expected: Newcomer | None = None

    @property
    def is_loading(self) -> bool:
        """Whether an aligner is on its way, or waits for its turn."""
        return bool(self._loads.orders)

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
        self._scheduler.narrow(pages)
        failed = []
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if any(lane.model in pages for lane in sequence.lanes):
                self._scheduler.remove(sequence)
                error = AlignerUnavailable(f"The aligner `{aligner}` was taken out of memory.")
                failed.append(FailedEvent(sequence.request.request_id, sequence.index, error))
        places = self._bank.remove(aligner)
        self._leaving.append(_Leaving(aligner, pages, places, self._scheduler.kv.num_launched))
        return failed

    def tend(self) -> list[AlignerOutcome]:
        """Take in whom the loader brought, free what no step reads any more, and say what has come of it."""
        for outcome in self._loads.take():
            match outcome:
                case Expected():
                    self._expect(outcome)
                case Arrived():
                    self._settle(outcome)
                case AlignerFailed():
                    self._renounce()
                    self._outcomes.append(outcome)
                case AlignerProgress():
                    self._outcomes.append(outcome)
        while self._leaving and self._leaving[0].last_step <= self._scheduler.kv.num_done:
            leaving = self._leaving.popleft()
            for group in self._bank.free(leaving.places):
                self._forget(group)
            for book in self._scheduler.books.values():
                book.drop(leaving.pages)
            self._outcomes.append(AlignerFreed(leaving.aligner))
        told, self._outcomes = self._outcomes, []
        return told

    def expected_lanes(self, prefill: Sequence) -> list[Lane]:
        """The lane of the one of a prompt's aligners whose weights are nearly there, if any."""
        if (newcomer := self._expected) is None:
            return []
        return [
            replace(self._bank.lane(newcomer.group, term), is_expected=True)
            for term in prefill.awaits
            if term.aligner == newcomer.name
        ]

    def _expect(self, expected: Expected) -> None:
        """Have an aligner read the prompts that wait for it, as its weights come."""
        newcomer = expected.newcomer
        if expected.order.aligner in self._abandoned or newcomer.name in self._bank.group_of:
            return
        self._expected = newcomer
        self._bank.group_by_name[newcomer.group.name] = newcomer.group
        newcomer.group.expect(newcomer.name, newcomer.slot)
        for prefill in self._scheduler.prefills:
            for lane in self.expected_lanes(prefill):
                self._scheduler.widen(prefill, lane)

    def _renounce(self) -> None:
        """The aligner that was expected, if any, will not come."""
        if (newcomer := self._expected) is None:
            return
        self._expected = None
        group, (pages, _) = newcomer.group, newcomer.group.lane(newcomer.name)
        self._scheduler.narrow({pages})
        for book in self._scheduler.books.values():
            book.drop({pages})
        group.renounce(newcomer.name)
        # It may have gone with the last of its other aligners.
        if group.is_empty and self._bank.group_by_name.pop(group.name, None) is not None:
            self._forget(group)

    def _welcome(self) -> None:
        """The aligner that was expected, if any, is there."""
        self._expected = None
        for prefill in self._scheduler.prefills:
            for lane in prefill.lanes:
                lane.is_expected = False

    def _settle(self, arrived: Arrived) -> None:
        aligner = arrived.order.aligner
        if aligner in self._abandoned:
            self._abandoned.discard(aligner)
            turn_away(arrived.newcomers)
            self._renounce()
            self._outcomes.append(AlignerFreed(aligner))
            return
        try:
            new_pools = self._bank.add(aligner, arrived.newcomers)
        except ValueError as error:
            turn_away(arrived.newcomers)
            self._renounce()
            self._outcomes.append(AlignerFailed(aligner, str(error)))
            return
        self._welcome()
        new_books = {name: self._new_book(pool.num_pages) for name, pool in new_pools.items()}
        self._scheduler.books.update(new_books)
        self._tell_loaded(aligner)

    def _tell_loaded(self, aligner: str) -> None:
        num_bytes = self._bank.bytes_of[aligner]
        self._outcomes.append(AlignerLoaded(aligner, num_bytes, str(self._bank.proposal.device)))

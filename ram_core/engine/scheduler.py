"""Which sequence contributes how many tokens to the next step. Plain Python: never imports torch.

Sequences that are being written come first, one token each; what is left of the step's budget goes to
prompts, in chunks, oldest first. A sequence is admitted when a slot and pages for its prompt are free; when
a running one finds no page, the youngest running sequence is put back into the queue and recomputed later
(its noise is counter-based, so it draws the same tokens). Every admitted sequence fits alone, so the oldest
always gets on and nothing can wait for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ram_core.engine.pages import PageBook, pages_for
from ram_core.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """`num_tokens` tokens of a sequence from `start`; the last of them draws a token if `draws`."""

    sequence: Sequence
    start: int
    num_tokens: int
    draws: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of one step, those of a single token first, and which sequences start with it."""

    rows: tuple[ScheduledRow, ...]
    started: tuple[Sequence, ...]


class Scheduler:
    """Books of slots and pages, a queue of the waiting, and the running in order of admission."""

    def __init__(
        self, books: Mapping[str, PageBook], *, page_size: int, num_slots: int, max_step_tokens: int
    ) -> None:
        self.books = books
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._page_size = page_size
        self._free_slots = list(range(num_slots - 1, -1, -1))
        # At least one prompt token must fit beside a full batch of drawing sequences.
        self._max_step_tokens = max(max_step_tokens, num_slots + 1)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self.waiting.append(sequence)

    def find(self, request_id: str, index: int | None) -> list[Sequence]:
        """The live sequences of a request, or the one of its choice `index`."""
        return [
            sequence
            for sequence in (*self.running, *self.waiting)
            if sequence.request.request_id == request_id and index in (None, sequence.index)
        ]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its slot and pages are free at once."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._release(sequence)

    def plan(self) -> Plan:
        """Choose the rows of the next step and reserve their pages."""
        budget = self._max_step_tokens
        writing = [sequence for sequence in self.running if sequence.num_pending == 1]
        # Making room for an older sequence may have put a younger one back.
        rows = [
            self._row(sequence, 1) for sequence in writing if sequence.slot >= 0 and self._make_room(sequence)
        ]
        budget -= len(rows)
        reading = [sequence for sequence in self.running if sequence.num_pending > 1]
        started: list[Sequence] = []
        for sequence in self._readers(reading, started):
            row = self._row(sequence, min(budget, sequence.num_pending))
            budget -= row.num_tokens
            rows.append(row)
            # Before the next is admitted: it would hold a slot and pages, and read nothing.
            if not budget:
                break
        rows.sort(key=lambda row: row.num_tokens > 1)
        return Plan(tuple(rows), tuple(started))

    def commit(self, row: ScheduledRow, token_id: int | None) -> None:
        """Note that a row was computed, and the token that it drew, if it drew one."""
        row.sequence.num_computed = row.start + row.num_tokens
        if token_id is not None:
            row.sequence.token_ids.append(token_id)

    def _readers(self, reading: list[Sequence], started: list[Sequence]) -> Iterator[Sequence]:
        """Sequences with prompt left to read: the running first, then whom the queue can spare room for."""
        yield from reading
        while self.waiting and self._free_slots and self._has_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self._reserve(sequence, len(sequence.token_ids))
            self.running.append(sequence)
            started.append(sequence)
            yield sequence

    @staticmethod
    def _row(sequence: Sequence, num_tokens: int) -> ScheduledRow:
        start = sequence.num_computed
        return ScheduledRow(sequence, start, num_tokens, start + num_tokens == len(sequence.token_ids))

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the prompt and the first drawn token fit into free pages, in every pool."""
        needed = self._pages_needed(sequence, len(sequence.token_ids) + 1)
        return all(count <= self.books[pool].num_free for pool, count in needed.items())

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve the next token's page, putting back younger sequences; False if it had to go itself."""
        total = len(sequence.token_ids)
        while any(
            count > self.books[pool].num_free for pool, count in self._pages_needed(sequence, total).items()
        ):
            youngest = self.running[-1]
            self._put_back(youngest)
            if youngest is sequence:
                return False
        self._reserve(sequence, total)
        return True

    def _pages_needed(self, sequence: Sequence, num_tokens: int) -> Counter[str]:
        wanted = pages_for(num_tokens, self._page_size)
        needed: Counter[str] = Counter()
        for lane in sequence.lanes:
            needed[lane.pool] += max(0, wanted - len(lane.pages))
        return needed

    def _reserve(self, sequence: Sequence, num_tokens: int) -> None:
        wanted = pages_for(num_tokens, self._page_size)
        for lane in sequence.lanes:
            lane.pages += self.books[lane.pool].take(max(0, wanted - len(lane.pages)))

    def _put_back(self, sequence: Sequence) -> None:
        """Preempt: free everything and wait in front of the queue, to be recomputed from the start."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        for lane in sequence.lanes:
            self.books[lane.pool].give_back(lane.pages)
            lane.pages = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

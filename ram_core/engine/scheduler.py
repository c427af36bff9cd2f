"""Which sequence contributes how many tokens to the next step. Plain Python: never imports torch.

Sequences that are being written come first, one token each; what is left of the step's budget goes to
prompts, in chunks, shared equally between tenants (see `reading`).

A sequence is admitted when a slot and pages for its prompt are free, in the order of `FairQueue`; it begins
behind the longest prefix that its lanes find in the books. When a running one finds no page, or somebody of a
better priority waits, the last of the lowest priority is put back into the queue and recomputed later (its
noise is counter-based, so it draws the same tokens). So is the last of the tenant with most running when one
that has nothing running waits: a flood leaves everybody else a place. Every admitted sequence fits alone, so
the first of the best priority always gets on and nothing can wait for ever.

While a request waits for its aligners, the proposal may read its prompt: a sequence of its own does, in a
place that nobody waits for, and gives way to everybody. Once the aligners are there, the request's sequence
goes on in that place.

A plan may be made while earlier steps still run: the tokens that these draw are counted before they are
known. A sequence that would need a page which is leaving (see `kv_memory`) waits for it. Slots change hands
at once: only the one stream that runs the steps touches what stands in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

from ram_core.engine.fair_queue import FairQueue
from ram_core.engine.kv_memory import KvMemory
from ram_core.engine.pages import PageBook, pages_for
from ram_core.engine.reading import MIN_SHARE, ReadingShares
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.sequence import Lane, Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of one step, those of a single token first, and which sequences start with it."""

    rows: tuple[ScheduledRow, ...]
    started: tuple[Sequence, ...]


class Scheduler:
    """Books of slots and pages, a queue of the waiting, and the running in order of admission."""

    def __init__(
        self,
        books: dict[str, PageBook],
        *,
        page_size: int,
        num_slots: int,
        max_step_tokens: int,
        max_chunk_tokens: int,
    ) -> None:
        self.kv = KvMemory(books, page_size)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._page_size = page_size
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._queue = FairQueue(quantum=max_step_tokens)
        # Choices that wait for the first of their request to have read the prompt that they share.
        self._followers: dict[Sequence, list[Sequence]] = {}
        self._shares = ReadingShares(max_step_tokens, max_chunk_tokens, num_slots)
        # Those whose requests are still to come, by request; without a slot until the next plan.
        self._prefills: dict[str, Sequence] = {}

    @property
    def books(self) -> dict[str, PageBook]:
        """The pages of each pool."""
        return self.kv.books

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, about in the order in which they will get one."""
        return [*self._queue, *chain.from_iterable(self._followers.values())]

    @property
    def is_busy(self) -> bool:
        """Whether a request's sequence runs; any thread may ask."""
        return any(not sequence.is_prefill for sequence in self.running)

    @property
    def has_work(self) -> bool:
        is_reading = any(sequence.num_pending for sequence in self._prefills.values())
        return bool(self._queue) or is_reading or self.is_busy

    def add(self, *choices: Sequence) -> None:
        """Queue the choices of a request. A prompt that fills a page is read once for all of them."""
        leader, *others = choices
        self._queue.add(leader)
        if others and leader.prefix_root is not None and len(leader.token_ids) > self._page_size:
            self._followers[leader] = others
        else:
            for sequence in others:
                self._queue.add(sequence)

    def prefill(self, sequence: Sequence) -> None:
        """Have a prompt read whose request is still to come, if there is room that nobody waits for."""
        self._prefills.setdefault(sequence.request.request_id, sequence)

    @property
    def prefills(self) -> list[Sequence]:
        """Those whose requests are still to come."""
        return [*self._prefills.values()]

    def widen(self, prefill: Sequence, lane: Lane) -> None:
        """Have another model read a prompt whose request is still to come, if nobody waits for the pages."""
        num_pages = pages_for(len(prefill.token_ids) + 1, self._page_size)
        if prefill.slot < 0:
            prefill.lanes.append(lane)
        elif not self._queue and self.kv.has_free({lane.pool: num_pages}):
            prefill.lanes.append(lane)
            self.kv.reserve(prefill, len(prefill.token_ids))

    def narrow(self, models: Collection[str]) -> None:
        """Have lanes of these names read no prompt any more whose request is still to come."""
        for prefill in self._prefills.values():
            for lane in [each for each in prefill.lanes if each.model in models]:
                prefill.lanes.remove(lane)
                self.kv.give_back(lane)

    def take_back(self, row: ScheduledRow) -> None:
        """Forget a prefill's row that was given up; nobody waits for its expected weights once more."""
        for lane, start in zip(row.lanes, row.lane_starts, strict=True):
            lane.num_computed = start
        self.narrow({lane.model for lane in row.lanes if lane.is_expected})

    def find(self, request_id: str, index: int | None) -> list[Sequence]:
        """The live sequences of a request, or the one of its choice `index`."""
        return [
            sequence
            for sequence in dict.fromkeys((*self.running, *self.waiting, *self._prefills.values()))
            if sequence.request.request_id == request_id and index in (None, sequence.index)
        ]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its slot is free at once, its pages when no step runs."""
        if sequence.is_prefill:
            self._prefills.pop(sequence.request.request_id, None)
            self._leave(sequence)
            return
        for leader, others in self._followers.items():
            if sequence in others:
                others.remove(sequence)
                if not others:
                    del self._followers[leader]
                return
        self._free_followers(sequence)
        if sequence.slot < 0:
            self._queue.remove(sequence)
            if (prefill := self._prefill_of(sequence)) is not None:
                self.remove(prefill)
        self._leave(sequence)
        self._queue.leave(sequence)

    @property
    def can_shrink(self) -> bool:
        """Whether a step may have fewer tokens than now."""
        return self._shares.can_shrink

    def shrink(self) -> None:
        """Halve the budget of a step: the last one found no memory."""
        self._shares.shrink()

    def plan(self) -> Plan:
        """Choose the rows of the next step and reserve their pages."""
        writing = [sequence for sequence in self.running if sequence.is_writing]
        # Making room for a better one may have put a worse one back.
        rows = [
            self._row(sequence, 1) for sequence in writing if sequence.slot >= 0 and self._make_room(sequence)
        ]
        asked = [sequence for sequence in self.running if sequence.is_reading and not sequence.is_prefill]
        budget = self._shares.budget(len(rows), len(asked) + self._num_coming)
        started = [*self._admit(asked, budget), *self._begin_prefills()]
        # Nobody else waits for weights that are still to come.
        is_alone = not (rows or asked)
        ahead = [each for each in self._prefills.values() if is_alone or not each.is_expecting]
        # Those put back for somebody of a better priority leave the step; their share goes to the prompts.
        rows = [row for row in rows if row.is_current]
        here = [sequence for sequence in (*ahead, *asked) if sequence.slot >= 0]
        reading = [sequence for sequence in here if sequence.num_pending]
        rows += [self._row(sequence, 0) for sequence in here if sequence.is_read]
        shares = self._shares.of(reading, [row.sequence for row in rows], self._num_coming)
        rows += [self._row(sequence, num) for sequence, num in zip(reading, shares, strict=True) if num]
        rows.sort(key=lambda row: row.num_tokens > 1)
        return Plan(tuple(rows), tuple(started))

    def commit(self, row: ScheduledRow, token_id: int) -> None:
        """Note the token that a row drew, unless it is void. The row must be current: what others drew is."""
        sequence = row.sequence
        self.kv.name_pages(row)
        if row.keeps_end:
            return
        sequence.num_in_flight -= 1
        sequence.token_ids.append(token_id)
        self._queue.charge(sequence, 1)
        self._free_followers(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Preempt: free everything and wait in front of the queue, to be recomputed from the start."""
        if sequence.is_prefill:
            self.remove(sequence)
            return
        self._leave(sequence)
        self._queue.put_back(sequence)
        self.num_preemptions += 1

    @property
    def _num_coming(self) -> int:
        """How many of those that wait find a slot."""
        return min(len(self._queue), len(self._free_slots)) if self._free_slots else 0

    def _free_followers(self, leader: Sequence) -> None:
        for sequence in reversed(self._followers.pop(leader, [])):
            self._queue.add(sequence, is_first=True)

    def _admit(self, reading: list[Sequence], budget: int) -> list[Sequence]:
        """Start whom there is room for and tokens to read; appends them to `reading`."""
        started: list[Sequence] = []
        while (head := self._queue.head()) is not None:
            tenants = {sequence.request.tenant for sequence in reading}
            wanted = sum(sequence.num_pending for sequence in reading)
            # One that found nothing to do would hold a slot and pages all the same.
            is_new_tenant = head.request.tenant not in tenants and len(tenants) * MIN_SHARE < budget
            if wanted >= budget and not is_new_tenant:
                break
            if not self._start(head):
                break
            reading.append(head)
            started.append(head)
        return started

    def _begin_prefills(self) -> list[Sequence]:
        """Start those that were asked for while nobody waits and there is room; forgets the others."""
        started: list[Sequence] = []
        for sequence in [each for each in self._prefills.values() if each.slot < 0]:
            prefixes = None if self._queue else self._prefixes_with_room(sequence)
            if prefixes is None:
                self.remove(sequence)
                continue
            self._place(sequence, prefixes)
            started.append(sequence)
        return started

    def _start(self, sequence: Sequence) -> bool:
        """Give the head of the queue a slot, what it shares, and pages for the rest; False without room."""
        if not self._go_on(sequence):
            while (prefixes := self._prefixes_with_room(sequence)) is None:
                if not self._make_place(sequence):
                    return False
            self._place(sequence, prefixes)
        self._queue.take(sequence)
        if not sequence.has_started:
            self._queue.charge(sequence, sequence.num_pending)
        return True

    def _make_place(self, sequence: Sequence) -> bool:
        """Have somebody give way to the head of the queue; False if it has to wait."""
        if self._is_room_coming(sequence):
            return False
        if self._drop_prefill():
            return True
        worst = self._worst()
        if worst is not None and worst.request.priority > sequence.request.priority:
            self.put_back(worst)
        elif worst is not None and (richest := self._last_of_the_richest(sequence)) is not None:
            self._step_aside(richest)
        else:
            return False
        return True

    def _place(self, sequence: Sequence, prefixes: list[list[int]]) -> None:
        """Give a sequence a free slot and free pages, behind what its lanes found."""
        for lane, pages in zip(sequence.lanes, prefixes, strict=True):
            self.kv.share(lane, pages)
        self.kv.reserve(sequence, len(sequence.token_ids))
        sequence.num_cached = sequence.lanes[0].num_computed
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)

    def _go_on(self, sequence: Sequence) -> bool:
        """Take the place of the one that reads the prompt before its request came, with room for the others.

        That one is gone in any case.
        """
        if (prefill := self._prefill_of(sequence)) is None:
            return False
        before = {lane.model: lane for lane in prefill.lanes}
        found = [
            before[lane.model].pages if lane.model in before else pages
            for lane, pages in zip(sequence.lanes, self.kv.find_prefixes(sequence), strict=True)
        ]
        is_same = (prefill.token_ids, prefill.prefix_root) == (sequence.token_ids, sequence.prefix_root)
        if not (is_same and prefill.slot >= 0 and self.kv.has_room(sequence, found)):
            self.remove(prefill)
            return False
        del self._prefills[sequence.request.request_id]
        for lane, pages in zip(sequence.lanes, found, strict=True):
            if (own := before.pop(lane.model, None)) is None:
                self.kv.share(lane, pages)
            else:
                lane.pages, lane.num_computed, lane.num_named = own.pages, own.num_computed, own.num_named
        for lane in before.values():
            self.kv.give_back(lane)
        self.kv.reserve(sequence, len(sequence.token_ids))
        sequence.num_cached, sequence.end_logits = prefill.num_cached, prefill.end_logits
        sequence.is_continued = True
        sequence.slot, prefill.slot = prefill.slot, -1
        self.running[self.running.index(prefill)] = sequence
        return True

    def _prefill_of(self, sequence: Sequence) -> Sequence | None:
        """The one that reads a sequence's prompt before its request came."""
        return None if sequence.index else self._prefills.get(sequence.request.request_id)

    def _drop_prefill(self) -> bool:
        """Have the last one go that reads a prompt before its request came; False if there is none."""
        for sequence in reversed(self._prefills.values()):
            self.remove(sequence)
            return True
        return False

    @staticmethod
    def _row(sequence: Sequence, num_tokens: int) -> ScheduledRow:
        end = sequence.num_computed + num_tokens
        starts = tuple(min(lane.num_computed, end) for lane in sequence.lanes)
        draws = end == sequence.num_tokens
        for lane in sequence.lanes:
            lane.num_computed = max(lane.num_computed, end)
        sequence.num_in_flight += draws and not sequence.is_prefill
        return ScheduledRow(sequence, sequence.stay, tuple(sequence.lanes), starts, end, draws)

    def _prefixes_with_room(self, sequence: Sequence) -> list[list[int]] | None:
        """What the lanes find, if there is a slot, and pages for the rest and the first drawn token."""
        if not self._free_slots:
            return None
        prefixes = self.kv.find_prefixes(sequence)
        return prefixes if self.kv.has_room(sequence, prefixes) else None

    def _is_room_coming(self, sequence: Sequence) -> bool:
        """Whether a slot is free, and pages will be when the steps under way are done."""
        if not self._free_slots:
            return False
        return self.kv.is_coming(self.kv.needed_behind(sequence, self.kv.find_prefixes(sequence)))

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve the next token's page, putting back worse sequences; False if it has to wait or go."""
        total = sequence.num_tokens
        wanted = pages_for(total, self._page_size)
        needed = Counter({lane.pool: 0 for lane in sequence.lanes})
        for lane in sequence.lanes:
            needed[lane.pool] += max(0, wanted - len(lane.pages))
        while not self.kv.has_free(needed):
            if self.kv.is_coming(needed):
                return False
            if self._drop_prefill():
                continue
            worst = self._worst()
            assert worst is not None
            self.put_back(worst)
            if worst is sequence:
                return False
        self.kv.reserve(sequence, total)
        return True

    def _worst(self) -> Sequence | None:
        """Who gives way first: of the lowest priority the last that was admitted."""
        return max(reversed(self.running), key=lambda sequence: sequence.request.priority, default=None)

    def _last_of_the_richest(self, newcomer: Sequence) -> Sequence | None:
        """Who gives way to a tenant that has nothing running: of the tenant with most, if it keeps others."""
        peers = [each for each in self.running if each.request.priority == newcomer.request.priority]
        counts = Counter(each.request.tenant for each in peers)
        if not peers or counts[newcomer.request.tenant]:
            return None
        [(tenant, count)] = counts.most_common(1)
        return next(each for each in reversed(peers) if each.request.tenant == tenant) if count > 1 else None

    def _step_aside(self, sequence: Sequence) -> None:
        """As `put_back`, but behind those of other tenants."""
        self._leave(sequence)
        self._queue.step_aside(sequence)
        self.num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Have a sequence give up its place, if it has one."""
        if sequence.slot < 0:
            return
        self.running.remove(sequence)
        for lane in sequence.lanes:
            self.kv.give_back(lane)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.stay += 1
        sequence.num_in_flight = 0
        sequence.is_continued, sequence.end_logits = False, {}

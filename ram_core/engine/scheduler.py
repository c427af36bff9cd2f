"""Which sequence contributes how many tokens to the next step. Plain Python: never imports torch.

Sequences that are being written come first, one token each; what is left of the step's budget goes to
prompts, in chunks, shared equally between tenants. Beside writing, a chunk is short, so that a long prompt
delays no other sequence's next token by much; alone it may fill the step. Where many could read beside few
that write, as in a burst that finds the server idle, the chunk is longer: few wait for many, and the batch is
full sooner. What is left of a short prompt is read at once if its tenant writes nothing.

A sequence is admitted when a slot and pages for its prompt are free, in the order of `FairQueue`; it begins
behind the longest prefix that its lanes find in the books. When a running one finds no page, or somebody of a
better priority waits, the last of the lowest priority is put back into the queue and recomputed later (its
noise is counter-based, so it draws the same tokens). So is the last of the tenant with most running when one
that has nothing running waits: a flood leaves everybody else a place. Every admitted sequence fits alone, so
the first of the best priority always gets on and nothing can wait for ever.

A plan may be made while earlier steps still run: the tokens that these draw are counted before they are
known. Pages that a sequence gives back are free only when every step is done that was launched before: until
then they are leaving. So no page is ever written for its new owner while anybody may still read or write it
for the old one, whatever runs beside the steps. A sequence that would need a leaving page waits for it. Slots
change hands at once: only the one stream that runs the steps touches what stands in them.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain

from ram_core.engine.fair_queue import FairQueue
from ram_core.engine.pages import PageBook, pages_for
from ram_core.engine.sequence import Sequence

_GUEST_CHUNKS = 2
"""Up to so many chunks are read at once for a tenant that writes nothing."""
_READER_WEIGHT = 4
"""Who waits for a first token counts as so many who wait for their next one."""
_MIN_SHARE = 16
"""So many tokens of prompt a tenant gets in a step at least, if it gets any."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Brings all lanes of a sequence to `end`; the last of its tokens draws a token if `draws`.

    Lane i reads from `lane_starts[i]`, which is `end` if it has nothing to do; `start` is the least of them.
    """

    sequence: Sequence
    stay: int
    lane_starts: tuple[int, ...]
    end: int
    draws: bool

    @property
    def start(self) -> int:
        return min(self.lane_starts)

    @property
    def num_tokens(self) -> int:
        """What the row takes of the step's budget: the tokens of its slowest lane."""
        return self.end - self.start

    @property
    def is_current(self) -> bool:
        """Whether the sequence is still in the stay that the row was planned for."""
        return self.sequence.stay == self.stay


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
        self.books = books
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._page_size = page_size
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._queue = FairQueue(quantum=max_step_tokens)
        # Choices that wait for the first of their request to have read the prompt that they share.
        self._followers: dict[Sequence, list[Sequence]] = {}
        self._num_launched = 0
        self._num_done = 0
        # What was given back while steps ran: pool, pages, and the last step that was launched before.
        self._leaving: deque[tuple[int, str, list[int]]] = deque()
        self._max_chunk_tokens = max_chunk_tokens
        # Never twice in a row: other prompts get on, however many strangers come.
        self._has_welcomed = False
        self._set_budget(max_step_tokens)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, about in the order in which they will get one."""
        return [*self._queue, *chain.from_iterable(self._followers.values())]

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._queue)

    def add(self, *choices: Sequence) -> None:
        """Queue the choices of a request. A prompt that fills a page is read once for all of them."""
        leader, *others = choices
        self._queue.add(leader)
        if others and leader.prefix_root is not None and len(leader.token_ids) > self._page_size:
            self._followers[leader] = others
        else:
            for sequence in others:
                self._queue.add(sequence)

    def find(self, request_id: str, index: int | None) -> list[Sequence]:
        """The live sequences of a request, or the one of its choice `index`."""
        return [
            sequence
            for sequence in (*self.running, *self.waiting)
            if sequence.request.request_id == request_id and index in (None, sequence.index)
        ]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its slot is free at once, its pages when no step runs."""
        for leader, others in self._followers.items():
            if sequence in others:
                others.remove(sequence)
                if not others:
                    del self._followers[leader]
                return
        self._free_followers(sequence)
        if sequence.slot < 0:
            self._queue.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)
        self._queue.leave(sequence)

    @property
    def num_launched(self) -> int:
        """Steps that were launched so far."""
        return self._num_launched

    @property
    def num_done(self) -> int:
        """Steps that have ended so far; they end in order."""
        return self._num_done

    @property
    def can_shrink(self) -> bool:
        """Whether a step may have fewer tokens than now."""
        return self._max_step_tokens > self._num_slots + 1

    def shrink(self) -> None:
        """Halve the budget of a step: the last one found no memory."""
        self._set_budget(self._max_step_tokens // 2)

    def plan(self) -> Plan:
        """Choose the rows of the next step and reserve their pages."""
        writing = [sequence for sequence in self.running if sequence.num_pending == 1 and sequence.may_draw]
        # Making room for a better one may have put a worse one back.
        rows = [
            self._row(sequence, 1) for sequence in writing if sequence.slot >= 0 and self._make_room(sequence)
        ]
        reading = [sequence for sequence in self.running if sequence.num_pending > 1]
        budget = self._chunk_budget(len(rows), len(reading))
        started = self._admit(reading, budget)
        # Those put back for somebody of a better priority leave the step; their share goes to the prompts.
        rows = [row for row in rows if row.is_current]
        reading = [sequence for sequence in reading if sequence.slot >= 0]
        shares = self._shares(reading, rows)
        rows += [self._row(sequence, num) for sequence, num in zip(reading, shares, strict=True) if num]
        rows.sort(key=lambda row: row.num_tokens > 1)
        return Plan(tuple(rows), tuple(started))

    def begin_step(self) -> None:
        """Note that a step was launched: pages that are given back from now on wait for it."""
        self._num_launched += 1

    def end_step(self) -> None:
        """Note that the first step that was launched and did not end is done; pages that waited are free."""
        self._num_done += 1
        while self._leaving and self._leaving[0][0] <= self._num_done:
            _, pool, pages = self._leaving.popleft()
            self.books[pool].give_back(pages)

    def commit(self, row: ScheduledRow, token_id: int) -> None:
        """Note the token that a row drew. The row must be current: what others drew is void."""
        sequence = row.sequence
        sequence.num_in_flight -= 1
        self._name_pages(sequence, row.end)
        sequence.token_ids.append(token_id)
        self._queue.charge(sequence, 1)
        self._free_followers(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Preempt: free everything and wait in front of the queue, to be recomputed from the start."""
        self.running.remove(sequence)
        self._release(sequence)
        self._queue.put_back(sequence)
        self.num_preemptions += 1

    def _set_budget(self, max_step_tokens: int) -> None:
        # At least one prompt token must fit beside a full batch of drawing sequences.
        self._max_step_tokens = max(max_step_tokens, self._num_slots + 1)

    def _chunk_budget(self, num_writing: int, num_reading: int) -> int:
        """Tokens of prompts that a step may read: a chunk, or more where many wait for the sake of few."""
        left = self._max_step_tokens - num_writing
        if not num_writing:
            return left
        if self._free_slots:
            num_reading += min(len(self._queue), len(self._free_slots))
        # Never more than a chunk each: one long prompt by itself delays nobody by more.
        num_chunks = min(_READER_WEIGHT * num_reading // num_writing, num_reading)
        return min(left, self._max_chunk_tokens * max(num_chunks, 1))

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
            is_new_tenant = head.request.tenant not in tenants and len(tenants) * _MIN_SHARE < budget
            if wanted >= budget and not is_new_tenant:
                break
            if not self._start(head):
                break
            reading.append(head)
            started.append(head)
        return started

    def _start(self, sequence: Sequence) -> bool:
        """Give the head of the queue a slot, what it shares, and pages for the rest; False without room."""
        while (prefixes := self._prefixes_with_room(sequence)) is None:
            worst = None if self._is_room_coming(sequence) else self._worst()
            if worst is not None and worst.request.priority > sequence.request.priority:
                self.put_back(worst)
            elif worst is not None and (richest := self._last_of_the_richest(sequence)) is not None:
                self._step_aside(richest)
            else:
                return False
        self._queue.take(sequence)
        for lane, pages in zip(sequence.lanes, prefixes, strict=True):
            self.books[lane.pool].share(pages)
            lane.pages = pages
            lane.num_named = len(pages)
            lane.num_computed = len(pages) * self._page_size
        self._reserve(sequence, len(sequence.token_ids))
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        if not sequence.has_started:
            self._queue.charge(sequence, sequence.num_pending)
        return True

    def _shares(self, reading: list[Sequence], writing: list[ScheduledRow]) -> list[int]:
        """Tokens for each reader; what is left of a guest's prompt goes before all others."""
        budget = self._chunk_budget(len(writing), len(reading))
        guest = None if self._has_welcomed else self._guest(reading, writing)
        self._has_welcomed = guest is not None
        if guest is None:
            return self._share_out(reading, budget)
        others = [sequence for sequence in reading if sequence is not guest]
        shares = dict(zip(others, self._share_out(others, max(budget - guest.num_pending, 0)), strict=True))
        return [guest.num_pending if sequence is guest else shares[sequence] for sequence in reading]

    def _guest(self, reading: list[Sequence], writing: list[ScheduledRow]) -> Sequence | None:
        """The first whose tenant only waits while others write, and whose prompt is soon read."""
        if not writing:
            return None
        tenants = {row.sequence.request.tenant for row in writing}
        left = self._max_step_tokens - len(writing)
        soon = min(_GUEST_CHUNKS * self._max_chunk_tokens, left)
        strangers = (each for each in reading if each.request.tenant not in tenants)
        return next((each for each in strangers if each.num_pending <= soon), None)

    def _share_out(self, reading: list[Sequence], budget: int) -> list[int]:
        """Tokens for each reader: its tenant's equal share, oldest first; then what others leave over."""
        if not reading:
            return []
        tenants = dict.fromkeys(sequence.request.tenant for sequence in reading)
        left = dict.fromkeys(tenants, max(budget // len(tenants), 1))
        spare = budget
        shares = []
        for sequence in reading:
            share = min(sequence.num_pending, left[sequence.request.tenant], spare)
            left[sequence.request.tenant] -= share
            spare -= share
            shares.append(share)
        for index, sequence in enumerate(reading):
            extra = min(sequence.num_pending - shares[index], spare)
            shares[index] += extra
            spare -= extra
        return shares

    @staticmethod
    def _row(sequence: Sequence, num_tokens: int) -> ScheduledRow:
        end = sequence.num_computed + num_tokens
        starts = tuple(min(lane.num_computed, end) for lane in sequence.lanes)
        draws = end == sequence.num_tokens
        for lane in sequence.lanes:
            lane.num_computed = max(lane.num_computed, end)
        sequence.num_in_flight += draws
        return ScheduledRow(sequence, sequence.stay, starts, end, draws)

    def _find_prefixes(self, sequence: Sequence) -> list[list[int]]:
        """For each lane the pages of the longest known prefix; the last token is always computed anew."""
        most = (len(sequence.token_ids) - 1) // self._page_size
        return [
            self.books[lane.pool].find(sequence.prefix_keys(lane, most, self._page_size))
            for lane in sequence.lanes
        ]

    def _name_pages(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the pages that `num_tokens` tokens fill; only a draw shows that they are sound."""
        if sequence.prefix_root is None:
            return
        num_full = num_tokens // self._page_size
        for lane in sequence.lanes:
            if num_full > lane.num_named:
                keys = list(sequence.prefix_keys(lane, num_full, self._page_size))
                for index in range(lane.num_named, num_full):
                    self.books[lane.pool].name(lane.pages[index], keys[index])
                lane.num_named = num_full

    def _prefixes_with_room(self, sequence: Sequence) -> list[list[int]] | None:
        """What the lanes find, if there is a slot, and pages for the rest and the first drawn token."""
        if not self._free_slots:
            return None
        prefixes = self._find_prefixes(sequence)
        needed = self._needed_behind(sequence, prefixes)
        has_room = all(count <= self.books[pool].num_free for pool, count in needed.items())
        return prefixes if has_room else None

    def _needed_behind(self, sequence: Sequence, prefixes: list[list[int]]) -> Counter[str]:
        """Free pages that a sequence takes of each pool to start behind what its lanes found."""
        wanted = pages_for(len(sequence.token_ids) + 1, self._page_size)
        needed: Counter[str] = Counter()
        for lane, found in zip(sequence.lanes, prefixes, strict=True):
            needed[lane.pool] += wanted - len(found) + self.books[lane.pool].num_idle(found)
        return needed

    def _is_room_coming(self, sequence: Sequence) -> bool:
        """Whether a slot is free, and pages will be when the steps under way are done."""
        if not self._free_slots:
            return False
        return self._is_coming(self._needed_behind(sequence, self._find_prefixes(sequence)))

    def _is_coming(self, needed: Counter[str]) -> bool:
        """Whether so many pages of each pool are free when the steps under way are done."""
        free = Counter({pool: self.books[pool].num_free for pool in needed})
        for _, pool, pages in self._leaving:
            free[pool] += sum(self.books[pool].num_holders(page) == 1 for page in pages)
        return bool(self._leaving) and all(free[pool] >= count for pool, count in needed.items())

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve the next token's page, putting back worse sequences; False if it has to wait or go."""
        total = sequence.num_tokens
        wanted = pages_for(total, self._page_size)
        needed = Counter({lane.pool: 0 for lane in sequence.lanes})
        for lane in sequence.lanes:
            needed[lane.pool] += max(0, wanted - len(lane.pages))
        while any(count > self.books[pool].num_free for pool, count in needed.items()):
            if self._is_coming(needed):
                return False
            worst = self._worst()
            assert worst is not None
            self.put_back(worst)
            if worst is sequence:
                return False
        self._reserve(sequence, total)
        return True

    def _reserve(self, sequence: Sequence, num_tokens: int) -> None:
        wanted = pages_for(num_tokens, self._page_size)
        for lane in sequence.lanes:
            lane.pages += self.books[lane.pool].take(max(0, wanted - len(lane.pages)))

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
        self.running.remove(sequence)
        self._release(sequence)
        self._queue.step_aside(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for lane in sequence.lanes:
            if self._num_launched > self._num_done:
                self._leaving.append((self._num_launched, lane.pool, lane.pages))
            else:
                self.books[lane.pool].give_back(lane.pages)
            lane.pages = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.stay += 1
        sequence.num_in_flight = 0

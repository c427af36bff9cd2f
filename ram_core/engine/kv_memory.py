"""The pages that sequences hold in all pools, and those on their way back. Plain Python: never imports torch.

Pages that a sequence gives back are free only when every step is done that was launched before: until then
they are leaving. So no page is ever written for its new owner while anybody may still read or write it for
the old one, whatever runs beside the steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from ram_core.engine.pages import PageBook, pages_for
from ram_core.engine.rows import ScheduledRow
from ram_core.engine.sequence import Lane, Sequence


class KvMemory:
    """Gives lanes their pages, out of `books` by the names of pools.

    So many steps were launched so far, and so many have ended; they end in order.
    """

    def __init__(self, books: dict[str, PageBook], page_size: int) -> None:
        self.books = books
        self._page_size = page_size
        self.num_launched = 0
        self.num_done = 0
        # What was given back while steps ran: pool, pages, and the last step that was launched before.
        self._leaving: deque[tuple[int, str, list[int]]] = deque()

    def begin_step(self) -> None:
        """Note that a step was launched: pages that are given back from now on wait for it."""
        self.num_launched += 1

    def end_step(self) -> None:
        """Note that the first step that was launched and did not end is done; pages that waited are free."""
        self.num_done += 1
        while self._leaving and self._leaving[0][0] <= self.num_done:
            _, pool, pages = self._leaving.popleft()
            self.books[pool].give_back(pages)

    def find_prefixes(self, sequence: Sequence) -> list[list[int]]:
        """For each lane the pages of the longest known prefix; the last token is always computed anew."""
        most = (len(sequence.token_ids) - 1) // self._page_size
        return [
            self.books[lane.pool].find(sequence.prefix_keys(lane, most, self._page_size))
            for lane in sequence.lanes
        ]

    def has_room(self, sequence: Sequence, prefixes: list[list[int]]) -> bool:
        """Whether there are pages for a sequence to start behind what its lanes found."""
        return self.has_free(self.needed_behind(sequence, prefixes))

    def has_free(self, needed: Mapping[str, int]) -> bool:
        """Whether so many pages of each pool are free."""
        return all(count <= self.books[pool].num_free for pool, count in needed.items())

    def needed_behind(self, sequence: Sequence, prefixes: list[list[int]]) -> Counter[str]:
        """Free pages that a sequence takes of each pool to start behind what its lanes found."""
        wanted = pages_for(len(sequence.token_ids) + 1, self._page_size)
        needed: Counter[str] = Counter()
        for lane, found in zip(sequence.lanes, prefixes, strict=True):
            needed[lane.pool] += wanted - len(found) + self.books[lane.pool].num_idle(found)
        return needed

    def is_coming(self, needed: Counter[str]) -> bool:
        """Whether so many pages of each pool are free when the steps under way are done."""
        free = Counter({pool: self.books[pool].num_free for pool in needed})
        for _, pool, pages in self._leaving:
            free[pool] += sum(self.books[pool].num_holders(page) == 1 for page in pages)
        return bool(self._leaving) and all(free[pool] >= count for pool, count in needed.items())

    def share(self, lane: Lane, pages: list[int]) -> None:
        """Have a lane begin behind pages that it found."""
        self.books[lane.pool].share(pages)
        lane.pages = pages
        lane.num_named = len(pages)
        lane.num_computed = len(pages) * self._page_size

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Give all lanes the pages that so many tokens take."""
        wanted = pages_for(num_tokens, self._page_size)
        for lane in sequence.lanes:
            lane.pages += self.books[lane.pool].take(max(0, wanted - len(lane.pages)))

    def name_pages(self, row: ScheduledRow) -> None:
        """Let others find the pages that a row's tokens fill; only a draw shows that they are sound."""
        sequence = row.sequence
        if sequence.prefix_root is None:
            return
        num_full = row.end // self._page_size
        for lane in row.lanes:
            # Some may have given their pages back since.
            if lane.pages and num_full > lane.num_named:
                keys = list(sequence.prefix_keys(lane, num_full, self._page_size))
                for index in range(lane.num_named, num_full):
                    self.books[lane.pool].name(lane.pages[index], keys[index])
                lane.num_named = num_full

    def give_back(self, lane: Lane) -> None:
        """Take a lane's pages back, once the steps under way are done."""
        if self.num_launched > self.num_done:
            self._leaving.append((self.num_launched, lane.pool, lane.pages))
        else:
            self.books[lane.pool].give_back(lane.pages)
        lane.pages = []

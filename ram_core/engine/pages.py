"""Who owns which page of a KV pool. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


class PageBook:
    """The free pages of one pool. Page 0, the trash page, is never handed out."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages; the caller has checked `num_free`."""
        assert count <= len(self._free)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages that `take` handed out."""
        self._free.extend(pages)

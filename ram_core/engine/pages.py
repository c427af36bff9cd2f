"""Who holds which page of a KV pool, and which pages hold a prefix that others may share. Plain Python."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

_DIGEST_BYTES = 16


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """Names a full page by the model that wrote it and a digest of all tokens up to the page's end.

    The digest is of a chain that starts with the tenant and the request's salt, so that two tenants' pages
    never have the same key. 128 bits: nobody finds a collision by accident, nor by trying.
    """

    model: str
    digest: bytes


def chain_root(*salt: str) -> bytes:
    """Where a chain of page digests starts."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for part in salt:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def chain_next(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of the page that holds `token_ids` and follows the page, or the root, `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class PageBook:
    """The pages of one pool. Page 0, the trash page, is never handed out.

    A page is held by one sequence or more. One that nobody holds is blank, or idle: it keeps the prefix that
    it is named for until the page is needed, the least recently used first. Without `keeps_idle`, prefixes
    are shared among the living only.
    """

    def __init__(self, num_pages: int, *, keeps_idle: bool = True) -> None:
        self.num_pages = num_pages - 1
        self._keeps_idle = keeps_idle
        self._blank = list(range(num_pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_pages
        self._keys: dict[int, PrefixKey] = {}
        self._pages: dict[PrefixKey, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_free

    def num_holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` pages for a single holder; the caller has checked `num_free`."""
        assert count <= self.num_free
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less for each page; `pages` are a sequence's in order.

        The end of a prefix is of no use without its beginning, so the last page is the first to be reused.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys and self._keeps_idle:
                self._idle[page] = None
            else:
                self._forget(page)
                self._blank.append(page)

    def find(self, keys: Iterable[PrefixKey]) -> list[int]:
        """The pages of the longest known prefix of `keys`; nobody holds them on the caller's behalf yet."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds; sharing these takes them from what is free."""
        return sum(not self._holders[page] for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One holder more for each page that `find` returned."""
        for page in pages:
            if not self._holders[page]:
                del self._idle[page]
            self._holders[page] += 1

    def name(self, page: int, key: PrefixKey) -> None:
        """Let a full page be found; if another holds the same prefix already, that one stays."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def drop(self, models: Container[str]) -> None:
        """Let nobody find what some models wrote, which are gone; their idle pages are blank from now on."""
        for page in [page for page in self._idle if self._keys[page].model in models]:
            del self._idle[page]
            self._forget(page)
            self._blank.append(page)

    def _forget(self, page: int) -> None:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]

"""Whether numbers broke on their way into KV memory, where zeros stand for those that are not finite.

Nothing but its keys and values leads from a token to the logits of a later one. So who looks at these in
every layer knows whether what a model says of a text is made of the model's own numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class KvWatch:
    """Looks at the keys and values of one forward, layer by layer; nothing here waits for the device."""

    def __init__(self) -> None:
        self._sums: list[Float[Tensor, " token"]] = []

    def look(
        self, key: Float[Tensor, "kv_head token dim"], value: Float[Tensor, "kv_head token dim"]
    ) -> None:
        """What one layer is about to remember of each token."""
        # A sum is finite only if all its terms are. It is of float32, as the terms may be of 16 bits: there
        # are numbers that float32 can hold and not add, but no layer could go on with them either.
        self._sums += [each.sum((0, 2), dtype=torch.float32) for each in (key, value)]

    @property
    def is_broken(self) -> Bool[Tensor, " token"]:
        """The tokens of which any layer had a number that is not finite."""
        return ~torch.stack(self._sums).isfinite().all(0)


_watch: ContextVar[KvWatch | None] = ContextVar("kv_watch", default=None)


@contextmanager
def watched_kv() -> Iterator[KvWatch]:
    """Look at all keys and values of the forward that runs inside the block."""
    watch = KvWatch()
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def current_watch() -> KvWatch | None:
    """Who looks at the forward that is under way, if anybody does."""
    return _watch.get()

"""How many cores a thread computes on, beside somebody who needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_all: ContextVar[int] = ContextVar("all_threads")


@contextmanager
def one_thread() -> Iterator[None]:
    """What this thread computes on CPU takes one core, and leaves the others to whoever needs them.

    Threads that compute something together wait for each other in a busy loop.
    """
    before = torch.get_num_threads()
    token = _all.set(before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _all.reset(token)


def all_threads() -> None:
    """From now on, nobody needs the cores that `one_thread` leaves, inside of which this may be."""
    torch.set_num_threads(_all.get(torch.get_num_threads()))

"""How far a load is, told as it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ram_core.engine.pace import Pace

if TYPE_CHECKING:
    from ram_core.engine.newcomers import Newcomer

_PROGRESS_STEP = 0.05
_SOON_S = 0.15
"""A forward that begins so long before its last weights come waits for few of them."""
_LEAST_READ = 0.2
"""Of a load: before, nobody knows how long the rest takes."""


class Listener(Protocol):
    """Who is told of a load, in the thread that does it."""

    def progress(self, fraction: float) -> None:
        """It has come so far, from 0 to 1."""

    def expect(self, newcomer: Newcomer) -> None:
        """Its weights are nearly there: forwards may begin, whose layers wait for theirs."""


class Share:
    """How much of a load is done when so much of one of its parts was read."""

    def __init__(self, listener: Listener, pace: Pace, index: int, num_parts: int) -> None:
        self.total = 0
        self.pace = pace
        self.listener = listener
        self.num_parts = num_parts
        self.on_soon: Callable[[], None] | None = None
        """Called once, when the rest of the part will be there soon."""
        self._index = index
        self._num_read = 0
        self._told = 0.0
        self._began_s = time.monotonic()

    def read(self, num_bytes: int) -> None:
        """Rest after it, and tell of it, in steps of some size."""
        self.pace.rest()
        self._num_read += num_bytes
        done = min(self._num_read / self.total, 1.0) if self.total else 0.0
        if self.on_soon is not None and self._is_soon(done):
            self.on_soon()
            self.on_soon = None
        if done - self._told >= _PROGRESS_STEP:
            self._told = done
            self.listener.progress((self._index + done) / self.num_parts)

    def _is_soon(self, done: float) -> bool:
        took_s = time.monotonic() - self._began_s
        return done >= _LEAST_READ and took_s * (1 - done) <= _SOON_S * done

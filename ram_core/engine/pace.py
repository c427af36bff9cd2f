"""How a load leaves the cores to the steps beside it."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 1 / 8
"""Of a core's time, beside steps: what a load takes in bursts, it gives back by sleeping."""
_LOOK_S = 0.005


class Pace:
    """Has a thread work for a share of the time alone while `is_busy`, and without pause otherwise.

    The lowest priority is not enough: on the cores that a step's threads share, each of its layers waits for
    the slowest of them, and the scheduler lets a thread of any priority go on for milliseconds.
    """

    def __init__(self, is_busy: Callable[[], bool], share: float = SHARE) -> None:
        self._is_busy = is_busy
        self._ratio = (1 - share) / share
        self._worked_s = time.thread_time()

    def rest(self) -> None:
        """Sleep for what this thread has worked since the last time; for after each piece of work."""
        now_s = time.thread_time()
        pause_s, self._worked_s = (now_s - self._worked_s) * self._ratio, now_s
        until_s = time.monotonic() + pause_s
        while self._is_busy() and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_S))

"""How threads that load and verify give way to those that make steps."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

LOADING, CHECKING = 5, 10
"""Niceness of a thread whose pace leaves the cores to the steps, and of one that has none.

A step's threads wait for each other in a busy loop, and leave no core to anybody: at 19 a load of 40 MB got
its turns in 4.6 s, and at 5, at the same pace, in 0.3. Without a pace, 10 is a tenth of a core.
"""


def give_way(niceness: int) -> None:
    """Let every other thread of the machine go before this one, from now on."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

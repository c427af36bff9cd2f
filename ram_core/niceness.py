"""How threads that load and verify give way to those that make steps."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

_NICENESS = 19
"""The lowest that still gets a turn. Beside loads on two cores, one gap between tokens in a hundred was 110
ms long at 10 and is 72 to 95 at this. Idle scheduling starves whoever waits for a thread that holds the
interpreter: a gap of 1.5 s was seen."""


def give_way() -> None:
    """Let every other thread of the machine go before this one, from now on."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

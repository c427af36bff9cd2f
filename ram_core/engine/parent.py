"""What processes of the engine have of the one that began them: its logs' looks, and its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
_SET_PARENT_DEATH_SIGNAL = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process, even a stopped one, whenever and however its parent ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("ram: the server ended before its engine began")

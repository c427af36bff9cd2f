"""What processes of the engine have of the one that began them: its logs' looks, and its end."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

_LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
# The first logs every request; the others complain on import, of kernels not found and of their own code.
_TALKATIVE = {"httpx": logging.WARNING, "torchao": logging.ERROR, "torch.utils._pytree": logging.ERROR}
_SET_PARENT_DEATH_SIGNAL = 1


def begin_logging(level: int | str) -> None:
    """Log to stderr, the same in every process of a server."""
    logging.basicConfig(level=level, format=_LOG_FORMAT)
    for name, least in _TALKATIVE.items():
        logging.getLogger(name).setLevel(least)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process, even a stopped one, whenever and however its parent ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("ram: the server ended before its engine began")

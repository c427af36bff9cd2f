"""How long the suites run: short where every change is tested, in full by `make faults`."""

from __future__ import annotations

import os
from typing import TypeVar

Length = TypeVar("Length", int, float)

IS_FULL = bool(os.environ.get("FULL_LENGTH"))


def full_or_short(full: Length, short: Length) -> Length:
    """The first if `FULL_LENGTH` is in the environment, else the second."""
    return full if IS_FULL else short

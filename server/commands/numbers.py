"""Lists of numbers in flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ram_core.errors import RamError

Number = TypeVar("Number", int, float)


def parse_numbers(flag: str, text: str, number: Callable[[str], Number]) -> list[Number]:
    """The numbers of a list such as "0.1,0.2", none of an empty one; raises `RamError` for anything else."""
    try:
        return [number(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise RamError(f"`--{flag}` must be numbers with commas between them, got {text!r}.") from None

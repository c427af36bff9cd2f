"""What a step needs of the device besides arithmetic: work side by side, and results on their way home."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


class Fork:
    """Runs parts of a step beside each other on CUDA, one after the other elsewhere.

    All parts begin after what the current stream was given before, and what it is given after begins when
    all have ended. So a step is over, on all streams, before the next one on the current stream begins, and
    memory that one leaves to another (pages, activations) is theirs in that order, without further ado.
    """

    def __init__(self, device: torch.device) -> None:
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, parts: Sequence[Callable[[], Part]]) -> list[Part]:
        """What each part returns: the first runs on the current stream, the others on another."""
        if self._side is None or len(parts) < 2:
            return [part() for part in parts]
        main = torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            others = [part() for part in parts[1:]]
        first = parts[0]()
        main.wait_stream(self._side)
        return [first, *others]


@contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Work that another thread gives the device here waits for no step, nor any step for it.

    It is done when the block ends.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def send_home(table: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there; None where it is there already."""
    if table.device.type != "cuda":
        return table.clone(), None
    home = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    home.copy_(table, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return home, arrived

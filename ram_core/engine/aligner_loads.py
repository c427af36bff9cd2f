"""Loads aligners beside the steps: one at a time, in a thread that takes little from them."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ram_core.engine.load_share import Listener
from ram_core.engine.messages import AlignerFailed, AlignerProgress, LoadAligner
from ram_core.engine.newcomers import Newcomer
from ram_core.errors import RamError
from ram_core.models.source import one_line
from ram_core.niceness import LOADING, give_way

logger = logging.getLogger(__name__)

_SWITCH_S = 0.0002
"""A step asks for the interpreter at every operation, and waits so long each time if a load has it: with
Python's 5 ms, one step took 580 ms beside transformers' loading of a model, with 0.5 ms 135, nice 93."""

Work = Callable[[LoadAligner, Listener], Sequence[Newcomer]]


@dataclass(frozen=True, slots=True)
class Expected:
    """The one model of an aligner is nearly in memory."""

    order: LoadAligner
    newcomer: Newcomer


@dataclass(frozen=True, slots=True)
class Arrived:
    """All models of an aligner are in memory."""

    order: LoadAligner
    newcomers: tuple[Newcomer, ...]


Outcome = AlignerProgress | Expected | AlignerFailed | Arrived


class AlignerLoads:
    """Does `work` for one order after the other; `wake` is called when there is something to `take`.

    The thread that makes the steps calls it.
    """

    def __init__(self, work: Work, wake: Callable[[], None]) -> None:
        self._work = work
        self._wake = wake
        self._orders: deque[LoadAligner] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._current: LoadAligner | None = None

    def begin(self, order: LoadAligner) -> None:
        """Load an aligner when those that were ordered before are there."""
        self._orders.append(order)
        self._begin_next()

    @property
    def orders(self) -> list[LoadAligner]:
        """Those that have no outcome yet."""
        return [*([self._current] if self._current else []), *self._orders]

    def take(self) -> list[Outcome]:
        """What has come of the orders since the last time."""
        taken = []
        while self._outcomes:
            outcome = self._outcomes.popleft()
            taken.append(outcome)
            if not isinstance(outcome, AlignerProgress | Expected):
                self._current = None
        self._begin_next()
        return taken

    def _begin_next(self) -> None:
        if self._current is not None or not self._orders:
            return
        self._current = self._orders.popleft()
        has_begun = threading.Event()
        num_threads = torch.get_num_threads()
        thread = threading.Thread(
            target=self._run, args=(self._current, has_begun), name="ram-loader", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # No memory, or too many of them: the steps go on.
            self._tell(AlignerFailed(self._current.aligner, one_line(error)))
            return
        has_begun.wait()
        # What the thread said for itself holds for others that begin later, too.
        torch.set_num_threads(num_threads)

    def _run(self, order: LoadAligner, has_begun: threading.Event) -> None:
        # Not to fight the steps for all cores at once, nor as an equal for the last of them. A thread's first
        # look at the number gives it everybody's: what is set before that does not last.
        torch.get_num_threads()
        torch.set_num_threads(1)
        give_way(LOADING)
        has_begun.set()
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        try:
            self._outcomes.append(self._outcome(order))
        finally:
            sys.setswitchinterval(before_s)
        self._wake()

    def _outcome(self, order: LoadAligner) -> Outcome:
        try:
            return Arrived(order, tuple(self._work(order, _Teller(order, self._tell))))
        except RamError as error:
            return AlignerFailed(order.aligner, str(error))
        except Exception as error:
            logger.exception("loading %s failed", order.aligner)
            return AlignerFailed(order.aligner, one_line(error))

    def _tell(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._wake()


@dataclass(frozen=True, slots=True)
class _Teller:
    """Passes on what is told of a load."""

    order: LoadAligner
    tell: Callable[[Outcome], None]

    def progress(self, fraction: float) -> None:
        self.tell(AlignerProgress(self.order.aligner, fraction))

    def expect(self, newcomer: Newcomer) -> None:
        self.tell(Expected(self.order, newcomer))

"""The engine's process: orders in, news out, and nothing else. Started by `ram_core.engine.process`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

import zmq

from ram_core.engine.client import HEARTBEAT_S
from ram_core.engine.followers import begin_followers
from ram_core.engine.parent import begin_logging, die_with
from ram_core.engine.wire import (
    AlignersChanged,
    Load,
    Loading,
    News,
    Order,
    Ready,
    Refused,
    Report,
    Stop,
    decode_order,
    encode,
)
from ram_core.errors import RamError

if TYPE_CHECKING:
    from ram_core.engine.engine import Engine

_LAST_WORDS_MS = 1000

logger = logging.getLogger("ram_core.engine.worker")


class Line:
    """Both directions of the talk with the parent."""

    def __init__(self, orders_at: str, news_at: str) -> None:
        context = zmq.Context()
        self._orders = context.socket(zmq.PULL)
        self._news = context.socket(zmq.PUSH)
        for socket in (self._orders, self._news):
            # Nothing may be lost, nor a step wait for a parent that is busy.
            socket.set_hwm(0)
            socket.linger = _LAST_WORDS_MS
        self._orders.bind(orders_at)
        self._news.connect(news_at)
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        for source in (self._orders, self._alarm):
            self._poller.register(source, zmq.POLLIN)

    def tell(self, news: News) -> None:
        """Hand on news; never waits."""
        self._news.send(encode(news))

    def wait(self) -> Order:
        """The next order, however long it takes."""
        return decode_order(self._orders.recv())

    def take(self, wait_s: float) -> Iterator[Order]:
        """All orders that are there; waits at most `wait_s` for a first one, or for `wake`."""
        ready = dict(self._poller.poll(round(wait_s * 1000)))
        if self._alarm in ready:
            os.eventfd_read(self._alarm)
        while self._orders.poll(0):
            yield decode_order(self._orders.recv())

    def wake(self) -> None:
        """Have `take` look around at once; any thread may call it."""
        os.eventfd_write(self._alarm, 1)


def main(orders_at: str, news_at: str, parent_pid: str) -> None:
    """Load what the parent orders, then step until it says to stop; exit code 1 if that fails."""
    die_with(int(parent_pid))
    line = Line(orders_at, news_at)
    load = line.wait()
    assert isinstance(load, Load), "the first order is what to load"
    begin_logging(load.log_level)
    begin_followers(load)
    with ExitStack() as exits:
        try:
            engine = exits.enter_context(_load(load, line))
        except RamError as error:
            line.tell(Refused(error))
            sys.exit(1)
        assert engine is not None, "this is the first rank"
        engine.wake = line.wake
        line.tell(Ready(engine.limits, engine.began))
        try:
            run(engine, line)
        except Exception:
            logger.exception("the engine's step loop died")
            sys.exit(1)


def _load(load: Load, line: Line) -> AbstractContextManager[Engine | None]:
    from transformers.utils import logging as transformers_logging

    from ram_core.engine.ranks import engine_of_ranks

    transformers_logging.disable_progress_bar()
    return engine_of_ranks(load.config, lambda words: line.tell(Loading(words)))


def run(engine: Engine, line: Line) -> None:
    """The step loop: one piece of news a step, and while idle a sign of life now and then."""
    while True:
        for order in line.take(0 if engine.has_work else HEARTBEAT_S):
            if isinstance(order, Stop):
                return
            assert not isinstance(order, Load), "an engine loads once"
            engine.handle(order)
        events = engine.step() if engine.has_work else ()
        line.tell(Report(tuple(events), engine.stats))
        if outcomes := engine.tend():
            line.tell(AlignersChanged(tuple(outcomes), engine.limits))

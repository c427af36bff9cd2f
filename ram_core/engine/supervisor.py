"""The engine in a process of its own that is begun anew whenever it dies, behind the client interface."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from ram_core.engine.client import StreamingClient
from ram_core.engine.config import EngineConfig
from ram_core.engine.messages import Command, EngineStats, Request
from ram_core.engine.process import EngineProcess
from ram_core.engine.streams import RequestStream
from ram_core.engine.wire import AlignersChanged, Loading, Ready, Refused, Report
from ram_core.errors import EngineUnavailable, InvalidRequest, RamError

_MAX_PAUSE_S = 30.0
_HEALTHY_S = 60.0
"""A life of that length makes the deaths before it forgotten."""
_STOP_GRACE_S = 5.0
_MAX_STILLBORN = 2
"""After so many lives in a row that did not come to take requests, the next begins without aligners."""
_CLOSED = "the engine was closed"

logger = logging.getLogger(__name__)


class SupervisedEngine(StreamingClient):
    """An `EngineClient` whose step loop runs in another process.

    If that dies, the requests on it fail, and another is started, after a pause that doubles with each death
    in a row, with the aligners that were in memory. Only a first start that fails is final.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(config, self._send)
        self.num_restarts = 0
        self._config = config
        self._progress = progress
        self._process: EngineProcess | None = None
        # Lives in a row that ended before they took requests.
        self._num_stillborn = 0
        self._loaded: Future[None] = Future()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ram-supervisor", daemon=True)

    @classmethod
    def start(
        cls, config: EngineConfig, progress: Callable[[str], None] = lambda _: None
    ) -> SupervisedEngine:
        """Begin the process and wait until it has loaded; see `begin` and `wait_loaded`."""
        client = cls(config, progress)
        client.begin()
        client.wait_loaded()
        return client

    def begin(self) -> None:
        """Have the process started; it loads while the caller does something else."""
        self._thread.start()

    def wait_loaded(self) -> None:
        """Return once requests are taken.

        Raises:
            CheckpointError: a model cannot be served.
            EngineUnavailable: the process died, or was closed, before it had loaded.
        """
        self._loaded.result()

    @property
    def pid(self) -> int | None:
        """The engine's process, if there is one just now."""
        process = self._process
        return None if process is None else process.pid

    def submit(self, request: Request) -> RequestStream:
        """Admit a request or refuse it at once; see `EngineClient`. Call it from a running event loop."""
        try:
            return super().submit(request)
        except OverflowError:
            raise InvalidRequest("A number in the request does not fit into 64 bits.") from None

    async def close(self) -> None:
        """End the process; running requests fail with `EngineUnavailable`."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """As `close`, for callers without an event loop."""
        self._closing.set()
        self._thread.join()

    def _send(self, command: Command) -> None:
        process = self._process
        if process is not None:
            process.send(command)

    def _run(self) -> None:
        num_deaths = 0
        while not self._closing.is_set():
            began_s = time.monotonic()
            error = self._live()
            if self._closing.is_set():
                break
            if not self._loaded.done():
                self._loaded.set_exception(error)
                return
            num_deaths = 1 if time.monotonic() - began_s > _HEALTHY_S else num_deaths + 1
            pause_s = pause_before_restart(num_deaths)
            logger.error("%s It is started again in %g s.", error, pause_s)
            if not self._closing.wait(pause_s):
                self.num_restarts += 1
        self._streams.shut(_CLOSED)
        if not self._loaded.done():
            self._loaded.set_exception(EngineUnavailable("The engine was closed before it had loaded."))

    def _live(self) -> RamError:
        """One life of the process, from its start to its end; returns why it ended."""
        process, error = None, None
        try:
            self._process = process = EngineProcess(self._next_config())
            error = self._listen(process)
        except Exception as cause:
            logger.exception("the engine's process could not be run")
            error = EngineUnavailable(f"The engine's process could not be run: {cause}")
        # Nobody is let in any more, and everybody told, before anything else is done.
        has_served = self.trouble is None
        self._num_stillborn = 0 if has_served else self._num_stillborn + 1
        is_closing = self._closing.is_set()
        self._streams.shut(_CLOSED if is_closing else "the engine has died and is being restarted")
        self._stats = EngineStats()
        self._process = None
        if not is_closing:
            self._residents.lose()
        if process is not None:
            process.end(_STOP_GRACE_S if is_closing and has_served else 0)
            error = error or EngineUnavailable(f"The engine's process {process.how_it_ended}.")
        assert error is not None, "what never began has failed"
        return error

    def _next_config(self) -> EngineConfig:
        """At first what was configured; after a death with the aligners that were there."""
        if not self._loaded.done():
            return self._config
        sources = self._residents.sources if self._num_stillborn < _MAX_STILLBORN else ()
        return replace(self._config, aligners=sources)

    def _listen(self, process: EngineProcess) -> RamError | None:
        """Spread the process' news until it ends or is to end; returns what it gave as the reason, if any."""
        while not self._closing.is_set():
            has_ended = process.has_ended
            match process.receive():
                case Report(events, stats):
                    self._stats = stats
                    self._streams.deliver(events)
                case AlignersChanged(outcomes, limits):
                    self._streams.renew(limits)
                    self._residents.take(outcomes)
                case Ready(limits, began):
                    self._stats = EngineStats(last_progress_s=time.monotonic())
                    self._streams.open(limits)
                    self._residents.begin(began)
                    if not self._loaded.done():
                        self._loaded.set_result(None)
                case Loading(line):
                    self._progress(line)
                case Refused(error):
                    return error
                case None if has_ended:
                    return None
        return None


def pause_before_restart(num_deaths: int) -> float:
    """Seconds to wait after so many deaths in a row: none after the first, then 1, 2, 4, … up to 30."""
    return min(2.0 ** min(num_deaths - 2, 10), _MAX_PAUSE_S) if num_deaths > 1 else 0.0

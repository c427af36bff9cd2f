"""The engine in a thread of its own, behind the asynchronous client interface.

Only frozen commands and events cross: a queue in, one callback a step out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from queue import Empty, SimpleQueue

from ram_core.engine.client import HEARTBEAT_S, StreamingClient
from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.load_bank import Progress
from ram_core.engine.messages import Command

_CLOSED = "the engine was closed"

logger = logging.getLogger(__name__)


class EngineThread(StreamingClient):
    """An `EngineClient` whose step loop runs in a background thread of this process.

    If the step loop dies, the engine is dead for good.
    """

    num_restarts = 0

    def __init__(self, engine: Engine) -> None:
        # None asks the thread to end, and True only to look around.
        self._inbox: SimpleQueue[Command | bool | None] = SimpleQueue()
        super().__init__(engine.config, self._inbox.put)
        self._engine = engine
        self._stats = engine.stats
        self._thread = threading.Thread(target=self._run, name="ram-engine", daemon=True)

    @classmethod
    def start(cls, config: EngineConfig, progress: Progress = lambda _: None) -> EngineThread:
        """Load the models in the calling thread, then run the step loop in its own.

        Raises:
            CheckpointError: a model cannot be served.
        """
        client = cls(Engine.load(config, progress))
        engine = client._engine
        engine.wake = partial(client._inbox.put, True)
        client._streams.open(engine.limits)
        client._residents.begin(engine.began)
        client._thread.start()
        return client

    async def close(self) -> None:
        """End the step loop; running requests fail with `EngineUnavailable`."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        trouble = _CLOSED
        try:
            while self._take_commands():
                self._streams.deliver(self._engine.step())
                self._tend()
        except Exception:
            logger.exception("the engine's step loop died")
            trouble = "the engine has died"
        self._streams.shut(trouble)
        if trouble != _CLOSED:
            self._residents.lose()

    def _take_commands(self) -> bool:
        """Hand on what has come in; wait for something if there is nothing to do. False: end the loop."""
        while not self._engine.has_work or not self._inbox.empty():
            try:
                command = self._inbox.get(timeout=HEARTBEAT_S)
            except Empty:
                self._stats = self._engine.stats
                continue
            if command is None:
                return False
            if not isinstance(command, bool):
                self._engine.handle(command)
            self._tend()
        return True

    def _tend(self) -> None:
        """Pass on what has come of orders about aligners, and the numbers."""
        if outcomes := self._engine.tend():
            self._streams.renew(self._engine.limits)
            self._residents.take(outcomes)
        self._stats = self._engine.stats

"""One life of the engine's process: spawned, spoken with, and reaped."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack

import zmq

from ram_core.engine.config import EngineConfig
from ram_core.engine.wire import Load, News, Order, Stop, decode_news, encode

# A fresh interpreter with this one's search path: nothing of the parent's memory or `__main__` comes along.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[4:]; from ram_core.engine.worker import main; main(*sys.argv[1:4])"
)
_LOOK_MS = 100
"""So often it is looked whether the process still lives."""
_RECONNECT_MS = 10
_HUGE_PAGES = "glibc.malloc.hugetlb"


class EngineProcess:
    """A running `ram_core.engine.worker`. One thread owns it; `send` alone may be called from any.

    That thread must live as long as the process, which the kernel ends with the thread that began it.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._sending = threading.Lock()
        with ExitStack() as exits:
            # Only this user may enter the directory, and so connect.
            self._home = tempfile.TemporaryDirectory(prefix="ram-engine-")
            exits.callback(self._home.cleanup)
            self._addresses = (f"ipc://{self._home.name}/orders", f"ipc://{self._home.name}/news")
            self._context = exits.enter_context(zmq.Context())
            self._orders = exits.enter_context(_open(self._context, zmq.PUSH))
            self._news = exits.enter_context(_open(self._context, zmq.PULL))
            # Whoever sends, connects: such a socket queues without a peer, and never makes its sender wait.
            self._orders.connect(self._addresses[0])
            self._news.bind(self._addresses[1])
            self._process = self._spawn()
            self._exits = exits.pop_all()
        self.send(Load(config, logging.getLogger().getEffectiveLevel()))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def how_it_ended(self) -> str:
        """Its exit code, or the signal that killed it, in words."""
        code = self._process.poll()
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def send(self, order: Order) -> None:
        """Hand an order on; never waits, and does nothing once the process is over.

        Raises:
            OverflowError: a number beyond 64 bits.
        """
        frame = encode(order)
        with self._sending:
            if not self._orders.closed:
                self._orders.send(frame, zmq.NOBLOCK)

    def receive(self) -> News | None:
        """The next news; None if there was none for a while. A process that ended may still have some."""
        if not self._news.poll(_LOOK_MS):
            return None
        # Both are connected now: the files have done their work, and cannot be left behind.
        self._home.cleanup()
        return decode_news(self._news.recv())

    def end(self, grace_s: float) -> None:
        """Ask the process to stop, kill it after `grace_s`, and leave nothing of it behind."""
        self.send(Stop())
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._sending:
            self._exits.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-c", _BOOT, *self._addresses, str(os.getpid()), *sys.path]
        # Born deaf to what is meant for the whole group: its parent ends it, when the last answer is out.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            environment = os.environ | _memory_options(os.environ)
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)  # noqa: S603 - ourselves
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _memory_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Have glibc ask for huge pages, which must be said before a process begins.

    What is laid out for the CPU is its memory: it takes half the time in pages of 2 MiB, as each page that a
    program touches first costs a fault. What the environment says already holds.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES in tunables:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))}


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket that holds as much as there is, and drops it when closed."""
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 0
    socket.reconnect_ivl = _RECONNECT_MS
    return socket

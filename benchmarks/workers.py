"""Each way in a process of its own, so that its peak memory is its own, asked one at a time."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers


class Worker:
    """The other end of an object that lives in a process of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.peak_mib = 0.0

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method there, wait for what it returns, and note the most memory it ever held.

        Raises:
            RuntimeError: it failed there; the message is its traceback.
        """
        self._pipe.send((method, args))
        return self.wait()

    def wait(self) -> Any:
        is_fine, answer, self.peak_mib = self._pipe.recv()
        if not is_fine:
            raise RuntimeError(answer)
        return answer


@contextmanager
def worker(build: Callable[..., object], *args: Any) -> Iterator[Worker]:
    """Build an object in a new process; it is ready when this returns, and gone after the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
    process.start()
    theirs.close()
    try:
        started = Worker(ours)
        started.wait()
        yield started
        ours.send(None)
        process.join(30)
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, build: Callable[..., object], args: tuple[Any, ...]) -> None:
    _silence_transformers()
    try:
        target = build(*args)
        pipe.send((True, None, peak_mib()))
        while (task := pipe.recv()) is not None:
            method, arguments = task
            answer = getattr(target, method)(*arguments)
            pipe.send((True, answer, peak_mib()))
    except Exception:
        pipe.send((False, traceback.format_exc(), peak_mib()))


def peak_mib() -> float:
    """The most memory this process ever held: on the device if it has used one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


def peak_resident_mib(pid: int | str = "self") -> float:
    """The most memory a process ever held resident, without what its parent held before it began."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        # Not Linux; there the figure may be the parent's.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**10


def tree_peak_mib(pid: int) -> float:
    """The sum of what a process and all that it started ever held resident; 0 for what has ended."""
    return sum(peak_resident_mib(each) for each in process_tree(pid))


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Let these processes and all that they started have no CPU inside the block."""
    trees = [each for pid in pids for each in process_tree(pid)]
    for pid in trees:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in trees:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def process_tree(pid: int) -> list[int]:
    """A process and all that it started, as long as it lives."""
    if not Path(f"/proc/{pid}/status").exists():
        return []
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]
    return [pid, *(each for child in children for each in process_tree(child))]


def _silence_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Its batching tells at level ERROR that it could not look up what it was given.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)

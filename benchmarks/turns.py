"""Processes that take turns with the streams that they hold."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from benchmarks.workers import Worker

Name = TypeVar("Name", bound=Hashable)


def best_steps_ms(workers: Mapping[Name, Worker], num_steps: int, num_rounds: int) -> dict[Name, float]:
    """Milliseconds a step of each, the best turn of all rounds; a turn is the mean of its steps.

    Every turn begins with a step that does not count: what the system reclaimed of a process while it waited
    for its turn comes back there.
    """
    best: dict[Name, float] = {}
    for _ in range(num_rounds):
        for name, worker in workers.items():
            worker.ask("steps", 1)
            took = worker.ask("steps", num_steps).steps_s
            mean_ms = sum(took) / num_steps * 1e3
            best[name] = min(best.get(name, mean_ms), mean_ms)
    return best

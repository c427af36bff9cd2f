"""What the engine itself takes of a step, beside the models' forwards and the resampling.

Both are timed from outside, by wrapping them; the rest of a step is planning, packing, copying and telling.
On a device of its own the wrappers wait for it, and steps do not overlap.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import Benchmark, Options, Pair, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import worker
from ram_core.engine import runner

# The engine's share of an aligned step.
PREDICTED = {1: 0.06, 8: 0.04, 32: 0.04}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached at the largest batch."""
    largest = max(options.batches)
    return [
        Claim(_share(batch), PREDICTED.get(batch), at_most=0.05 if batch == largest else None)
        for batch in options.batches
    ]


def _share(batch: int) -> str:
    return f"batch {batch}: the engine's share of an aligned step"


def add_options(options: Options) -> None:
    options.add("--batches", [1, 8, 32], "sequences at once", quick=[1, 4])
    options.add("--prompt", 32, "tokens in each prompt", quick=8)
    options.add("--steps", 64, "steps of each batch", quick=8)


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of some steps, and those of them in models' forwards and in the resampling."""

    steps_s: float
    forwards_s: float
    resampling_s: float

    @property
    def own_s(self) -> float:
        return self.steps_s - self.forwards_s - self.resampling_s


class Timed:
    """Adds up the time that a function takes."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self.spent_s = 0.0
        self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _settle()
        began = time.perf_counter()
        try:
            return self._work(*args, **kwargs)
        finally:
            _settle()
            self.spent_s += time.perf_counter() - began
            self.num_calls += 1


class TimedEngine(EngineWay):
    """Our engine, with its models and its resampling wrapped."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Aligners of one architecture are served by one model.
        models = list(dict.fromkeys([self.engine.bank.proposal, *self.engine.bank.aligners.values()]))
        self._forwards = [Timed(model.forward) for model in models]
        for model, timed in zip(models, self._forwards, strict=True):
            model.forward = timed  # type: ignore[method-assign]
        self._resampling = Timed(runner.draw_tokens)  # type: ignore[attr-defined]
        runner.draw_tokens = self._resampling  # type: ignore[attr-defined]

    def parts(self, num_steps: int) -> Parts:
        """Some steps of the streams that are held.

        Raises:
            RuntimeError: the engine did not go through what is wrapped.
        """
        forwards_s, resampling_s = self._spent_s()
        num_calls = self._resampling.num_calls
        steps_s = sum(self.steps(num_steps).steps_s)
        if self._resampling.num_calls - num_calls != num_steps or not self._forwards[0].num_calls:
            raise RuntimeError("the engine computes its steps in another way than this command knows")
        after_forwards_s, after_resampling_s = self._spent_s()
        return Parts(steps_s, after_forwards_s - forwards_s, after_resampling_s - resampling_s)

    def _spent_s(self) -> tuple[float, float]:
        return sum(timed.spent_s for timed in self._forwards), self._resampling.spent_s


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed_job(pair: Pair, options: argparse.Namespace) -> Job:
    """Room for the largest batch; parts of steps that overlap, or were captured, cannot be told apart."""
    max_batch = max(options.batches)
    return Job(
        pair.proposal,
        pair.aligners,
        options.device,
        options.dtype,
        max_batch,
        pair.kv_bytes(max_batch, options.prompt + options.steps + 32, options.dtype),
        is_overlapping=False,
        cuda_graphs=False,
    )


def run(options: argparse.Namespace) -> Outcome:
    found: dict[tuple[int, str], Parts] = {}
    with checkpoints(options) as pair, ExitStack() as stack:
        timed = stack.enter_context(worker(TimedEngine, timed_job(pair, options)))
        for batch in options.batches:
            say(f"overhead: batch {batch}")
            prompts = random_prompts(options, batch, options.prompt, seed=0)
            for way, aligner in (("aligned", 0), ("identity", -1)):
                timed.ask("hold", prompts, [aligner] * batch)
                timed.ask("steps", 4)
                found[batch, way] = timed.ask("parts", options.steps)
                timed.ask("release")
        peak_mib = timed.peak_mib
    rows: list[list[Cell]] = []
    for (batch, way), parts in found.items():
        each = [s / options.steps * 1e3 for s in (parts.forwards_s, parts.resampling_s, parts.own_s)]
        rows.append([batch, way, *each, parts.own_s / parts.steps_s, peak_mib])
    columns = ["batch", "way", "forwards, ms a step", "resampling, ms", "engine, ms"]
    title = f"Where a step's time goes, {options.dtype}"
    table = Table(title, [*columns, "engine ÷ step", "peak MiB"], rows)
    figures = {
        _share(batch): parts.own_s / parts.steps_s
        for (batch, way), parts in found.items()
        if way == "aligned"
    }
    return Outcome([table], figures)


BENCHMARK = Benchmark("overhead", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

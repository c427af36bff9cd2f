"""A step's time against the number of aligners that its sequences use, and the memory that they take.

Every count of aligners has a process of its own that loads so many; the rows of the batch are spread evenly
over them.

    python -m benchmarks.aligners
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.shapes import PAIRS
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.turns import best_steps_ms
from benchmarks.workers import worker

# Step with so many aligners ÷ step with one, by batch and count.
PREDICTED = {(8, 2): 1.08, (8, 4): 1.25, (8, 8): 1.55, (32, 2): 1.04, (32, 4): 1.1, (32, 8): 1.25}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected; no count but the first has a bar."""
    cases = [(batch, count) for batch in options.batches for count in options.counts if count > 1]
    return [Claim(_versus(batch, count), PREDICTED.get((batch, count))) for batch, count in cases]


def _versus(batch: int, count: int) -> str:
    return f"batch {batch}: step, {count} aligners ÷ 1"


def add_options(options: Options) -> None:
    options.add("--batches", [8, 32], "sequences at once", quick=[4])
    options.add("--counts", [0, 1, 2, 4, 8], "aligners in a batch; 0 is the proposal alone", quick=[0, 1, 2])
    options.add("--prompt", 32, "tokens in each prompt", quick=8)
    options.add("--steps", 4, "steps in a turn", quick=2)
    options.add("--rounds", 6, "turns of every count", quick=2)


def run(options: argparse.Namespace) -> Outcome:
    max_batch = max(options.batches)
    num_tokens = options.prompt + (options.steps + 1) * options.rounds + 32
    with checkpoints(options, max(options.counts)) as pair, ExitStack() as stack:
        workers = {}
        for count in options.counts:
            room = pair.kv_bytes(max_batch, num_tokens, options.dtype, is_aligned=count > 0)
            job = Job(pair.proposal, pair.aligners[:count], options.device, options.dtype, max_batch, room)
            workers[count] = stack.enter_context(worker(EngineWay, job))
        found = {}
        for batch in options.batches:
            say(f"aligners: batch {batch}")
            prompts = random_prompts(options, batch, options.prompt, seed=0)
            for count, at in workers.items():
                at.ask("hold", prompts, spread(batch, count))
            found[batch] = best_steps_ms(workers, options.steps, options.rounds)
            for at in workers.values():
                at.ask("release")
        peaks = {count: at.peak_mib for count, at in workers.items()}
    return _outcome(options, found, peaks)


def spread(batch: int, count: int) -> list[int]:
    """An aligner for each row, all of them used as often as can be; -1 where there is none."""
    return [row % count if count else -1 for row in range(batch)]


def _outcome(
    options: argparse.Namespace, found: dict[int, dict[int, float]], peaks: dict[int, float]
) -> Outcome:
    rows: list[list[Cell]] = []
    figures = {}
    for batch, ms in found.items():
        for count in ms:
            ratio = ms[count] / ms[1] if 1 in ms else None
            rows.append([batch, count, ms[count], batch / ms[count] * 1e3, ratio, peaks[count]])
            if count > 1 and ratio is not None:
                figures[_versus(batch, count)] = ratio
    size = PAIRS[options.pair][1].num_parameters / 1e6
    columns = ["batch", "aligners", "ms a step", "tokens/s", "step ÷ one aligner", "peak MiB"]
    title = f"Decode with several aligners of {size:.1f} M parameters, {options.dtype}"
    return Outcome([Table(title, columns, rows)], figures)


BENCHMARK = Benchmark("aligners", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

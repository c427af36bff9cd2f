"""A step's time against the length of the context, beside the machine's limit.

python -m benchmarks.context
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.limits import Machine, Speed, step_cost
from benchmarks.shapes import PAIRS
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.turns import best_steps_ms
from benchmarks.workers import worker

# By batch and context: aligned ÷ identity, and the share of the limit.
PREDICTED = {
    (1, 128): (1.25, 0.75),
    (1, 512): (1.25, 0.7),
    (1, 2048): (1.25, 0.5),
    (1, 8000): (1.2, 0.35),
    (8, 128): (1.25, 0.55),
    (8, 512): (1.2, 0.4),
    (8, 2048): (1.2, 0.3),
}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected; there are no bars."""
    found = []
    for batch, context in cases(options):
        ratio, share = PREDICTED.get((batch, context), (None, None))
        found += [Claim(_versus(batch, context), ratio), Claim(_share(batch, context), share)]
    return found


def _versus(batch: int, context: int) -> str:
    return f"batch {batch}, context {context}: step, aligned ÷ identity"


def _share(batch: int, context: int) -> str:
    return f"batch {batch}, context {context}: limit ÷ step, aligned"


def add_options(options: Options) -> None:
    options.add("--batches", [1, 8], "sequences at once", quick=[1, 2])
    options.add("--contexts", [128, 512, 2048, 8000], "tokens behind each sequence", quick=[32, 64])
    options.add("--most", 16_384, "leave out what holds more tokens in all: its prompts take minutes")
    options.add("--steps", 4, "steps in a turn", quick=2)
    options.add("--rounds", 5, "turns of every way", quick=2)


def cases(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Batches and contexts that are measured."""
    return [(b, c) for b in options.batches for c in options.contexts if b * c <= options.most]


def run(options: argparse.Namespace) -> Outcome:
    steps = (options.steps + 1) * options.rounds + 32
    max_batch = max(options.batches)

    def room(*, is_aligned: bool) -> int:
        return max(
            pair.kv_bytes(b, c + steps, options.dtype, is_aligned=is_aligned) for b, c in cases(options)
        )

    with checkpoints(options) as pair, ExitStack() as stack:
        aligned = Job(
            pair.proposal, pair.aligners, options.device, options.dtype, max_batch, room(is_aligned=True)
        )
        jobs = {
            "aligned": aligned,
            "identity": replace(aligned, aligners=(), kv_bytes=room(is_aligned=False)),
        }
        machine = stack.enter_context(worker(Machine, options.device, options.dtype, options.quick))
        speed = machine.ask("measure")
        workers = {way: stack.enter_context(worker(EngineWay, job)) for way, job in jobs.items()}
        found = {}
        for batch, context in cases(options):
            say(f"context: batch {batch}, {context} tokens")
            for at in workers.values():
                at.ask("hold", random_prompts(options, batch, context, seed=0))
            found[batch, context] = best_steps_ms(workers, options.steps, options.rounds)
            for at in workers.values():
                at.ask("release")
        peaks = {way: at.peak_mib for way, at in workers.items()}
    return _outcome(options, found, speed, peaks)


def _outcome(
    options: argparse.Namespace,
    found: dict[tuple[int, int], dict[str, float]],
    speed: Speed,
    peaks: dict[str, float],
) -> Outcome:
    proposal, aligner = PAIRS[options.pair]
    rows: list[list[Cell]] = []
    figures = {}
    for (batch, context), ms in found.items():
        for way in ms:
            aligners = [aligner] if way == "aligned" else []
            cost = step_cost(proposal, aligners, batch, context, options.dtype)
            limit = speed.limit_ms(cost)
            if way == "aligned":
                figures[_share(batch, context)] = limit / ms[way]
            cells: list[Cell] = [batch, context, way, ms[way], ms[way] / ms["identity"], cost.num_bytes / 1e6]
            rows.append([*cells, limit, speed.kind(cost), limit / ms[way], peaks[way]])
        figures[_versus(batch, context)] = ms["aligned"] / ms["identity"]
    columns = ["batch", "context", "way", "ms a step", "step ÷ identity", "MB a step", "limit, ms", "set by"]
    title = (
        f"Decode by context, {options.dtype}; {speed.bandwidth / 1e9:.1f} GB/s, "
        f"{speed.flops / 1e9:.0f} GFLOP/s in the same run"
    )
    table = Table(title, [*columns, "share of the limit", "peak MiB"], rows)
    return Outcome([table], figures)


BENCHMARK = Benchmark("context", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

"""A step's time and the memory it takes, against the number of aligners that its sequences use.

Aligners are full models, with a forward each (loop) or in one module (bank), or LoRA adapters of one base.
Every way and count has a process of its own that loads so many; the rows of the batch are spread evenly over
them.

    python -m benchmarks.aligners
    python -m benchmarks.aligners --most              # 64 full aligners too
    python -m benchmarks.aligners --device cuda --dtype bfloat16 --pair llama --batches 64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.adapters import save_adapter
from benchmarks.common import Benchmark, Options, Pair, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.shapes import PAIRS
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.turns import best_steps_ms
from benchmarks.workers import worker

NONE, LOOP, BANK, LORA = "none", "loop", "bank", "LoRA"
MOST = 64


class Case(NamedTuple):
    """How many aligners, and in which way."""

    way: str
    count: int


ONE = Case(LOOP, 1)
"""What all others are compared with: an aligner that is alone takes the same way with and without a bank."""

# Step ÷ step of one aligner, by batch and case; at batch 64 of a GPU, by the bytes that a step reads.
PREDICTED = {
    (8, Case(LOOP, 4)): 1.25,
    (8, Case(BANK, 4)): 1.2,
    (8, Case(LOOP, 16)): 1.55,
    (8, Case(BANK, 16)): 1.45,
    (8, Case(LOOP, MOST)): 1.55,
    (8, Case(BANK, MOST)): 1.45,
    (8, Case(LORA, 1)): 1.02,
    (8, Case(LORA, 4)): 1.03,
    (8, Case(LORA, 16)): 1.05,
    (8, Case(LORA, 64)): 1.05,
    (32, Case(LOOP, 4)): 1.12,
    (32, Case(BANK, 4)): 1.07,
    (32, Case(LOOP, 16)): 1.5,
    (32, Case(BANK, 16)): 1.35,
    (32, Case(LOOP, MOST)): 2.0,
    (32, Case(BANK, MOST)): 1.7,
    (32, Case(LORA, 1)): 1.02,
    (32, Case(LORA, 4)): 1.03,
    (32, Case(LORA, 16)): 1.06,
    (32, Case(LORA, 64)): 1.1,
    (64, Case(BANK, 16)): 2.1,
    (64, Case(LORA, 64)): 1.2,
}
CUDA_BARS = {(64, Case(BANK, 16)): 2.2, (64, Case(LORA, 64)): 1.3}
CPU_BARS = {(32, 4): 1.0}
"""Bank ÷ loop."""


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and the bars of the device in use."""
    is_cpu = options.device == "cpu"
    found = []
    for batch in options.batches:
        cases = [case for case in _cases(options) if case.count and case != ONE]
        for case in cases:
            bar = None if is_cpu else CUDA_BARS.get((batch, case))
            found.append(Claim(_versus_one(batch, case), PREDICTED.get((batch, case)), at_most=bar))
        for count in [case.count for case in cases if case.way == BANK]:
            bar = CPU_BARS.get((batch, count)) if is_cpu else None
            found.append(Claim(_versus_loop(batch, count), 0.95, at_most=bar))
    return found


def _versus_one(batch: int, case: Case) -> str:
    return f"batch {batch}: step, {case.count} in a {case.way} ÷ 1 aligner"


def _versus_loop(batch: int, count: int) -> str:
    return f"batch {batch}: step, {count} aligners, bank ÷ loop"


def add_options(options: Options) -> None:
    options.add("--batches", [8, 32], "sequences at once", quick=[4])
    options.add("--counts", [1, 4, 16], "full aligners in a batch", quick=[1, 2])
    options.add("--lora-counts", [1, 4, 16, 64], "LoRA adapters in a batch", quick=[2])
    options.add("--rank", 16, "of the adapters", quick=4)
    options.add("--prompt", 32, "tokens in each prompt", quick=8)
    options.add("--steps", 4, "steps in a turn", quick=2)
    options.add("--rounds", 6, "turns of every way", quick=2)
    options.add_argument("--most", action="store_true", help=f"{MOST} full aligners as well")


def _cases(options: argparse.Namespace) -> list[Case]:
    """All ways; `ONE` and none at all are always there."""
    counts = sorted({*options.counts, *([MOST] if options.most else [])} - {1})
    many = [Case(way, count) for count in counts for way in (LOOP, BANK)]
    return [Case(NONE, 0), ONE, *many, *(Case(LORA, count) for count in options.lora_counts)]


def run(options: argparse.Namespace) -> Outcome:
    cases = _cases(options)
    full = max(case.count for case in cases if case.way != LORA)
    found: dict[tuple[int, Case], Measured] = {}
    with checkpoints(options, full) as pair:
        adapters = _save_adapters(options, pair, max(options.lora_counts, default=0))
        # Those of one count take turns; all at once would not fit into a small machine's memory.
        for count in sorted({max(case.count, 1) for case in cases}):
            here = [case for case in cases if max(case.count, 1) == count]
            found = _measure(options, pair, adapters, here if ONE in here else [ONE, *here]) | found
    return _outcome(options, cases, found)


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a way at one batch, beside one aligner in the same turns."""

    ms: float
    ms_of_one: float
    peak_mib: float


def _measure(
    options: argparse.Namespace, pair: Pair, adapters: tuple[str, ...], cases: list[Case]
) -> dict[tuple[int, Case], Measured]:
    with ExitStack() as stack:
        workers = {}
        for case in cases:
            say(f"aligners: loading {case.count} ({case.way})")
            workers[case] = stack.enter_context(worker(EngineWay, _job(options, pair, adapters, case)))
        times = {}
        for batch in options.batches:
            say(f"aligners: batch {batch}")
            prompts = random_prompts(options, batch, options.prompt, seed=0)
            for case, at in workers.items():
                at.ask("hold", prompts, spread(batch, case.count))
            times[batch] = best_steps_ms(workers, options.steps, options.rounds)
            for at in workers.values():
                at.ask("release")
        peaks = {case: at.peak_mib for case, at in workers.items()}
    return {
        (batch, case): Measured(ms[case], ms[ONE], peaks[case])
        for batch, ms in times.items()
        for case in cases
    }


def _job(options: argparse.Namespace, pair: Pair, adapters: tuple[str, ...], case: Case) -> Job:
    max_batch = max(options.batches)
    num_tokens = options.prompt + (options.steps + 1) * options.rounds + 32
    room = pair.kv_bytes(max_batch, num_tokens, options.dtype, is_aligned=case.count > 0)
    aligners = adapters if case.way == LORA else pair.aligners
    job = Job(pair.proposal, aligners[: case.count], options.device, options.dtype, max_batch, room)
    return replace(job, aligner_bank=case.way != LOOP)


def _save_adapters(options: argparse.Namespace, pair: Pair, count: int) -> tuple[str, ...]:
    """Adapters of the first aligner, beside it."""
    base = Path(pair.aligners[0])
    return tuple(
        save_adapter(
            pair.shapes[1], str(base), base.parent / f"lora-{options.rank}-{at}", options.dtype, options.rank
        )
        for at in range(count)
    )


def spread(batch: int, count: int) -> list[int]:
    """An aligner for each row, all of them used as often as can be; -1 where there is none."""
    return [row % count if count else -1 for row in range(batch)]


def _outcome(
    options: argparse.Namespace, cases: Iterable[Case], found: dict[tuple[int, Case], Measured]
) -> Outcome:
    rows: list[list[Cell]] = []
    figures = {}
    for batch in options.batches:
        for case in cases:
            measured = found[batch, case]
            ratio = measured.ms / measured.ms_of_one
            loop = found.get((batch, Case(LOOP, case.count))) if case.way == BANK else None
            rows.append(
                [
                    batch,
                    case.way,
                    case.count,
                    measured.ms,
                    batch / measured.ms * 1e3,
                    ratio,
                    measured.ms / loop.ms if loop else None,
                    measured.peak_mib,
                ]
            )
            if case.count and case != ONE:
                figures[_versus_one(batch, case)] = ratio
            if loop:
                figures[_versus_loop(batch, case.count)] = measured.ms / loop.ms
    size = PAIRS[options.pair][1].num_parameters / 1e6
    columns = [
        "batch",
        "way",
        "aligners",
        "ms a step",
        "tokens/s",
        "step ÷ one aligner",
        "bank ÷ loop",
        "peak MiB",
    ]
    title = f"Decode with several aligners of {size:.1f} M parameters, {options.dtype}"
    notes = [
        "Every count is compared with one aligner in turns of its own; `ms a step` of one is of the first."
    ]
    return Outcome([Table(title, columns, rows)], figures, notes)


BENCHMARK = Benchmark("aligners", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

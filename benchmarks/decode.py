"""Milliseconds a decode step: ours, the authors' way, transformers' batching, and the machine's limit.

A step's time is the slope between a short and a long generation, which leaves the prompt out. Every way
takes its turn in every round, so that ratios hold while the machine's speed drifts.

    python -m benchmarks.decode                          # CPU, 100 M + 10 M parameters, float32
    python -m benchmarks.decode --pair llama --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.limits import Machine, Speed, step_cost
from benchmarks.peers import AuthorsWay, ContinuousBatching
from benchmarks.shapes import PAIRS
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import Worker, worker

WAYS = ("aligned", "identity", "authors", "transformers")


# At the default settings, before the first run: tokens/s of aligned ÷ transformers, ÷ identity, ÷ authors,
# and the share of the limit.
PREDICTED = {1: (0.95, 0.8, 1.1, 0.75), 8: (1.0, 0.8, 4.0, 0.6), 32: (1.15, 0.8, 10.0, 0.5)}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    found = []
    for batch in options.batches:
        peer, identity, authors, share = PREDICTED.get(batch, (None,) * 4)
        found += [
            Claim(_versus("transformers", batch), peer, at_least=0.95),
            Claim(_versus("identity", batch), identity),
            Claim(_versus("authors", batch), authors),
            Claim(_share(batch), share),
        ]
    return found


def _versus(way: str, batch: int) -> str:
    return f"batch {batch}: tokens/s, aligned ÷ {way}"


def _share(batch: int) -> str:
    return f"batch {batch}: limit ÷ step, aligned"


def add_options(options: Options) -> None:
    options.add("--batches", [1, 8, 32], "sequences at once", quick=[1, 4])
    options.add("--ways", list(WAYS), f"which of {', '.join(WAYS)}")
    options.add("--prompt", 32, "tokens in each prompt", quick=8)
    options.add("--short", 8, "tokens of the short generation", quick=4)
    options.add("--long", 56, "tokens of the long generation", quick=12)
    options.add("--rounds", 3, "turns of every way", quick=1)


def run(options: argparse.Namespace) -> Outcome:
    unknown = set(options.ways) - set(WAYS)
    if unknown:
        raise SystemExit(f"no way is called {sorted(unknown)}; there are: {', '.join(WAYS)}")
    with checkpoints(options) as pair, ExitStack() as stack:
        max_batch, num_tokens = max(options.batches), options.prompt + options.long
        aligned = Job(
            pair.proposal,
            pair.aligners,
            options.device,
            options.dtype,
            max_batch,
            pair.kv_bytes(max_batch, num_tokens, options.dtype),
        )
        identity_bytes = pair.kv_bytes(max_batch, num_tokens, options.dtype, is_aligned=False)
        identity = replace(aligned, aligners=(), kv_bytes=identity_bytes)
        builds = {
            "aligned": (EngineWay, aligned),
            "identity": (EngineWay, identity),
            "authors": (AuthorsWay, aligned),
            "transformers": (ContinuousBatching, aligned),
        }
        machine = stack.enter_context(worker(Machine, options.device, options.dtype, options.quick))
        speeds: list[Speed] = [machine.ask("measure")]
        workers = {way: stack.enter_context(worker(*builds[way])) for way in options.ways}
        found = {}
        for batch in options.batches:
            say(f"decode: batch {batch}")
            found[batch] = _measure(workers, batch, options)
            speeds.append(machine.ask("measure"))
        peaks = {way: workers[way].peak_mib for way in options.ways}
        notes = [
            f"transformers at batch {batch}: attention {workers['transformers'].ask('attention', batch)}"
            for batch in options.batches
            if "transformers" in workers
        ]
    speed = Speed(*(max(getattr(s, part) for s in speeds) for part in ("copy", "read", "flops")))
    return _outcome(options, found, speed, peaks, notes)


def _measure(workers: dict[str, Worker], batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of every way, in turn, round after round; the best counts, as noise only adds."""
    prompts = random_prompts(options, batch, options.prompt, seed=0)
    # One request at a time needs no batch to tell its pace, and `batch` times the patience.
    own = {way: prompts[:1] if way == "authors" else prompts for way in workers}
    took: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for way, worker_of in workers.items():
            # What the system reclaimed of a process while it waited for its turn comes back here.
            worker_of.ask("generate", own[way], 2)
            for length in (options.short, options.long):
                took.setdefault((way, length), []).append(worker_of.ask("generate", own[way], length))
    return {
        way: slope_ms(took[way, options.short], took[way, options.long], options.long - options.short)
        * (batch // len(own[way]))
        for way in workers
    }


def slope_ms(short_s: list[float], long_s: list[float], num_steps: int) -> float:
    """Milliseconds a step between the best of two lengths that lie `num_steps` apart."""
    return (min(long_s) - min(short_s)) / num_steps * 1e3


def _outcome(
    options: argparse.Namespace,
    found: dict[int, dict[str, float]],
    speed: Speed,
    peaks: dict[str, float],
    notes: list[str],
) -> Outcome:
    proposal, aligner = PAIRS[options.pair]
    context = options.prompt + (options.short + options.long) // 2
    rows: list[list[Cell]] = []
    figures: dict[str, float] = {}
    for batch, ms in found.items():
        for way in ms:
            aligners = [aligner] if way in ("aligned", "authors") else []
            cost = step_cost(proposal, aligners, batch, context, options.dtype)
            limit = speed.limit_ms(cost)
            ratio = ms[way] / ms["aligned"] if "aligned" in ms else None
            cells: list[Cell] = [batch, way, ms[way], batch / ms[way] * 1e3, ratio]
            rows.append([*cells, cost.num_bytes / 1e6, limit, speed.kind(cost), limit / ms[way], peaks[way]])
            if way == "aligned":
                figures[_share(batch)] = limit / ms[way]
            elif "aligned" in ms:
                figures[_versus(way, batch)] = ms[way] / ms["aligned"]
    columns = ["batch", "way", "ms a step", "tokens/s", "step ÷ aligned", "MB a step", "limit, ms", "set by"]
    shapes = f"{proposal.num_parameters / 1e6:.1f} M + {aligner.num_parameters / 1e6:.1f} M parameters"
    machine = Table(
        "The machine, in the same run",
        ["copy (read + write), GB/s", "sum (read), GB/s", "matrix product, GFLOP/s"],
        [[speed.copy / 1e9, speed.read / 1e9, speed.flops / 1e9]],
    )
    steps = Table(
        f"Decode, {shapes}, {options.dtype}, prompts of {options.prompt} tokens",
        [*columns, "share of the limit", "peak MiB"],
        rows,
    )
    return Outcome([machine, steps], figures, notes)


BENCHMARK = Benchmark("decode", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

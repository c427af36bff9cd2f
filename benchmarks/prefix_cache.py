"""Time to first token behind a long system prompt, with the prefix cache and without.

Four requests come one after the other: the first with this system prompt, the same again, another question
behind the same system prompt, and that question to another aligner. What the proposal keeps of a prefix is
shared between aligners; what an aligner keeps is its own.

    python -m benchmarks.prefix_cache
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import Worker, worker

REQUESTS = ("first", "the same again", "another question", "another aligner")
# First token with the cache ÷ without, and what must be reached.
PREDICTED = {"first": 1.02, "the same again": 0.05, "another question": 0.08, "another aligner": 0.2}
BARS = {"first": 1.1, "the same again": 0.25, "another question": 0.25, "another aligner": 0.5}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    return [Claim(_versus(name), PREDICTED[name], at_most=BARS[name]) for name in REQUESTS]


def _versus(name: str) -> str:
    return f"{name}: first token, with the cache ÷ without"


def add_options(options: Options) -> None:
    options.add("--shared", 1024, "tokens of the system prompt", quick=128)
    options.add("--own", 32, "tokens of a question", quick=16)
    options.add("--rounds", 4, "system prompts for every way", quick=2)


def run(options: argparse.Namespace) -> Outcome:
    num_tokens = options.shared + options.own + 16
    with checkpoints(options, 2) as pair, ExitStack() as stack:
        room = pair.kv_bytes(2 * len(REQUESTS), num_tokens, options.dtype)
        cached = Job(pair.proposal, pair.aligners, options.device, options.dtype, 8, room, prefix_cache=True)
        jobs = {"with the cache": cached, "without": replace(cached, prefix_cache=False)}
        workers = {way: stack.enter_context(worker(EngineWay, job)) for way, job in jobs.items()}
        found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in REQUESTS} for way in workers}
        for turn in range(options.rounds + 1):
            say(f"prefix_cache: system prompt {turn} of {options.rounds}")
            for way, at in workers.items():
                for name, first_s in _ask_all(at, turn, options).items():
                    # The first round warms up.
                    if turn:
                        found[way][name].append(first_s)
        peaks = {way: at.peak_mib for way, at in workers.items()}
    return _outcome(options, found, peaks)


def _ask_all(at: Worker, turn: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of each request; the next comes when the last has its token."""
    [system] = random_prompts(options, 1, options.shared, seed=turn)
    question, other = random_prompts(options, 2, options.own, seed=turn)
    asked = {
        "first": ([*system, *question], 0),
        "the same again": ([*system, *question], 0),
        "another question": ([*system, *other], 0),
        "another aligner": ([*system, *other], 1),
    }
    # What the system reclaimed of a process while it waited for its turn comes back here.
    at.ask("generate", random_prompts(options, 1, options.own, seed=-1 - turn), 2)
    return {name: at.ask("first_token", *request)[0] for name, request in asked.items()}


def _outcome(
    options: argparse.Namespace, found: dict[str, dict[str, list[float]]], peaks: dict[str, float]
) -> Outcome:
    rows: list[list[Cell]] = []
    figures = {}
    for name in REQUESTS:
        base = min(found["without"][name])
        for way in found:
            best, median = min(found[way][name]), statistics.median(found[way][name])
            rows.append([name, way, best * 1e3, median * 1e3, best / base, peaks[way]])
        figures[_versus(name)] = min(found["with the cache"][name]) / base
    columns = ["request", "way", "first token, ms (best)", "ms (median)", "best ÷ without", "peak MiB"]
    title = f"First token behind {options.shared} shared tokens, {options.dtype}"
    return Outcome([Table(title, columns, rows)], figures)


BENCHMARK = Benchmark("prefix_cache", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

"""Gaps between the tokens of running streams while a long prompt is read, and before it came.

A long prompt is read in chunks beside the streams, so that none of them waits for all of it.

    python -m benchmarks.long_prompt
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.common import Benchmark, Options, checkpoints, percentile, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import Worker, worker

DURING = "aligned: p99 while the prompt is read ÷ p50 then"
BEFORE = "aligned: p99 while the prompt is read ÷ p50 before"
IDENTITY = "identity: p99 while the prompt is read ÷ p50 then"


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    return [Claim(DURING, 1.6, at_most=3.0), Claim(BEFORE, 3.5), Claim(IDENTITY, 1.6, at_most=3.0)]


def add_options(options: Options) -> None:
    options.add("--streams", 8, "streams that run", quick=2)
    options.add("--prompt", 32, "tokens in the prompt of each stream", quick=8)
    options.add("--long", 4096, "tokens of the long prompt", quick=256)
    options.add("--steps", 32, "steps before the long prompt comes", quick=4)
    options.add("--rounds", 2, "long prompts for every way", quick=1)


def run(options: argparse.Namespace) -> Outcome:
    max_batch, num_streams = options.streams + 1, options.streams
    # A stream gains a token with every step, of which the smallest chunks make the most.
    held = options.prompt + options.rounds * (options.steps + options.long // 32) + 64
    with checkpoints(options) as pair, ExitStack() as stack:

        def room(*, is_aligned: bool) -> int:
            streams = pair.kv_bytes(num_streams, held, options.dtype, is_aligned=is_aligned)
            return streams + pair.kv_bytes(1, options.long, options.dtype, is_aligned=is_aligned)

        aligned = Job(
            pair.proposal, pair.aligners, options.device, options.dtype, max_batch, room(is_aligned=True)
        )
        jobs = {
            "aligned": aligned,
            "identity": replace(aligned, aligners=(), kv_bytes=room(is_aligned=False)),
        }
        workers = {way: stack.enter_context(worker(EngineWay, job)) for way, job in jobs.items()}
        found = {way: _measure(at, options) for way, at in workers.items()}
        peaks = {way: at.peak_mib for way, at in workers.items()}
    return _outcome(options, found, peaks)


def _measure(at: Worker, options: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Gaps before and while the prompt is read, and its first tokens, in seconds."""
    before: list[float] = []
    during: list[float] = []
    firsts: list[float] = []
    at.ask("hold", random_prompts(options, options.streams, options.prompt, seed=0))
    at.ask("steps", 4)
    for turn in range(options.rounds):
        say(f"long_prompt: prompt {turn + 1} of {options.rounds}")
        before += at.ask("steps", options.steps).gaps_s
        [prompt] = random_prompts(options, 1, options.long, seed=1 + turn)
        first_s, stretch = at.ask("first_token", prompt)
        during += stretch.gaps_s
        firsts.append(first_s)
    at.ask("release")
    return before, during, firsts


def _outcome(
    options: argparse.Namespace,
    found: dict[str, tuple[list[float], list[float], list[float]]],
    peaks: dict[str, float],
) -> Outcome:
    rows: list[list[Cell]] = []
    ratios = {}
    for way, (before, during, firsts) in found.items():
        p50, p99 = percentile(during, 0.5), percentile(during, 0.99)
        p50_before, p99_before = percentile(before, 0.5), percentile(before, 0.99)
        ratios[way] = p99 / p50, p99 / p50_before
        gaps: list[Cell] = [s * 1e3 for s in (p50_before, p99_before, p50, p99)]
        rows.append([way, *gaps, *ratios[way], min(firsts), peaks[way]])
    columns = ["way", "p50 before, ms", "p99 before, ms", "p50 then, ms", "p99 then, ms"]
    columns += ["p99 ÷ p50 then", "p99 ÷ p50 before", "long prompt's first token, s", "peak MiB"]
    title = (
        f"Gaps of {options.streams} streams while a prompt of {options.long} tokens is read, {options.dtype}"
    )
    figures = {DURING: ratios["aligned"][0], BEFORE: ratios["aligned"][1], IDENTITY: ratios["identity"][0]}
    return Outcome([Table(title, columns, rows)], figures)


BENCHMARK = Benchmark("long_prompt", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

"""Time to first token, alone and beside running streams: ours, the authors' way, and a chain of two models.

A newcomer arrives between two steps. Streams that run beside it are of its own kind. The chain is what
correcting an answer after the fact costs: the proposal drafts all of it, a model of the aligner's size then
reads prompt and draft and rewrites it; both run on our engine. The authors' way serves one request at a time,
so beside running streams a newcomer waits for all of them: that is computed from one answer's time.

    python -m benchmarks.first_token
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.common import Benchmark, Options, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.peers import AuthorsWay, RewriteChain
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import Worker, worker

# Aligned ÷ identity, by the number of streams that run beside.
PREDICTED = {0: 1.12, 8: 1.2, 31: 1.2}
CHAIN = "alone: first token, chain ÷ aligned"


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    bars = [Claim(_versus(load), PREDICTED.get(load), at_most=1.25) for load in options.loads]
    # 128 steps of a draft, against one prompt: the published figures, 10.14 s and 0.31 s, give 33.
    return [*bars, Claim(CHAIN, 20.0, at_least=5.0)]


def _versus(load: int) -> str:
    return (
        f"beside {load} streams: first token, aligned ÷ identity"
        if load
        else "alone: first token, aligned ÷ identity"
    )


def add_options(options: Options) -> None:
    options.add("--loads", [0, 8, 31], "streams that run beside the newcomer", quick=[0, 2])
    options.add("--prompt", 128, "tokens in each prompt", quick=16)
    options.add("--answer", 128, "tokens of the chain's draft, and of an answer of the authors' way", quick=8)
    options.add("--rounds", 7, "turns of every way", quick=2)


def run(options: argparse.Namespace) -> Outcome:
    max_batch, num_tokens = max(options.loads) + 1, options.prompt + 64 + 16 * options.rounds
    with checkpoints(options) as pair, ExitStack() as stack:
        room = (options.dtype,)
        aligned = Job(
            pair.proposal,
            pair.aligners,
            options.device,
            options.dtype,
            max_batch,
            pair.kv_bytes(max_batch, num_tokens, *room),
        )
        alone_bytes = pair.kv_bytes(max_batch, num_tokens, *room, is_aligned=False)
        identity = replace(aligned, aligners=(), kv_bytes=alone_bytes)
        chain_bytes = pair.kv_bytes(1, options.prompt + options.answer, *room)
        drafts = replace(identity, max_batch=1, kv_bytes=chain_bytes)
        rewrites = replace(drafts, proposal=pair.aligners[0])
        workers = {
            "aligned": stack.enter_context(worker(EngineWay, aligned)),
            "identity": stack.enter_context(worker(EngineWay, identity)),
        }
        authors = stack.enter_context(worker(AuthorsWay, aligned))
        chain = stack.enter_context(worker(RewriteChain, drafts, rewrites))
        say("first_token: alone, all ways")
        alone = _measure_peers(authors, chain, options)
        found: dict[tuple[int, str], list[float]] = {(0, "authors"): alone[0], (0, "chain"): alone[1]}
        for load in options.loads:
            say(f"first_token: beside {load} streams")
            for way, times_s in _measure(workers, load, options).items():
                found[load, way] = times_s
            if load:
                found[load, "authors"] = [load * alone[2] + own_s for own_s in alone[0]]
        peaks = {way: at.peak_mib for way, at in (workers | {"authors": authors, "chain": chain}).items()}
    return _outcome(options, found, alone[3], peaks)


def _measure_peers(
    authors: Worker, chain: Worker, options: argparse.Namespace
) -> tuple[list[float], list[float], float, float]:
    """First tokens of the authors' way and of the chain, and the best of a whole answer and of a draft."""
    firsts, chained, answers, drafts = [], [], [], []
    rounds = max(2, options.rounds // 3)
    for turn in range(rounds + 1):
        [prompt] = random_prompts(options, 1, options.prompt, seed=turn)
        [draft] = random_prompts(options, 1, options.answer, seed=-1 - turn)
        firsts.append(authors.ask("generate", [prompt], 1))
        answers.append(authors.ask("generate", [prompt], options.answer))
        total_s, draft_s = chain.ask("first_token", prompt, draft)
        chained.append(total_s)
        drafts.append(draft_s)
    # The first round warms up.
    return firsts[1:], chained[1:], min(answers[1:]), min(drafts[1:])


def _measure(workers: dict[str, Worker], load: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds to the first token of newcomers, each with a prompt of its own."""
    streams = random_prompts(options, load, options.prompt, seed=10_000)
    found: dict[str, list[float]] = {way: [] for way in workers}
    for at in workers.values():
        at.ask("hold", streams)
    for turn in range(options.rounds + 1):
        [prompt] = random_prompts(options, 1, options.prompt, seed=100 * load + turn)
        for way, at in workers.items():
            if load:
                at.ask("steps", 2)
            else:
                # What the system reclaimed of a process while it waited for its turn comes back here.
                at.ask("generate", [prompt[:2]], 2)
            first_s, _ = at.ask("first_token", prompt)
            if turn:
                found[way].append(first_s)
    for at in workers.values():
        at.ask("release")
    return found


def _outcome(
    options: argparse.Namespace,
    found: dict[tuple[int, str], list[float]],
    draft_s: float,
    peaks: dict[str, float],
) -> Outcome:
    rows: list[list[Cell]] = []
    figures = {}
    for load in options.loads:
        base = min(found[load, "identity"])
        for way in ("aligned", "identity", "authors", "chain"):
            times_s = found.get((load, way))
            if times_s:
                best, median = min(times_s), statistics.median(times_s)
                rows.append([load, way, best * 1e3, median * 1e3, best / base, peaks[way]])
        figures[_versus(load)] = min(found[load, "aligned"]) / base
    if 0 in options.loads:
        figures[CHAIN] = min(found[0, "chain"]) / min(found[0, "aligned"])
    columns = [
        "streams beside",
        "way",
        "first token, ms (best)",
        "ms (median)",
        "best ÷ identity",
        "peak MiB",
    ]
    table = Table(f"First token, prompts of {options.prompt} tokens, {options.dtype}", columns, rows)
    notes = [
        f"chain: a draft of {options.answer} tokens took {draft_s:.2f} s of its first token's time",
        "authors beside streams: computed, as they wait for whole answers of "
        f"{options.answer} tokens, one after the other",
    ]
    return Outcome([table], figures, notes)


BENCHMARK = Benchmark("first_token", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

"""A quiet tenant's time to first token, alone and beside a tenant that floods the server.

`ram serve` with two tenants. The quiet one asks for one short answer after the other; the other one sends all
its requests at once, several times as many as run together, and has some left when the quiet one is done.

    python -m benchmarks.fairness
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import Benchmark, Options, checkpoints, percentile, random_prompts, say
from benchmarks.http import RAM, Server, serve
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import tree_peak_mib
from server.bench.client import Client, Target
from server.bench.load import PlannedRequest
from server.tenants.editing import add_tenant

P95 = "quiet tenant's first token, p95: beside the flood ÷ alone"
MEDIAN = "quiet tenant's first token, median: beside the flood ÷ alone"
_SETTLE_S = 1.0
"""The flood has arrived by then, and is running."""


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    return [Claim(P95, 1.8, at_most=2.0), Claim(MEDIAN, 1.5)]


def add_options(options: Options) -> None:
    options.add("--streams", 32, "sequences that run together", quick=2)
    options.add("--flood", 200, "requests of the flood", quick=8)
    options.add("--flood-prompt", 32, "tokens in each of its prompts", quick=8)
    options.add("--flood-answer", 64, "tokens of each of its answers", quick=32)
    options.add("--asked", 25, "requests of the quiet tenant, one after the other", quick=2)
    options.add("--prompt", 128, "tokens in each of its prompts", quick=8)
    options.add("--answer", 4, "tokens of each of its answers", quick=2)
    options.add("--rounds", 1, "turns of both ways", quick=1)


def run(options: argparse.Namespace) -> Outcome:
    found: dict[str, list[list[float]]] = {"alone": [], "beside the flood": []}
    with checkpoints(options) as pair, tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        tenants = scratch / "tenants.toml"
        keys = {name: add_tenant(tenants, name) for name in ("quiet", "loud")}
        longest = max(options.prompt + options.answer, options.flood_prompt + options.flood_answer)
        room = pair.kv_bytes(options.streams, longest, options.dtype)
        say("fairness: starting ram serve")
        with serve(pair, options, room, scratch, tenants_file=tenants) as at:
            # The first round warms up.
            for turn in range(options.rounds + 1):
                say(f"fairness: round {turn} of {options.rounds}")
                alone = asyncio.run(_ask(at, keys["quiet"], options, seed=2 * turn))
                with _flood(at, keys["loud"], options, scratch, seed=turn) as flood:
                    beside = asyncio.run(_ask(at, keys["quiet"], options, seed=2 * turn + 1))
                    if flood.poll() is not None:
                        raise RuntimeError(f"the flood was over before the last of {beside} s")
                if turn:
                    found["alone"].append(alone)
                    found["beside the flood"].append(beside)
            peak_mib = tree_peak_mib(at.pid) if at.pid else None
    return _outcome(options, found, peak_mib)


@contextmanager
def _flood(
    at: Server, key: str, options: argparse.Namespace, scratch: Path, seed: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The loud tenant's requests, all at once, running; they are waited for.

    Raises:
        RuntimeError: one of them failed.
    """
    prompts = random_prompts(options, options.flood, options.flood_prompt, seed=-1 - seed)
    lines = [json.dumps({"prompt": _words(prompt)}) for prompt in prompts]
    data, log = scratch / "flood.jsonl", scratch / "flood.log"
    data.write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "url": at.url,
        "model": at.model,
        "concurrency": len(prompts),
        "requests": len(prompts),
        "warmup": 0,
        "data": data,
        "output-tokens": options.flood_answer,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with log.open("w") as said:
        environment = os.environ | {"OPENAI_API_KEY": key}
        process = subprocess.Popen([RAM, "bench", *flags], stdout=said, stderr=said, env=environment)
        try:
            _wait_until_full(at, options)
            yield process
            if process.wait(600):
                raise RuntimeError(f"the flood failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
        finally:
            process.kill()


def _wait_until_full(at: Server, options: argparse.Namespace) -> None:
    """Return when as many sequences run as may."""
    for _ in range(600):
        with urllib.request.urlopen(f"{at.url}/metrics", timeout=5) as answer:
            if f"ram_requests_running {float(options.streams)}\n" in answer.read().decode():
                return
        time.sleep(0.05)
    raise RuntimeError("the flood never filled the batch")


async def _ask(at: Server, key: str, options: argparse.Namespace, seed: int) -> list[float]:
    """Seconds to the first token of one request after the other."""
    prompts = random_prompts(options, options.asked, options.prompt, seed=1000 + seed)
    target = Target(at.url, api_key=key)
    times_s = []
    async with target.open_session(1) as session:
        client = Client(target, session, time.perf_counter())
        for index, prompt in enumerate(prompts):
            fields = {"model": at.model, "stream": True, "max_tokens": options.answer}
            body = fields | {"messages": [{"role": "user", "content": _words(prompt)}]}
            request = PlannedRequest(index, at.model or "", options.answer, json.dumps(body).encode())
            record = await client.send(request)
            if record.failure is not None:
                raise RuntimeError(f"the quiet tenant was not answered: {record.failure}")
            times_s.append(record.chunk_times_s[0] - record.sent_s)
    return times_s


def _words(prompt: list[int]) -> str:
    return " ".join(f"w{token}" for token in prompt)


def _outcome(
    options: argparse.Namespace, found: dict[str, list[list[float]]], peak_mib: float | None
) -> Outcome:
    shares = {"median": 0.5, "p95": 0.95}
    best = {
        (way, name): min(percentile(times_s, share) for times_s in rounds)
        for way, rounds in found.items()
        for name, share in shares.items()
    }
    rows: list[list[Cell]] = [[way, *(best[way, name] * 1e3 for name in shares), peak_mib] for way in found]
    title = (
        f"First token of {options.asked} requests in turn, prompts of {options.prompt} tokens; the flood: "
        f"{options.flood} at once, {options.flood_prompt} + {options.flood_answer} tokens, {options.dtype}"
    )
    table = Table(title, ["quiet tenant", "median, ms", "p95, ms", "peak MiB"], rows)
    flooded, alone = "beside the flood", "alone"
    figures = {
        P95: best[flooded, "p95"] / best[alone, "p95"],
        MEDIAN: best[flooded, "median"] / best[alone, "median"],
    }
    return Outcome([table], figures)


BENCHMARK = Benchmark("fairness", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

"""Aligners that come while others are used: how soon one answers, and what the others notice of it.

A large aligner is added over HTTP and asked at once: the time to its first token stands beside the time that
its weights take to be read, from the disk, as the system drops them from its memory before each turn, or from
the system's memory. It comes with a manifest, whose hashes are compared, or without; the very first of its
architecture stands by itself. Then streams run on one aligner while another is loaded and unloaded without
pause: the gaps between their tokens stand beside the gaps at rest. Last, a server that knows hundreds of
aligners is asked for their names.

    python -m benchmarks.hot_loading
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import aiohttp

from benchmarks.common import Benchmark, Options, Pair, checkpoints, percentile, random_prompts, say
from benchmarks.http import Server, serve
from benchmarks.shapes import PAIRS, Shape, save_checkpoint
from benchmarks.tables import Cell, Claim, Outcome, Table
from ram_core.aligners.pack import Wishes, pack

FIRST = "added aligner: first token ÷ reading its weights"
WAYS = {
    "packed, from disk": (True, True),
    "packed, cached": (True, False),
    "no manifest, from disk": (False, True),
}
"""Whether it has a manifest, and whether its files are read from the disk."""
GAPS = "p99 of gaps while aligners are loaded ÷ at rest"
NAMES_MS = "names of all known aligners, ms"
BLOCK = 1 << 24


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    return [Claim(FIRST, 2.0, at_most=1.5), Claim(GAPS, 1.3, at_most=1.5), Claim(NAMES_MS, 5.0, at_most=10.0)]


def add_options(options: Options) -> None:
    options.add("--streams", 8, "answers at once while aligners are loaded", quick=2)
    options.add("--prompt", 32, "tokens in each prompt", quick=8)
    options.add("--answer", 128, "tokens of each answer", quick=16)
    options.add("--loads", 100, "aligners that are loaded meanwhile", quick=3)
    options.add("--rounds", 8, "large aligners that are added in each way", quick=1)
    options.add("--known", 500, "aligners that a server knows", quick=5)


def run(options: argparse.Namespace) -> Outcome:
    with checkpoints(options, 2) as pair, tempfile.TemporaryDirectory(dir=options.models) as scratch:
        root = Path(scratch) / "aligners"
        root.mkdir()
        link(Path(pair.aligners[1]), root / "other")
        say("hot_loading: a large aligner's weights")
        large = Path(scratch) / "large"
        save_checkpoint(_large(options), large, options.dtype, options.device, seed=7)
        # Room for the streams, and for one request to an aligner that has just come.
        room = pair.kv_bytes(options.streams + 1, options.prompt + options.answer, options.dtype)
        with serve(pair, options, room, Path(scratch), aligners_dir=root) as server:
            firsts = asyncio.run(_add_large(server, large, root, options))
            gaps = asyncio.run(_load_beside(server, options))
        names_ms = _ask_names(pair, options, room, root, Path(scratch))
    return _outcome(options, firsts, gaps, names_ms)


def link(source: Path, target: Path) -> None:
    """The same files at another place, without their bytes."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)


def _large(options: argparse.Namespace) -> Shape:
    """Half a gigabyte in float32, with the pair's vocabulary; something tiny for a quick look."""
    vocab_size = PAIRS[options.pair][0].vocab_size
    if options.quick:
        return Shape(64, 3, 4, 2, 96, vocab_size, is_tied=True)
    return Shape(1024, 8, 16, 4, 2816, vocab_size, is_tied=True)


def read_s(directory: Path) -> float:
    """Seconds to read the weights."""
    room = bytearray(BLOCK)
    began = time.perf_counter()
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - began


def forget(directory: Path) -> None:
    """Have the system drop what it keeps of the files in memory."""
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


async def _add_large(
    server: Server, large: Path, root: Path, options: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Of each way's turns: seconds to read the weights, and from adding an aligner to its first token."""
    ways = ["first of its kind", *WAYS]
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(300)) as client:
        # The first turn of each way warms up, but for the first of all.
        turns = [ways[0], *(way for way in WAYS for _ in range(options.rounds + 1))]
        for turn, way in enumerate(turns):
            say(f"hot_loading: large aligner {turn + 1} of {len(turns)}")
            has_manifest, is_cold = WAYS.get(way, (True, True))
            hidden, name = root / f".large-{turn}.new", f"large-{turn}"
            link(large, hidden)
            if has_manifest:
                pack(hidden, Wishes(name=name, version="1"))
            if is_cold:
                forget(hidden)
            reading_s = read_s(hidden)
            if is_cold:
                forget(hidden)
            path = hidden.rename(root / name)
            began = time.perf_counter()
            await _post(client, "/v1/aligners", {"name": name, "path": path.name, "load": True})
            [prompt] = random_prompts(options, 1, options.prompt, seed=turn)
            [first] = [now async for now in _tokens(client, name, prompt, 1)]
            took[way].append((reading_s, first - began))
            async with client.delete(f"/v1/aligners/{name}", params={"wait": 60}) as answer:
                answer.raise_for_status()
            shutil.rmtree(path)
    return {way: found if way == ways[0] else found[1:] for way, found in took.items()}


async def _load_beside(server: Server, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds between the tokens of running streams, at rest and while another aligner comes and goes."""
    gaps: dict[str, list[float]] = {"warm-up": [], "at rest": [], "while loading": [], "at rest again": []}
    phase = "warm-up"

    async def stream(client: aiohttp.ClientSession, number: int) -> None:
        for turn in range(sys.maxsize):
            [prompt] = random_prompts(options, 1, options.prompt, seed=1000 * turn + number)
            before = None
            async for now in _tokens(client, "aligned", prompt, options.answer):
                if before is not None:
                    gaps[phase].append(now - before)
                before = now

    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(300)) as client:
        streams = [asyncio.create_task(stream(client, number)) for number in range(options.streams)]
        await asyncio.sleep(1 if options.quick else 5)
        began = time.perf_counter()
        phase = "at rest"
        await asyncio.sleep(1 if options.quick else 15)
        phase = "while loading"
        say("hot_loading: loading beside streams")
        for _ in range(options.loads):
            for what in ("load", "unload"):
                await _post(client, f"/v1/aligners/other/{what}?wait=60", {})
        loading_s = time.perf_counter() - began
        phase = "at rest again"
        await asyncio.sleep(min(loading_s, 1 if options.quick else 15))
        for task in streams:
            task.cancel()
        for task in streams:
            with suppress(asyncio.CancelledError):
                await task
    rest = gaps["at rest"] + gaps["at rest again"]
    return {"at rest": rest, "while loading": gaps["while loading"]}


async def _post(client: aiohttp.ClientSession, path: str, body: dict[str, object]) -> None:
    async with client.post(path, json=body) as answer:
        if answer.status not in (200, 201, 202):
            raise RuntimeError(f"{path}: {answer.status} {await answer.text()}")


async def _tokens(
    client: aiohttp.ClientSession, model: str, prompt: list[int], num_tokens: int
) -> AsyncIterator[float]:
    """The moments at which a request's tokens come."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    async with client.post("/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{model}: {answer.status} {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b'data: {"'):
                if b'"error"' in line:
                    raise RuntimeError(f"{model}: {line.decode()}")
                yield time.perf_counter()


def _ask_names(pair: Pair, options: argparse.Namespace, room: int, root: Path, scratch: Path) -> list[float]:
    """Milliseconds of each time that a server which knows many aligners lists their names."""
    for number in range(options.known):
        link(Path(pair.aligners[1]), root / f"known-{number}")
    with serve(pair, options, room, scratch, aligners_dir=root) as server:
        return asyncio.run(_list_names(server, options.known))


async def _list_names(server: Server, num_known: int) -> list[float]:
    took = []
    async with aiohttp.ClientSession(server.url) as client:
        for _ in range(50):
            began = time.perf_counter()
            async with client.get("/v1/models") as answer:
                names = (await answer.json())["data"]
            took.append((time.perf_counter() - began) * 1e3)
    if len(names) < num_known:
        raise RuntimeError(f"the server knows {len(names)} models, not {num_known}")
    return took


def _outcome(
    options: argparse.Namespace,
    firsts: dict[str, list[tuple[float, float]]],
    gaps: dict[str, list[float]],
    names_ms: list[float],
) -> Outcome:
    added: list[list[Cell]] = []
    for way, found in firsts.items():
        reading_s, first_s = (statistics.median(column) for column in zip(*found, strict=True))
        added.append([way, reading_s * 1e3, first_s * 1e3, first_s / reading_s])
    ratio = next(float(str(row[-1])) for row in added if row[0] == next(iter(WAYS)))
    beside: list[list[Cell]] = [
        [phase, len(found), *(percentile(found, share) * 1e3 for share in (0.5, 0.99)), max(found) * 1e3]
        for phase, found in gaps.items()
    ]
    names: list[list[Cell]] = [[options.known, *(percentile(names_ms, share) for share in (0.5, 0.99))]]
    title = f"Gaps between tokens of {options.streams} streams, {options.loads} loads"
    tables = [
        Table(
            "A large aligner, added and asked at once",
            ["way", "reading, ms", "first token, ms", "ratio"],
            added,
        ),
        Table(title, ["phase", "gaps", "p50, ms", "p99, ms", "longest, ms"], beside),
        Table("GET /v1/models", ["aligners", "p50, ms", "p99, ms"], names),
    ]
    p99 = {phase: percentile(found, 0.99) for phase, found in gaps.items()}
    figures = {
        FIRST: ratio,
        GAPS: p99["while loading"] / p99["at rest"],
        NAMES_MS: percentile(names_ms, 0.5),
    }
    return Outcome(tables, figures)


BENCHMARK = Benchmark("hot_loading", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

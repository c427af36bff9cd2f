"""Milliseconds a decode step and time to first token, ours against the peers, in one run on one machine.

Every way lives in a process of its own (so that its peak memory is its own) and takes its turn in every
round, so that ratios hold while the machine's speed drifts. A step's time is the slope between a short and a
long generation, which leaves the prompt out.

    python -m benchmarks.decode                          # CPU, 100 M + 10 M parameters, float32
    python -m benchmarks.decode --pair llama --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from benchmarks.shapes import PAIRS, save_pair
from benchmarks.ways import WAYS, Job

PREDICTED = {
    "aligned / identity": "at most 1.3",
    "aligned / transformers": "at most 1.1",
    "authors / aligned, tokens per second at the largest batch": "at least 8",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The best of all rounds of one way at one batch size: noise only adds."""

    way: str
    batch: int
    ms_per_step: float
    first_token_ms: float
    peak_mib: float


def serve(way: str, job: Job, pipe: Connection) -> None:
    """A worker: generate what is asked, answer with seconds, until told to stop."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    generate = WAYS[way](job)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        began = time.perf_counter()
        first_s = generate(*task)
        pipe.send((time.perf_counter() - began, first_s, peak_mib(job.device)))


def peak_mib(device: str) -> float:
    """The most memory this process ever held: on the device if it has its own, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextmanager
def worker(way: str, job: Job) -> Iterator[Connection]:
    """Start a way's process; it is ready when this returns, and gone after the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(way, job, theirs), daemon=True)
    process.start()
    if ours.recv() != "ready":
        raise RuntimeError(f"{way} did not start")
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(30)


def ask(pipe: Connection, prompts: list[list[int]], num_tokens: int) -> tuple[float, float, float]:
    pipe.send((prompts, num_tokens))
    elapsed_s, first_s, mib = pipe.recv()
    return elapsed_s, first_s, mib


def measure(pipes: dict[str, Connection], batch: int, options: argparse.Namespace) -> list[Measured]:
    """All ways at one batch size, in turn, round after round."""
    noise = random.Random(batch)
    vocab_size = PAIRS[options.pair][0].vocab_size
    prompts = [[noise.randrange(4, vocab_size) for _ in range(options.prompt)] for _ in range(batch)]
    shorts: dict[str, list[float]] = {way: [] for way in pipes}
    longs: dict[str, list[float]] = {way: [] for way in pipes}
    firsts: dict[str, list[float]] = {way: [] for way in pipes}
    peaks: dict[str, float] = {}
    # One request at a time needs no batch to tell its pace, and `batch` times the patience.
    own = {way: prompts[:1] if way == "authors" else prompts for way in pipes}
    for way, pipe in pipes.items():
        ask(pipe, own[way], 2)
    for _ in range(options.rounds):
        for way, pipe in pipes.items():
            # What the system reclaimed of a process while it waited for its turn comes back here.
            ask(pipe, own[way], 2)
            short_s, first_s, _ = ask(pipe, own[way], options.short)
            long_s, _, peaks[way] = ask(pipe, own[way], options.long)
            shorts[way].append(short_s)
            longs[way].append(long_s)
            firsts[way].append(first_s * 1e3)
    return [
        Measured(
            way=way,
            batch=batch,
            ms_per_step=(min(longs[way]) - min(shorts[way]))
            / (options.long - options.short)
            * 1e3
            * (batch / len(own[way])),
            first_token_ms=min(firsts[way]),
            peak_mib=peaks[way],
        )
        for way in pipes
    ]


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit,
        "cpu": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(results: list[Measured]) -> str:
    """Markdown: one line a batch and way, ratios against `aligned`."""
    lines = [
        "| batch | way | ms a step | tokens/s | step ÷ aligned | first token, ms | peak MiB |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    base = {r.batch: r.ms_per_step for r in results if r.way == "aligned"}
    for r in results:
        first = "–" if r.first_token_ms != r.first_token_ms else f"{r.first_token_ms:.0f}"
        lines.append(
            f"| {r.batch} | {r.way} | {r.ms_per_step:.1f} | {r.batch / r.ms_per_step * 1e3:.1f} "
            f"| {r.ms_per_step / base[r.batch]:.2f} | {first} | {r.peak_mib:.0f} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--prompt", type=int, default=32, help="tokens in each prompt")
    parser.add_argument("--short", type=int, default=8, help="tokens of the short generation")
    parser.add_argument("--long", type=int, default=72, help="tokens of the long generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    facts = environment()
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    print("predicted:", "; ".join(f"{name} {bound}" for name, bound in PREDICTED.items()))
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory:
        proposal, aligner, counts = save_pair(
            options.pair, Path(directory), getattr(torch, options.dtype), options.device
        )
        print(f"parameters: proposal {counts[0] / 1e6:.1f} M, aligner {counts[1] / 1e6:.1f} M", flush=True)
        job = Job(proposal, aligner, options.device, options.dtype, max(options.batches))
        pipes = {}
        with ExitStack() as stack:
            for way in options.ways:
                pipes[way] = stack.enter_context(worker(way, job))
            for batch in options.batches:
                results += measure(pipes, batch, options)
                print(f"batch {batch} done", flush=True)
    print(table(results))
    if options.json:
        document = {"environment": facts, "options": vars(options) | {"json": str(options.json)}}
        document["results"] = [asdict(result) for result in results]
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

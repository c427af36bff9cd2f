"""Tokens a second over HTTP against the engine's own, and against another server.

`ram serve` and the client `ram bench` share the machine; the engine alone runs the same prompts in a process
of its own. All requests of a round are sent at once, and a round is over when the last answer is. Another
server, such as vLLM with the proposal alone, is loaded by the same client with the same prompts, and is
compared with our aligned answers.

    python -m benchmarks.http
    python -m benchmarks.http --base-url http://127.0.0.1:8001 --base-pid PID
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Benchmark, Options, Pair, checkpoints, random_prompts, say
from benchmarks.engine_way import EngineWay, Job
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.workers import stopped, tree_peak_mib, worker

RAM = Path(sys.executable).with_name("ram")
START_S = 300
OVER_HTTP = "tokens/s, aligned: over HTTP ÷ the engine alone"
AGAINST = "tokens/s: ours, aligned ÷ the other server's, its model alone"


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected, and what must be reached."""
    return [Claim(OVER_HTTP, 0.93, at_least=0.85), Claim(AGAINST, 1.1, at_least=0.95)]


def add_options(options: Options) -> None:
    options.add("--streams", 64, "answers at once, over HTTP and in the engine alone", quick=4)
    options.add("--base-streams", 32, "answers at once, ours and another server's", quick=2)
    options.add("--prompt", 32, "tokens in each prompt", quick=8)
    options.add("--answer", 64, "tokens of each answer", quick=8)
    options.add("--rounds", 2, "turns of every way", quick=1)
    options.add_argument("--base-url", "--vllm-url", help="another server, already running")
    options.add_argument("--base-model", help="its model; default: the first that it lists")
    options.add_argument("--base-pid", type=int, help="its process, whose children's memory counts too")


@dataclass(frozen=True, slots=True)
class Server:
    """Where answers come from."""

    way: str
    url: str
    model: str | None
    pid: int | None


@dataclass(frozen=True, slots=True)
class Answers:
    """One round: tokens a second, and what a client saw."""

    tokens_per_s: float
    first_token_s: float | None = None
    gap_s: float | None = None
    client_share: float | None = None


def run(options: argparse.Namespace) -> Outcome:
    with checkpoints(options) as pair, ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        room = pair.kv_bytes(options.streams, options.prompt + options.answer, options.dtype)
        job = Job(pair.proposal, pair.aligners, options.device, options.dtype, options.streams, room)
        alone = stack.enter_context(worker(EngineWay, job))
        say("http: starting ram serve")
        ours = stack.enter_context(serve(pair, options, room, scratch))
        others = []
        if options.base_url:
            others = [Server("another server", options.base_url, options.base_model, options.base_pid)]
        servers = [ours, *others]
        found: dict[tuple[str, int], list[Answers]] = {}
        # The first round warms up.
        for turn in range(options.rounds + 1):
            say(f"http: round {turn} of {options.rounds}")
            prompts = random_prompts(options, options.streams, options.prompt, seed=turn)
            with stopped(_pids(servers)):
                took_s = alone.ask("generate", prompts, options.answer)
            counted = [("engine alone", options.streams, Answers(len(prompts) * options.answer / took_s))]
            asked = [(ours, prompts)]
            if others:
                few = random_prompts(options, options.base_streams, options.prompt, seed=-1 - turn)
                asked += [(at, few) for at in servers]
            for at, each in asked:
                # A server that waits may keep its threads awake: the machine is for the one that is asked.
                with stopped(_pids(other for other in servers if other is not at)):
                    counted.append((at.way, len(each), load(at, each, options, scratch)))
            for way, streams, answers in counted if turn else []:
                found.setdefault((way, streams), []).append(answers)
        peaks = {at.way: tree_peak_mib(at.pid) if at.pid else None for at in servers}
        peaks["engine alone"] = alone.peak_mib
    return _outcome(options, found, peaks)


def _pids(servers: Iterable[Server]) -> list[int]:
    return [server.pid for server in servers if server.pid is not None]


@contextmanager
def serve(
    pair: Pair, options: argparse.Namespace, kv_bytes: int, scratch: Path, **settings: object
) -> Iterator[Server]:
    """`ram serve`, ready; `settings` are flags of its own beside those that all have.

    Raises:
        RuntimeError: it did not become ready; the message is what it said last.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings |= {
        "aligner": f"aligned={pair.aligners[0]}",
        "port": port,
        "device": options.device,
        "dtype": options.dtype,
        "max-batch": options.streams,
        "kv-memory": kv_bytes,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    url = f"http://127.0.0.1:{port}"
    with (scratch / "serve.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen([RAM, "serve", pair.proposal, *flags], stdout=log, stderr=log)
        try:
            if not _becomes_ready(process, f"{url}/health/ready"):
                log.seek(0)
                raise RuntimeError(f"ram serve did not become ready:\n{log.read()[-2000:]}")
            yield Server("over HTTP", url, "aligned", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    return False


def load(at: Server, prompts: list[list[int]], options: argparse.Namespace, scratch: Path) -> Answers:
    """Send all prompts at once, as words of the pair's vocabulary.

    Raises:
        RuntimeError: an answer failed.
    """
    data, result = scratch / "prompts.jsonl", scratch / "answers.json"
    lines = [json.dumps({"prompt": " ".join(f"w{token}" for token in prompt)}) for prompt in prompts]
    data.write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "url": at.url,
        "concurrency": len(prompts),
        "requests": len(prompts),
        "warmup": 0,
        "data": data,
        "output-tokens": options.answer,
        "json": result,
    }
    settings |= {"model": at.model} if at.model else {}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run([RAM, "bench", *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ram bench failed at {at.way}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(result.read_text(encoding="utf-8"))
    seen = found["summary"]
    if seen["num_ok"] != len(prompts) or seen["mean_output_tokens"] != options.answer:
        raise RuntimeError(f"{at.way} did not answer everything: {seen['failures']}")
    return Answers(
        seen["output_tokens_per_s"], seen["ttft_s"]["p50"], seen["itl_s"]["p50"], found["client_cpu_share"]
    )


def _outcome(
    options: argparse.Namespace,
    found: dict[tuple[str, int], list[Answers]],
    peaks: dict[str, float | None],
) -> Outcome:
    best = {case: max(rounds, key=lambda answers: answers.tokens_per_s) for case, rounds in found.items()}
    rows: list[list[Cell]] = []
    for (way, streams), seen in best.items():
        times = [s * 1e3 if s is not None else None for s in (seen.first_token_s, seen.gap_s)]
        rows.append([streams, way, seen.tokens_per_s, *times, seen.client_share, peaks[way]])
    columns = ["streams", "way", "tokens/s", "first token p50, ms", "gap p50, ms"]
    title = f"Prompts of {options.prompt} tokens, answers of {options.answer}, {options.dtype}"
    table = Table(title, [*columns, "client, share of a core", "peak MiB"], rows)
    at_ours = best["over HTTP", options.streams].tokens_per_s
    figures = {OVER_HTTP: at_ours / best["engine alone", options.streams].tokens_per_s}
    if options.base_url:
        ours = best["over HTTP", options.base_streams].tokens_per_s
        figures[AGAINST] = ours / best["another server", options.base_streams].tokens_per_s
    notes = ["peak MiB: resident, of all processes of a server"] if options.device != "cpu" else []
    return Outcome([table], figures, notes)


BENCHMARK = Benchmark("http", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

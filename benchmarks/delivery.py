"""What the server's own process takes of a CPU for each streamed token, from the engine's news to the socket.

The engine is a process that draws nothing, and says one token to every stream each 10 ms. Counted is the CPU
time of the process with the API, all its threads and system calls; the slope between short and long answers
leaves out what a request costs whatever its length.

    python -m benchmarks.delivery
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from unittest import mock

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Benchmark, Options, say
from benchmarks.shapes import CHAT_TEMPLATE
from benchmarks.tables import Cell, Claim, Outcome, Table
from benchmarks.talker import STEP_S, VOCAB_SIZE
from benchmarks.workers import Worker, worker
from ram_core.engine import process
from ram_core.engine.config import EngineConfig
from ram_core.engine.supervisor import SupervisedEngine
from server.aligners.checking import Checker
from server.aligners.start import Inventory
from server.app import create_app
from server.connections import guarded
from server.serving import Loaded
from server.settings import Settings

_START_S = 60.0
_BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w100"}]}),
    "completions": ("/v1/completions", {"prompt": [100]}),
}


def claims(options: argparse.Namespace) -> list[Claim]:
    """What was expected."""
    return [Claim(_cost(way), 40.0) for way in _BODIES]


def _cost(way: str) -> str:
    return f"{way}: µs of CPU a token"


def add_options(options: Options) -> None:
    options.add("--streams", 32, "answers at once", quick=4)
    options.add("--answers", [32, 256], "tokens of short and of long answers", quick=[4, 16])
    options.add("--rounds", 3, "turns of every kind of answer", quick=1)


class Api:
    """The server in this process, and its talking engine in another."""

    def __init__(self) -> None:
        boot = process._BOOT.replace("ram_core.engine.worker", "benchmarks.talker")
        with mock.patch.object(process, "_BOOT", boot):
            engine = SupervisedEngine.start(EngineConfig("", max_batch=64))
        tokenizer = _tokenizer()
        loaded = Loaded(engine, tokenizer, Checker(tokenizer, VOCAB_SIZE), Inventory((), ()))
        app = create_app(Settings(served_model_name="talker"), loaded)
        # As `ram serve` has it.
        http = guarded(_START_S)
        config = uvicorn.Config(app, port=0, log_level="warning", access_log=False, http=http, ws="none")
        server = uvicorn.Server(config)
        threading.Thread(target=server.run, daemon=True).start()
        deadline = time.monotonic() + _START_S
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self._port = server.servers[0].sockets[0].getsockname()[1]

    def port(self) -> int:
        return self._port

    def cpu_s(self) -> float:
        """CPU seconds of this process up to now, in user and system mode."""
        return time.process_time()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words, spelt as byte-level BPE spells its tokens: what most models' tokenizers are."""
    words = ["<eos>", *(f"w{index}" for index in range(1, VOCAB_SIZE))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def run(options: argparse.Namespace) -> Outcome:
    found: dict[str, list[float]] = {way: [] for way in _BODIES}
    short, long = options.answers
    num_tokens = options.streams * (long - short)
    with worker(Api) as api:
        port = api.ask("port")
        for turn in range(options.rounds + 1):
            say(f"delivery: round {turn} of {options.rounds}")
            for way in _BODIES:
                took_s = [_cpu_s(api, port, way, options.streams, length) for length in options.answers]
                # The first round warms up.
                if turn:
                    found[way].append((took_s[1] - took_s[0]) / num_tokens * 1e6)
    rows: list[list[Cell]] = [[way, min(took), statistics.median(took)] for way, took in found.items()]
    title = f"{options.streams} streams, a step each {STEP_S * 1e3:.0f} ms"
    table = Table(title, ["answers", "µs a token (best)", "µs (median)"], rows)
    return Outcome([table], {_cost(way): min(took) for way, took in found.items()})


def _cpu_s(api: Worker, port: int, way: str, num_streams: int, num_tokens: int) -> float:
    """CPU seconds of the server for so many answers at once, from the first request to the last byte.

    Raises:
        RuntimeError: an answer is not what it should be.
    """
    path, fields = _BODIES[way]
    body = json.dumps(fields | {"model": "talker", "stream": True, "max_tokens": num_tokens}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    began_s = api.ask("cpu_s")
    for answer in _ask_all(port, [request] * num_streams):
        if answer.count(b"w100") != num_tokens or not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            raise RuntimeError(f"an answer is not what it should be: {answer[:300]!r} … {answer[-300:]!r}")
    return api.ask("cpu_s") - began_s


def _ask_all(port: int, requests: Sequence[bytes]) -> list[bytes]:
    """Send all at once, each on a connection of its own, and read until the server hangs up."""
    answers = [bytearray() for _ in requests]
    with selectors.DefaultSelector() as selector:
        for request, answer in zip(requests, answers, strict=True):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, (connection, answer))
        while selector.get_map():
            for key, _ in selector.select():
                connection, answer = key.data
                if data := connection.recv(2**16):
                    answer += data
                else:
                    selector.unregister(connection)
                    connection.close()
    return [bytes(answer) for answer in answers]


BENCHMARK = Benchmark("delivery", __doc__, claims, add_options, run)

if __name__ == "__main__":
    BENCHMARK.main(sys.argv[1:])

"""An engine that does what a test tells it, and a live server around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from ram_core.aligners.manifest import default_manifest
from ram_core.engine.client import EngineClient
from ram_core.engine.messages import (
    AlignerNews,
    EngineBegan,
    EngineStats,
    Event,
    FailedEvent,
    FinishReason,
    LoadAligner,
    Request,
    StartedEvent,
    StepTelemetry,
    TokenEvent,
)
from ram_core.errors import EngineUnavailable, RamError
from server.aligners.checking import Checker
from server.aligners.known import KnownVersion, Origin, key_of
from server.aligners.start import Inventory
from server.app import create_app
from server.connections import guarded
from server.serving import Loaded
from server.settings import Settings
from tests.models import EOS, make_tokenizer

TOKENIZER = make_tokenizer()
EOS_ID: int = TOKENIZER.convert_tokens_to_ids(EOS)
PATIENCE_S = 10.0
"""How long a test waits for what must happen; it never waits that long unless it fails."""


class Gate:
    """A place in a script at which the engine stops until the test opens it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def wait_reached(self) -> None:
        assert self._reached.wait(PATIENCE_S), "the engine never came to the gate"

    def open(self) -> None:
        self._opened.set()

    async def pass_through(self) -> None:
        self._reached.set()
        while not self._opened.is_set():
            await asyncio.sleep(0.001)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


Item = Event | Gate
Script = Callable[[Request], Sequence[Item]]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def say(
    request: Request,
    text: str,
    *,
    index: int = 0,
    finish: FinishReason | None = "stop",
    telemetry: StepTelemetry | None = None,
    log_prob: float = -0.5,
) -> list[TokenEvent]:
    """The events of a text; "stop" adds an end-of-text token, "length" ends with the text's last one."""
    ids = ids_of(text) + ([EOS_ID] if finish == "stop" else [])
    top = tuple((token_id, -1.0 - rank) for rank, token_id in enumerate(range(65, 90)))
    return [
        TokenEvent(
            request_id=request.request_id,
            index=index,
            token_id=token_id,
            log_prob=log_prob,
            top_log_probs=top[: request.sampling.num_top_log_probs],
            telemetry=telemetry,
            finish_reason=finish if position == len(ids) - 1 else None,
        )
        for position, token_id in enumerate(ids)
    ]


def greet(request: Request) -> list[Item]:
    """Every choice says the same."""
    events: list[Item] = [StartedEvent(request.request_id, 0.25)]
    for index in range(request.num_choices):
        events += say(request, "Hello, dog!", index=index)
    return events


class ScriptedStream:
    def __init__(self, engine: ScriptedEngine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._cancelled: set[int] = set()
        self._open = set(range(request.num_choices))
        self._events = aiter(self)

    async def __aenter__(self) -> ScriptedStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cancel()
        self._engine.left.put(self._request.request_id)

    async def __aiter__(self) -> AsyncIterator[Event]:
        for item in self._engine.script(self._request):
            if isinstance(item, Gate):
                await item.pass_through()
                continue
            if self._engine.trouble is not None:
                yield FailedEvent(self._request.request_id, 0, EngineUnavailable("The engine was closed."))
                return
            await asyncio.sleep(0)
            if isinstance(item, StartedEvent):
                yield item
            elif item.index in self._open:
                if isinstance(item, FailedEvent) or item.finish_reason:
                    self._open.discard(item.index)
                yield item
            if not self._open:
                return

    async def take(self) -> list[Event]:
        event = await anext(self._events, None)
        return [] if event is None else [event]

    def cancel(self, index: int | None = None) -> None:
        for choice in sorted(self._open) if index is None else [index]:
            if choice in self._open:
                self._open.discard(choice)
                self._engine.cancelled.put((self._request.request_id, choice))


class ScriptedEngine:
    """An `EngineClient` whose every event the test has written."""

    def __init__(self, script: Script = greet) -> None:
        self.aligners = ("polite@1", "org/terse@1")
        self.max_model_len = 256
        self.vocab_size = len(TOKENIZER)
        self.reset(script)

    def reset(self, script: Script = greet) -> None:
        """Forget what was said and done."""
        self.script = script
        self.stats = EngineStats(num_pages=10, last_progress_s=math.inf)
        self.num_restarts = 0
        self.trouble: str | None = None
        self.refusal: RamError | None = None
        self.requests: list[Request] = []
        self.cancelled: queue.Queue[tuple[str, int]] = queue.Queue()
        self.left: queue.Queue[str] = queue.Queue()

    def watch_aligners(self, listener: Callable[[AlignerNews], None]) -> None:
        there = tuple((name, 1) for name in self.aligners)
        listener(EngineBegan(there, (), memory_bytes=len(there), bytes_per_weight=4, device="cpu"))

    def load_aligner(self, order: LoadAligner) -> None:
        raise AssertionError("all that there is, is in memory")

    def free_aligner(self, aligner: str) -> None:
        raise AssertionError("all that there is, stays in memory")

    def submit(self, request: Request) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        return ScriptedStream(self, request)

    def prefill(self, request: Request) -> None:
        raise AssertionError("nobody waits for what is in memory")

    def forget(self, request_id: str) -> None:
        raise AssertionError("nobody waits for what is in memory")

    async def close(self) -> None:
        self.trouble = "the engine was closed"

    @property
    def last(self) -> Request:
        return self.requests[-1]


class LiveServer:
    """A server on a port of its own, and the engine behind it."""

    def __init__(self, url: str, app: Any, engine: Any, admin_url: str = "") -> None:
        self.url = url
        self.admin_url = admin_url or url
        self.app = app
        self.engine = engine


def loaded_of(engine: EngineClient, tokenizer: Any = TOKENIZER, inventory: Inventory | None = None) -> Loaded:
    """An engine that began with aligners called NAME@VERSION; without an inventory, there are no others."""
    if inventory is None:
        keys = [key_of(model) for model in engine.aligners]
        known = (KnownVersion(key, Path("/nowhere"), default_manifest(*key), Origin.SETTINGS) for key in keys)
        inventory = Inventory(tuple(known), tuple(key.name for key in keys))
    return Loaded(engine, tokenizer, Checker(tokenizer, len(tokenizer)), inventory)


@contextlib.contextmanager
def live(
    engine: Any, tokenizer: Any = TOKENIZER, inventory: Inventory | None = None, **settings: Any
) -> Iterator[LiveServer]:
    """Serve an engine until the block is left; an `admin_port` must be 0."""
    loaded = None if engine is None else loaded_of(engine, tokenizer, inventory)
    chosen = Settings(served_model_name="big", **settings)
    app = create_app(chosen, loaded)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + ("admin_port" in settings))]
    urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]
    if "admin_port" in settings:
        app.state.serving.doors.admin_port = sockets[1].getsockname()[1]
    http = guarded(chosen.receive_timeout_s)
    patience_s = chosen.keep_alive_s
    config = uvicorn.Config(app, log_level="warning", ws="none", http=http, timeout_keep_alive=patience_s)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.002)
    assert server.started, "the server did not start"
    try:
        yield LiveServer(urls[0], app, engine, urls[-1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not stop"


def count_metrics(text: str) -> Counter[str]:
    """Samples of a Prometheus text by their full name, labels included."""
    samples: Counter[str] = Counter()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)  # type: ignore[assignment]
    return samples


def chat(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "big", "messages": [{"role": "user", "content": text}], **fields}


def events_of(text: str) -> list[str]:
    """What a whole stream says, without the `data: `; comments are left out."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), text
    return [block.removeprefix("data: ") for block in blocks]


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a whole stream that ends as it should."""
    *chunks, last = events_of(text)
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]

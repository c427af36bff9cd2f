"""A server of raw bytes in the load client's own event loop, which notes when it wrote what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any


class Exchange:
    """One request at the server: its body, and ways to answer it."""

    def __init__(self, head: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.came_s = time.perf_counter()
        self.wrote_s: list[float] = []
        self._writer = writer

    async def answer(self, status: str, kind: str, raw: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
        await self.write(head.encode() + raw)

    async def begin(self) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        await self.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())

    async def event(self, data: object) -> None:
        raw = data if isinstance(data, bytes) else b"data: " + json.dumps(data).encode() + b"\n\n"
        await self.write(b"%x\r\n%b\r\n" % (len(raw), raw))

    async def say(self, text: str, **fields: Any) -> None:
        """A chunk with content, and note when it left."""
        self.wrote_s.append(time.perf_counter())
        await self.event(chunk({"content": text}, **fields))

    async def end(self, *, usage: dict[str, Any] | None = None, has_done: bool = True) -> None:
        await self.event(chunk({}, finish_reason="length"))
        if usage is not None:
            await self.event({"choices": [], "usage": usage})
        if has_done:
            await self.event(b"data: [DONE]\n\n")
        await self.write(b"0\r\n\r\n")

    async def write(self, raw: bytes) -> None:
        self._writer.write(raw)
        await self._writer.drain()

    def cut(self) -> None:
        self._writer.transport.abort()


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}


Script = Callable[[Exchange], Awaitable[None]]


class RawServer:
    """Counts what comes in, and plays a script to each request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.exchanges: list[Exchange] = []
        self.num_connections = 0
        self.num_running = 0
        self.max_running = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await self._serve(reader, writer)
        finally:
            writer.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [line for line in head.lower().splitlines() if line.startswith("content-length:")]
                raw = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b"{}"
                exchange = Exchange(head, json.loads(raw), writer)
                self.exchanges.append(exchange)
                self.num_running += 1
                self.max_running = max(self.max_running, self.num_running)
                try:
                    await self.script(exchange)
                finally:
                    self.num_running -= 1


@contextlib.asynccontextmanager
async def raw_server(script: Script) -> AsyncIterator[RawServer]:
    raw = RawServer(script)
    server = await asyncio.start_server(raw.take, "127.0.0.1", 0)
    raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
        await raw.close()
        await server.wait_closed()

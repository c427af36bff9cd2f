"""Many clients at once, each of which tells what it saw."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.faults.operated import PATIENCE_S, Operated
from tests.http.standin import chat

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Seen:
    """One answer: its status, its headers, the events of a stream, and the text of all of them."""

    status: int
    headers: httpx.Headers
    events: tuple[str, ...]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    @property
    def text(self) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    @property
    def ending(self) -> str:
        """How a stream ended: its finish reason, its error's code, or that it was cut."""
        if not self.events or self.events[-1] != "[DONE]":
            return "cut"
        last = self.chunks[-1]
        return str(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])


async def read_stream(
    http: httpx.AsyncClient, body: dict[str, Any], on_first: Callable[[], None] = lambda: None
) -> Seen:
    """Send a request and read its stream to the end; `on_first` is called when text comes."""
    async with http.stream("POST", CHAT, json=body) as answer:
        events: list[str] = []
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == 1:
                    on_first()
        return Seen(answer.status_code, answer.headers, tuple(events))


def client_of(server: Operated) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits, headers=server.headers)


async def crowd(
    server: Operated, num_streams: int, strike: Callable[[], None] = lambda: None, **fields: Any
) -> list[Seen]:
    """Streams of which every second one is aligned; strike when all of them have brought text."""
    begun = asyncio.Semaphore(0)
    async with client_of(server) as http:
        reading = [
            asyncio.create_task(
                read_stream(
                    http,
                    chat(
                        **({"model": ("polite", "big")[number % 2], "stream": True} | fields),
                        seed=number,
                    ),
                    begun.release,
                )
            )
            for number in range(num_streams)
        ]
        for _ in reading:
            await begun.acquire()
        await asyncio.to_thread(strike)
        return await asyncio.gather(*reading)

"""One streamed request after the other over kept-alive connections, with the arrival time of every chunk.

aiohttp, because its streams cost a third of the CPU of httpx's (27 µs a chunk instead of 88): the client
often shares its cores with the server.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from ram_core.errors import RamError
from server.bench.load import PlannedRequest
from server.bench.record import Failure, Record
from server.bench.sse import EventParser

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn closes an idle connection: never send into one that is closing."""
MAX_MESSAGE_CHARS = 300


@dataclass(frozen=True)
class Target:
    """Where requests go, and how."""

    url: str
    api_key: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 600.0
    needs_done: bool = True

    def __post_init__(self) -> None:
        scheme, _, rest = self.url.partition("://")
        if scheme not in {"http", "https"} or not rest.strip("/"):
            raise RamError(f"A URL begins with http:// or https://; got `{self.url}`.")
        if not 0 < self.timeout_s < math.inf:
            raise RamError(f"`timeout` is above 0; got {self.timeout_s:g}.")

    @property
    def base_url(self) -> str:
        """The URL itself if it has a path, else its `/v1`."""
        url = self.url.rstrip("/")
        return url if "/" in url.partition("://")[2] else f"{url}/v1"

    def open_session(self, max_connections: int) -> aiohttp.ClientSession:
        """A pool of connections; 0 is no limit."""
        headers = {
            "Accept": "text/event-stream, application/json",
            # Compression would gather chunks.
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}),
            **self.headers,
        }
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_connections, keepalive_timeout=KEEP_ALIVE_S),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None

    def has_content(self) -> bool:
        return bool(
            self.content or self.reasoning_content or self.reasoning or self.refusal or self.tool_calls
        )


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class AnswerReader:
    """Gathers what a stream tells, event by event."""

    def __init__(self) -> None:
        self.chunk_times_s: list[float] = []
        self.done_s: float | None = None
        self.usage = _Usage()
        self.finish_reason: str | None = None
        self.failure: Failure | None = None

    def take(self, event: bytes, now_s: float) -> None:
        """Note an event that was complete at `now_s`; the first failure stays."""
        if event == b"[DONE]":
            self.done_s = self.done_s or now_s
            return
        try:
            chunk = _decode_chunk(event)
        except msgspec.MsgspecError as error:
            self._fail(Failure("bad event", message=str(error)))
            return
        if chunk.error:
            self._fail(_failure_of("error event", chunk.error))
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
        if any(choice.delta.has_content() for choice in chunk.choices):
            self.chunk_times_s.append(now_s)

    def end(self, *, needs_done: bool) -> None:
        """Judge a stream that the server has ended."""
        if self.done_s is None and needs_done:
            self._fail(Failure("missing [DONE]"))
        elif not self.chunk_times_s:
            self._fail(Failure("empty answer"))

    def break_off(self, failure: Failure) -> None:
        """The stream ended otherwise; after its last event that does no harm."""
        if self.done_s is None:
            self._fail(failure)
        self.end(needs_done=False)

    def _fail(self, failure: Failure) -> None:
        self.failure = self.failure or failure


class Client:
    """Sends requests and keeps their times, counted from `origin_s` on `time.perf_counter`."""

    def __init__(self, target: Target, session: aiohttp.ClientSession, origin_s: float) -> None:
        self._url = f"{target.base_url}/chat/completions"
        self._needs_done = target.needs_done
        self._session = session
        self._origin_s = origin_s

    def now_s(self) -> float:
        return time.perf_counter() - self._origin_s

    async def send(self, request: PlannedRequest, planned_s: float | None = None) -> Record:
        """Send, read to the end, and tell; never raises for what the server or the network does."""
        reader = AnswerReader()
        is_answered = False
        sent_s = self.now_s()
        try:
            async with self._session.post(self._url, data=request.body) as response:
                is_answered = True
                await self._read(response, reader)
        except TimeoutError:
            reader.break_off(Failure("timeout", message="The whole request took too long."))
        except (aiohttp.ClientError, OSError) as error:
            kind = "broken stream" if is_answered else "connection"
            reader.break_off(Failure(kind, type(error).__name__, str(error)[:MAX_MESSAGE_CHARS]))
        ended_s = reader.done_s if reader.done_s is not None else self.now_s()
        details = reader.usage.prompt_tokens_details
        return Record(
            index=request.index,
            model=request.model,
            num_asked_tokens=request.num_asked_tokens,
            planned_s=planned_s,
            sent_s=sent_s,
            ended_s=ended_s,
            chunk_times_s=tuple(reader.chunk_times_s),
            prompt_tokens=reader.usage.prompt_tokens,
            cached_tokens=details.cached_tokens if details else None,
            output_tokens=reader.usage.completion_tokens,
            finish_reason=reader.finish_reason,
            failure=reader.failure,
        )

    async def _read(self, response: aiohttp.ClientResponse, reader: AnswerReader) -> None:
        if response.status != 200:
            reader.break_off(_refusal(response.status, await response.read()))
            return
        if response.content_type != "text/event-stream":
            reader.break_off(Failure("no stream", message=f"The answer is {response.content_type}."))
            return
        parser = EventParser()
        async for raw in response.content.iter_any():
            now_s = self.now_s()
            for event in parser.feed(raw):
                reader.take(event, now_s)
        reader.end(needs_done=self._needs_done)


def _refusal(status: int, raw: bytes) -> Failure:
    try:
        error = msgspec.json.decode(raw)
        error = error.get("error", error) if isinstance(error, dict) else error
    except msgspec.MsgspecError:
        error = raw.decode(errors="replace")
    return _failure_of(f"HTTP {status}", error)


def _failure_of(kind: str, error: object) -> Failure:
    """A failure from an OpenAI error object, or whatever a server sends in its place."""
    if not isinstance(error, dict):
        return Failure(kind, message=str(error)[:MAX_MESSAGE_CHARS])
    code = error.get("code") or error.get("type") or ""
    return Failure(kind, str(code), str(error.get("message", error))[:MAX_MESSAGE_CHARS])


async def list_models(target: Target) -> list[str]:
    """The names that the server serves; raises `RamError` where it cannot tell."""
    try:
        async with target.open_session(1) as session, session.get(f"{target.base_url}/models") as response:
            raw = await response.read()
            if response.status != 200:
                failure = _refusal(response.status, raw)
                raise RamError(f"{target.base_url}/models: {failure.label}: {failure.message}")
            listing = msgspec.json.decode(raw)
            names = [str(model["id"]) for model in listing["data"]]
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise RamError(f"Cannot reach {target.base_url}: {error}") from None
    except (msgspec.MsgspecError, KeyError, TypeError):
        raise RamError(f"{target.base_url}/models lists no models; name one with --model.") from None
    if not names:
        raise RamError(f"{target.base_url} serves no model.")
    return names
